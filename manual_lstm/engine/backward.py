r"""The backward of the fused loop, derived by hand: through time from the last step to the first.

Let :math:`\delta z` be the gradient of the loss by z. Step t starts from :math:`\delta h_t`, the
output's gradient plus what the step after it passes back, and from :math:`\delta c_t` of the step after
it. The last step has them from h_n and c_n. :func:`manual_lstm.cell.lstm_cell_backward` makes
:math:`\delta a` of them, and

.. math::
    \delta h_{t-1} = W_{hh}^T \delta a

The weights take part in every step, so their gradients are sums over the steps, which are products of
all the rows of a block:

.. math::
    \delta W_{ih} = \sum_t \delta a\, x_t^T,\quad \delta W_{hh} = \sum_t \delta a\, h_{t-1}^T,\quad
    \delta b = \sum_t \delta a,\quad \delta W_{hr} = \sum_t \delta h_t\, m_t^T,\quad
    \delta x_t = W_{ih}^T \delta a

For complex numbers every factor is conjugated. (Backpropagation through time; Werbos 1990. The
gradients of the LSTM in full: Graves & Schmidhuber 2005.)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manual_lstm.cell import lstm_cell_backward, lstm_cell_derivatives, output_again
from manual_lstm.engine import workspace
from manual_lstm.engine.cuts import BlockCuts, with_zeros, zero_rows
from manual_lstm.engine.direction import Direction, Gradients
from manual_lstm.engine.gemm import OuterSum, state_product
from manual_lstm.engine.steps import BlockSteps

_contiguous = torch.contiguous_format  # of all that is returned: a compiled caller counts on it
# Larger blocks than the forward's: the sums over rows are faster over many.
_BLOCK_ROWS, _BLOCK_STEPS = 512, 64


def run_backward(
    d: Direction,
    gates: Tensor,
    cells: Tensor,
    grads: Sequence[Tensor | None],
    need: Gradients,
    by_row: bool,
) -> tuple[Tensor, ...]:
    """Go back through all steps of one direction.

    Args:
        d: the direction.
        gates, cells: as the forward has kept them, see :class:`manual_lstm.engine.forward.Kept`.
        grads: the gradients of output, h_n and c_n.
        need: which gradients are wanted.
        by_row: whether to return for every row what the weights' gradients are sums of.

    Returns:
        The gradients in the order of :class:`Gradients`; empty where not wanted.
        With ``by_row`` then the gradient of a, ``[N, 4H]``, the h before the step, ``[N, P or H]``,
        and with a projection the gradient of the h after it, ``[N, P]``; otherwise empty.
    """
    steps = BlockSteps(d)
    cuts = BlockCuts(d, steps)
    x, N, (B, P), H = d.x, steps.starts[-1], d.h_0.shape, d.c_0.size(1)
    grad_output, grad_h_n, grad_c_n = grads
    out_rows = None if grad_output is None else grad_output.reshape(N, P)
    sums = WeightSums(d, need)
    d_x = x.new_empty(x.shape if need.x else 0)
    # The gradients of both states; the rows of sequences that are not under way wait in them.
    d_h = x.new_zeros(d.h_0.shape) if grad_h_n is None else grad_h_n.clone(memory_format=_contiguous)
    d_c = x.new_zeros(d.c_0.shape) if grad_c_n is None else grad_c_n.clone(memory_format=_contiguous)
    da_rows = x.new_empty(N if by_row else 0, 4 * H)
    h_rows = x.new_empty(N if by_row else 0, P)
    d_h_rows = x.new_empty(N if by_row and d.weight_hr is not None else 0, P)

    blocks = steps.blocks(_BLOCK_ROWS, _BLOCK_STEPS) if N else []
    n = max((steps.starts[b.stop] - steps.starts[b.start] for b in blocks), default=0)
    small = steps.dense and workspace.is_small(d.c_0)
    scratch = (_SmallScratch if small else _Scratch)(d, n)
    weight_hh_conj = d.weight_hh.conj()
    weight_hr_conj = None if d.weight_hr is None else d.weight_hr.conj()
    by_halves = steps.of_one and P % 2 == 0  # MKL gives a single row to a single thread
    add = state_product(weight_hh_conj, B, len(steps.sizes), by_halves)
    d_c_t, d_c_wide = d_c, d_c.unsqueeze(1)  # [b, H] and [b, 1, H]
    for block in reversed(blocks):
        rows = steps.rows(block)
        i, f, g, o = steps.by_gate(gates, block)  # [T', B, H] each, or packed [n, H]
        # The forward keeps no h, so the caller may modify the output in place.
        tanh_c, m, h = output_again(o, cells[rows].view_as(o), d.weight_hr)
        c_edge, h_edge = d.c_0, d.h_0  # the state before the block
        edge = steps.before_block(block)
        if edge is not None:
            *_, o_edge = steps.by_gate(gates, edge)
            c_edge = cells[steps.rows(edge)]
            h_edge = output_again(o_edge, c_edge.view_as(o_edge), d.weight_hr)[2].view(-1, P)
        c_before = cuts.zero(steps.shift(cells[rows], block, c_edge, d.c_0), block)  # [n, H]
        h_before = cuts.zero(steps.shift(h.view(-1, P), block, h_edge, d.h_0), block)  # [n, P or H]

        n = rows.stop - rows.start
        da, dm_to_dc, d_h_block = scratch.da[:n], scratch.dm_to_dc[:n], scratch.d_h[:n]
        lstm_cell_derivatives(
            i, f, g, o, c_before.view_as(i), tanh_c, da.view(*i.shape[:-1], 4 * H), dm_to_dc.view_as(i)
        )
        if out_rows is None:
            d_h_block.zero_()
        else:
            d_h_block.copy_(out_rows[rows])
        da_next = da_next_wide = None  # the gradient of a in the step after this one
        views = scratch.views(steps.sizes[block.start : block.stop], f, by_halves)
        back = steps.in_order(zip(cuts.of(block), views))[::-1]
        for cut, (d_h_t, da_t, d_h_wide, da_wide, da_ifg, da_o, dm_to_dc_t, f_t) in back:
            if da_next_wide is not None and (steps.dense or da_next_wide.size(-2) == da_t.size(0)):
                add(d_h_wide, da_next_wide)
            else:
                if da_next is not None:
                    torch.mm(da_next, weight_hh_conj, out=d_h[: da_next.size(0)])
                b = da_t.size(0)
                d_h_t.add_(d_h[:b])
                d_c_t = d_c[:b]
                d_c_wide = d_c_t.unsqueeze(1)
            lstm_cell_backward(d_h_t, d_c_t, d_c_wide, weight_hr_conj, da_ifg, da_o, dm_to_dc_t, f_t)
            da_next, da_next_wide = da_t, da_wide
            if cut is not None:  # da_t stays as it is, for the sums
                zero_rows(d_c_t, cut)
                da_next = with_zeros(da_t, cut)
                da_next_wide = da_next.expand_as(da_wide)
        if da_next is not None and (need.h_0 or edge is not None):
            torch.mm(da_next, weight_hh_conj, out=d_h[: da_next.size(0)])

        sums.add(steps.rows_of(x, block), h_before, m.view(-1, H), da, d_h_block)
        if by_row:
            da_rows[rows], h_rows[rows] = da, h_before
            if d.weight_hr is not None:
                d_h_rows[rows] = d_h_block
        if need.x:
            # Not oneDNN's product, whose sums over so many columns have twice MKL's error.
            torch.mm(da, d.weight_ih.conj(), out=d_x.view(N, x.size(-1))[rows])
    scratch.end()
    return d_x, d_h, d_c, *sums.results(), da_rows, h_rows, d_h_rows


class StepViews(NamedTuple):
    """What one step reads and writes."""

    d_h: Tensor  # the gradient of the hidden state after it, [b, P or H]
    da: Tensor  # factors, which become the gradient of a, [b, 4H]
    d_h_wide: Tensor  # d_h as state_product takes it
    da_wide: Tensor  # da as state_product takes it
    da_ifg: Tensor  # those of i, f and g, [b, 3, H]
    da_o: Tensor  # those of o, [b, H]
    dm_to_dc: Tensor  # the factor from m to c, [b, H]
    f: Tensor  # the forget gate, conjugated, [b, H]


class _Scratch:
    """The buffers of a block, for one block after another.

    Attributes:
        da, dm_to_dc, d_h: see :class:`StepViews`; of all rows, ``[n, features]``.
    """

    def __init__(self, d: Direction, n: int) -> None:
        (_, P), H = d.h_0.shape, d.c_0.size(1)
        new = d.c_0.new_empty
        self.da, self.dm_to_dc, self.d_h = new(n, 4 * H), new(n, H), new(n, P)

    def views(self, sizes: list[int], f: Tensor, by_halves: bool) -> Sequence[StepViews]:
        """The views of the steps of a block.

        Args:
            sizes: how many rows each has.
            f: the forget gates, ``[T', B, H]`` or ``[n, H]``.
        """
        n = sum(sizes)
        return step_views(sizes, self.d_h[:n], self.da[:n], self.dm_to_dc[:n], f.conj(), by_halves)

    def end(self) -> None:
        """Leave the last block."""


class _SmallScratch(_Scratch):
    """The same for small steps: buffers and views serve all blocks, and are kept for other calls."""

    def __init__(self, d: Direction, n: int) -> None:
        (B, P), H = d.h_0.shape, d.c_0.size(1)
        self._key = "backward", B, H, P, d.c_0.dtype, _BLOCK_STEPS
        self.da, self.dm_to_dc, self.d_h, self._f, self._views = workspace.take(self._key, self._make)

    def _make(self) -> Any:
        _, B, H, P, dtype, _ = self._key
        rows = B * _BLOCK_STEPS
        shapes = (rows, 4 * H), (rows, H), (rows, P), (rows, H)
        return *(torch.empty(shape, dtype=dtype, device="cpu") for shape in shapes), []

    def views(self, sizes: list[int], f: Tensor, by_halves: bool) -> Sequence[StepViews]:
        T, B = len(sizes), sizes[0]
        self._f[: T * B].view(f.shape).copy_(f.conj())
        ready = len(self._views)
        if ready < T:  # calls of few steps do not need more views
            new = slice(ready * B, T * B)
            self._views += step_views(
                sizes[ready:],
                self.d_h[new],
                self.da[new],
                self.dm_to_dc[new],
                self._f[new],
                by_halves,
            )
        views: list[StepViews] = self._views[:T]
        return views

    def end(self) -> None:
        kept = self.da, self.dm_to_dc, self.d_h, self._f, self._views
        workspace.give_back(self._key, kept)


def step_views(
    sizes: list[int], d_h: Tensor, da: Tensor, dm_to_dc: Tensor, f: Tensor, by_halves: bool
) -> list[StepViews]:
    """Make the views of the steps of a block.

    Args:
        sizes: how many rows each has.
        d_h, da, dm_to_dc: see :class:`StepViews`; of all rows, ``[n, features]``.
        f: likewise, or ``[T', B, H]``.
        by_halves: how :func:`state_product` takes them.
    """
    by_gate = da.view(da.size(0), 4, -1)  # [n, 4, H]
    d_h_steps, da_steps, da_ifg, da_o, dm_to_dc_steps = (
        part.split_with_sizes(sizes) for part in (d_h, da, by_gate[:, :3], by_gate[:, 3], dm_to_dc)
    )
    wide = d_h_steps, da_steps
    if by_halves:
        n, P = d_h.shape
        wide = d_h.view(n, 2, 1, P // 2).unbind(0), da.view(n, 1, 1, -1).expand(n, 2, 1, -1).unbind(0)
    f_steps = f.unbind(0) if f.dim() == 3 else f.split_with_sizes(sizes)
    return list(map(StepViews, d_h_steps, da_steps, *wide, da_ifg, da_o, dm_to_dc_steps, f_steps))


class WeightSums:
    """The gradients of the weights and the bias: sums over all blocks."""

    def __init__(self, d: Direction, need: Gradients) -> None:
        # nn.LSTM leaves its kernel for packed and projected input, and then sums step by step.
        piece = 512 if d.batch_sizes is None and d.weight_hr is None else 64
        self._ih = OuterSum(d.weight_ih, piece) if need.weight_ih else None
        self._hh = OuterSum(d.weight_hh, piece) if need.weight_hh else None
        self._hr = OuterSum(d.weight_hr, piece) if need.weight_hr and d.weight_hr is not None else None
        self._need_bias = need.bias
        self._bias = d.x.new_zeros(d.weight_hh.size(0) if need.bias else 0)  # [4H]

    def add(self, x: Tensor, h_before: Tensor, m: Tensor, da: Tensor, d_h: Tensor) -> None:
        """Add the n rows of a block.

        Args:
            x: the input, ``[n, I]``.
            h_before: the h before each step, ``[n, P or H]``.
            m: the m of each step, ``[n, H]``.
            da: the gradient of a, ``[n, 4H]``.
            d_h: the gradient of the h after each step, ``[n, P or H]``.
        """
        if self._ih is not None:
            self._ih.add(da, x.conj())
        if self._hh is not None:
            self._hh.add(da, h_before.conj())
        if self._hr is not None:
            self._hr.add(d_h, m.conj())
        if self._need_bias:
            self._bias += da.sum(0)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of weight_ih, weight_hh, bias and weight_hr; empty where not wanted."""
        sums = (self._ih, self._hh, self._hr)
        ih, hh, hr = (self._bias.new_empty(0) if s is None else s.result() for s in sums)
        return ih, hh, self._bias, hr
