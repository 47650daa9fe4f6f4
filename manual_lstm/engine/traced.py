"""The layer under torch.jit.trace: recorded as ``aten::lstm``, the operator behind nn.LSTM.

A trace is written for other programs, which know that operator. It serves every length and batch size,
where recorded steps would be as many as the example has.
"""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from manual_lstm.engine.context import traced_number

_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")  # in the operator's order


def run_traced(
    x: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Mapping[str, Tensor]],
    D: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run all layers and directions together; the arguments are those of ``run_stack``.

    Padded input is recorded as its packing, the operator, and padding.

    Returns:
        The output, h_n and c_n.
    """
    flat = [w[kind] for w in weights for kind in _KINDS if kind in w]
    has_biases = "bias_ih" in weights[0]
    options = has_biases, len(weights) // D, dropout, dropout != 0, D == 2
    if lengths is not None:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        assert packed.sorted_indices is not None
        assert packed.unsorted_indices is not None
        h_0, c_0 = (state.index_select(1, packed.sorted_indices) for state in (h_0, c_0))
        rows, *states = torch.lstm(packed.data, packed.batch_sizes, (h_0, c_0), flat, *options)
        output, _ = pad_packed_sequence(packed._replace(data=rows), total_length=x.size(0))
        h_n, c_n = (state.index_select(1, packed.unsorted_indices) for state in states)
        return output, h_n, c_n
    if batch_sizes is None:
        return torch.lstm(x, (h_0, c_0), flat, *options, False)
    return torch.lstm(x, batch_sizes, (h_0, c_0), flat, *options)


def warn_of_recorded_steps(what: str, T: int) -> None:
    """Warn that a trace of what nn.LSTM's operator cannot do serves one length only."""
    warnings.warn(
        f"{what}, so torch.jit.trace records the {traced_number(T)} steps of its example: "
        "the trace serves sequences of this length only. torch.export records a loop for every length",
        torch.jit.TracerWarning,  # type: ignore[attr-defined]
        stacklevel=2,
    )
