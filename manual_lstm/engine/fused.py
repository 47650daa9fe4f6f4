r"""The gate loop of one direction as one operator, with its backward derived by hand.

``manual_lstm::direction`` computes what :func:`manual_lstm.loop.plain_direction` computes, faster:
autograd does not watch its steps, so they write into buffers made once, and what belongs to all
steps is done for many of them in one call.

**The backward.** Write :math:`a = W_{ih} x_t + W_{hh} h_{t-1} + b` for what the four gates are made
of, so that one step is

.. math::
    i = \sigma(a_i),\; f = \sigma(a_f),\; g = \tanh(a_g),\; o = \sigma(a_o),\quad
    c_t = f c_{t-1} + i g,\quad m_t = o \tanh(c_t),\quad h_t = m_t \text{ or } W_{hr} m_t

Go through time from the last step to the first, and let :math:`\delta z` be the gradient of the loss
by z. Step t is told :math:`\delta h_t`, the output's gradient plus what step t + 1 passes back, and
:math:`\delta c_t` from step t + 1; the last step has them from h_n and c_n. By the chain rule, from
the last line to the first,

.. math::
    \delta m &= \delta h_t \text{ or } W_{hr}^T \delta h_t \\
    \delta c_t &\mathrel{+}= \delta m \; o (1 - \tanh^2 c_t) \\
    \delta a_o &= \delta m \tanh(c_t) \; o (1 - o) \\
    \delta a_i &= \delta c_t \; g \; i (1 - i) \\
    \delta a_f &= \delta c_t \; c_{t-1} \; f (1 - f) \\
    \delta a_g &= \delta c_t \; i \; (1 - g^2) \\
    \delta c_{t-1} &= \delta c_t \; f, \qquad \delta h_{t-1} = W_{hh}^T \delta a

using :math:`\sigma' = \sigma (1 - \sigma)` and :math:`\tanh' = 1 - \tanh^2`. All factors behind the
first of each line come from the forward: they are computed for a block of steps at once, and the
loop multiplies. The weights took part in every step, so their gradients are sums over the steps,
which are products of all the rows of a block:

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

from manual_lstm.engine.context import transforms_active
from manual_lstm.engine.dtypes import autocast_dtype
from manual_lstm.engine.gemm import OuterSum, gate_products, repeated_product
from manual_lstm.engine.steps import Steps
from manual_lstm.loop import plain_direction

_contiguous = torch.contiguous_format  # of all that is returned: a compiled caller counts on it
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input  # grad * y * (1 - y)
_tanh_backward = torch.ops.aten.tanh_backward.grad_input  # grad * (1 - y * y)


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
    """Run one direction: see :func:`manual_lstm.loop.plain_direction` for the arguments.

    Args:
        save: whether to keep what the backward needs.

    Returns:
        The output, h_n and c_n; and with ``save`` for every row the four gates ``[4, N, H]`` and
        the cell state ``[N, H]``, which otherwise are empty.
    """
    steps = Steps(x, batch_sizes, reverse)
    sizes, N, (B, H) = steps.sizes, steps.starts[-1], c_0.shape
    if sizes and sizes[0] != B:  # a compiled caller cannot look into batch_sizes
        raise RuntimeError(f"h_0 and c_0 should have {sizes[0]} sequences, as the input, but got {B}")
    products = gate_products(weight_ih, weight_hh, bias, N, len(sizes))
    # Views are made for all steps at once, because one costs as much as a small operation.
    output = x.new_empty(*x.shape[:-1], h_0.size(1))
    rows = output.view(N, h_0.size(1))
    outputs = rows.split_with_sizes(sizes)  # T times [b, P or H]
    h_steps = products.widen(rows).split_with_sizes(sizes, 1)
    # What nobody needs after its step shares one place, [4, b, H] or [b, H] side by side for any b.
    places = {}
    a_place, tanh_place = x.new_empty(4 * B * H), x.new_empty(B * H)
    for b in set(sizes):
        a = a_place[: 4 * b * H].view(4, b, H)
        places[b] = a, a[2], tanh_place[: b * H].view(b, H)
    if save:
        gates, cells = x.new_empty(4, N, H), x.new_empty(N, H)
        c_steps = cells.split_with_sizes(sizes)  # T times [b, H]
        i_steps, f_steps, g_steps, o_steps = (gate.split_with_sizes(sizes) for gate in gates)
        ifgo_steps = gates.split_with_sizes(sizes, 1)  # T times [4, b, H]
        views = list(zip(ifgo_steps, i_steps, f_steps, g_steps, o_steps, c_steps))
    else:
        gates, cells = x.new_empty(0), x.new_empty(0)
        c = c_0.clone(memory_format=_contiguous)  # where a finished sequence's state waits
        gates_place = x.new_empty(4 * B * H)
        shared = {}
        for b in set(sizes):
            ifgo = gates_place[: 4 * b * H].view(4, b, H)
            shared[b] = ifgo, *ifgo.unbind(0), c[:b]
        views = [shared[b] for b in sizes]

    held, h_t, c_t = B, products.widen(h_0), c_0 if save else c  # the state before a step
    for block in steps.blocks():
        projected = products.project(steps.rows_of(x, block), sizes[block.start : block.stop])
        for t, x_t in steps.in_order(zip(block, projected)):
            b = sizes[t]
            if b != held:
                held, h_t = b, products.widen(steps.previous(t, outputs, h_0))
                c_t = steps.previous(t, c_steps, c_0) if save else c[:b]  # [b, H]
            a, a_g, tanh_c = places[b]
            ifgo, i, f, g, o, c_out = views[t]
            products.add(x_t, h_t, a)  # [4, b, H]
            torch.sigmoid(a, out=ifgo)  # g's too: one call is faster than two
            torch.tanh(a_g, out=g)
            c_t = torch.mul(f, c_t, out=c_out).addcmul_(i, g)
            torch.tanh(c_t, out=tanh_c)
            if weight_hr is None:
                torch.mul(o, tanh_c, out=outputs[t])
            else:
                torch.mm(o * tanh_c, weight_hr.t(), out=outputs[t])
            h_t = h_steps[t]  # the output of this step

    h_n = steps.last(outputs, h_0)
    c_n = steps.last(c_steps, c_0) if save else c
    return output, h_n, c_n, gates, cells


@direction.register_fake
def _(
    x: Tensor, batch_sizes: Tensor | None, h_0: Tensor, c_0: Tensor, *weights_reverse_save: Any
) -> tuple[Tensor, ...]:
    save = weights_reverse_save[-1]
    H = c_0.size(1)
    output = x.new_empty(*x.shape[:-1], h_0.size(1))
    h_n, c_n = x.new_empty(h_0.shape), x.new_empty(c_0.shape)
    if not save:
        return output, h_n, c_n, x.new_empty(0), x.new_empty(0)
    N = x.size(0) * x.size(1) if batch_sizes is None else x.size(0)
    return output, h_n, c_n, x.new_empty(4, N, H), x.new_empty(N, H)


@torch.library.custom_op("manual_lstm::direction_backward", mutates_args=())
def direction_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
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
    needs: list[bool],
    by_row: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run one direction's backward: the module's docstring derives it.

    Args:
        needs: which of the gradients that are returned are wanted.
        by_row: whether to return for every row what the weights' gradients are sums of.

    Returns:
        The gradients of x, h_0, c_0, weight_ih, weight_hh, bias and weight_hr; empty where not wanted.
        With ``by_row`` then the gradient of a, ``[N, 4H]``, the h before the step, ``[N, P or H]``,
        and with a projection the gradient of the h after it, ``[N, P]``; otherwise empty.
    """
    steps = Steps(x, batch_sizes, reverse)
    sizes, N, H, B = steps.sizes, steps.starts[-1], c_0.size(1), c_0.size(0)
    need_x, need_h, _, need_ih, need_hh, need_bias, need_hr = needs
    d_x = x.new_empty(x.shape if need_x else 0)
    d_bias = x.new_zeros(4 * H if need_bias else 0)
    # nn.LSTM leaves its kernel for packed and projected input, and then sums step by step.
    piece = 512 if batch_sizes is None and weight_hr is None else 64
    d_ih = OuterSum(weight_ih, piece) if need_ih else None
    d_hh = OuterSum(weight_hh, piece) if need_hh else None
    d_hr = OuterSum(weight_hr, piece) if need_hr and weight_hr is not None else None
    # The gradients of both states; the rows of sequences that are not under way wait in them.
    d_h = x.new_zeros(h_0.shape) if grad_h_n is None else grad_h_n.clone(memory_format=_contiguous)
    d_c = x.new_zeros(c_0.shape) if grad_c_n is None else grad_c_n.clone(memory_format=_contiguous)
    if grad_output is not None:
        out_steps = grad_output.reshape(N, h_0.size(1)).split_with_sizes(sizes)  # [b, P or H]
    c_steps = cells.split_with_sizes(sizes)  # T times [b, H]
    da_rows = x.new_empty(N if by_row else 0, 4 * H)
    h_rows = x.new_empty(N if by_row else 0, h_0.size(1))
    d_h_rows = x.new_empty(N if by_row and weight_hr is not None else 0, h_0.size(1))
    weight_back = weight_hh.conj()
    add = repeated_product(weight_back, B)

    d_h_t = None  # the gradient of the step at hand, [b, P or H], where the step after it knows
    for block in reversed(steps.blocks()):
        rows = steps.rows(block)
        n = rows.stop - rows.start
        # The block and its neighbours: the state before its first step is one of these.
        wider = range(max(block.start - 1, 0), min(block.stop + 1, len(sizes)))
        wide_rows = steps.rows(wider)
        tanh_wide = torch.tanh(cells[wide_rows])  # [n', H]; computed again, not kept
        inside = slice(rows.start - wide_rows.start, rows.stop - wide_rows.start)
        i, f, g, o = gates[:, rows].conj()  # four times [n, H]
        tanh_c = tanh_wide[inside].conj()  # [n, H]
        c_before = torch.cat([steps.previous(t, c_steps, c_0) for t in block]).conj()  # [n, H]

        # What the loop multiplies, for all steps of the block at once; da becomes the gradient of a.
        da = da_rows[rows] if by_row else x.new_empty(n, 4 * H)
        dm_to_dc = x.new_empty(n, H)
        da_i, da_f, da_g, da_o = da.chunk(4, 1)  # four times [n, H]
        _sigmoid_backward(g, i.conj(), grad_input=da_i)
        _sigmoid_backward(c_before, f.conj(), grad_input=da_f)
        _tanh_backward(i, g.conj(), grad_input=da_g)
        _sigmoid_backward(tanh_c, o.conj(), grad_input=da_o)
        _tanh_backward(o, tanh_c.conj(), grad_input=dm_to_dc)

        b_sizes = sizes[block.start : block.stop]
        # a's four gates and the three that hang on c; o's; from m to c; from c to the c before
        parts = (da, da.view(n, 4, H)[:, :3], da_o, dm_to_dc, f)
        views = [part.split_with_sizes(b_sizes) for part in parts]
        d_h_block: list[Tensor] = []
        for t, (da_t, da_ifg, da_o_t, dm_to_dc_t, f_t) in reversed(
            steps.in_order(zip(block, zip(*views)))
        ):
            b, before = sizes[t], t + 1 if reverse else t - 1  # the step taken before this one
            if d_h_t is None:
                d_h_t = d_h[:b] if grad_output is None else d_h[:b] + out_steps[t]
                d_c_t = d_c[:b]
            d_m = d_h_t
            if weight_hr is not None:
                d_h_block.append(d_h_t.clone() if grad_output is None else d_h_t)
                d_m = d_h_t @ weight_hr.conj()  # [b, H]
            d_c_t.addcmul_(d_m, dm_to_dc_t)
            da_ifg.mul_(d_c_t.unsqueeze(1))
            da_o_t.mul_(d_m)
            d_c_t.mul_(f_t)

            first = not 0 <= before < len(sizes)
            if grad_output is not None and not first and sizes[before] == b:
                d_h_t = add(out_steps[before], da_t)
            else:
                if need_h or not first:
                    d_h[:b] = torch.mm(da_t, weight_back)
                d_h_t = None

        x_block = steps.rows_of(x, block)  # [n, I]
        if d_ih is not None:
            d_ih.add(da, x_block.conj())
        if by_row or d_hh is not None or d_hr is not None:
            # h is not kept either, so that its owner may write to it: it is o tanh(c) once more.
            m = gates[3, wide_rows] * tanh_wide  # [n', H]
            h = m if weight_hr is None else m @ weight_hr.t()  # [n', P or H]
            d_h_block = d_h_block if reverse else d_h_block[::-1]
            if d_hr is not None:
                d_hr.add(torch.cat(d_h_block), m[inside].conj())
            if by_row or d_hh is not None:
                h_steps = dict(zip(wider, h.split_with_sizes(sizes[wider.start : wider.stop])))
                h_before = torch.cat([steps.previous(t, h_steps, h_0) for t in block])  # [n, P or H]
            if d_hh is not None:
                d_hh.add(da, h_before.conj())
            if by_row:
                h_rows[rows] = h_before
                if weight_hr is not None:
                    torch.cat(d_h_block, out=d_h_rows[rows])
        if need_bias:
            d_bias += da.sum(0)
        if need_x:
            # Not oneDNN's, whose sums over so many columns have twice MKL's error.
            torch.mm(da, weight_ih.conj(), out=d_x.view(N, x.size(-1))[rows])
    d_weights = (x.new_empty(0) if total is None else total.result() for total in (d_ih, d_hh, d_hr))
    d_weight_ih, d_weight_hh, d_weight_hr = d_weights
    weights = d_weight_ih, d_weight_hh, d_bias, d_weight_hr
    return d_x, d_h, d_c, *weights, da_rows, h_rows, d_h_rows


@direction_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _, _, _, x, _, h_0, c_0, weight_ih, weight_hh, bias, weight_hr, *rest = arguments
    _, _, cells, needs, by_row = rest if len(rest) == 5 else (*rest, False)
    inputs = (x, h_0, c_0, weight_ih, weight_hh, bias, weight_hr)
    always = (False, True, True, False, False, False, False)  # the states' are its working memory
    N, (P, four_H) = cells.size(0) if by_row else 0, weight_hh.shape[::-1]
    return (
        *(
            x.new_empty(t.shape if t is not None and (need or known) else 0)
            for t, need, known in zip(inputs, needs, always)
        ),
        x.new_empty(N, four_H),
        x.new_empty(N, P),
        x.new_empty(N if weight_hr is not None else 0, P),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, reverse, _ = inputs
    ctx.save_for_backward(*tensors, *output[3:])
    ctx.reverse = reverse
    ctx.set_materialize_grads(False)  # nobody has a gradient for what is kept for ourselves


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of all arguments of ``direction``."""
    *tensors, gates, cells = ctx.saved_tensors
    needed = [k for k in range(8) if ctx.needs_input_grad[k] and k != 1]
    results: list[Tensor | None] = [None] * 10
    # Under autocast too the products are those of the forward's dtype, as in nn.LSTM's backward.
    kind, cast_to = gates.device.type, autocast_dtype(gates.device)
    with torch.autocast(kind, enabled=False) if cast_to else nullcontext():
        if torch.is_grad_enabled() or transforms_active():
            # The gradients are to be differentiated themselves: then autograd, through the plain loop.
            with torch.enable_grad():
                # Views, so that h_0 and c_0 may be one tensor and have each its own gradient.
                inputs: list[Any] = [t.view_as(t) if k in needed else t for k, t in enumerate(tensors)]
                inputs.append(ctx.reverse)
                outputs = plain_direction(*inputs)
            # Without a step, the states depend on no weight.
            pairs = [(o, g) for o, g in zip(outputs, grads) if g is not None and o.requires_grad]
            gradients = torch.autograd.grad(
                [o for o, _ in pairs],
                [inputs[k] for k in needed],
                [g for _, g in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        else:
            needs = [k in needed for k in (0, 2, 3, 4, 5, 6, 7)]
            every = direction_backward(*grads[:3], *tensors, ctx.reverse, gates, cells, needs)
            gradients = tuple(g for g, need in zip(every, needs) if need)
    for k, gradient in zip(needed, gradients):
        results[k] = gradient
    return tuple(results)


direction.register_autograd(_backward, setup_context=_save)


# Shapes, without batch_sizes, come from torch.utils.flop_counter: two flops for a multiply and add.
@register_flop_formula(torch.ops.manual_lstm.direction)
def _(
    x: list[int],
    batch_sizes: list[int] | None,
    h_0: list[int],
    c_0: list[int],
    weight_ih: list[int],
    weight_hh: list[int],
    bias: list[int] | None,
    weight_hr: list[int] | None,
    *args: Any,
    **kwargs: Any,
) -> int:
    weights = [weight_ih, weight_hh] + ([weight_hr] if weight_hr else [])
    return sum(2 * prod(x[:-1]) * prod(weight) for weight in weights)


@register_flop_formula(torch.ops.manual_lstm.direction_backward)
def _(
    grad_output: list[int] | None,
    grad_h_n: list[int] | None,
    grad_c_n: list[int] | None,
    x: list[int],
    batch_sizes: list[int] | None,
    h_0: list[int],
    c_0: list[int],
    weight_ih: list[int],
    weight_hh: list[int],
    bias: list[int] | None,
    weight_hr: list[int] | None,
    reverse: bool,
    gates: list[int],
    cells: list[int],
    needs: list[bool],
    by_row: bool = False,
    **kwargs: Any,
) -> int:
    need_x, _, _, need_ih, need_hh, _, need_hr = needs
    products = (need_x + need_ih) * prod(weight_ih) + (1 + need_hh) * prod(weight_hh)
    if weight_hr:
        products += (1 + need_hr) * prod(weight_hr)
    return 2 * prod(x[:-1]) * products


def fused_direction(
    x: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    weight_hr: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction by the operator; as :func:`manual_lstm.loop.plain_direction`."""
    tensors = (x, batch_sizes, h_0, c_0, weight_ih, weight_hh, bias, weight_hr)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    output, h_n, c_n, *_ = direction(*tensors, reverse, save)
    return output, h_n, c_n
