"""The plain loop, and the block in which every call goes through it."""

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from manual_lstm import ManualLSTM, lstm_forward, plain_loop
from manual_lstm.cell import lstm_cell
from manual_lstm.check.parity import data_of

OPTIONS: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
L_D = 4  # layers times directions of OPTIONS


@contextmanager
def cell_calls() -> Iterator[list[int]]:
    """What a debugger would see: a one for each time this thread enters ``lstm_cell``."""
    calls: list[int] = []

    def look(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code is lstm_cell.__code__:
            calls.append(1)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def _layer() -> ManualLSTM:
    torch.manual_seed(0)
    return ManualLSTM(3, 4, dtype=torch.float64, **OPTIONS)


def _inputs() -> dict[str, Any]:
    torch.manual_seed(1)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    return {
        "dense": x,
        "one step": x[:1],
        "unbatched": x[:, 0],
        "packed": pack_padded_sequence(x, [3, 5], enforce_sorted=False),
        "nested": torch.nested.nested_tensor([x[:5, 0], x[:2, 1]], layout=torch.jagged),
    }


def _values_and_gradients(layer: ManualLSTM, input: Any) -> list[Tensor]:
    output, states = layer(input)
    data = output.values() if isinstance(output, Tensor) and output.is_nested else data_of(output)
    results = [data, *states]
    loss = sum(((part * (k + 1)).sin().sum() for k, part in enumerate(results)), torch.zeros(()))
    return [*results, *torch.autograd.grad(loss, list(layer.parameters()))]


@pytest.mark.parametrize("form", _inputs())
def test_each_step_passes_through_the_cell(form: str) -> None:
    layer, input = _layer(), _inputs()[form]
    expected = _values_and_gradients(layer, input)
    T = 1 if form == "one step" else 5
    with plain_loop(), cell_calls() as calls:
        actual = _values_and_gradients(layer, input)
    assert len(calls) == T * L_D
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    with torch.no_grad(), plain_loop(), cell_calls() as calls:
        layer(input)
    assert len(calls) == T * L_D


def test_outside_only_one_step_does() -> None:
    layer = _layer()
    for form, input in _inputs().items():
        with cell_calls() as calls:
            layer(input)
        assert len(calls) == (L_D if form == "one step" else 0), form


def test_the_notebooks_function_does_too() -> None:
    weights = [*nn.LSTM(3, 4).parameters()]
    arguments: Any = torch.randn(2, 5, 3), (torch.zeros(2, 4), torch.zeros(2, 4)), *weights
    with plain_loop(), cell_calls() as calls:
        lstm_forward(*arguments)
    assert len(calls) == 5


def steps_seen() -> int:
    """How many of five steps a debugger sees."""
    with cell_calls() as calls:
        ManualLSTM(3, 4)(torch.randn(5, 2, 3))
    return len(calls)


def test_it_nests_and_ends_with_an_exception() -> None:
    with plain_loop():
        with plain_loop():
            assert steps_seen() == 5
        assert steps_seen() == 5
    assert steps_seen() == 0
    with pytest.raises(ZeroDivisionError), plain_loop():
        _ = 1 // 0
    assert steps_seen() == 0
    with plain_loop():
        with pytest.raises(ZeroDivisionError), plain_loop():
            _ = 1 // 0
        assert steps_seen() == 5


def test_blocks_of_one_thread_may_overlap() -> None:
    first, second = plain_loop(), plain_loop()  # as of two asyncio tasks
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert steps_seen() == 5
    second.__exit__(None, None, None)
    assert steps_seen() == 0


@pytest.mark.parametrize("packed", [False, True])
def test_no_steps_are_the_same_inside(packed: bool) -> None:
    layer = _layer()
    input: Any = torch.randn(0, 2, 3, dtype=torch.float64)
    if packed:
        input = PackedSequence(input.view(0, 3), torch.zeros(0, dtype=torch.int64))
    hx = [torch.randn(L_D, 0 if packed else 2, n).double().requires_grad_() for n in (2, 4)]
    results = []
    for inside in (False, True):
        with plain_loop() if inside else nullcontext():
            output, (h_n, c_n) = layer(input, tuple(hx))
        loss = data_of(output).sum() + h_n.sin().sum() + c_n.sum()
        gradients = torch.autograd.grad(loss, [*hx, *layer.parameters()])
        assert data_of(output).requires_grad
        results.append([data_of(output), h_n, c_n, *gradients])
    for outside, within in zip(*results):
        torch.testing.assert_close(within, outside, rtol=0, atol=0, check_stride=True)


def test_it_holds_for_its_thread_only() -> None:
    seen: dict[str, int] = {}

    def call(name: str) -> None:
        seen[name] = steps_seen()

    def call_inside(name: str) -> None:
        with plain_loop():
            call(name)

    def in_a_thread(target: Callable[[str], None], name: str) -> None:
        thread = threading.Thread(target=target, args=(name,))
        thread.start()
        thread.join()

    with plain_loop():
        in_a_thread(call, "another thread")
        call("this thread")
    in_a_thread(call_inside, "another thread, inside")
    call("afterwards")
    assert seen == {
        "another thread": 0,
        "this thread": 5,
        "another thread, inside": 5,
        "afterwards": 0,
    }


def test_under_torch_func() -> None:
    layer, xs = _layer(), torch.randn(3, 5, 2, 3, dtype=torch.float64)
    weights: dict[str, Tensor] = dict(layer.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = functional_call(layer, weights, (x,))[0]
        return output.sin().sum()

    compute = vmap(grad(loss), (None, 0))
    expected = compute(weights, xs)
    with plain_loop(), cell_calls() as calls:
        actual = compute(weights, xs)
    assert len(calls) == 5 * L_D
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_a_checkpoint_whose_backward_runs_inside() -> None:
    layer = _layer()
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)

    def gradient(run: Callable[[Tensor], Any]) -> Tensor:
        (found,) = torch.autograd.grad(run(x)[0].sin().sum(), x)
        return found

    expected = gradient(layer)
    with plain_loop(), cell_calls() as calls:
        actual = gradient(lambda x: checkpoint(layer, x, use_reentrant=False))
    assert len(calls) == 2 * 5 * L_D  # forwards, and once more in the backward
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


class _Backend:
    """Compiles nothing, and keeps the graphs."""

    def __init__(self) -> None:
        self.graphs: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph.print_readable(print_output=False))
        return graph.forward


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    gc.collect()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_code_is_chosen_by_where_it_is_called() -> None:
    layer, backend, x = _layer(), _Backend(), torch.randn(5, 2, 3, dtype=torch.float64)
    compiled: Any = torch.compile(layer, fullgraph=True, backend=backend)
    expected = layer(x)
    for inside in (False, True, False, True, False):
        if inside:
            with plain_loop():
                actual = compiled(x)
        else:
            actual = compiled(x)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    one_operator, step_by_step = backend.graphs  # compiled once each, whatever the order of the calls
    assert "manual_lstm.direction" in one_operator
    assert "manual_lstm.direction" not in step_by_step
    assert step_by_step.count("= torch.addmm(") == 5 * L_D


@pytest.mark.usefixtures("_fresh_compiler")
def test_the_block_inside_a_compiled_function() -> None:
    layer, backend, x = _layer(), _Backend(), torch.randn(5, 2, 3, dtype=torch.float64)

    def three(x: Tensor) -> list[Tensor]:
        before = layer(x)[0]
        with plain_loop():
            within = layer(x)[0]
        return [before, within, layer(x)[0]]

    compiled: Any = torch.compile(three, fullgraph=True, backend=backend)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), 3 * [layer(x)[0]], rtol=0, atol=1e-12)
    (graph,) = backend.graphs
    assert graph.count("= torch.ops.manual_lstm.direction") == 2 * L_D
    assert graph.count("= torch.addmm(") == 5 * L_D
    with cell_calls() as calls:
        layer(x)
    assert not calls  # the compiled function has ended its block


def test_traces_and_exports_record_the_steps() -> None:
    layer, x = ManualLSTM(3, 4), torch.randn(5, 2, 3)
    with plain_loop():
        trace: Any = torch.jit.trace(layer, x)  # type: ignore[no-untyped-call]
        program = torch.export.export(layer, (x,))
    assert str(trace.inlined_graph).count("aten::addmm") == 5
    assert "aten::lstm" not in str(trace.inlined_graph)
    assert program.graph_module.code.count("ops.aten.addmm.default(") == 5
    torch.testing.assert_close(trace(x), layer(x))
    torch.testing.assert_close(program.module()(x), layer(x))
