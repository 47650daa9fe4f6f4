"""Tables that are printed row by row, no wider than a terminal of 100 columns."""

from collections.abc import Sequence
from typing import NamedTuple


class Column(NamedTuple):
    """Two lines above it, and its width."""

    top: str
    bottom: str
    width: int


class Table:
    """Prints its heading at once, and rows when they come. The first column is to the left."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = columns
        self.row([column.top for column in columns])
        self.row([column.bottom for column in columns])

    def row(self, cells: Sequence[str]) -> None:
        """Print a row; cells that are missing at its end stay empty."""
        first, *rest = self.columns
        line = f"{cells[0]:<{first.width}}"
        line += "".join(f"{cell:>{column.width}}" for cell, column in zip(cells[1:], rest))
        print(line.rstrip(), flush=True)


def format_number(value: float | None) -> str:
    """Three digits, or a dash for what there is not."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 or value == 0 else f"{value:.3g}"


def format_ratio(value: float | None) -> str:
    """A ratio: two decimals, one from 10 on."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def format_megabytes(size: float | None) -> str:
    """Bytes in MB, 10**6: whole ones from 10 on."""
    if size is None:
        return "-"
    return f"{size / 1e6:.1f}" if size < 9.95e6 else f"{size / 1e6:.0f}"
