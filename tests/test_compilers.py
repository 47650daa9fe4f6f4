"""The report's rows on compilers, for many options, and what a layer has to do beyond them."""

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

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "bias=False": {"bias": False},
    "2 layers, bidirectional": {"num_layers": 2, "bidirectional": True},
    "proj_size": {"proj_size": 2, "bidirectional": True},
    "batch_first": {"batch_first": True},
    "all": {"num_layers": 2, "bidirectional": True, "proj_size": 2, "bias": False, "batch_first": True},
}
SLOW = ("defaults", "all")  # what a slow row is tried on


def _params() -> list[Any]:
    return [
        pytest.param(row, OPTIONS[name], packed, id=f"{row.label}-{name}{'-packed' * packed}")
        for row in compilers.ROWS
        for name in (SLOW if row.slow else OPTIONS)
        for packed in ((False, True) if row.packed else (False,))
    ]


@pytest.mark.parametrize(("row", "options", "packed"), _params())
def test_row(row: ReportRow, options: dict[str, Any], packed: bool) -> None:
    missing = row.missing()
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    try:
        row.check(Setting(ManualLSTM, options, packed))
    except MissingRequirement as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [*OPTIONS.values(), {"num_layers": 2, "dropout": 0.5}])
def test_compiled_without_a_compiler(options: dict[str, Any], packed: bool) -> None:
    compilers.check_compile(Setting(ManualLSTM, options, packed), "aot_eager")


class _Last(nn.Module):
    """Reads the last states, as a classifier does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        _, (h_n, c_n) = self.layer(x)
        return torch.stack([h_n[-1].sum(1), c_n.index_select(1, torch.tensor([2, 0, 1]))[0].sum(1)])


@pytest.mark.parametrize("options", [OPTIONS["defaults"], OPTIONS["2 layers, bidirectional"]])
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
