"""The gradient of each weight for every sample: sums over its steps alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from manual_lstm.cell import output_again
from manual_lstm.engine.direction import Direction, Gradients
from manual_lstm.engine.fused import direction_backward
from manual_lstm.engine.steps import PaddedSteps, split_gates

_ALL_NEEDS = Gradients(*[True] * len(Gradients._fields))
_STATES_ONLY = _ALL_NEEDS._replace(weight_ih=False, weight_hh=False, bias=False, weight_hr=False)


def sample_gradients(
    d: Direction, gates: Tensor, cells: Tensor, grads: Sequence[Tensor | None], v: int | None
) -> Gradients:
    """Run the backward of one direction, with a gradient of every weight for each sample.

    Args:
        d: the direction.
        gates, cells: as the operator has kept them.
        grads: the gradients of output, h_n and c_n.
        v: the number of samples; the rows of every step hold them in turn, ``[b / v, v]``. ``None``
            for packed or dense input in which each of the B sequences is a sample.

    Returns:
        The gradients: those of x and of the states as of one batch, those of weights ``[v, ...]``, or
        ``None`` where there is no such weight.
    """
    arguments = (*d, gates, cells, *grads, list(_STATES_ONLY), True)
    d_x, d_h, d_c, *_, da, h_before, d_h_rows = direction_backward(*arguments)
    x = d.x.reshape(-1, d.x.size(-1))  # [N, I]
    m = None
    if d.weight_hr is not None:
        *_, o = split_gates(d, gates)
        m = output_again(o, cells.view(o.shape), None)[1].flatten(0, -2)  # [N, H]
    if v is None:
        v = d.h_0.size(0)
        if d.batch_sizes is not None:  # rows of zeros, so that every step has a row of each sample
            steps = PaddedSteps(d)
            x, h_before, da = (steps.pad(rows).flatten(0, 1) for rows in (x, h_before, da))
            if m is not None:
                m, d_h_rows = (steps.pad(rows).flatten(0, 1) for rows in (m, d_h_rows))
    return Gradients(
        x=d_x,
        h_0=d_h,
        c_0=d_c,
        weight_ih=_outer_sums(da, x, v),
        weight_hh=_outer_sums(da, h_before, v),
        bias=None if d.bias is None else by_sample(da, v).sum(0),
        weight_hr=None if m is None else _outer_sums(d_h_rows, m, v),
    )


def batch_gradients(
    d: Direction, gates: Tensor, cells: Tensor, grads: Sequence[Tensor | None]
) -> Gradients:
    """Run the backward of one direction, as of one batch; the gradient of a missing weight is empty."""
    values = direction_backward(*d, gates, cells, *grads, list(_ALL_NEEDS), False)
    return Gradients.split(values)[0]


def by_sample(rows: Tensor, v: int) -> Tensor:
    """``[..., n * v, features]`` to ``[..., n, v, features]``."""
    *before, n, features = rows.shape
    return rows.reshape(*before, n // v, v, features)


def _outer_sums(left: Tensor, right: Tensor, v: int) -> Tensor:
    """Each sample's sum of its rows' outer products: ``[n * v, a], [n * v, b]`` to ``[v, a, b]``."""
    return torch.bmm(by_sample(left, v).permute(1, 2, 0), by_sample(right.conj(), v).transpose(0, 1))
