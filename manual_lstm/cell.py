"""One time step of the LSTM: the six equations, and nothing else."""

from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """What one time step makes, for the ``b`` sequences that have it."""

    i: Tensor  # the input gate, [b, H]
    f: Tensor  # the forget gate, [b, H]
    g: Tensor  # the cell gate, [b, H]
    o: Tensor  # the output gate, [b, H]
    c: Tensor  # the cell state after it, [b, H]
    m: Tensor  # o times tanh of c: the hidden state before its projection, [b, H]
    h: Tensor  # the hidden state after it, [b, P]; without a projection m itself


def lstm_cell(x_t: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor, weight_hr: Tensor | None) -> Step:
    r"""Take one step.

    .. math::
        i &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h + b_{hi}) \\
        f &= \sigma(W_{if} x_t + b_{if} + W_{hf} h + b_{hf}) \\
        g &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h + b_{hg}) \\
        o &= \sigma(W_{io} x_t + b_{io} + W_{ho} h + b_{ho}) \\
        c' &= f \odot c + i \odot g \\
        h' &= o \odot \tanh(c') \quad\text{or, projected,}\quad W_{hr} (o \odot \tanh(c'))

    The terms with :math:`x_t` and both biases do not depend on the state: the loop computes
    them for all steps in one product and hands them over as ``x_t``.

    Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000; the projection is
    that of Sak et al. 2014 (https://arxiv.org/abs/1402.1128).

    Args:
        x_t: the projected input of this step, ``[b, 4H]``, gates in the order i, f, g, o.
        h: the hidden state before this step, ``[b, H]``, or ``[b, P]`` with a projection.
        c: the cell state before this step, ``[b, H]``.
        weight_hh: ``[4H, H]``, or ``[4H, P]`` with a projection.
        weight_hr: ``[P, H]``, or ``None`` without a projection.

    Returns:
        The gates, and the states after this step, shaped like ``h`` and ``c``.
    """
    i, f, g, o = gates(torch.addmm(x_t, h, weight_hh.t()))  # four times [b, H]
    c = f * c + i * g
    return output_step(i, f, g, o, c, weight_hr)


def gates(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Make the gates i, f, g and o of what they are made of: :math:`\sigma, \sigma, \tanh, \sigma`.

    Args:
        a: ``[b, 4H]``, in the order i, f, g, o.

    Returns:
        Four tensors ``[b, H]``.
    """
    i, f, g, o = a.chunk(4, dim=-1)
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


def output_step(
    i: Tensor, f: Tensor, g: Tensor, o: Tensor, c: Tensor, weight_hr: Tensor | None
) -> Step:
    r"""Finish a step whose gates and cell state are known: :math:`h' = o \odot \tanh(c')`, projected.

    Args:
        i, f, g, o: the gates, ``[b, H]`` each.
        c: the cell state after this step, ``[b, H]``.
        weight_hr: ``[P, H]``, or ``None`` without a projection.

    Returns:
        The whole step. What differs in a cell of your own, ``_replace`` puts into it.
    """
    m = o * torch.tanh(c)
    return Step(i, f, g, o, c, m, m if weight_hr is None else torch.mm(m, weight_hr.t()))
