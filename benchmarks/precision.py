"""Errors of nn.LSTM and ManualLSTM in narrow dtypes against nn.LSTM in float64, and their times."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contenders import Contender, official_contender, our_contender
from benchmarks.table import Column, Table, format_ratio
from benchmarks.timing import Effort, interleave, median_ratio
from benchmarks.workload import MODES, Settings, Workload

CASES = (
    Case(28, 64, 28, 128),
    Case(100, 32, 256, 256),
    Case(50, 16, 512, 512),
    Case(200, 1, 80, 512),
)


def print_precision_table(
    cases: tuple[Case, ...], dtypes: tuple[torch.dtype, ...], effort: Effort, settings: Settings
) -> Iterator[dict[str, object]]:
    """Print the table; yields what was measured, row by row."""
    print(
        "error: norm of the difference from nn.LSTM in float64 with the same weights and input, divided"
    )
    print("by the norm of the latter; time: ManualLSTM's as a multiple of nn.LSTM's.\n")
    table = Table(
        [
            Column("", "T,B,I,H", 17),
            Column("", "dtype", 9),
            Column("output's", "nn.LSTM", 11),
            Column("error:", "ours", 9),
            Column("", "ratio", 7),
            Column("gradients'", "nn.LSTM", 12),
            Column("error:", "ours", 9),
            Column("", "ratio", 7),
            Column("time:", "infer.", 9),
            Column("", "train.", 8),
        ]
    )
    for case in cases:
        for dtype in dtypes:
            measured = _measure(case, replace(settings, dtype=dtype), effort)
            errors: list[str] = []
            for part in (0, 1):
                theirs, our = measured["nn.LSTM"][part], measured["ManualLSTM"][part]
                errors += [f"{theirs:.1e}", f"{our:.1e}", format_ratio(our / theirs) if theirs else "-"]
            name = str(dtype).removeprefix("torch.")
            table.row([case.shape, name, *errors, *map(format_ratio, measured["time"])])
            yield {"case": str(case), "dtype": name, **measured}


def _measure(case: Case, settings: Settings, effort: Effort) -> dict[str, list[float]]:
    w = Workload(case, settings)
    exact = Workload(case, replace(settings, dtype=torch.float64))
    with torch.no_grad():
        for p, narrow in zip(exact.lstm.parameters(), w.lstm.parameters()):
            p.copy_(narrow)
    assert isinstance(w.x, Tensor)
    exact.x = w.x.double()
    oracle = _answers(official_contender(exact))
    contenders = {"nn.LSTM": official_contender(w), "ManualLSTM": our_contender(w)}
    measured = {who: _errors(_answers(contender), oracle) for who, contender in contenders.items()}
    measured["time"] = []
    for mode in MODES:
        runners = {who: contender.runner(mode) for who, contender in contenders.items()}
        seconds = interleave(runners, effort, settings.threads, settings.device)
        measured["time"].append(median_ratio(seconds, "ManualLSTM", "nn.LSTM"))
    return measured


def _answers(contender: Contender) -> tuple[Tensor, Tensor]:
    """Return the output, and all gradients as one tensor."""
    output = contender.training().detach()
    gradients = [p.grad.flatten() for p in contender.parameters if p.grad is not None]
    return output, torch.cat(gradients)


def _errors(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, expected)]
