"""Tables that are printed row by row, for a terminal of 100 columns."""

from collections.abc import Sequence
from typing import NamedTuple


class Column(NamedTuple):
    """The two lines of a column's heading, and its width."""

    top: str
    bottom: str
    width: int


class Table:
    """A table that prints its heading when it is made. The first column is aligned to the left."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = columns
        self.row([column.top for column in columns])
        self.row([column.bottom for column in columns])

    def row(self, cells: Sequence[str]) -> None:
        """Print a row. It may have fewer cells than the table has columns."""
        first, *rest = self.columns
        line = f"{cells[0]:<{first.width}}"
        line += "".join(f"{cell:>{column.width}}" for cell, column in zip(cells[1:], rest))
        print(line.rstrip(), flush=True)


def format_number(value: float | None) -> str:
    """Format a number with three digits, or None as a dash."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 or value == 0 else f"{value:.3g}"


def format_ratio(value: float | None) -> str:
    """Format a ratio with two decimals, one from 10 on, none from 100 on; or None as a dash."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def format_megabytes(size: float | None) -> str:
    """Format bytes in MB of 10**6 bytes, with one decimal below 10; or None as a dash."""
    if size is None:
        return "-"
    return f"{size / 1e6:.1f}" if size < 9.95e6 else f"{size / 1e6:.0f}"
