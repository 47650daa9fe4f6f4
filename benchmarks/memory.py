"""Peak memory of one forward, or forward and backward, above the model and its input.

Every figure is of a fresh process, since what an earlier call has left behind would hide a peak.
On CPU it is the growth of the resident set, on CUDA that of torch's allocator.
"""

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.contenders import Contender, official_contender, our_contender
from benchmarks.table import Column, Table, format_megabytes, format_ratio
from benchmarks.workload import DTYPES, INFERENCE, TRAINING, Settings, Workload

CONTENDERS = {"nn.LSTM": official_contender, "ManualLSTM": our_contender}
LEAST = 1e6  # bytes of which a ratio means something
PEAK = "_peak"  # the command that runs in the fresh process

# Case, mode, and the most that ManualLSTM may take as a multiple of nn.LSTM's.
ROWS: list[tuple[Case, str, float | None]] = [
    (Case(500, 64, 256, 256), TRAINING, 0.7),
    (Case(300, 64, 256, 256, layers=3), TRAINING, 0.7),
    (Case(500, 64, 256, 256, layers=2), INFERENCE, 1.0),
    (Case(500, 64, 256, 256), INFERENCE, None),
    (Case(500, 64, 256, 256, packed=True), TRAINING, None),
]


def measure_peak(case: Case, mode: str, who: str, settings: Settings) -> float | None:
    """The peak in bytes, measured in a fresh process; ``None`` where it cannot be known."""
    spec = {
        "case": asdict(case),
        "mode": mode,
        "who": who,
        "threads": settings.threads,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "device": str(settings.device),
    }
    command = [sys.executable, "-m", "benchmarks", PEAK, json.dumps(spec)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        print(f"  peak memory of {who} at {case}: {reason[0]}", file=sys.stderr)
        return None
    value: float | None = json.loads(done.stdout)
    return value


def measure_peaks(case: Case, mode: str, settings: Settings) -> dict[str, float | None]:
    """The peak of nn.LSTM and of ManualLSTM."""
    return {who: measure_peak(case, mode, who, settings) for who in CONTENDERS}


def memory_ratio(found: dict[str, float | None]) -> float | None:
    """ManualLSTM's peak as a multiple of nn.LSTM's; none where that is lost among memory pages."""
    theirs, our = found["nn.LSTM"], found["ManualLSTM"]
    return our / theirs if theirs is not None and our is not None and theirs >= LEAST else None


def memory_cells(found: dict[str, float | None]) -> list[str]:
    """Three cells: nn.LSTM's peak, ours, the quotient."""
    return [
        format_megabytes(found["nn.LSTM"]),
        format_megabytes(found["ManualLSTM"]),
        format_ratio(memory_ratio(found)),
    ]


def measure_here(text: str, known: Mapping[str, Callable[[Workload], Contender]]) -> None:
    """In the fresh process: measure one of those known, and print the bytes."""
    spec: dict[str, Any] = json.loads(text)
    settings = Settings(spec["threads"], DTYPES[spec["dtype"]], torch.device(spec["device"]))
    torch.set_num_threads(settings.threads)
    case, mode = Case(**spec["case"]), spec["mode"]
    make = known[spec["who"]]
    tiny = replace(case, T=min(case.T, 2), B=min(case.B, 2), I=min(case.I, 4), H=min(case.H, 4))
    _run(make(Workload(tiny, settings)), mode)  # loads libraries, starts threads
    contender = make(Workload(case, settings))
    gc.collect()
    print(json.dumps(_growth(contender, mode, settings.device)))


def _run(contender: Contender, mode: str) -> None:
    with contender.during(mode):
        contender.step(mode)()


def _growth(contender: Contender, mode: str, device: torch.device) -> float | None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _run(contender, mode)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    resident = _status("VmRSS")
    if resident is not None and _reset():
        _run(contender, mode)
        return (_status("VmHWM") or 0) - resident
    try:
        import resource
    except ImportError:
        return None
    # Without a resident set to start from, only growth beyond the peak so far can be seen.
    unit = 1 if sys.platform == "darwin" else 1024
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _run(contender, mode)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before) * unit


def _reset() -> bool:
    """Make the peak of the resident set what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def print_memory_table(
    rows: list[tuple[Case, str, float | None]], settings: Settings
) -> Iterator[dict[str, object]]:
    """Print the table of the memory command; yields what was measured, row by row."""
    print("Peak memory above the model and its input, in MB (10^6 bytes), each in a fresh process.")
    print("ratio: ManualLSTM's as a multiple of nn.LSTM's; input and output are there to compare.\n")
    table = Table(
        [
            Column("", "T,B,I,H", 35),
            Column("", "mode", 10),
            Column("", "input", 8),
            Column("", "output", 8),
            Column("", "nn.LSTM", 9),
            Column("Manual", "LSTM", 8),
            Column("", "ratio", 8),
            Column("", "target", 13),
        ]
    )
    for case, mode, target in rows:
        found = measure_peaks(case, mode, settings)
        steps, ratio = case.T * case.B * settings.dtype.itemsize, memory_ratio(found)
        verdict = ""
        if target is not None and ratio is not None:
            verdict = f"{target:.1f} {'met' if ratio <= target else 'MISSED'}"
        features = case.H * (2 if case.bidirectional else 1)
        sizes = [format_megabytes(steps * case.I), format_megabytes(steps * features)]
        table.row([str(case), mode, *sizes, *memory_cells(found), verdict])
        yield {"case": str(case), "mode": mode, "bytes": found, "ratio": ratio, "target": target}
