r"""Six cells from the literature, each a ManualLSTM with other equations.

They take nn.LSTM's arguments, and what more each needs as keyword arguments. Everything that ManualLSTM
does, they do: layers, directions, packed input, projection, ``unroll``, transforms, ``torch.compile``.

A swap does not run ``__init__``: ``replace_lstm(model, layer_class=ZoneoutLSTM)`` and
``ZoneoutLSTM.from_lstm(lstm)`` give a layer the numbers that stand in the class. Change them on the
layer afterwards (``layer.zoneout_h = 0.2``), or swap to a subclass that has others:

>>> from manual_lstm.cells import ZoneoutLSTM
>>> class MyZoneout(ZoneoutLSTM):
...     zoneout_h, zoneout_c = 0.2, 0.2
"""

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, layer_norm

from manual_lstm.cell import Step, gates, output_step
from manual_lstm.engine.custom import CellWeights
from manual_lstm.module import ManualLSTM


class LayerNormLSTM(ManualLSTM):
    r"""Normalises the gates and the cell state: Ba, Kiros & Hinton 2016 (https://arxiv.org/abs/1607.06450).

    Equations 20 to 22 of the paper:

    .. math::
        a &= LN(W_{hh} h_{t-1}) + LN(W_{ih} x_t) + b \\
        c_t &= \sigma(a_f) \odot c_{t-1} + \sigma(a_i) \odot \tanh(a_g) \\
        h_t &= \sigma(a_o) \odot \tanh(LN(c_t))

    where each LN has a gain and a bias, and normalises all four gates as one vector.

    Args:
        *arguments, **options: as for :class:`~manual_lstm.ManualLSTM`.
        eps (float): what each LN adds to the variance.

    Attributes:
        ln_x_l[k], ln_h_l[k]: gain and bias, ``[2, 4H]``, from ones and zeros.
        ln_c_l[k]: gain and bias, ``[2, H]``.

    Raises:
        ValueError: eps is not positive.

    Example:
        >>> from manual_lstm.cells import LayerNormLSTM
        >>> output, _ = LayerNormLSTM(10, 20, eps=1e-3)(torch.randn(5, 3, 10))
    """

    eps: float = 1e-5

    def __init__(self, *arguments: Any, eps: float = 1e-5, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.eps = eps
        self._norm_eps()

    def _norm_eps(self) -> float:
        eps: Any = self.eps
        if isinstance(eps, numbers.Real) and not isinstance(eps, bool) and float(eps) > 0.0:
            return float(eps)
        raise ValueError(f"eps should be a positive number, but got {eps!r}")

    def cell_parameters(self) -> dict[str, Tensor]:
        H = self.hidden_size
        sizes = {"ln_x": 4 * H, "ln_h": 4 * H, "ln_c": H}
        return {name: torch.stack([torch.ones(n), torch.zeros(n)]) for name, n in sizes.items()}

    def _norm(self, z: Tensor, gain_and_bias: Tensor) -> Tensor:
        gain, bias = gain_and_bias
        return layer_norm(z, gain.shape, gain, bias, self._norm_eps())

    def project(self, x: Tensor, w: CellWeights) -> Tensor:
        normed = self._norm(x @ w.weight_ih.t(), w.ln_x)
        return normed if w.bias is None else normed + w.bias

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: CellWeights) -> Step:
        i, f, g, o = gates(x_t + self._norm(h @ w.weight_hh.t(), w.ln_h))
        c = f * c + i * g
        return output_step(i, f, g, o, self._norm(c, w.ln_c), w.weight_hr)._replace(c=c)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"


class PeepholeLSTM(ManualLSTM):
    r"""Lets the gates see the cell state: Gers & Schmidhuber 2000 (https://doi.org/10.1109/IJCNN.2000.861302).

    .. math::
        i_t &= \sigma(a_i + p_i \odot c_{t-1}),\quad f_t = \sigma(a_f + p_f \odot c_{t-1}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot \tanh(a_g),\quad o_t = \sigma(a_o + p_o \odot c_t)

    The peepholes begin at zero: until it is trained, such a layer computes what nn.LSTM computes.

    Args:
        *arguments, **options: as for :class:`~manual_lstm.ManualLSTM`.

    Attributes:
        peephole_l[k]: :math:`p_i, p_f, p_o`, ``[3, H]``.

    Example:
        >>> from manual_lstm.cells import PeepholeLSTM
        >>> layer = PeepholeLSTM.from_lstm(nn.LSTM(10, 20, num_layers=2))
        >>> layer.peephole_l1.shape
        torch.Size([3, 20])
    """

    def cell_parameters(self) -> dict[str, Tensor]:
        return {"peephole": torch.zeros(3, self.hidden_size)}

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: CellWeights) -> Step:
        i, f, g, o = (x_t + h @ w.weight_hh.t()).chunk(4, -1)
        p_i, p_f, p_o = w.peephole
        i, f, g = torch.sigmoid(i + p_i * c), torch.sigmoid(f + p_f * c), torch.tanh(g)
        c = f * c + i * g
        return output_step(i, f, g, torch.sigmoid(o + p_o * c), c, w.weight_hr)


class CoupledLSTM(ManualLSTM):
    r"""Forgets what it makes room for: :math:`f_t = 1 - i_t`, Greff et al. 2017 (https://arxiv.org/abs/1503.04069).

    The rows of the weights that belong to the forget gate have no effect.

    Args:
        *arguments, **options: as for :class:`~manual_lstm.ManualLSTM`.

    Example:
        >>> from manual_lstm.cells import CoupledLSTM
        >>> output, _ = CoupledLSTM(10, 20)(torch.randn(5, 3, 10))
    """

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: CellWeights) -> Step:
        i, _, g, o = gates(x_t + h @ w.weight_hh.t())
        return output_step(i, 1 - i, g, o, (1 - i) * c + i * g, w.weight_hr)


class ZoneoutLSTM(ManualLSTM):
    r"""Keeps units of the states as they were, at random: Krueger et al. 2017 (https://arxiv.org/abs/1606.01305).

    In training, each unit of h and c keeps its old value with a probability, drawn anew in each step.
    In evaluation, it takes the mean of the old and the new value, weighted with that probability.

    Args:
        *arguments, **options: as for :class:`~manual_lstm.ManualLSTM`.
        zoneout_h (float): the probability that a unit of h keeps its value.
        zoneout_c (float): the probability that a unit of c keeps its value.

    Raises:
        ValueError: a probability outside of [0, 1]; raised by the call, too, if it was set later.

    Example:
        >>> from manual_lstm.cells import ZoneoutLSTM
        >>> layer = ZoneoutLSTM(10, 20, zoneout_h=0.1, zoneout_c=0.3)
        >>> output, _ = layer(torch.randn(5, 3, 10))
    """

    zoneout_h: float = 0.05
    zoneout_c: float = 0.5

    def __init__(
        self, *arguments: Any, zoneout_h: float = 0.05, zoneout_c: float = 0.5, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.zoneout_h, self.zoneout_c = zoneout_h, zoneout_c
        _probability(self, "zoneout_h")
        _probability(self, "zoneout_c")

    def _zone(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        p = _probability(self, name)
        return old + (1 - p) * dropout(new - old, p, self.training)

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: CellWeights) -> Step:
        step = super().cell(x_t, h, c, w)
        return step._replace(c=self._zone("zoneout_c", c, step.c), h=self._zone("zoneout_h", h, step.h))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, zoneout_h={self.zoneout_h}, zoneout_c={self.zoneout_c}"


class VariationalLSTM(ManualLSTM):
    r"""Drops the same units in all steps: Gal & Ghahramani 2016 (https://arxiv.org/abs/1512.05287).

    In training, each layer and direction draws for each sequence one mask of its input and one of its
    hidden state, and keeps them for all steps:

    .. math::
        a = W_{ih} (x_t \odot m_x) + W_{hh} (h_{t-1} \odot m_h) + b

    An element of a mask is 0 with the given probability p, and otherwise 1 / (1 - p). The output is not
    masked; between layers, it is the input of the next. nn.LSTM's own ``dropout``, which draws anew in
    each step, acts there as well, and is best left at 0.

    Args:
        *arguments, **options: as for :class:`~manual_lstm.ManualLSTM`.
        input_dropout (float): the probability with which a feature of each layer's input is dropped.
        hidden_dropout (float): the probability with which a unit of each layer's h is dropped.

    Raises:
        ValueError: a probability outside of [0, 1]; raised by the call, too, if it was set later.

    Example:
        >>> from manual_lstm.cells import VariationalLSTM
        >>> layer = VariationalLSTM(10, 20, num_layers=2, input_dropout=0.2, hidden_dropout=0.3)
        >>> output, _ = layer(torch.randn(5, 3, 10))
    """

    input_dropout: float = 0.25
    hidden_dropout: float = 0.25

    def __init__(
        self,
        *arguments: Any,
        input_dropout: float = 0.25,
        hidden_dropout: float = 0.25,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.input_dropout, self.hidden_dropout = input_dropout, hidden_dropout
        _probability(self, "input_dropout")
        _probability(self, "hidden_dropout")

    def per_sequence(self, h_0: Tensor, c_0: Tensor) -> dict[str, Tensor]:
        B, P = h_0.shape
        D = 2 if self.bidirectional else 1
        # The widest input of a layer; each layer uses as many features as its input has.
        input = h_0.new_ones(B, max(self.input_size, D * P))
        return {
            "input_mask": dropout(input, _probability(self, "input_dropout"), self.training),
            "hidden_mask": dropout(
                torch.ones_like(h_0), _probability(self, "hidden_dropout"), self.training
            ),
        }

    def _masks_input(self) -> bool:
        return self.training and self.input_dropout != 0

    def project(self, x: Tensor, w: CellWeights) -> Tensor:
        # The mask comes before the product, and only the cell knows the sequence of each row.
        return x if self._masks_input() else super().project(x, w)

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: CellWeights) -> Step:
        if self._masks_input():
            x_t = super().project(x_t * w.input_mask[:, : x_t.size(1)], w)  # [b, I] to [b, 4H]
        return super().cell(x_t, h * w.hidden_mask, c, w)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, input_dropout={self.input_dropout}, "
            f"hidden_dropout={self.hidden_dropout}"
        )


class HardSigmoidLSTM(ManualLSTM):
    r"""Gates by straight lines: :math:`\sigma(a) \approx \min(\max(a / 6 + 1/2, 0), 1)`.

    The function is :func:`torch.nn.functional.hardsigmoid` (Courbariaux et al. 2015,
    https://arxiv.org/abs/1511.00363, have it with another slope). The cell gate keeps its tanh.

    Args:
        *arguments, **options: as for :class:`~manual_lstm.ManualLSTM`.

    Example:
        >>> from manual_lstm.cells import HardSigmoidLSTM
        >>> output, _ = HardSigmoidLSTM(10, 20)(torch.randn(5, 3, 10))
    """

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: CellWeights) -> Step:
        a = x_t + h @ w.weight_hh.t()
        i, f, _, o = (a / 6 + 0.5).clamp(0, 1).chunk(4, -1)
        g = torch.tanh(a.chunk(4, -1)[2])
        return output_step(i, f, g, o, f * c + i * g, w.weight_hr)


def _probability(layer: ManualLSTM, name: str) -> float:
    """The attribute of a layer, which may have been set at any time."""
    p: Any = getattr(layer, name)
    if isinstance(p, numbers.Real) and not isinstance(p, bool) and 0.0 <= float(p) <= 1.0:
        return float(p)
    raise ValueError(f"{name} should be a probability in the range [0, 1], but got {p!r}")
