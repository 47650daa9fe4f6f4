"""The stack of layers and directions, and in it the choice of the loop."""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from manual_lstm.engine.context import may_fold, may_fuse, transforms_active
from manual_lstm.engine.fused import fused_direction
from manual_lstm.engine.scan import may_scan, scan_direction
from manual_lstm.engine.vmap import sample_direction
from manual_lstm.loop import plain_direction

# fused_direction and plain_direction: the same arguments, the same results.
Direction = Callable[..., tuple[Tensor, Tensor, Tensor]]


class DirectionWeights(NamedTuple):
    """The weights of one direction of one layer, in the order nn.LSTM keeps them."""

    weight_ih: Tensor  # [4H, I], above the first layer [4H, D * (P or H)]
    weight_hh: Tensor  # [4H, P or H]
    bias_ih: Tensor | None  # [4H]
    bias_hh: Tensor | None  # [4H]
    weight_hr: Tensor | None = None  # [P, H]


def loop_for(T: int | None, tensors: Iterable[Tensor | None]) -> Direction:
    """The loop that runs T steps of these tensors: the fused one wherever it may.

    One step leaves nothing to fuse, and is mostly bookkeeping. T is None where only the operator can
    know the steps' sizes.
    """
    if may_scan():
        return scan_direction
    if T == 1:
        return plain_direction
    tensors = list(tensors)
    if transforms_active():
        return sample_direction if may_fold(tensors) else plain_direction
    return fused_direction if may_fuse(tensors) else plain_direction


def lstm_stack(
    x: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    layers: list[list[DirectionWeights]],
    dropout: float,
    run: Direction | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run all layers and directions.

    Args:
        x: the input, ``[T, B, I]``, or packed ``[N, I]``.
        batch_sizes: ``None``, or for packed input the number of rows of each step, ``[T]``, int64.
        h_0: the initial hidden states, ``[L * D, B, P or H]``.
        c_0: the initial cell states, ``[L * D, B, H]``.
        layers: the weights, ``layers[layer][direction]``.
        dropout: the probability with which an element between two layers is zeroed.
        run: what runs each direction; ``None`` for the loop that is best.

    Returns:
        The output, ``[T, B, D * (P or H)]`` or packed ``[N, D * (P or H)]``, and h_n and c_n,
        shaped like h_0 and c_0.
    """
    if run is None:
        T: int | None = (x if batch_sizes is None else batch_sizes).size(0)
        if batch_sizes is not None and torch.compiler.is_compiling():
            T = None
        run = loop_for(T, chain([x, h_0, c_0], *chain.from_iterable(layers), [batch_sizes]))
    h_first = _rows(h_0)  # L * D times [B, P or H]
    c_first = h_first if c_0 is h_0 else _rows(c_0)  # L * D times [B, H]
    h_last: list[Tensor] = []
    c_last: list[Tensor] = []
    for layer, directions in enumerate(layers):
        if dropout > 0 and layer > 0:
            x = torch.dropout(x, dropout, train=True)
        outputs: list[Tensor] = []
        for direction, w in enumerate(directions):
            k = len(h_last)  # layer * D + direction
            bias = None if w.bias_ih is None or w.bias_hh is None else w.bias_ih + w.bias_hh
            output, h, c = run(
                x,
                batch_sizes,
                h_first[k],
                c_first[k],
                w.weight_ih,
                w.weight_hh,
                bias,
                w.weight_hr,
                reverse=direction == 1,
            )
            outputs.append(output)
            h_last.append(h)
            c_last.append(c)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    if len(h_last) == 1:  # for one step of one layer, two copies are time worth saving
        return x, h_last[0].unsqueeze(0), c_last[0].unsqueeze(0)
    return x, torch.stack(h_last), torch.stack(c_last)


def _rows(states: Tensor) -> tuple[Tensor, ...]:
    """The states of each layer and direction."""
    if not torch.compiler.is_compiling():
        return states.unbind(0)
    # AOTAutograd keeps what unbind returns and, where another has use for them, the states too.
    # Inductor takes each for a tensor of its own, and may write to one before it has read the other.
    return tuple(states.select(0, k) for k in range(states.size(0)))
