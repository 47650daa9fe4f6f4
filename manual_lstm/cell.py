r"""One time step of the LSTM in three forms: the textbook's, the same into buffers, and its derivative.

All mathematics of a step is in this file. Write :math:`a = W_{ih} x_t + W_{hh} h_{t-1} + b` for what
the four gates are made of. A step is then

.. math::
    i = \sigma(a_i),\; f = \sigma(a_f),\; g = \tanh(a_g),\; o = \sigma(a_o),\quad
    c_t = f \odot c_{t-1} + i \odot g,\quad m_t = o \odot \tanh(c_t),\quad
    h_t = m_t \text{ or, projected, } W_{hr} m_t

- :func:`lstm_cell` is the textbook form. Plain loops call it, and autograd differentiates it.
- :func:`lstm_cell_out` writes the same step into buffers. The fused loop calls it.
- :func:`lstm_cell_derivatives` and :func:`lstm_cell_backward` are its derivative. The backward of the
  fused loop calls them.

Whoever changes an equation changes it in each form.

Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000. The projection is that of Sak
et al. 2014 (https://arxiv.org/abs/1402.1128).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear


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

    The terms with :math:`x_t` and both biases do not depend on the state. The loop computes
    them for all steps in one product and passes them as ``x_t``.

    Args:
        x_t: the projected input of this step, ``[b, 4H]``, gates in the order i, f, g, o.
        h: the hidden state before this step, ``[b, H]``, or ``[b, P]`` with a projection.
        c: the cell state before this step, ``[b, H]``.
        weight_hh: ``[4H, H]``, or ``[4H, P]`` with a projection.
        weight_hr: ``[P, H]``, or ``None`` without a projection.

    Returns:
        The gates, and the states after this step, shaped like ``h`` and ``c``.
    """
    i, f, g, o = gates(add_product(x_t, h, weight_hh))  # four times [b, H]
    c = f * c + i * g
    return output_step(i, f, g, o, c, weight_hr)


def add_product(x: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """Return :math:`x + h W^T`, for ``[b, N]``, ``[b, K]`` and ``[N, K]``. See :func:`product`."""
    if weight.dtype == h.dtype and not is_subclass(weight):
        return torch.addmm(x, h, weight.t())
    return x + product(h, weight)


def product(h: Tensor, weight: Tensor) -> Tensor:
    """Return :math:`h W^T`, for ``[b, K]`` and ``[N, K]``, in the dtype of ``h``.

    A weight of another dtype, of low precision where a layer takes one step, is multiplied in its own.
    There ``h`` may have more dimensions, and also where the weight is a subclass of Tensor (quantized,
    for example), of which only :func:`torch.nn.functional.linear` is asked.
    """
    if is_subclass(weight):
        return linear(h, weight)
    if weight.dtype == h.dtype:
        return torch.mm(h, weight.t())
    return linear(h.to(weight.dtype), weight).to(h.dtype)


def is_subclass(weight: Tensor) -> bool:
    """Whether the weight stands for other tensors, as torchao's and DTensor do."""
    return hasattr(type(weight), "__tensor_flatten__")


def gates(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Return the gates i, f, g and o: :math:`\sigma(a_i), \sigma(a_f), \tanh(a_g), \sigma(a_o)`.

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
        The whole step. A cell of your own replaces what differs with ``_replace``.
    """
    m = o * torch.tanh(c)
    return Step(i, f, g, o, c, m, m if weight_hr is None else product(m, weight_hr))


def lstm_cell_out(
    c: Tensor,
    weight_hr_t: Tensor | None,
    a_ifo: Tensor,
    i: Tensor,
    f: Tensor,
    g: Tensor,
    o: Tensor,
    c_out: Tensor,
    h_out: Tensor,
) -> None:
    """Take the same step as :func:`lstm_cell`, into buffers.

    Args:
        c: the cell state before this step, ``[b, H]``. It may be ``c_out``.
        weight_hr_t: weight_hr, transposed, ``[H, P]``, or ``None`` without a projection.
        a_ifo: the pre-activations of the gates i, f and o, ``[3, b, H]``. Becomes these gates.
        i, f, o: its views, ``[b, H]`` each.
        g: the pre-activation of the cell gate, ``[b, H]``. Becomes it.
        c_out: receives the cell state after this step, ``[b, H]``.
        h_out: receives the hidden state after this step, ``[b, P or H]``.
    """
    a_ifo.sigmoid_()
    g.tanh_()
    if c is c_out:
        c.mul_(f)
    else:
        torch.mul(f, c, out=c_out)
    c_out.addcmul_(i, g)
    if weight_hr_t is None:
        torch.tanh(c_out, out=h_out).mul_(o)
    else:
        torch.mm(torch.tanh(c_out).mul_(o), weight_hr_t, out=h_out)


def output_again(o: Tensor, c: Tensor, weight_hr: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute tanh(c), m and h once more, for a backward that has kept only o and c.

    Args:
        o: output gates, ``[..., H]``.
        c: cell states after their steps, ``[..., H]``.
        weight_hr: ``[P, H]``, or ``None`` without a projection.

    Returns:
        tanh(c) and m, ``[..., H]``, and h, ``[..., P or H]``.
    """
    tanh_c = torch.tanh(c)
    m = o * tanh_c
    return tanh_c, m, m if weight_hr is None else torch.matmul(m, weight_hr.t())


def lstm_cell_derivatives(
    i: Tensor,
    f: Tensor,
    g: Tensor,
    o: Tensor,
    c_before: Tensor,
    tanh_c: Tensor,
    da: Tensor,
    dm_to_dc: Tensor,
) -> None:
    r"""Write the factors of a step's derivative that do not depend on the loss.

    With :math:`\sigma' = \sigma (1 - \sigma)` and :math:`\tanh' = 1 - \tanh^2` they are

    .. math::
        \frac{\partial c_t}{\partial a_i} = g \; i (1 - i),\quad
        \frac{\partial c_t}{\partial a_f} = c_{t-1} \; f (1 - f),\quad
        \frac{\partial c_t}{\partial a_g} = i \; (1 - g^2),\quad
        \frac{\partial m_t}{\partial a_o} = \tanh(c_t) \; o (1 - o),\quad
        \frac{\partial m_t}{\partial c_t} = o (1 - \tanh^2 c_t)

    They need only what the forward has kept, so one call serves the n rows of many steps. For complex
    numbers every factor is conjugated.

    Args:
        i, f, g, o: the gates, ``[..., H]`` each.
        c_before: the cell states before the steps, ``[..., H]``.
        tanh_c: tanh of the cell states after the steps, ``[..., H]``.
        da: receives the first four, ``[..., 4H]``.
        dm_to_dc: receives the last, ``[..., H]``.
    """
    da_i, da_f, da_g, da_o = da.chunk(4, -1)  # four times [..., H]
    # sigmoid_backward(d, y) is d y (1 - y), tanh_backward(d, y) is d (1 - y * y), both conjugate y.
    torch.ops.aten.sigmoid_backward.grad_input(g.conj(), i, grad_input=da_i)
    torch.ops.aten.sigmoid_backward.grad_input(c_before.conj(), f, grad_input=da_f)
    torch.ops.aten.tanh_backward.grad_input(i.conj(), g, grad_input=da_g)
    torch.ops.aten.sigmoid_backward.grad_input(tanh_c.conj(), o, grad_input=da_o)
    torch.ops.aten.tanh_backward.grad_input(o.conj(), tanh_c, grad_input=dm_to_dc)


def lstm_cell_backward(
    d_h: Tensor,
    d_c: Tensor,
    d_c_wide: Tensor,
    weight_hr_conj: Tensor | None,
    da_ifg: Tensor,
    da_o: Tensor,
    dm_to_dc: Tensor,
    f_conj: Tensor,
) -> None:
    r"""Go back through one step, in place: the chain rule from the step's last line to its first.

    .. math::
        \delta m_t &= \delta h_t \text{ or, projected, } W_{hr}^T \delta h_t \\
        \delta c_t &\mathrel{+}= \delta m_t \; \partial m_t / \partial c_t \\
        \delta a_{i,f,g} &= \delta c_t \; \partial c_t / \partial a_{i,f,g},\quad
        \delta a_o = \delta m_t \; \partial m_t / \partial a_o \\
        \delta c_{t-1} &= \delta c_t \; f

    where :math:`\delta z` is the gradient of the loss by z.

    Args:
        d_h: the gradient of h, ``[b, P or H]``.
        d_c: the gradient of c from the step after this one, ``[b, H]``. Becomes that of the c before.
        d_c_wide: a view of it, ``[b, 1, H]``.
        weight_hr_conj: weight_hr, conjugated, ``[P, H]``, or ``None`` without a projection.
        da_ifg: factors by :func:`lstm_cell_derivatives`, ``[b, 3, H]``. Becomes a's gradient.
        da_o: the same for the output gate, ``[b, H]``.
        dm_to_dc: the factor from m to c, ``[b, H]``.
        f_conj: the forget gate, conjugated, ``[b, H]``.
    """
    d_m = d_h if weight_hr_conj is None else d_h @ weight_hr_conj  # [b, H]
    d_c.addcmul_(d_m, dm_to_dc)
    da_ifg.mul_(d_c_wide)
    da_o.mul_(d_m)
    d_c.mul_(f_conj)
