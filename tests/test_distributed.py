"""The report's rows on training on two processes; and which loop runs there."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.flop_counter import FlopCounterMode

from manual_lstm import ManualLSTM
from manual_lstm.report import distributed
from manual_lstm.report.row import MissingRequirement, ReportRow, Setting
from tests.helpers.rows import run_row

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all": {"num_layers": 2, "bidirectional": True, "proj_size": 2, "bias": False, "batch_first": True},
}


def _params() -> list[Any]:
    """Each row with both options; the quick run has one of DistributedDataParallel and one of FSDP2."""
    quick = (distributed.ROWS[0], True), (distributed.ROWS[-1], False)
    return [
        pytest.param(
            row,
            OPTIONS[name],
            packed,
            id=f"{row.label}-{name}{'-packed' * packed}",
            marks=[] if (row, packed) in quick else [pytest.mark.slow],
        )
        for row in distributed.ROWS
        for name, packed in (("defaults", True), ("all", False))
    ]


@pytest.mark.parametrize(("row", "options", "packed"), _params())
def test_a_row_on_two_processes(row: ReportRow, options: dict[str, Any], packed: bool) -> None:
    run_row(row, Setting(ManualLSTM, options, packed))


def _operators(setting: Setting, rank: int, folder: Path) -> dict[str, int]:
    """The operators that the counter knows, and how many flops they took, of a sharded layer."""
    model = distributed.shard_model(setting, layer_too=True)
    assert isinstance(model.layer, FSDPModule)
    assert isinstance(model.layer, ManualLSTM)
    with FlopCounterMode(display=False) as counter:
        model(distributed.draw_batch(setting, 0, distributed.sequences_of(rank))).backward()
    return {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}


@pytest.mark.slow
def test_a_sharded_layer_takes_the_operator(tmp_path: Path) -> None:
    setting = Setting(ManualLSTM)
    try:
        found = distributed.run_on_two_processes(partial(_operators, setting), tmp_path)
    except MissingRequirement as error:
        pytest.skip(str(error))
    assert {"manual_lstm.direction", "manual_lstm.direction_backward"} <= found.keys()
    T, B, H = 5, 2, setting.H
    assert found["manual_lstm.direction"] == 2 * T * B * 4 * H * (setting.I + H)


def _whole(gradient: Any) -> Any:
    return gradient.full_tensor()


def _train_on_gates(setting: Setting, rank: int, folder: Path) -> list[Any]:
    """Losses of gates alone, of the fields and of the steps, on a sharded layer; and its gradients."""
    layer = distributed.shard_model(setting, layer_too=True).layer
    assert isinstance(layer, ManualLSTM)
    x = distributed.draw_batch(setting, 0, slice(None))
    found: list[Any] = []
    for of_steps in (False, True):
        layer.zero_grad()
        unrolled = layer.unroll(x)
        gates = [step.f for step in unrolled.steps[0]] if of_steps else unrolled.f
        loss = torch.stack([gate.square().sum() for gate in gates]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = {name: _whole(p.grad) for name, p in layer.named_parameters()}
        found.append((float(loss), gradients, unrolled.output.detach()))
    return found


@pytest.mark.slow
def test_unroll_of_a_sharded_layer_trains_on_gates_alone(tmp_path: Path) -> None:
    setting = Setting(ManualLSTM)
    try:
        found = distributed.run_on_two_processes(partial(_train_on_gates, setting), tmp_path)
    except MissingRequirement as error:
        pytest.skip(str(error))
    layer = setting.layer()
    x = distributed.draw_batch(setting, 0, slice(None))
    assert isinstance(layer, ManualLSTM)
    for of_steps, (loss, gradients, output) in zip((False, True), found):
        unrolled = layer.unroll(x)
        gates = [step.f for step in unrolled.steps[0]] if of_steps else unrolled.f
        expected = torch.stack([gate.square().sum() for gate in gates]).sum()
        layer.zero_grad()
        expected.backward()  # type: ignore[no-untyped-call]
        assert loss == pytest.approx(expected.item())
        torch.testing.assert_close(gradients, {n: p.grad for n, p in layer.named_parameters()})
        torch.testing.assert_close(output, unrolled.output)


def test_a_failure_on_a_process_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^ValueError: by design$"):
        distributed.run_on_two_processes(_fail, tmp_path)


def _fail(rank: int, folder: Path) -> None:
    raise ValueError("by design")
