"""The steps of the fused loop on CUDA, where launching operations is what takes the time.

torch has one kernel for all of a step but its product. It is private, so it is looked up, and used once
it has given the results of ``cell.py`` for a small example in this process. Its names::

    h, c, gates = _thnn_fused_lstm_cell(input_part, recurrent_part, c_before)
    d_a, d_c_before = _thnn_fused_lstm_cell_backward_impl(d_h, d_c, c_before, c, gates)

with ``[b, 4H]`` for both parts, the gates and d_a, in the order i, f, g, o.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manual_lstm.cell import lstm_cell, lstm_cell_backward, lstm_cell_derivatives, output_again
from manual_lstm.engine.backward import WeightSums
from manual_lstm.engine.context import is_capturing
from manual_lstm.engine.cuts import BlockCuts, with_zeros, zero_rows
from manual_lstm.engine.direction import Direction, Gradients
from manual_lstm.engine.forward import Kept
from manual_lstm.engine.steps import BlockSteps, join_gates, split_gates

_cell: Any = getattr(torch.ops.aten, "_thnn_fused_lstm_cell", None)
_cell_backward: Any = getattr(torch.ops.aten, "_thnn_fused_lstm_cell_backward_impl", None)
_DTYPES = (torch.float32, torch.float64)
_trusted: dict[tuple[torch.device, torch.dtype], bool] = {}


def fits(d: Direction) -> bool:
    """Whether this file takes the steps of a direction."""
    return (
        d.x.is_cuda
        and d.weight_hr is None
        and d.x.dtype in _DTYPES
        and d.x.numel() > 0
        and is_trusted(d.x.device, d.x.dtype)
    )


def is_trusted(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel has been found to compute what ``cell.py`` says; tried at the first call."""
    known = _trusted.get((device, dtype))
    if known is None:
        if is_capturing(device):
            return False
        known = _trusted[device, dtype] = _agrees(device, dtype)
    return known


def _agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel computes a small example as ``cell.py`` does, forwards and backwards."""
    if _cell is None or _cell_backward is None:
        return False
    b, H = 3, 5
    values = torch.linspace(-2, 2, 11 * b * H, dtype=dtype, device=device).sin()
    a, recurrent, *states = values.split_with_sizes([4 * b * H, 4 * b * H, b * H, b * H, b * H])
    a, recurrent = a.view(b, 4 * H), recurrent.view(b, 4 * H)
    c, d_h, d_c = (state.view(b, H) for state in states)
    try:
        h_out, c_out, gates = _cell(a, recurrent, c)
        got = [h_out, c_out, gates, *_cell_backward(d_h, d_c, c, c_out, gates, False)[:2]]
    except (RuntimeError, TypeError):
        return False
    no_weight = a.new_zeros(4 * H, 1)
    step = lstm_cell(a + recurrent, a.new_zeros(b, 1), c, no_weight, None)
    da, dm_to_dc = torch.empty_like(a), torch.empty_like(c)
    lstm_cell_derivatives(*step[:4], c, output_again(step.o, step.c, None)[0], da, dm_to_dc)
    da_ifg, da_o = da.view(b, 4, H).split_with_sizes([3, 1], 1)
    lstm_cell_backward(d_h, d_c, d_c.unsqueeze(1), None, da_ifg, da_o.squeeze(1), dm_to_dc, step.f)
    expected = [step.h, step.c, torch.cat(step[:4], 1), da, d_c]
    tolerance = 64 * torch.finfo(dtype).eps
    return all(torch.allclose(x, y, tolerance, tolerance) for x, y in zip(got, expected))


def run_forward_on_cuda(d: Direction, save: bool) -> Kept:
    """As :func:`manual_lstm.engine.forward.run_forward`."""
    steps = BlockSteps(d)
    N, H = steps.starts[-1], d.c_0.size(1)
    x, weight_ih_t, weight_hh_t = d.x.reshape(N, -1), d.weight_ih.t(), d.weight_hh.t()
    a = torch.mm(x, weight_ih_t) if d.bias is None else torch.addmm(d.bias, x, weight_ih_t)  # [N, 4H]
    h, c = d.h_0, d.c_0
    h_steps: list[Tensor] = []
    c_steps: list[Tensor] = []
    gates_steps: list[Tensor] = []
    cuts = BlockCuts(d, steps).of(range(len(steps.sizes)))
    for a_t, cut in steps.in_order(zip(a.split_with_sizes(steps.sizes), cuts)):
        b = a_t.size(0)
        if b != h.size(0):
            h, c = steps.resized(h, b, d.h_0), steps.resized(c, b, d.c_0)
        if cut is not None:
            h, c = with_zeros(h, cut), with_zeros(c, cut)
        h, c, gates_t = _cell(a_t, torch.mm(h, weight_hh_t), c)
        h_steps.append(h)
        if save or not steps.dense:
            c_steps.append(c)
        if save:
            gates_steps.append(gates_t)
    h_rows = torch.cat(steps.in_order(h_steps))  # [N, H]
    cells = torch.cat(steps.in_order(c_steps)) if c_steps else c.new_empty(0, H)
    output, h_n = h_rows.view(*d.x.shape[:-1], H), steps.last(h_rows, d.h_0)
    c_n = c if steps.dense else steps.last(cells, d.c_0)
    if not save:
        return Kept(output, h_n, c_n, a.new_empty(0, H), a.new_empty(0, H))
    gates = torch.cat(steps.in_order(gates_steps))  # [N, 4H]
    by_gate = (gate.reshape(output.shape) for gate in gates.chunk(4, 1))
    return Kept(output, h_n, c_n, join_gates(d, *by_gate), cells)


def run_backward_on_cuda(
    d: Direction,
    gates: Tensor,
    cells: Tensor,
    grads: Sequence[Tensor | None],
    need: Gradients,
    by_row: bool,
) -> tuple[Tensor, ...]:
    """As :func:`manual_lstm.engine.backward.run_backward`."""
    steps = BlockSteps(d)
    N, B, H = steps.starts[-1], d.h_0.size(0), d.c_0.size(1)
    sizes, everything = steps.sizes, range(len(steps.sizes))
    grad_output, grad_h_n, grad_c_n = grads
    by_gate = [gate.reshape(N, H) for gate in split_gates(d, gates)]  # i, f, g, o
    h = output_again(by_gate[3], cells, None)[2]  # [N, H]
    h_before = steps.shift(h, everything, d.h_0, d.h_0)
    c_before = steps.shift(cells, everything, d.c_0, d.c_0)
    cuts = BlockCuts(d, steps)
    h_before, c_before = cuts.zero(h_before, everything), cuts.zero(c_before, everything)
    cut_steps = cuts.of(everything)
    gates_steps = torch.cat(by_gate, 1).split_with_sizes(sizes)
    c_steps, c_before_steps = cells.split_with_sizes(sizes), c_before.split_with_sizes(sizes)
    out_rows = cells.new_zeros(N, H) if grad_output is None else grad_output.reshape(N, H)
    out_steps = out_rows.split_with_sizes(sizes)

    # The gradients of both states; the rows of sequences that are not under way wait in them.
    d_h = cells.new_zeros(B, H) if grad_h_n is None else grad_h_n
    d_c = cells.new_zeros(B, H) if grad_c_n is None else grad_c_n
    da_steps: list[Tensor] = [cells] * len(sizes)
    for t in steps.in_order(everything)[::-1]:
        b = sizes[t]
        d_h_t, d_c_t = (d_h, d_c) if b == B else (d_h[:b], d_c[:b])
        da, d_c_t, *_ = _cell_backward(
            d_h_t + out_steps[t], d_c_t, c_before_steps[t], c_steps[t], gates_steps[t], False
        )
        da_steps[t] = da
        d_h_t = torch.mm(da, d.weight_hh)
        if (cut := cut_steps[t]) is not None:
            d_h_t, d_c_t = zero_rows(d_h_t, cut), zero_rows(d_c_t, cut)
        d_h, d_c = (
            (d_h_t, d_c_t) if b == B else (torch.cat([d_h_t, d_h[b:]]), torch.cat([d_c_t, d_c[b:]]))
        )
    da = torch.cat(da_steps)  # [N, 4H]
    sums = WeightSums(d, need)
    x = d.x.reshape(N, -1)
    sums.add(x, h_before, h, da, h)
    d_x = torch.mm(da, d.weight_ih).view(d.x.shape) if need.x else x.new_empty(0)
    rows = (da, h_before) if by_row else (x.new_empty(0, 4 * H), x.new_empty(0, H))
    return d_x, d_h, d_c, *sums.results(), *rows, x.new_empty(0, H)
