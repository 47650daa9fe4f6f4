"""Time and peak memory as one thing grows: steps, batch, hidden size, layers."""

import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks import memory
from benchmarks.cases import Case
from benchmarks.contenders import check_answer, official_contender, our_contender, run_once
from benchmarks.table import Column, Table, format_megabytes, format_number, format_ratio
from benchmarks.timing import Effort, interleave, median_ratio
from benchmarks.workload import Settings, Workload

BASE = Case(100, 16, 128, 128)
AXES = {
    "T": (100, 1_000, 5_000, 20_000),
    "H": (32, 64, 128, 256, 512, 1024),
    "B": (1, 4, 16, 64, 256),
    "layers": (1, 2, 4, 8),
}
NAMES = {"T": "steps, T", "H": "hidden size, H", "B": "batch, B", "layers": "layers"}


def case_at(base: Case, axis: str, value: int) -> Case:
    """Return the base case with one number changed. Over T the batch is small, to save memory."""
    if axis == "T":
        return replace(base, T=value, B=min(base.B, 4))
    changes: dict[str, Any] = {axis: value}
    return replace(base, **changes)


def print_scaling_table(
    base: Case,
    axes: dict[str, tuple[int, ...]],
    modes: tuple[str, ...],
    effort: Effort,
    with_memory: bool,
    settings: Settings,
) -> Iterator[dict[str, object]]:
    """Print a table for each axis and mode; yields what was measured, row by row."""
    print("Time of a call and its peak memory above the model and input, in total and for each step.")
    print("If time and memory for each step do not rise with T, the totals grow linearly in T.")
    for axis, values in axes.items():
        for mode in modes:
            fixed = case_at(base, axis, values[0])
            others = ", ".join(f"{k}={getattr(fixed, k)}" for k in ("T", "B", "I", "H") if k != axis)
            print(f"\n{NAMES[axis]}: {mode}; {others}")
            table = Table(_columns(axis, with_memory))
            for value in values:
                case = case_at(base, axis, value)
                measured = _measure(case, mode, effort, with_memory, settings)
                table.row([str(value), *_cells(measured, case.T)])
                yield {"axis": axis, "value": value, "mode": mode, **measured}


def _columns(axis: str, with_memory: bool) -> list[Column]:
    columns = [
        Column("", axis, 8),
        Column("nn.LSTM", "ms", 9),
        Column("Manual", "LSTM", 9),
        Column("", "ratio", 8),
        Column("us a step:", "nn", 12),
        Column("", "ours", 8),
    ]
    if with_memory:
        columns += [
            Column("peak MB:", "nn", 11),
            Column("", "ours", 8),
            Column("", "ratio", 8),
            Column("kB a step:", "nn", 12),
            Column("", "ours", 7),
        ]
    return columns


def _measure(
    case: Case, mode: str, effort: Effort, with_memory: bool, settings: Settings
) -> dict[str, object]:
    w = Workload(case, settings)
    contenders = {"nn.LSTM": official_contender(w), "ManualLSTM": our_contender(w)}
    check_answer(*(run_once(contenders[who], mode) for who in ("ManualLSTM", "nn.LSTM")))

    runners = {who: contender.runner(mode) for who, contender in contenders.items()}
    seconds = interleave(runners, effort, settings.threads, settings.device)
    peaks = memory.measure_peaks(case, mode, settings) if with_memory else {}
    return {
        "case": str(case),
        "seconds": seconds,
        "ratio": median_ratio(seconds, "ManualLSTM", "nn.LSTM"),
        "bytes": peaks,
    }


def _cells(measured: dict[str, object], steps: int) -> list[str]:
    seconds, peaks = measured["seconds"], measured["bytes"]
    assert isinstance(seconds, dict)
    assert isinstance(peaks, dict)
    middle = [statistics.median(values) for values in seconds.values()]
    cells = [format_number(value * 1e3) for value in middle]
    assert isinstance(measured["ratio"], float)
    cells.append(format_ratio(measured["ratio"]))
    cells += [format_number(value / steps * 1e6) for value in middle]
    if peaks:
        cells += [format_megabytes(peaks["nn.LSTM"]), format_megabytes(peaks["ManualLSTM"])]
        cells.append(format_ratio(memory.memory_ratio(peaks)))
        cells += [format_number(None if p is None else p / steps / 1e3) for p in peaks.values()]
    return cells
