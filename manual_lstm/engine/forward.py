"""The forward of the fused loop: the steps of one direction, into buffers.

The steps go in blocks. The views that they write to are made for a whole block and, where steps are
small, kept for the blocks and calls that follow: making a view costs as much as a small operation.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manual_lstm.cell import lstm_cell_out
from manual_lstm.engine import workspace
from manual_lstm.engine.cuts import BlockCuts, zero_rows
from manual_lstm.engine.direction import Direction
from manual_lstm.engine.gemm import gate_product
from manual_lstm.engine.input_product import InputProduct, input_product
from manual_lstm.engine.steps import BlockSteps

_contiguous = torch.contiguous_format  # of all that is returned: a compiled caller counts on it
_BLOCK_STEPS = 64  # in a block, at most: the fewer, the more blocks share views


class Kept(NamedTuple):
    """What the forward returns."""

    output: Tensor  # [T, B, P or H] or packed [N, P or H]
    h_n: Tensor  # [B, P or H]
    c_n: Tensor  # [B, H]
    # For the backward, where it is wanted; otherwise empty.
    gates: Tensor  # of each step the gates i, f, o, g, [4, b, H], one step after the other: [4N, H]
    cells: Tensor  # the cell states after the steps, [N, H]


class StepViews(NamedTuple):
    """What one step writes to."""

    a: Tensor  # the pre-activations of i, f, o, g, which become these gates, as gate_product takes them
    a_ifo: Tensor  # those of i, f and o, [3, b, H]
    i: Tensor  # each by itself, [b, H]
    f: Tensor
    o: Tensor
    g: Tensor
    c: Tensor  # the cell state after it, [b, H]
    h: Tensor  # the hidden state after it, [b, P or H]
    h_wide: Tensor  # the same, as gate_product takes it


def run_forward(d: Direction, save: bool) -> Kept:
    """Take all steps of one direction.

    Args:
        d: the direction.
        save: whether to keep what the backward needs.
    """
    steps = BlockSteps(d)
    N, P, H = steps.starts[-1], d.h_0.size(1), d.c_0.size(1)
    output = d.x.new_empty(*d.x.shape[:-1], P)
    gates, cells = d.x.new_empty(4 * N if save else 0, H), d.x.new_empty(N if save else 0, H)
    h_rows, c_n = output.view(N, P), d.c_0
    if N:
        small = steps.dense and workspace.is_small(c_n)
        product = input_product(d, steps)
        places = (_SmallPlaces if small else _Places)(d, steps, gates, cells, h_rows)
        c_n = _run(d, steps, product, places)
    c_n = steps.last(cells, d.c_0) if save else c_n.clone(memory_format=_contiguous)
    return Kept(output, steps.last(h_rows, d.h_0), c_n, gates, cells)


def _run(d: Direction, steps: BlockSteps, product: InputProduct, places: "_Places") -> Tensor:
    """Take the steps, and return the cell state after the last."""
    T = len(steps.sizes)
    add = gate_product(d.weight_hh, steps.starts[-1] // T, T, steps.of_one)
    weight_hr_t = None if d.weight_hr is None else d.weight_hr.t()
    cuts = BlockCuts(d, steps)
    # The state before a step, and h as gate_product takes it.
    h, h_wide, c = d.h_0, d.h_0.expand(2 if steps.of_one else 4, *d.h_0.shape), d.c_0
    for block in steps.blocks(product.most_rows, _BLOCK_STEPS):
        a_block, views = places.enter(block, product.by_step)
        inputs = product.enter(block, a_block)
        for x_t, cut, views_t in steps.in_order(zip(inputs, cuts.of(block), views)):
            a, a_ifo, i, f, o, g, c_out, h_out, h_out_wide = views_t
            if not steps.dense and c_out.size(0) != c.size(0):
                b = c_out.size(0)
                h_wide = steps.resized(h_wide, b, d.h_0.expand(4, *d.h_0.shape))
                h, c = h_wide[0], steps.resized(c, b, d.c_0) if places.save else c_out
            if cut is not None:
                h_wide = cuts.copy_h(h, cut, h_wide.size(0))
                c = zero_rows(c if c is c_out else c_out.copy_(c), cut)
            if x_t is not None:
                product.of_step(x_t, a)
            add(a, h_wide)
            lstm_cell_out(c, weight_hr_t, a_ifo, i, f, g, o, c_out, h_out)
            h, h_wide, c = h_out, h_out_wide, c_out
        places.leave(block)
    places.end()
    return places.c_n


class _Places:
    """Where the steps of a direction write.

    Args:
        d: the direction.
        steps: its steps.
        gates, cells: see :class:`Kept`; empty without save.
        h_rows: the output, ``[N, P or H]``.

    Attributes:
        save: whether gates and cells are kept.
        c_n: without save the cell state, ``[B, H]``. Every step writes to it, and a finished sequence's
            state waits in it.
    """

    def __init__(
        self, d: Direction, steps: BlockSteps, gates: Tensor, cells: Tensor, h_rows: Tensor
    ) -> None:
        self.save = gates.size(0) > 0
        self._steps, self._gates, self._cells, self._h_rows = steps, gates, cells, h_rows
        self.c_n = d.c_0 if self.save else d.c_0.clone(memory_format=_contiguous)
        self._a = gates  # without save, the gates of one block or step

    def enter(self, block: range, one_step: bool) -> tuple[Tensor, list[StepViews]]:
        """Return the gates of a block, ``[4n, H]``, and the views of its steps.

        Args:
            block: the block.
            one_step: whether one place for the gates will do for all steps.
        """
        rows, sizes = self._steps.rows(block), self._steps.sizes[block.start : block.stop]
        if self.save:
            a = self._gates[4 * rows.start : 4 * rows.stop]
            c = self._cells[rows]
            return a, step_views(sizes, a, c, self._h_rows[rows], self.c_n, self._steps.of_one)
        n = 4 * (sizes[0] if one_step else rows.stop - rows.start)
        if self._a.size(0) < n:
            self._a = self.c_n.new_empty(n, self.c_n.size(1))
        a = self._a[:n]
        return a, step_views(sizes, a, None, self._h_rows[rows], self.c_n, self._steps.of_one)

    def leave(self, block: range) -> None:
        """Keep what the steps of a block have made."""

    def end(self) -> None:
        """Leave the last block."""


class _SmallPlaces(_Places):
    """The same for small steps: buffers of one block serve all blocks, and are kept for other calls."""

    def __init__(
        self, d: Direction, steps: BlockSteps, gates: Tensor, cells: Tensor, h_rows: Tensor
    ) -> None:
        self.save = gates.size(0) > 0
        self._steps, self._gates, self._cells, self._h_rows = steps, gates, cells, h_rows
        B, H = d.c_0.shape
        self._sizes = [B] * _BLOCK_STEPS
        self._key = "forward", self.save, B, H, h_rows.size(1), gates.dtype, _BLOCK_STEPS
        self._a, self._c, self._h, self.c_n, self._views = workspace.take(self._key, self._make)

    def _make(self) -> Any:
        _, save, B, H, P, dtype, _ = self._key
        a, c, h, c_n = (
            torch.empty(rows, features, dtype=dtype, device="cpu")
            for rows, features in (
                (4 * B * _BLOCK_STEPS, H),
                (B * _BLOCK_STEPS if save else 0, H),
                (B * _BLOCK_STEPS, P),
                (B, H),
            )
        )
        return a, c, h, c_n, []

    def enter(self, block: range, one_step: bool) -> tuple[Tensor, list[StepViews]]:
        T, B = len(block), self._sizes[0]
        ready = len(self._views)
        if ready < T:  # calls of few steps do not need more views
            new = slice(ready * B, T * B)
            self._views += step_views(
                self._sizes[ready:T],
                self._a[4 * new.start : 4 * new.stop],
                self._c[new] if self.save else None,
                self._h[new],
                self.c_n,
                self._steps.of_one,
            )
        return self._a[: 4 * B * T], self._views[:T]

    def leave(self, block: range) -> None:
        rows = self._steps.rows(block)
        n = rows.stop - rows.start
        self._h_rows[rows].copy_(self._h[:n])
        if self.save:
            self._gates[4 * rows.start : 4 * rows.stop].copy_(self._a[: 4 * n])
            self._cells[rows].copy_(self._c[:n])

    def end(self) -> None:
        kept = self._a, self._c, self._h, self.c_n, self._views
        workspace.give_back(self._key, kept)


def step_views(
    sizes: list[int], a: Tensor, c: Tensor | None, h: Tensor, c_n: Tensor, of_one: bool
) -> list[StepViews]:
    """Make the views of the steps of a block.

    Args:
        sizes: the number of rows of each step.
        a: the gates of the steps, or of one step that serves all, ``[4n, H]``.
        c: the cell states after the steps, ``[n, H]``, or ``None``: then every step writes to ``c_n``.
        h: the hidden states after the steps, ``[n, P or H]``.
        c_n: ``[B, H]``.
        of_one: see :class:`manual_lstm.engine.steps.BlockSteps`.
    """
    T, b, H = len(sizes), sizes[0], a.size(1)
    if c is None:
        c_steps: Sequence[Tensor] = [c_n if b == c_n.size(0) else c_n[:b] for b in sizes]
    else:
        c_steps = c.split_with_sizes(sizes)
    pieces = 2 if of_one else 4
    h_steps, wide = h.split_with_sizes(sizes), h.expand(pieces, *h.shape).split_with_sizes(sizes, 1)
    if b == sizes[-1]:
        by_step = a.view(-1, 4, b, H)
        parts = a.view(-1, pieces, b, 4 * H // pieces), by_step[:, :3], *by_step.unbind(1)
        gates = (part.unbind(0) * (T // by_step.size(0)) for part in parts)
        return list(map(StepViews, *gates, c_steps, h_steps, wide))
    a_steps = a.split_with_sizes([4 * b for b in sizes])
    views: list[StepViews] = []
    for b, a_t, *states in zip(sizes, a_steps, c_steps, h_steps, wide):
        a_t = a_t.view(4, b, H)
        views.append(StepViews(a_t, a_t[:3], *a_t.unbind(0), *states))
    return views
