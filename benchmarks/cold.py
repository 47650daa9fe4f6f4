"""The first calls of a process: the import, and what the first forward and backward take."""

import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.table import Column, Table
from benchmarks.workload import Settings

NAMES = ("nn.LSTM", "ManualLSTM")
# Of the process's processor time: the import, the first forward, and after it the first training step.
PROGRAM = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[2]))
start = time.process_time()
if sys.argv[1] == "ManualLSTM":
    from manual_lstm import ManualLSTM as LSTM
else:
    from torch.nn import LSTM
imported = time.process_time()
layer, x = LSTM(64, 128, num_layers=2), torch.randn(20, 4, 64)
made = time.process_time()
with torch.no_grad():
    layer(x)
forward = time.process_time()
layer(x)[0].sum().backward()
print(imported - start, forward - made, time.process_time() - forward, "torch._dynamo" in sys.modules)
"""


def print_cold_table(rounds: int, settings: Settings) -> Iterator[dict[str, object]]:
    """Print the table; yields what was measured, row by row."""
    print(f"Processor time in a fresh process, ms: the median of {rounds}. torch is imported before.\n")
    table = Table(
        [
            Column("", "", 14),
            Column("", "import", 10),
            Column("first", "forward", 12),
            Column("first", "training step", 16),
            Column("torch._dynamo", "loaded", 16),
        ]
    )
    seconds: dict[str, list[list[float]]] = {name: [] for name in NAMES}
    loaded = dict.fromkeys(NAMES, False)
    for _ in range(rounds):
        for name in NAMES:
            *times, dynamo = _run(name, settings.threads)
            seconds[name].append([float(value) for value in times])
            loaded[name] = loaded[name] or dynamo == "True"
    for name in NAMES:
        middle = [statistics.median(values) for values in zip(*seconds[name])]
        table.row([name, *(f"{value * 1e3:.1f}" for value in middle), "yes" if loaded[name] else "no"])
        yield {"who": name, "seconds": seconds[name], "loads_dynamo": loaded[name]}


def _run(name: str, threads: int) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, name, str(threads)]
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()
