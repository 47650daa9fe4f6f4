"""The report's rows on compilers, for many options, and what a layer has to do beyond them."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import FlopCounterMode

from manual_lstm import ManualLSTM
from manual_lstm.report import compilers
from manual_lstm.report.row import MissingRequirement, ReportRow, Setting
from tests.helpers.rows import row_grid, run_row
from tests.helpers.versions import compiles_packing

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "bias=False": {"bias": False},
    "2 layers, bidirectional": {"num_layers": 2, "bidirectional": True},
    "proj_size": {"proj_size": 2, "bidirectional": True},
    "batch_first": {"batch_first": True},
    "all": {"num_layers": 2, "bidirectional": True, "proj_size": 2, "bias": False, "batch_first": True},
}


# Inductor's sample in the quick run is a test of its own, below. A package takes half a minute.
SLOW_ROWS = {
    "torch.compile(fullgraph=True), forward and training",
    "AOTInductor package with dynamic T and B",
}


@pytest.mark.parametrize(("row", "options", "packed"), row_grid(compilers.ROWS, OPTIONS, SLOW_ROWS))
def test_a_row_on_compilers(row: ReportRow, options: dict[str, Any], packed: bool) -> None:
    run_row(row, Setting(ManualLSTM, options, packed))


WITH_DROPOUT = {**OPTIONS, "dropout": {"num_layers": 2, "dropout": 0.5}}


@pytest.mark.parametrize(
    ("name", "packed"),
    list(product(WITH_DROPOUT, [False, True])),
)
@pytest.mark.slow
def test_compiled_without_a_compiler(name: str, packed: bool) -> None:
    compilers.check_compile(Setting(ManualLSTM, WITH_DROPOUT[name], packed), "aot_eager")


class _Last(nn.Module):
    """Reads the last states, as a classifier does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        _, (h_n, c_n) = self.layer(x)
        return torch.stack([h_n[-1].sum(1), c_n.index_select(1, torch.tensor([2, 0, 1]))[0].sum(1)])


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS["defaults"],
        pytest.param(OPTIONS["2 layers, bidirectional"], marks=pytest.mark.slow),
    ],
)
def test_compiled_model_has_no_zeros_in_common_with_its_backward(options: dict[str, Any]) -> None:
    """Its backward makes zeros of the initial states' shape, takes those for them and writes there."""
    try:
        compilers.require_compiler()
    except MissingRequirement as error:
        pytest.skip(str(error))
    setting = Setting(ManualLSTM, options)
    layer, x = setting.layer(), setting.dense()
    models = _Last(layer), _Last(setting.official(layer))
    with compilers.fresh_compiler():
        values = torch.compile(models[0], fullgraph=True)(x), models[1](x)
        actual, expected = (
            torch.autograd.grad(value.sin().sum(), list(model.parameters()))
            for value, model in zip(values, models)
        )
        compilers.assert_close(actual, expected)


def test_compiled_unbatched() -> None:
    setting = Setting(ManualLSTM, {"num_layers": 2, "bidirectional": True})
    layer = setting.layer()
    x, (h_0, c_0) = setting.dense()[:, 0], setting.hx()
    hx = h_0[:, 0], c_0[:, 0]
    with compilers.fresh_compiler():
        program = torch.compile(layer, fullgraph=True, backend="aot_eager")
        expected = compilers.results_and_gradients(setting.official(layer), x, hx)
        compilers.assert_close(compilers.results_and_gradients(program, x, hx), expected)


@pytest.mark.parametrize("B", [2, 4])
def test_compiled_packed_input_refuses_states_of_another_batch(B: int) -> None:
    setting = Setting(ManualLSTM, packed=True)
    input = setting.input(6, 3)
    assert isinstance(input, PackedSequence)
    input = PackedSequence(input.data, input.batch_sizes)  # without indices, which would choose rows
    with compilers.fresh_compiler():
        program = torch.compile(setting.layer(), fullgraph=True, backend="aot_eager")
        program(input, setting.hx(3))
        with pytest.raises(RuntimeError, match=rf"\b3\b.*\b{B}\b"):
            program(input, setting.hx(B))


def test_fake_tensors_take_the_operator() -> None:
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        ManualLSTM(4, 5)(torch.randn(6, 3, 4))
    assert str(next(iter(counter.get_flop_counts()["Global"]))) == "manual_lstm.direction"


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 2}])
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=compiles_packing)])
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
