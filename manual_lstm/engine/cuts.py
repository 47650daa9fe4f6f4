"""Cuts: where a new sequence begins within a row, and the state before it counts no more.

A caller's ``resets`` says at which steps of the input a new sequence begins. A direction is cut there:
forwards, the step with the reset begins from a state of zeros, and backwards the step before it does.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from manual_lstm.engine.context import has_numbers, is_capturing, is_tracing
from manual_lstm.engine.direction import Direction
from manual_lstm.engine.steps import BlockSteps, step_index


def cuts_of(resets: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """Which steps of a direction begin from zeros, in the shape of ``resets``.

    Args:
        resets: which steps of the input begin a sequence, ``[T, B]`` or packed ``[N]``, bool.
        batch_sizes: of packed input the number of rows of each step.
        reverse: whether the direction goes from the last step to the first.
    """
    if not reverse:
        return resets
    if batch_sizes is None:
        T, B = resets.shape
        return torch.cat([resets, resets.new_zeros(1, B)]).narrow(0, 1, T)
    # Of each row, the row of the same sequence one step later.
    N, device = resets.size(0), resets.device
    if N == 0:
        return resets
    if has_numbers(batch_sizes):  # then they need not be fake where the rest is
        batch_sizes = torch.tensor(batch_sizes.tolist())
    sizes = batch_sizes.to(device)
    t = step_index(resets, sizes)  # [N]
    row = torch.arange(N, device=device)
    position = row - (sizes.cumsum(0) - sizes).index_select(0, t)
    later_sizes = torch.cat([sizes, sizes.new_zeros(1)]).index_select(0, t + 1)
    later = (row + sizes.index_select(0, t)).clamp(max=N - 1)
    return resets.index_select(0, later) & (position < later_sizes)


class BlockCuts:
    """Which rows of which steps begin from zeros, for a loop that knows the numbers.

    On the CPU rows are indices: to fill these takes half the time of a mask. Elsewhere they are masks,
    which nobody has to look at while a CUDA graph is captured.
    """

    def __init__(self, d: Direction, steps: BlockSteps) -> None:
        self._starts = steps.starts
        self._of_steps: list[Tensor | None] = [None] * len(steps.sizes)
        self._rows: Tensor | None = None  # those of all steps, in packed data
        self._h = d.h_0.new_empty(0)  # where copy_h writes
        if d.cuts is None:
            return
        cuts = d.cuts.reshape(-1)  # [N]
        if is_capturing(cuts.device):
            self._rows = cuts.unsqueeze(1)
            self._of_steps = list(self._rows.split_with_sizes(steps.sizes))
            return
        rows = cuts.nonzero().squeeze(1)  # [K]
        if rows.numel() == 0:
            return
        starts = torch.tensor(steps.starts, device=rows.device)
        bounds = torch.searchsorted(rows, starts)
        counts = bounds.diff()
        self._bounds: list[int] = bounds.tolist()
        self._rows = rows
        if rows.is_cpu:
            rows = rows - starts[:-1].repeat_interleave(counts)
            of_steps = rows.split_with_sizes(counts.tolist())
        else:
            self._rows = cuts.unsqueeze(1)
            of_steps = self._rows.split_with_sizes(steps.sizes)
        there = (a < b for a, b in pairwise(self._bounds))
        self._of_steps = [rows if cut else None for rows, cut in zip(of_steps, there)]

    def of(self, block: range) -> list[Tensor | None]:
        """For each step of a block the rows that begin from zeros; ``None`` for none."""
        return self._of_steps[block.start : block.stop]

    def copy_h(self, h: Tensor, rows: Tensor, pieces: int) -> Tensor:
        """Copy the hidden state before a step, with zeros in the rows that begin anew.

        Args:
            h: ``[b, features]``.
            rows: of :meth:`of`.
            pieces: how often the result repeats the copy.

        Returns:
            ``[pieces, b, features]``. The next call writes to the same place.
        """
        if self._h.shape != h.shape:
            self._h = h.new_empty(h.shape)
            self._h_wide = self._h.expand(pieces, *h.shape)
        zero_rows(self._h.copy_(h), rows)
        return self._h_wide

    def zero(self, states: Tensor, block: range) -> Tensor:
        """Write zeros among the states before the steps of a block, ``[n, features]``."""
        if self._rows is None:
            return states
        if self._rows.dtype == torch.bool:
            return zero_rows(states, self._rows[self._starts[block.start] : self._starts[block.stop]])
        rows = self._rows[self._bounds[block.start] : self._bounds[block.stop]]
        return zero_rows(states, rows - self._starts[block.start])


def zero_rows(states: Tensor, rows: Tensor) -> Tensor:
    """Write zeros, in place.

    Args:
        states: ``[b, features]``.
        rows: indices ``[k]``, or a mask ``[b, 1]``.
    """
    if rows.dtype == torch.bool:
        return states.masked_fill_(rows, 0)
    return states.index_fill_(0, rows, 0)


def with_zeros(states: Tensor, rows: Tensor) -> Tensor:
    """The same, into a copy."""
    if rows.dtype == torch.bool:
        return states.masked_fill(rows, 0)
    return states.index_fill(0, rows, 0)


def check_resets(resets: Any, expected: Sequence[int], device: torch.device) -> None:
    """Check that resets are a tensor of the input's kind, with a bool for each of its steps."""
    if not isinstance(resets, Tensor) or resets.is_nested or resets.layout != torch.strided:
        kind = type(resets).__name__
        if isinstance(resets, Tensor):
            kind = "a nested tensor" if resets.is_nested else f"a tensor of {resets.layout}"
        raise TypeError(f"resets should be a Tensor of torch.bool like the input, but got {kind}")
    if resets.dtype != torch.bool:
        raise TypeError(
            f"resets should be of torch.bool, but got {resets.dtype}: pass resets.bool() if other "
            "numbers than 0 mark the beginning of a sequence"
        )
    if not is_tracing() and tuple(resets.shape) != tuple(expected):
        raise ValueError(
            f"resets should be {list(expected)}, one for each step of the input, "
            f"but got {list(resets.shape)}"
        )
    if resets.device != device:
        raise RuntimeError(
            f"resets should be on the device of the input, {device}, but got {resets.device}"
        )
