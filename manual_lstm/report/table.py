"""Run the rows on nn.LSTM and on ManualLSTM, and print what came of it."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
from torch import nn

from manual_lstm.module import ManualLSTM
from manual_lstm.report import (
    compilers,
    derivatives,
    distributed,
    nested,
    opacus,
    tools,
    training,
    transforms,
    weights,
)
from manual_lstm.report.row import Missing, Row, Setting

ROWS: list[Row] = [
    *transforms.ROWS,
    *opacus.ROWS,
    *derivatives.ROWS,
    *compilers.ROWS,
    *training.ROWS,
    *weights.ROWS,
    *distributed.ROWS,
    *tools.ROWS,
    *nested.ROWS,
]
OPTIONS = {"num_layers": 2, "bidirectional": True}
YES = "✓"


def show(device: str = "cpu") -> bool:
    """Print the table, row by row; return whether ManualLSTM did all that could be tried."""
    width = max(len(row.label) for row in ROWS)
    print(f"torch {torch.__version__}, {sys.platform}, {device}, each layer with {OPTIONS}\n")
    print(f"| {'':{width}} | ManualLSTM | nn.LSTM |")
    print(f"|{'-' * (width + 2)}|---|---|")
    good = True
    for row in ROWS:
        ours, theirs = result(row, ManualLSTM, device), result(row, nn.LSTM, device)
        good = good and (ours == YES or ours.startswith("needs"))
        print(f"| {row.label:{width}} | {_cell(ours)} | {_cell(theirs)} |", flush=True)
    return good


def result(row: Row, make: Callable[..., nn.Module], device: str) -> str:
    """A tick, what is missing, or the first line of what was raised."""
    if row.missing():
        return f"needs {', '.join(row.missing())}, not installed"
    for packed in (False, True) if row.packed else (False,):
        try:
            with quiet(), torch.random.fork_rng():
                row.run(Setting(make, OPTIONS, packed=packed, device=device))
        except Missing as missing:
            return f"needs {missing}"
        except Exception as error:
            lines = str(error).strip().splitlines()
            return f"{'packed: ' if packed else ''}{type(error).__name__}: {lines[0] if lines else ''}"
    return YES


def _cell(text: str, most: int = 90) -> str:
    """Fit a text into a table of Markdown and into what the terminal can show."""
    text = text if len(text) <= most else text[: most - 3] + "..."
    encoding = sys.stdout.encoding or "utf-8"
    text = text.replace("|", "\\|").replace(YES, YES if _encodes(YES, encoding) else "yes")
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _encodes(text: str, encoding: str) -> bool:
    return text.encode(encoding, "ignore") != b""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep to ourselves what a check prints, warns and logs, in Python or below."""
    disabled = logging.root.manager.disable
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        logging.disable(logging.CRITICAL)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
