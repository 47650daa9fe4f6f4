r"""The gate loop of one direction as one operator, with its backward derived by hand.

``manual_lstm::direction`` computes what :func:`manual_lstm.loop.run_plain` computes, faster: autograd
does not watch its steps, so they write into buffers made once, and what belongs to many steps is one
call for all of them. The mathematics of a step, forwards and backwards, is in ``cell.py``. This file
manages buffers, blocks of steps, and sums over steps.

**The backward** goes through time from the last step to the first. Let :math:`\delta z` be the
gradient of the loss by z. Step t starts from :math:`\delta h_t`, the output's gradient plus what the
step after it passes back, and from :math:`\delta c_t` of the step after it. The last step has them from
h_n and c_n. :func:`manual_lstm.cell.lstm_cell_backward` makes :math:`\delta a` of them, and

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

from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from manual_lstm.cell import (
    Step,
    lstm_cell_backward,
    lstm_cell_derivatives,
    lstm_cell_out,
    output_again,
)
from manual_lstm.engine.context import autocast_dtype, is_grad_enabled
from manual_lstm.engine.differentiate import plain_gradients
from manual_lstm.engine.direction import Direction, Gradients, Result
from manual_lstm.engine.dispatch import Loop, choose_backward
from manual_lstm.engine.gemm import GateProducts, OuterSum, gate_products, repeated_product
from manual_lstm.engine.steps import BlockSteps, steps_of

_contiguous = torch.contiguous_format  # of all that is returned: a compiled caller counts on it


def run_fused(d: Direction, keep: bool = False) -> Result:
    """Take all steps of one direction by the operator.

    Args:
        d: the direction.
        keep: whether to return the steps. They have no gradients.
    """
    needs_grad = is_grad_enabled() and any(t is not None and t.requires_grad for t in Gradients.of(d))
    output, h_n, c_n, gates, cells = direction(*d, needs_grad or keep)
    if not keep:
        return Result(output, h_n, c_n)
    shape = (*output.shape[:-1], d.c_0.size(1))  # [T, B, H] or [N, H]
    i, f, g, o = gates.view(4, *shape).unbind(0)
    c, m = cells.view(shape), output
    if d.weight_hr is not None:
        m = output_again(gates[3], cells, d.weight_hr)[1].view(shape)
    return Result(output, h_n, c_n, steps_of(d).all(Step(i, f, g, o, c, m, output)))


@torch.library.custom_op("manual_lstm::direction", mutates_args=())
def direction(
    x: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    weight_hr: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run one direction: :class:`Direction` describes the arguments.

    Args:
        save: whether to keep what the backward needs.

    Returns:
        The output, h_n and c_n; and with ``save`` for every row the four gates ``[4, N, H]`` and
        the cell state ``[N, H]``, which otherwise are empty.
    """
    d = Direction(x, batch_sizes, h_0, c_0, weight_ih, weight_hh, bias, weight_hr, reverse)
    steps = BlockSteps(d)
    sizes, B = steps.sizes, c_0.size(0)
    if sizes and sizes[0] != B:  # a compiled caller cannot look into batch_sizes
        raise RuntimeError(f"h_0 and c_0 should have {sizes[0]} sequences, as the input, but got {B}")
    products = gate_products(weight_ih, weight_hh, bias, steps.starts[-1], len(sizes))
    buffers = _Buffers(d, steps, products, save)

    h_steps, wide_h_steps, of_steps = buffers.h_steps, buffers.wide_h_steps, buffers.of_steps
    b, h, c = B, products.widen(h_0), buffers.c  # the state before a step
    for block in steps.blocks():
        projected = products.project(steps.rows_of(x, block), sizes[block.start : block.stop])
        for t, x_t in steps.in_order(zip(block, projected)):
            if sizes[t] != b:
                b, h = sizes[t], products.widen(steps.previous(t, h_steps, h_0))
                c = steps.previous(t, buffers.c_steps, c_0) if save else buffers.c[:b]  # [b, H]
            step_buffers = of_steps[t]
            products.add(x_t, h, step_buffers[0])  # a, [4, b, H]
            c = lstm_cell_out(c, weight_hr, h_steps[t], *step_buffers)
            h = wide_h_steps[t]

    h_n = steps.last(h_steps, h_0)
    c_n = steps.last(buffers.c_steps, c_0) if save else buffers.c
    return buffers.output, h_n, c_n, buffers.gates, buffers.cells


class _Buffers:
    """Where the steps of a forward write.

    Views are made for all steps at once, because one costs as much as a small operation.

    Attributes:
        output: ``[T, B, P or H]`` or packed ``[N, P or H]``.
        h_steps: its rows of each step, ``[b, P or H]``.
        wide_h_steps: the same as ``products`` takes them.
        gates: with ``save``, ``[4, N, H]``.
        cells: with ``save``, ``[N, H]``.
        c_steps: with ``save``, their rows of each step, ``[b, H]``.
        c: the initial cell state, ``[B, H]``. Without ``save`` every step writes to it, and a finished
            sequence's state waits in it.
        of_steps: for each step what :func:`lstm_cell_out` writes to, but for h.
    """

    def __init__(self, d: Direction, steps: BlockSteps, products: GateProducts, save: bool) -> None:
        sizes, N, (B, H), P = steps.sizes, steps.starts[-1], d.c_0.shape, d.h_0.size(1)
        x = d.x
        self.output = x.new_empty(*x.shape[:-1], P)
        rows = self.output.view(N, P)
        self.h_steps = rows.split_with_sizes(sizes)
        self.wide_h_steps = products.widen(rows).split_with_sizes(sizes, 1)
        # All steps share scratch buffers. For any b, the first elements are a contiguous [4, b, H] or
        # [b, H].
        a_place, tanh_place = x.new_empty(4 * B * H), x.new_empty(B * H)
        shared: dict[int, tuple[Tensor, ...]] = {}
        for b in set(sizes):
            a = a_place[: 4 * b * H].view(4, b, H)
            shared[b] = a, a[2], tanh_place[: b * H].view(b, H)
        if save:
            self.gates, self.cells = x.new_empty(4, N, H), x.new_empty(N, H)
            self.c = d.c_0
            self.c_steps = self.cells.split_with_sizes(sizes)
            ifgo_steps = self.gates.split_with_sizes(sizes, 1)  # T times [4, b, H]
            by_gate = [gate.split_with_sizes(sizes) for gate in self.gates]  # T times [b, H] each
            own = zip(ifgo_steps, *by_gate, self.c_steps)
            self.of_steps = [(*shared[b], *views) for b, views in zip(sizes, own)]
        else:
            self.gates, self.cells = x.new_empty(0), x.new_empty(0)
            self.c = d.c_0.clone(memory_format=_contiguous)
            self.c_steps = ()
            gates_place = x.new_empty(4 * B * H)
            for b in set(sizes):
                ifgo = gates_place[: 4 * b * H].view(4, b, H)
                shared[b] = *shared[b], ifgo, *ifgo.unbind(0), self.c[:b]
            self.of_steps = [shared[b] for b in sizes]


@direction.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    d, (save,) = Direction.split(arguments)
    H = d.c_0.size(1)
    output = d.x.new_empty(*d.x.shape[:-1], d.h_0.size(1))
    h_n, c_n = d.x.new_empty(d.h_0.shape), d.x.new_empty(d.c_0.shape)
    if not save:
        return output, h_n, c_n, d.x.new_empty(0), d.x.new_empty(0)
    N = d.x.size(0) * d.x.size(1) if d.batch_sizes is None else d.x.size(0)
    return output, h_n, c_n, d.x.new_empty(4, N, H), d.x.new_empty(N, H)


@torch.library.custom_op("manual_lstm::direction_backward", mutates_args=())
def direction_backward(
    x: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    weight_hr: Tensor | None,
    reverse: bool,
    gates: Tensor,
    cells: Tensor,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    needs: list[bool],
    by_row: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run one direction's backward: the module's docstring derives it.

    Args:
        gates, cells: as the forward has kept them.
        grad_output, grad_h_n, grad_c_n: the gradients of its results.
        needs: which gradients are wanted, in the order of :class:`Gradients`.
        by_row: whether to return for every row what the weights' gradients are sums of.

    Returns:
        The gradients in the order of :class:`Gradients`; empty where not wanted.
        With ``by_row`` then the gradient of a, ``[N, 4H]``, the h before the step, ``[N, P or H]``,
        and with a projection the gradient of the h after it, ``[N, P]``; otherwise empty.
    """
    d = Direction(x, batch_sizes, h_0, c_0, weight_ih, weight_hh, bias, weight_hr, reverse)
    steps = BlockSteps(d)
    sizes, N, P, H = steps.sizes, steps.starts[-1], h_0.size(1), c_0.size(1)
    need = Gradients(*needs)
    sums = _WeightSums(d, need)
    d_x = x.new_empty(x.shape if need.x else 0)
    # The gradients of both states; the rows of sequences that are not under way wait in them.
    d_h = x.new_zeros(h_0.shape) if grad_h_n is None else grad_h_n.clone(memory_format=_contiguous)
    d_c = x.new_zeros(c_0.shape) if grad_c_n is None else grad_c_n.clone(memory_format=_contiguous)
    out_steps = None if grad_output is None else grad_output.reshape(N, P).split_with_sizes(sizes)
    c_steps = cells.split_with_sizes(sizes)  # T times [b, H]
    da_rows = x.new_empty(N if by_row else 0, 4 * H)
    h_rows = x.new_empty(N if by_row else 0, P)
    d_h_rows = x.new_empty(N if by_row and weight_hr is not None else 0, P)
    weight_hh_conj = weight_hh.conj()
    weight_hr_conj = None if weight_hr is None else weight_hr.conj()
    add = repeated_product(weight_hh_conj, c_0.size(0))

    # The gradients of a step's states, [b, P or H] and [b, H]; None where no step has made d_h_t yet.
    d_h_t, d_c_t = None, d_c
    for block in reversed(steps.blocks()):
        wide = steps.widened(block)  # with its neighbours, which have the state before its first step
        rows, wide_rows = steps.rows(block), steps.rows(wide)
        n = rows.stop - rows.start
        inside = slice(rows.start - wide_rows.start, rows.stop - wide_rows.start)
        i, f, g, o = gates[:, rows]  # four times [n, H]
        # The forward keeps no h, so the caller may modify the output in place.
        _, _, _, o_wide = gates[:, wide_rows]
        # tanh_c and m: [n', H], h: [n', P or H]
        tanh_c, m, h = output_again(o_wide, cells[wide_rows], weight_hr)
        c_before = torch.cat([steps.previous(t, c_steps, c_0) for t in block])  # [n, H]
        da = da_rows[rows] if by_row else x.new_empty(n, 4 * H)  # factors, and then a's gradient
        dm_to_dc = x.new_empty(n, H)
        lstm_cell_derivatives(i, f, g, o, c_before, tanh_c[inside], da, dm_to_dc)

        parts = (da.view(n, 4, H)[:, :3], da[:, 3 * H :], dm_to_dc, f.conj(), da)
        views = zip(*(part.split_with_sizes(sizes[block.start : block.stop]) for part in parts))
        d_h_block: list[Tensor] = []  # with a projection, the gradient of h in each step
        for t, (da_ifg, da_o, dm_to_dc_t, f_t, da_t) in reversed(steps.in_order(zip(block, views))):
            b = sizes[t]
            if d_h_t is None:
                d_h_t = d_h[:b] if out_steps is None else d_h[:b] + out_steps[t]
                d_c_t = d_c[:b]
            if weight_hr is not None:
                d_h_block.append(d_h_t.clone() if out_steps is None else d_h_t)
            lstm_cell_backward(d_h_t, d_c_t, weight_hr_conj, da_ifg, da_o, dm_to_dc_t, f_t)

            before = steps.before(t)
            if out_steps is not None and before is not None and sizes[before] == b:
                d_h_t = add(out_steps[before], da_t)
            else:
                if need.h_0 or before is not None:
                    d_h[:b] = torch.mm(da_t, weight_hh_conj)
                d_h_t = None

        h_steps = dict(zip(wide, h.split_with_sizes(sizes[wide.start : wide.stop])))
        h_before = torch.cat([steps.previous(t, h_steps, h_0) for t in block])  # [n, P or H]
        d_h_all = torch.cat(d_h_block if reverse else d_h_block[::-1]) if d_h_block else None
        sums.add(steps.rows_of(x, block), h_before, m[inside], da, d_h_all)
        if by_row:
            h_rows[rows] = h_before
            if d_h_all is not None:
                d_h_rows[rows] = d_h_all
        if need.x:
            # Not oneDNN's product, whose sums over so many columns have twice MKL's error.
            torch.mm(da, weight_ih.conj(), out=d_x.view(N, x.size(-1))[rows])
    return d_x, d_h, d_c, *sums.results(), da_rows, h_rows, d_h_rows


class _WeightSums:
    """The gradients of the weights and the bias: sums over all blocks."""

    def __init__(self, d: Direction, need: Gradients) -> None:
        # nn.LSTM leaves its kernel for packed and projected input, and then sums step by step.
        piece = 512 if d.batch_sizes is None and d.weight_hr is None else 64
        self._ih = OuterSum(d.weight_ih, piece) if need.weight_ih else None
        self._hh = OuterSum(d.weight_hh, piece) if need.weight_hh else None
        self._hr = OuterSum(d.weight_hr, piece) if need.weight_hr and d.weight_hr is not None else None
        self._need_bias = need.bias
        self._bias = d.x.new_zeros(d.weight_hh.size(0) if need.bias else 0)  # [4H]

    def add(self, x: Tensor, h_before: Tensor, m: Tensor, da: Tensor, d_h: Tensor | None) -> None:
        """Add the n rows of a block.

        Args:
            x: the input, ``[n, I]``.
            h_before: the h before each step, ``[n, P or H]``.
            m: the m of each step, ``[n, H]``.
            da: the gradient of a, ``[n, 4H]``.
            d_h: with a projection the gradient of the h after each step, ``[n, P]``.
        """
        if self._ih is not None:
            self._ih.add(da, x.conj())
        if self._hh is not None:
            self._hh.add(da, h_before.conj())
        if self._hr is not None and d_h is not None:
            self._hr.add(d_h, m.conj())
        if self._need_bias:
            self._bias += da.sum(0)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of weight_ih, weight_hh, bias and weight_hr; empty where not wanted."""
        sums = (self._ih, self._hh, self._hr)
        ih, hh, hr = (self._bias.new_empty(0) if s is None else s.result() for s in sums)
        return ih, hh, self._bias, hr


@direction_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    d, (_, cells, *_, needs, by_row) = Direction.split(arguments)
    # The gradients of the states are working memory of the operator, so they are always there.
    need = Gradients(*needs)._replace(h_0=True, c_0=True)
    shapes = (t.shape if t is not None and n else (0,) for t, n in zip(Gradients.of(d), need))
    N, (four_H, P) = cells.size(0) if by_row else 0, d.weight_hh.shape
    rows = (N, four_H), (N, P), (N if d.weight_hr is not None else 0, P)
    return tuple(d.x.new_empty(shape) for shape in (*shapes, *rows))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    d, _ = Direction.split(inputs)
    _, _, _, gates, cells = output
    *tensors, ctx.reverse = d
    ctx.save_for_backward(*tensors, gates, cells)
    ctx.set_materialize_grads(False)  # otherwise autograd makes zeros for gates and cells


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of all arguments of ``direction``."""
    *tensors, gates, cells = ctx.saved_tensors
    d = Direction._make([*tensors, ctx.reverse])
    need = Gradients.of(Direction.split(ctx.needs_input_grad)[0])
    grad_output, grad_h_n, grad_c_n, *_ = grads
    grad_results = grad_output, grad_h_n, grad_c_n
    # Under autocast too the products are those of the forward's dtype, as in nn.LSTM's backward.
    kind, cast_to = gates.device.type, autocast_dtype(gates.device)
    with torch.autocast(kind, enabled=False) if cast_to else nullcontext():
        if choose_backward(Loop.FUSED) is Loop.PLAIN:
            gradients = plain_gradients(d, grad_results, need)
        else:
            values = direction_backward(*d, gates, cells, *grad_results, list(need), False)
            gradients = Gradients(*(v if n else None for v, n in zip(values, need)))
    return *gradients.by_argument(), None


direction.register_autograd(_backward, setup_context=_save)


# Shapes, without batch_sizes, come from torch.utils.flop_counter: two flops for a multiply and add.
@register_flop_formula(torch.ops.manual_lstm.direction)
def _(*shapes: Any, **kwargs: Any) -> int:
    d, _ = Direction.split(shapes)
    return 2 * prod(d.x[:-1]) * sum(prod(w) for w in (d.weight_ih, d.weight_hh, d.weight_hr) if w)


@register_flop_formula(torch.ops.manual_lstm.direction_backward)
def _(*shapes: Any, **kwargs: Any) -> int:
    d, (*_, needs, _) = Direction.split(shapes)
    need = Gradients(*needs)
    products = (need.x + need.weight_ih) * prod(d.weight_ih) + (1 + need.weight_hh) * prod(d.weight_hh)
    if d.weight_hr:
        products += (1 + need.weight_hr) * prod(d.weight_hr)
    return int(2 * prod(d.x[:-1]) * products)
