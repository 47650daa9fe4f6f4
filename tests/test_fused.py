"""The fused operator against its twin, the plain loop; and the products it is made of."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from manual_lstm import ManualLSTM
from manual_lstm.check.parity import forward_and_backward, twins
from manual_lstm.engine import fused, gemm, stack, steps
from manual_lstm.engine.context import may_fuse
from manual_lstm.loop import plain_direction
from manual_lstm.testing import Case, assert_same_layer, cases
from manual_lstm.testing.comparing import assert_close, run_case

# One direction: x, batch_sizes, h_0, c_0, weight_ih, weight_hh, bias, weight_hr, reverse.
Arguments = tuple[Any, ...]
DIFFERENTIABLE = (0, 2, 3, 4, 5, 6, 7)


@contextmanager
def patched(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes for a while: for hypothesis, whose cases share one monkeypatch."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def plainly() -> Any:
    """The plain loop, whatever the choice would be."""
    return patched(stack, may_fuse=lambda *_: False)


def arguments(
    sizes: list[int],
    packed: bool,
    I: int = 3,
    H: int = 4,
    P: int = 0,
    bias: bool = True,
    reverse: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Arguments:
    """Arguments of one direction, all of which require gradients."""
    torch.manual_seed(seed)
    B = max(sizes, default=2)

    def randn(*shape: int) -> Tensor:
        # Complex ones are small: sigmoid and tanh have poles on the imaginary axis.
        return torch.randn(*shape, dtype=dtype).mul(0.1 if dtype.is_complex else 0.5).requires_grad_()

    return (
        randn(sum(sizes), I) if packed else randn(len(sizes), B, I),
        torch.tensor(sizes, dtype=torch.int64) if packed else None,
        randn(B, P or H),
        randn(B, H),
        randn(4 * H, I),
        randn(4 * H, P or H),
        randn(4 * H) if bias else None,
        randn(P, H) if P else None,
        reverse,
    )


@st.composite
def drawn_arguments(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> Arguments:
    packed = draw(st.booleans())
    if packed:
        sizes = sorted(draw(st.lists(st.integers(1, 6), min_size=1, max_size=9)), reverse=True)
    else:
        sizes = [draw(st.integers(0, 5))] * draw(st.integers(0, 9))
    H = draw(st.integers(1, 20))
    return arguments(
        sizes,
        packed,
        I=draw(st.integers(1, 20)),
        H=H,
        P=draw(st.integers(1, H - 1)) if H > 1 and draw(st.booleans()) else 0,
        bias=draw(st.booleans()),
        reverse=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**16)),
    )


def run_direction(function: Any, given_: Arguments, wanted: list[bool]) -> dict[str, Tensor]:
    """The results, and all gradients of those of the three results that are wanted."""
    outputs = function(*given_)
    names = ("output", "h_n", "c_n")
    found = {name: part.detach() for name, part in zip(names, outputs)}
    loss = sum((part * torch.linspace(0.5, 1.5, part.numel()).reshape(part.shape)).sum().abs()
               for part, want in zip(outputs, wanted) if want)  # fmt: skip
    inputs = [given_[k] for k in DIFFERENTIABLE if given_[k] is not None]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    for k, (tensor, gradient) in enumerate(zip(inputs, gradients)):
        found[f"gradient {k}"] = torch.zeros_like(tensor) if gradient is None else gradient
    return found


@given(
    given_=drawn_arguments(dtypes=(torch.float64, torch.complex128)),
    wanted=st.lists(st.booleans(), min_size=3, max_size=3).filter(any),
    rows=st.sampled_from([1, 3, 10, 512]),
)
def test_the_operator_equals_the_plain_loop(given_: Arguments, wanted: list[bool], rows: int) -> None:
    expected = run_direction(plain_direction, given_, wanted)
    with patched(steps, BLOCK_ROWS=rows):
        actual = run_direction(fused.fused_direction, given_, wanted)
        with torch.no_grad():
            unsaved = fused.fused_direction(*given_)
    assert_close(actual, expected, 1e-12)
    names = ("output", "h_n", "c_n")
    assert_close(dict(zip(names, unsaved)), {name: actual[name] for name in names}, 1e-12)
    assert all(part.is_contiguous() for part in unsaved)


CONFIGURATIONS: list[dict[str, Any]] = [
    {"sizes": [2, 2, 2], "packed": False},
    {"sizes": [2, 2, 2], "packed": False, "P": 2, "reverse": True},
    {"sizes": [3, 2, 2, 1], "packed": True, "bias": False},
    {"sizes": [3, 2, 2, 1], "packed": True, "P": 2, "reverse": True},
    {"sizes": [1, 1, 1], "packed": False, "reverse": True},
]


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("rows", [2, 512])
def test_gradcheck_and_gradgradcheck(
    configuration: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "BLOCK_ROWS", rows)
    given_ = arguments(**configuration, I=2, H=3)
    assert torch.autograd.gradcheck(fused.fused_direction, given_, fast_mode=True)
    assert torch.autograd.gradgradcheck(fused.fused_direction, given_, fast_mode=True)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(configuration: dict[str, Any], save: bool) -> None:
    given_ = arguments(**configuration)
    if not save:
        given_ = tuple(a.detach() if isinstance(a, Tensor) else a for a in given_)
    torch.library.opcheck(fused.direction, (*given_, save))
    if save:
        *tensors, reverse = (a.detach() if isinstance(a, Tensor) else a for a in given_)
        output, h_n, c_n, *kept = fused.direction(*tensors, reverse, True)
        needs = [True, True, True, True, True, tensors[6] is not None, tensors[7] is not None]
        given_ = (output, h_n, c_n, *tensors, reverse, *kept, needs)
        torch.library.opcheck(fused.direction_backward, given_)
        torch.library.opcheck(fused.direction_backward, (*given_, True))


def test_more_data_than_steps_is_an_error() -> None:
    given_ = list(arguments([2, 1], packed=True))
    given_[0] = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"3 rows.*got 5"):
        fused.fused_direction(*given_)


@pytest.mark.parametrize("sizes", [[1, 1, 0, 0], [1, 0], [3, 2, 0, 0], [0, 0]], ids=str)
@pytest.mark.parametrize("H", [3, 4])
@pytest.mark.parametrize("reverse", [False, True])
def test_steps_of_no_sequence_at_the_end(sizes: list[int], H: int, reverse: bool) -> None:
    given_ = arguments(sizes, packed=True, H=H, reverse=reverse)
    expected = run_direction(plain_direction, given_, [True] * 3)
    assert_close(run_direction(fused.fused_direction, given_, [True] * 3), expected, 1e-12)


@pytest.mark.parametrize("sizes", [[], [2], [2, 2]], ids=str)
@pytest.mark.parametrize("result", range(3))
def test_second_order_where_a_result_depends_on_little(sizes: list[int], result: int) -> None:
    for wanted in DIFFERENTIABLE:
        given_: list[Any] = [
            t.detach() if isinstance(t, Tensor) else t for t in arguments(sizes, False, P=2)
        ]
        given_[wanted].requires_grad_()
        found = []
        for create_graph in (False, True):
            loss = fused.fused_direction(*given_)[result].sum()
            (gradient,) = torch.autograd.grad(
                loss, given_[wanted], create_graph=create_graph, allow_unused=True
            )
            found.append(torch.zeros_like(given_[wanted]) if gradient is None else gradient)
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_strides_are_those_that_a_compiled_caller_is_told(packed: bool) -> None:
    *tensors, reverse = (
        t.detach() if isinstance(t, Tensor) else t for t in arguments([3, 3, 3], packed, P=2)
    )
    given_ = [t.t().contiguous().t() if t is not None and t.dim() == 2 else t for t in tensors]
    for save in (False, True):
        results = fused.direction(*given_, reverse, save)
        assert all(part.is_contiguous() for part in results)
    output, h_n, c_n, *kept = results
    for grads in ((output, h_n.t().contiguous().t(), c_n.t().contiguous().t()), (output, None, None)):
        backward = fused.direction_backward(*grads, *given_, reverse, *kept, [True] * 7)
        assert all(part.is_contiguous() for part in backward)


def test_nothing_is_kept_that_nobody_needs() -> None:
    layer = ManualLSTM(3, 4, 2, bidirectional=True)
    x = torch.randn(6, 2, 3)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    saves: list[bool] = []
    original = fused.direction

    def spy(*args: Any) -> Any:
        saves.append(args[-1])
        return original(*args)

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, patched(fused, direction=spy):
        with torch.no_grad():
            layer(x)
        assert not kept
        layer.requires_grad_(False)(x)
        assert not kept
        assert not any(saves)
        layer.requires_grad_(True)(x)
    assert kept
    assert saves == [False] * 8 + [True] * 4


@pytest.mark.parametrize("frozen", range(7))
def test_no_gradient_is_computed_that_nobody_needs(
    frozen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_ = arguments([3, 3, 2], packed=True, P=2)
    given_[DIFFERENTIABLE[frozen]].requires_grad_(False)
    seen: list[Any] = []
    original = fused.direction_backward

    def spy(*args: Any) -> Any:
        seen.append((args[-1], original(*args)))
        return seen[-1][1]

    monkeypatch.setattr(fused, "direction_backward", spy)
    fused.fused_direction(*given_)[0].sum().backward()  # type: ignore[no-untyped-call]
    ((needs, gradients),) = seen
    assert needs == [k != frozen for k in range(7)]
    if frozen not in (1, 2):  # the states' gradients are the loop's working memory
        assert gradients[frozen].numel() == 0
    for k in DIFFERENTIABLE:
        assert (given_[k].grad is None) == (k == DIFFERENTIABLE[frozen])


@pytest.mark.parametrize("reverse", [False, True])
def test_a_gradient_does_not_depend_on_which_others_are_wanted(reverse: bool) -> None:
    given_ = arguments([3, 3, 2], packed=True, P=2, reverse=reverse)
    expected = torch.autograd.grad(
        plain_direction(*given_)[0].square().sum(), [given_[k] for k in DIFFERENTIABLE]
    )
    for wanted in product((False, True), repeat=7):
        for k, want in zip(DIFFERENTIABLE, wanted):
            given_[k].requires_grad_(want)
        output = fused.fused_direction(*given_)[0]
        assert output.requires_grad == any(wanted)
        if any(wanted):
            inputs = [given_[k] for k in DIFFERENTIABLE if given_[k].requires_grad]
            actual = torch.autograd.grad(output.square().sum(), inputs)
            some = tuple(gradient for gradient, want in zip(expected, wanted) if want)
            torch.testing.assert_close(actual, some, rtol=0, atol=1e-12)


@pytest.mark.parametrize("create_graph", [False, True])
def test_one_tensor_for_both_states(create_graph: bool) -> None:
    given_ = list(arguments([2, 2, 2], packed=False))
    given_[3] = given_[2]
    gradients = [
        torch.autograd.grad(function(*given_)[0].square().sum(), given_[2], create_graph=create_graph)
        for function in (fused.fused_direction, plain_direction)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


def test_the_results_may_be_written_to_before_the_backward() -> None:
    for options in ({}, {"proj_size": 2}, {"bidirectional": True, "num_layers": 2}):
        reference, layer = twins(3, 4, dtype=torch.float64, **options)
        x = torch.randn(5, 2, 3, dtype=torch.float64)
        gradients = []
        for lstm, write in ((reference, False), (layer, True)):
            output, (h_n, c_n) = lstm(x)
            for part in (output, h_n, c_n):
                if write:
                    part.mul_(2)
            loss = (output.sum() + h_n.sum() + c_n.sum()) * (1 if write else 2)
            gradients.append(torch.autograd.grad(loss, list(lstm.parameters())))
        torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)


def test_backward_twice_and_after_the_weights_have_changed() -> None:
    layer = ManualLSTM(3, 4)
    loss = layer(torch.randn(5, 2, 3))[0].sum()
    first = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    with torch.no_grad():
        layer.all_weights[0][1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_batched_by_vmap(packed: bool) -> None:
    layer = ManualLSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    output, (h_n, _) = layer(pack_padded_sequence(x, [5, 3]) if packed else x)
    flat = torch.cat([(output.data if packed else output).flatten(), h_n.flatten()])
    rows = torch.eye(flat.numel(), dtype=torch.float64)
    batched = torch.autograd.grad(flat, x, rows, retain_graph=True, is_grads_batched=True)[0]
    for row, gradient in zip(rows, batched):
        expected = torch.autograd.grad(flat, x, row, retain_graph=True)[0]
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_a_sequence_of_20000_steps() -> None:
    layer = ManualLSTM(2, 3)
    x = torch.randn(20_000, 1, 2, requires_grad=True)
    output, _ = layer(x)
    output.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    reference = nn.LSTM(2, 3)
    reference.load_state_dict(layer.state_dict())
    torch.testing.assert_close(output, reference(x)[0], rtol=0, atol=1e-5)


def test_the_numbers_do_not_depend_on_the_threads() -> None:
    layer, x = ManualLSTM(40, 64), torch.randn(20, 16, 40)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(forward_and_backward(layer, x, None))
    finally:
        torch.set_num_threads(before)
    assert_close(found[0], found[1], 1e-5)


@pytest.mark.parametrize("inside", [False, True])
def test_backward_under_autocast(inside: bool) -> None:
    reference, layer = twins(3, 4, 2, bidirectional=True)
    x = torch.randn(5, 2, 3)
    gradients = []
    for lstm in (reference, layer):
        with torch.autocast("cpu", torch.bfloat16):
            inner = lstm(x)[0].float().sum()
        outer = lstm(x)[0].sum()
        with torch.autocast("cpu", torch.bfloat16):
            gradients.append(torch.autograd.grad(inner if inside else outer, list(lstm.parameters())))
    atol = 0.2 if inside else 1e-5
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=atol)


def test_second_order_under_autocast_is_as_exact_as_outside() -> None:
    layer, x = ManualLSTM(3, 4, 2, proj_size=2), torch.randn(5, 2, 3, requires_grad=True)
    loss = layer(x)[0].sum()
    expected = torch.autograd.grad(loss, x, create_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


# The choice of the loop.


@contextmanager
def counted() -> Iterator[list[int]]:
    """How often the stack ran the fused direction."""
    calls: list[int] = []
    original = fused.fused_direction

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    with patched(stack, fused_direction=spy):
        yield calls


def test_ordinary_calls_take_the_operator() -> None:
    layer = ManualLSTM(3, 4, 2, bidirectional=True)
    x = torch.randn(5, 2, 3)
    packed = pack_padded_sequence(x, [3, 5], enforce_sorted=False)
    for input in (x, x[:, 0], packed, x.transpose(0, 1).contiguous().transpose(0, 1)):
        for context in (nullcontext(), torch.no_grad(), torch.inference_mode()):
            with context, counted() as calls:
                layer(input)
            assert len(calls) == 4
    with counted() as calls:
        layer(x[:1])
    assert not calls  # one step has nothing to fuse


def _vmap(layer: ManualLSTM, x: Tensor) -> Any:
    return torch.vmap(lambda x: layer(x)[0])(x.expand(2, *x.shape))


def _grad(layer: ManualLSTM, x: Tensor) -> Any:
    return torch.func.grad(lambda x: layer(x)[0].sum())(x)


def _jvp(layer: ManualLSTM, x: Tensor) -> Any:
    return torch.func.jvp(lambda x: layer(x)[0], (x,), (x,))


def _forward_ad(layer: ManualLSTM, x: Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)  # type: ignore[no-untyped-call]
        return layer(dual)[0]


def _hessian(layer: ManualLSTM, x: Tensor) -> Any:
    return torch.func.hessian(lambda x: layer(x)[0].sum())(x)


def _trace(layer: ManualLSTM, x: Tensor) -> Any:
    return torch.jit.trace(layer, (x,), check_trace=False)(x)  # type: ignore[no-untyped-call]


def _export(layer: ManualLSTM, x: Tensor) -> Any:
    program = torch.export.export(layer, (x,))
    assert "manual_lstm" not in program.graph_module.code
    return program.module()(x)


class _Subclass(Tensor):
    pass


def _subclass(layer: ManualLSTM, x: Tensor) -> Any:
    return layer(x.as_subclass(_Subclass))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "context", [_vmap, _grad, _jvp, _forward_ad, _hessian, _trace, _export, _subclass]
)
def test_whatever_has_to_see_the_steps_takes_the_plain_loop(context: Any) -> None:
    layer = ManualLSTM(3, 4)
    x = torch.randn(3, 2, 3)
    with counted() as calls:
        context(layer, x)
    assert not calls


def test_a_missing_private_name_means_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    assert may_fuse([torch.zeros(1)])
    monkeypatch.setattr("manual_lstm.engine.context._functorch_active", None)
    assert not may_fuse([torch.zeros(1)])


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 2}])
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_it_is_one_node_for_a_direction(options: dict[str, Any], packed: bool) -> None:
    layer = ManualLSTM(3, 4, **options, dtype=torch.float64)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def function(x: Tensor, sizes: Tensor | None) -> Any:
        input = x if sizes is None else nn.utils.rnn.PackedSequence(x, sizes)
        output, (h_n, c_n) = layer(input)
        return (output if sizes is None else output.data), h_n, c_n

    torch.compiler.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    x, sizes = torch.randn(5, 2, 3, dtype=torch.float64), None
    if packed:
        x, sizes = torch.randn(6, 3, dtype=torch.float64), torch.tensor([3, 2, 1])
    torch.testing.assert_close(compiled(x, sizes), function(x, sizes), rtol=0, atol=1e-12)
    directions = sum("manual_lstm.direction" in target for target in seen)
    assert directions == len(layer.all_weights)
    assert not any("addmm" in target or "sigmoid" in target for target in seen)
    torch.compiler.reset()


def test_compiled_training_has_the_same_gradients_for_other_lengths() -> None:
    layer = ManualLSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for T, B in ((5, 2), (9, 3), (4, 6)):
        x = torch.randn(T, B, 3, dtype=torch.float64)
        found = []
        for lstm in (layer, compiled):
            output, (_, c_n) = lstm(x)
            loss = output.square().sum() + c_n.sum()
            found.append(torch.autograd.grad(loss, list(layer.parameters())))
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)
    torch.compiler.reset()


def test_flops_are_counted() -> None:
    layer, x = ManualLSTM(3, 4, proj_size=2), torch.randn(5, 2, 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    forward = 2 * 10 * (16 * 3 + 16 * 2 + 2 * 4)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        layer(x)[0].sum().backward()
    # x has no gradient; the recurrent and the projecting product have two in the backward.
    assert counter.get_total_flops() == 2 * forward + 2 * 10 * (16 * 2 + 2 * 4)


# The products.


@contextmanager
def onednn_everywhere() -> Iterator[None]:
    """oneDNN for all float32 on CPU, whatever the size."""

    def prefers(weight: Tensor, rows: int) -> bool:
        return weight.dtype == torch.float32 and weight.device.type == "cpu" and rows > 0

    with patched(gemm, _prefers_onednn=prefers):
        yield


has_onednn = pytest.mark.skipif(
    None in (gemm._linear, gemm._linear_add, gemm._pack), reason="no oneDNN operators in this torch"
)


@has_onednn
@given(case=cases(dtypes=(torch.float32,), devices=("cpu",)))
def test_onednn_is_as_exact_as_nn_lstm(case: Case) -> None:
    reference, layer = case.pair(ManualLSTM)
    with onednn_everywhere():
        assert_same_layer(layer, reference, case)


@has_onednn
def test_large_products_take_onednn_and_its_switch_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    linear = gemm._linear

    def spy(*args: Any) -> Tensor:
        calls.append("onednn")
        assert linear is not None
        return linear(*args)

    monkeypatch.setattr(gemm, "_linear", spy)
    layer, x = ManualLSTM(8, 512), torch.randn(3, 16, 8)
    with torch.no_grad():
        with_onednn = layer(x)
        assert len(calls) == 4  # the input of all steps, and three steps
        with torch.backends.mkldnn.flags(enabled=False):
            without = layer(x)
        copy.deepcopy(layer).double()(x.double())  # which oneDNN does not know
        assert len(calls) == 4
        monkeypatch.setattr(gemm, "_linear_add", None)  # a torch that has lost the operator
        fallback = layer(x)
    assert len(calls) == 4
    torch.testing.assert_close(with_onednn, without)
    assert torch.equal(without[0], fallback[0])


@has_onednn
def test_onednn_takes_weights_and_states_that_lie_transposed() -> None:
    given_ = arguments([3] * 10, packed=False, dtype=torch.float32)
    strided = [t.t().contiguous().t() if k in (2, 3, 4, 5) else t for k, t in enumerate(given_)]
    found = []
    for these in (given_, strided):
        with onednn_everywhere():
            found.append(run_direction(fused.fused_direction, tuple(these), [True] * 3))
    assert_close(found[1], found[0], 1e-6)


def test_operators_that_do_not_exist_are_not_found() -> None:
    assert gemm.find_onednn("_no_such_operator", "default") is None
    assert gemm.find_onednn("_linear_pointwise", "no_such_overload") is None


@given(case=cases(large=False, without={"dropout"}))
def test_the_layer_with_and_without_the_operator(case: Case) -> None:
    layer = case.layer(ManualLSTM)
    actual = run_case(layer, case)
    with plainly():
        expected = run_case(layer, case)
    assert_close(actual, expected, 1e-12)
