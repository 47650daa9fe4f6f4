"""Try each row on nn.LSTM and on ManualLSTM, and print the outcomes as tables."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import NamedTuple

import torch
from torch import nn

from manual_lstm.check.command import Progress
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
from manual_lstm.report.row import MissingRequirement, ReportRow, Setting

ROWS: list[ReportRow] = [
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
# The headings of the tables, in the order in which they are printed. Empty tables are left out.
MANUAL_FAILS = "What fails for ManualLSTM"
OFFICIAL_REFUSES = "What nn.LSTM refuses"
BOTH_DO = "What both do"
UNTRIED = "What could not be tried here"
HEADINGS = (MANUAL_FAILS, OFFICIAL_REFUSES, BOTH_DO, UNTRIED)


class RowOutcome(NamedTuple):
    """What :func:`outcome_of` returned for a row, for each of the two layers."""

    label: str
    manual: str
    official: str

    @property
    def heading(self) -> str:
        """The heading of the table that the row belongs to."""
        if self.manual.startswith("needs "):
            return UNTRIED
        if not self.manual.startswith(YES):
            return MANUAL_FAILS
        return BOTH_DO if self.official.startswith(YES) else OFFICIAL_REFUSES


def print_report(device: str = "cpu", labels: Collection[str] | None = None) -> bool:
    """Try rows and print the tables; return whether ManualLSTM did all that could be tried.

    The tables are printed at the end. Progress goes to stderr.

    Args:
        device: where the layers are.
        labels: the rows to try; ``None`` for all.
    """
    print(f"torch {torch.__version__}, {sys.platform}, {device}, each layer with {OPTIONS}", flush=True)
    rows = [row for row in ROWS if labels is None or row.label in labels]
    outcomes, progress = [], Progress()
    for number, row in enumerate(rows, start=1):
        progress(number, len(rows), row.label)
        manual, official = (outcome_of(row, make, device) for make in (ManualLSTM, nn.LSTM))
        outcomes.append(RowOutcome(row.label, manual, official))
    progress.end()
    for heading in HEADINGS:
        _print_table(heading, [outcome for outcome in outcomes if outcome.heading == heading])
    return all(outcome.heading != MANUAL_FAILS for outcome in outcomes)


def _print_table(heading: str, outcomes: list[RowOutcome]) -> None:
    """Print a table in Markdown, or nothing if there are no outcomes."""
    if not outcomes:
        return
    width = max(len(outcome.label) for outcome in outcomes)
    print(f"\n## {heading}\n")
    print(f"| {'':{width}} | ManualLSTM | nn.LSTM |")
    print(f"|{'-' * (width + 2)}|---|---|")
    for label, manual, official in outcomes:
        print(f"| {label:{width}} | {_cell(manual)} | {_cell(official)} |", flush=True)


def outcome_of(row: ReportRow, make: Callable[..., nn.Module], device: str) -> str:
    """Return a tick and a note, what the machine lacks, or the first line of what was raised."""
    note = ""
    if row.missing():
        return f"needs {', '.join(row.missing())}, not installed"
    for packed in (False, True) if row.packed else (False,):
        try:
            with silence(), torch.random.fork_rng():
                note = row.run(Setting(make, OPTIONS, packed=packed, device=device))
        except MissingRequirement as missing:
            return f"needs {missing}"
        except Exception as error:
            lines = str(error).strip().splitlines()
            return f"{'packed: ' if packed else ''}{type(error).__name__}: {lines[0] if lines else ''}"
    return f"{YES} {note}".strip()


def _cell(text: str, most: int = 90) -> str:
    """Shorten and escape a text for a table in Markdown, and for the encoding of the terminal."""
    text = text if len(text) <= most else text[: most - 3] + "..."
    encoding = sys.stdout.encoding or "utf-8"
    text = text.replace("|", "\\|").replace(YES, YES if _can_encode(YES, encoding) else "yes")
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _can_encode(text: str, encoding: str) -> bool:
    return text.encode(encoding, "ignore") != b""


@contextmanager
def silence() -> Iterator[None]:
    """Discard what is printed, warned and logged, by Python or by native code."""
    disabled = logging.root.manager.disable
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        logging.disable(logging.CRITICAL)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
