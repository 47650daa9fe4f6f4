"""What ``lengths`` and ``resets`` mean, said by nn.LSTM: on packed sequences, and piece by piece."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    unpack_sequence,
)

States = tuple[Tensor, Tensor]


def run_in_pieces(
    lstm: nn.LSTM,
    input: Tensor | PackedSequence,
    hx: States | None,
    lengths: Sequence[int] | None = None,
    resets: Tensor | PackedSequence | None = None,
) -> tuple[Any, States]:
    """Run nn.LSTM on what it has no arguments for.

    With ``lengths``, the sequences that are not empty are packed. With ``resets``, each sequence is
    cut, and nn.LSTM runs on every piece alone.

    Args:
        lstm: the layer.
        input, hx: as it takes them.
        lengths: of padded input the number of steps of each sequence.
        resets: which steps begin a new sequence, in the form of the input.

    Returns:
        The output in the form of the input, and (h_n, c_n).
    """
    if resets is None:
        assert isinstance(input, Tensor)
        assert lengths is not None
        return _run_packed(lstm, input, hx, lengths)
    if isinstance(input, PackedSequence):
        assert isinstance(resets, PackedSequence)
        outputs, states = _run_pieces(lstm, unpack_sequence(input), hx, unpack_sequence(resets))
        packed = pack_sequence(outputs, enforce_sorted=input.sorted_indices is None)
        return input._replace(data=packed.data), states
    assert isinstance(resets, Tensor)
    if input.dim() == 2:
        hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        (output,), (h_n, c_n) = _run_pieces(lstm, [input], hx, [resets])
        return output, (h_n.squeeze(1), c_n.squeeze(1))
    batch_dim = 0 if lstm.batch_first else 1
    T, B = input.size(1 - batch_dim), input.size(batch_dim)
    lengths = [T] * B if lengths is None else lengths
    sequences = [x[:n] for x, n in zip(input.unbind(batch_dim), lengths)]
    cut = [r[:n] for r, n in zip(resets.unbind(batch_dim), lengths)]
    if B == 0:
        output, states = lstm(input, hx)
        return output, states
    outputs, states = _run_pieces(lstm, sequences, hx, cut)
    padded = [torch.cat([y, y.new_zeros(T - len(y), y.size(1))]) for y in outputs]
    output = torch.stack(padded, batch_dim)
    if not any(lengths):
        output = output + 0 * input[..., :1]  # so that there is a gradient, of zeros
    return output, states


def _run_packed(
    lstm: nn.LSTM, input: Tensor, hx: States | None, lengths: Sequence[int]
) -> tuple[Tensor, States]:
    batch_dim = 0 if lstm.batch_first else 1
    T, device = input.size(1 - batch_dim), input.device
    h_0, c_0 = _zeros(lstm, input, input.size(batch_dim)) if hx is None else hx
    filled = torch.tensor([b for b, n in enumerate(lengths) if n], dtype=torch.int64, device=device)
    D = 2 if lstm.bidirectional else 1
    sizes = list(input.shape)
    sizes[2] = D * h_0.size(2)
    output = input.new_zeros(sizes)
    if len(filled) == 0:  # all depends on all, as elsewhere
        return output + 0 * input[..., :1], (h_0.clone(), c_0.clone())
    packed = pack_padded_sequence(
        input.index_select(batch_dim, filled),
        [n for n in lengths if n],
        batch_first=lstm.batch_first,
        enforce_sorted=False,
    )
    states = h_0.index_select(1, filled), c_0.index_select(1, filled)
    rows, (h_n, c_n) = lstm(packed, states)
    padded, _ = pad_packed_sequence(rows, batch_first=lstm.batch_first, total_length=T)
    return output.index_copy(batch_dim, filled, padded), (
        h_0.index_copy(1, filled, h_n),
        c_0.index_copy(1, filled, c_n),
    )


def _run_pieces(
    lstm: nn.LSTM, sequences: Sequence[Tensor], hx: States | None, resets: Sequence[Tensor]
) -> tuple[list[Tensor], States]:
    """Run every piece of sequences ``[T_b, I]`` alone; hx is that of their batch."""
    h_0, c_0 = _zeros(lstm, sequences[0], len(sequences)) if hx is None else hx
    outputs, last = [], []
    for b, (x, begins) in enumerate(zip(sequences, resets)):
        output, states = _run_row(lstm, x, (h_0[:, b], c_0[:, b]), begins)
        outputs.append(output)
        last.append(states)
    h_n, c_n = (torch.stack(parts, 1) for parts in zip(*last))
    return outputs, (h_n, c_n)


def _run_row(lstm: nn.LSTM, x: Tensor, hx: States, begins: Tensor) -> tuple[Tensor, States]:
    T, D = x.size(0), 2 if lstm.bidirectional else 1
    if T == 0:
        return x.new_zeros(0, D * hx[0].size(1)), hx
    bounds = [0, *(t for t in range(1, T) if begins[t]), T]
    pieces = [slice(a, b) for a, b in pairwise(bounds)]
    forward = torch.arange(hx[0].size(0)) % D == 0
    forward = forward.unsqueeze(1).to(x.device)  # [L * D, 1]
    outputs: list[Tensor] = []
    h_n, c_n = hx
    for k, piece in enumerate(pieces):
        # The states of the caller are those before the first piece and, backwards, after the last.
        of_first = k == 0 and not bool(begins[0])
        keep = (forward & of_first) | (~forward & (k == len(pieces) - 1))
        states = (torch.where(keep, state, torch.zeros_like(state)) for state in hx)
        output, (h, c) = lstm(x[piece], tuple(states))
        outputs.append(output)
        ends = (forward & (k == len(pieces) - 1)) | (~forward & (k == 0))
        h_n, c_n = torch.where(ends, h, h_n), torch.where(ends, c, c_n)
    return torch.cat(outputs), (h_n, c_n)


def _zeros(lstm: nn.LSTM, x: Tensor, B: int) -> States:
    L_D = lstm.num_layers * (2 if lstm.bidirectional else 1)
    P = lstm.proj_size or lstm.hidden_size
    return x.new_zeros(L_D, B, P), x.new_zeros(L_D, B, lstm.hidden_size)
