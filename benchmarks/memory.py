"""Peak memory of one forward, or forward and backward, above the model and its input.

Each figure is measured in a fresh process, because memory that an earlier call left behind would hide
a peak. On CPU it is the growth of the resident set, on CUDA the growth in torch's allocator.
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
LEAST = 1e6  # bytes; a ratio to less is lost among memory pages
PEAK = "_peak"  # the command of the fresh process

# Case, mode, and the most that ManualLSTM may take as a multiple of nn.LSTM's.
ROWS: list[tuple[Case, str, float | None]] = [
    (Case(500, 64, 256, 256), TRAINING, 0.7),
    (Case(300, 64, 256, 256, layers=3), TRAINING, 0.7),
    (Case(500, 64, 256, 256, layers=2), INFERENCE, 1.0),
    (Case(500, 64, 256, 256), INFERENCE, None),
    (Case(500, 64, 256, 256, packed=True), TRAINING, None),
]


def measure_peak(case: Case, mode: str, who: str, settings: Settings) -> float | None:
    """Measure the peak in bytes in a fresh process; return ``None`` if it cannot be measured."""
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
    """Measure the peaks of nn.LSTM and of ManualLSTM."""
    return {who: measure_peak(case, mode, who, settings) for who in CONTENDERS}


def memory_ratio(peaks: dict[str, float | None]) -> float | None:
    """Return ManualLSTM's peak as a multiple of nn.LSTM's, or None if nn.LSTM's is below ``LEAST``."""
    theirs, our = peaks["nn.LSTM"], peaks["ManualLSTM"]
    return our / theirs if theirs is not None and our is not None and theirs >= LEAST else None


def memory_cells(peaks: dict[str, float | None]) -> list[str]:
    """Return three cells: nn.LSTM's peak, ManualLSTM's, and their ratio."""
    megabytes = [format_megabytes(peaks[name]) for name in ("nn.LSTM", "ManualLSTM")]
    return [*megabytes, format_ratio(memory_ratio(peaks))]


def measure_in_this_process(
    text: str, contenders: Mapping[str, Callable[[Workload], Contender]]
) -> None:
    """Measure one of the contenders, and print the bytes. The fresh process runs this.

    ``text`` is the JSON of what :func:`measure_peak` asks for.
    """
    spec: dict[str, Any] = json.loads(text)
    settings = Settings(spec["threads"], DTYPES[spec["dtype"]], torch.device(spec["device"]))
    torch.set_num_threads(settings.threads)
    case, mode = Case(**spec["case"]), spec["mode"]
    make = contenders[spec["who"]]
    tiny = replace(case, T=min(case.T, 2), B=min(case.B, 2), I=min(case.I, 4), H=min(case.H, 4))
    _run(make(Workload(tiny, settings)), mode)  # so that libraries are loaded and threads started
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
    if resident is not None and _reset_peak():
        _run(contender, mode)
        return (_status("VmHWM") or 0) - resident
    try:
        import resource
    except ImportError:
        return None
    # Where the peak cannot be reset, only growth beyond the peak so far can be measured.
    unit = 1 if sys.platform == "darwin" else 1024
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _run(contender, mode)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before) * unit


def _reset_peak() -> bool:
    """Set the recorded peak to the present resident set; return whether the system allows it."""
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
    print(
        "ratio: ManualLSTM's as a multiple of nn.LSTM's. input, output: their sizes, to compare with.\n"
    )
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
        peaks = measure_peaks(case, mode, settings)
        ratio = memory_ratio(peaks)
        verdict = ""
        if target is not None and ratio is not None:
            verdict = f"{target:.1f} {'met' if ratio <= target else 'MISSED'}"
        features = case.H * (2 if case.bidirectional else 1)
        bytes_of_feature = case.T * case.B * settings.dtype.itemsize
        sizes = [format_megabytes(bytes_of_feature * n) for n in (case.I, features)]
        table.row([str(case), mode, *sizes, *memory_cells(peaks), verdict])
        yield {"case": str(case), "mode": mode, "bytes": peaks, "ratio": ratio, "target": target}
