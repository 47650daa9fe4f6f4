"""Grids of which the quick run takes a sample."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def quick_sample(grid: Iterable[tuple[Any, ...]], quick: Container[tuple[Any, ...]]) -> list[Any]:
    """The parameters of a test: the whole grid, in which all but ``quick`` is slow."""
    return [pytest.param(*point, marks=[] if point in quick else [pytest.mark.slow]) for point in grid]
