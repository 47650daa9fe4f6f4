"""Which rows of packed data are which step's, and in which order a direction takes them."""

from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

# A block of steps has about this many rows: enough for a product to be fast, few enough for its
# result to stay in the cache. Only a block's projected input is held at a time.
BLOCK_ROWS = 512

T = TypeVar("T")
States = tuple[Tensor, ...] | Mapping[int, Tensor]


class Steps:
    """Which rows belong to which step, and in which order a direction takes the steps.

    Args:
        x: ``[T, B, I]``, or packed ``[N, I]``.
        batch_sizes: ``None``, or for packed input the number of rows of each step, ``[T]``.
        reverse: whether the last step is taken first.
    """

    def __init__(self, x: Tensor, batch_sizes: Tensor | None, reverse: bool) -> None:
        self.sizes: list[int] = [x.size(1)] * x.size(0) if batch_sizes is None else batch_sizes.tolist()
        self.starts = list(accumulate(self.sizes, initial=0))
        self.reverse = reverse
        if batch_sizes is not None and self.starts[-1] != x.size(0):
            raise ValueError(
                f"data should have {self.starts[-1]} rows, the sum of batch_sizes, but got {x.size(0)}"
            )

    def blocks(self) -> list[range]:
        """Ranges of neighbouring steps with about ``BLOCK_ROWS`` rows, in the order they are taken."""
        bounds = [0]
        for t in range(1, len(self.sizes)):
            if self.starts[t + 1] - self.starts[bounds[-1]] > BLOCK_ROWS:
                bounds.append(t)
        bounds.append(len(self.sizes))
        blocks = [range(a, b) for a, b in pairwise(bounds) if a < b]
        return self.in_order(blocks)

    def in_order(self, steps: Iterable[T]) -> list[T]:
        """What belongs to neighbouring steps, in the order these are taken."""
        return list(steps)[::-1] if self.reverse else list(steps)

    def rows(self, block: range) -> slice:
        """The rows of the block, in packed data."""
        return slice(self.starts[block.start], self.starts[block.stop])

    def rows_of(self, x: Tensor, block: range) -> Tensor:
        """The block's rows of the input, ``[n, I]``."""
        if x.dim() == 3:
            return x[block.start : block.stop].reshape(-1, x.size(2))
        return x[self.rows(block)]

    def previous(self, t: int, states: States, first: Tensor) -> Tensor:
        """The state before step t: of the step taken before it, and of sequences that begin, ``first``.

        Args:
            t: the step.
            states: the states after each step, by step, ``[b, features]`` each.
            first: the initial states, ``[B, features]``.
        """
        b, before = self.sizes[t], t + 1 if self.reverse else t - 1
        if not 0 <= before < len(self.sizes):
            return first if first.size(0) == b else first[:b]
        state, held = states[before], self.sizes[before]
        if held == b:
            return state
        return state[:b] if held > b else torch.cat([state, first[held:b]])

    def last(self, states: tuple[Tensor, ...], first: Tensor) -> Tensor:
        """The final state of each sequence, ``[B, features]``: where it ended, or the initial one."""
        parts: list[Tensor] = []
        known = 0
        for t in range(len(self.sizes)) if self.reverse else range(len(self.sizes) - 1, -1, -1):
            if self.sizes[t] > known:
                parts.append(states[t][known:])
                known = self.sizes[t]
        return torch.cat([*parts, first[known:]])  # always a copy
