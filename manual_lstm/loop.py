"""The unrolled gate loop: one direction over time, in plain differentiable operations.

This file and ``cell.py`` are the LSTM. Which rows a step works on is ``engine/steps.py``'s to know. The
fused loop in ``engine/fused.py`` computes the same faster, and is tested against this one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from manual_lstm.cell import Step, is_subclass, lstm_cell, product
from manual_lstm.engine.context import is_tracing
from manual_lstm.engine.direction import AllSteps, Direction, Result
from manual_lstm.engine.gemm import with_columns_of_zeros
from manual_lstm.engine.steps import Steps, steps_of

# Takes one step, as lstm_cell does: x_t, h, c, weight_hh, weight_hr, and the rows of whatever else
# was prepared.
Cell = Callable[..., Step]


class Prepared(NamedTuple):
    """What a direction is run with."""

    x: Tensor  # the projected input of all steps, [T, B, 4H] or [N, 4H]
    cell: Cell
    of_steps: Sequence[Tensor] = ()  # what else each step gets its rows of, [T, B, ...] or [N, ...]


Prepare = Callable[[Direction], Prepared]

# Autograd adds up the gradient of each alias of weight_hh by itself, and then the aliases': over many
# steps, two short sums round off less than one long one.
_STEPS_OF_AN_ALIAS = 32


def run_plain(d: Direction, prepare: Prepare | None = None, keep: bool = False) -> Result:
    """Take all steps of one direction, one by one.

    Args:
        d: the direction.
        prepare: what projects the input and gives the cell; ``None`` for :func:`prepare_lstm`.
        keep: whether to return the steps.
    """
    x, cell, of_steps = prepare_lstm(d) if prepare is None else prepare(d)  # [T, B, 4H] or [N, 4H]
    uncut = d.batch_sizes is None and d.lengths is None and d.cuts is None
    if uncut and not keep and not is_tracing() and x.size(0) == 1:
        rows = [each.squeeze(0) for each in of_steps]
        step = cell(x.squeeze(0), d.h_0, d.c_0, d.weight_hh, d.weight_hr, *rows)  # no loop
        return Result(torch.stack([step.h]), step.h, step.c)

    steps = steps_of(d)
    inputs = steps.split(x)  # T times [b, 4H]
    others = [steps.split(each) for each in of_steps]  # T times [b, ...] each
    h, c, weight_hh = d.h_0, d.c_0, d.weight_hh
    outputs: list[Tensor] = []
    kept: list[Step] = []
    T = len(inputs)
    aliases = T > _STEPS_OF_AN_ALIAS and not is_subclass(weight_hh)
    for k, t in enumerate(steps.order(T)):
        if aliases and k % _STEPS_OF_AN_ALIAS == 0:
            weight_hh = d.weight_hh.view_as(d.weight_hh)
        before = steps.under_way(t, h), steps.under_way(t, c)  # [b, P or H] and [b, H]
        step = cell(inputs[t], *before, weight_hh, d.weight_hr, *(each[t] for each in others))
        h, c = steps.carry(t, step.h, h), steps.carry(t, step.c, c)
        outputs.append(step.h)
        if keep:
            kept.append(step)

    if not outputs:
        return _without_steps(d, x, keep)
    output = steps.join(steps.in_order(outputs))
    if not keep:
        return Result(output, h, c)
    kept = steps.in_order(kept)
    joined = _join(steps, kept, output)
    return Result(output, h, c, steps.all(joined, kept))


def _without_steps(d: Direction, x: Tensor, keep: bool) -> Result:
    """The result of no steps: an output without rows, and copies of the states.

    Like the operator's, all three depend on every argument, whose gradients are zeros.
    """
    tensors = [x, d.h_0, d.c_0, d.weight_hh, *([] if d.weight_hr is None else [d.weight_hr])]
    nothing = torch.cat([tensor.flatten()[:0] for tensor in tensors])  # [0]
    h, c = (torch.cat([state.flatten(), nothing]).view_as(state) for state in (d.h_0, d.c_0))
    output = nothing.view(*x.shape[:-1], d.h_0.size(-1))  # [0, B, P or H] or [0, P or H]
    empty = nothing.view(*x.shape[:-1], d.c_0.size(-1))  # [0, B, H] or [0, H]
    steps = AllSteps(Step(empty, empty, empty, empty, empty, empty, output), [])
    return Result(output, h, c, steps if keep else None)


def _join(steps: Steps, kept: list[Step], output: Tensor) -> Step:
    """Make one Step of all, ``[T, B, features]`` or packed ``[N, features]``."""
    i, f, g, o, c, m, _ = zip(*kept)
    m_is_h = kept[0].m is kept[0].h  # without a projection
    joined = [steps.join(parts) for parts in (i, f, g, o, c)]
    return Step._make([*joined, output if m_is_h else steps.join(m), output])


def prepare_lstm(d: Direction) -> Prepared:
    """Project the input of all steps; the cell is nn.LSTM's."""
    return Prepared(project(d.x, d.weight_ih, d.bias), lstm_cell)


def project(x: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """The input's part of the gates for all steps, one product: ``[..., I]`` to ``[..., 4H]``."""
    if weight_ih.dtype != x.dtype or is_subclass(weight_ih):
        a = product(x, weight_ih)
        return a if bias is None else a + bias
    return linear(*with_columns_of_zeros(x, weight_ih), bias)
