"""The layer under torch.jit.trace: recorded as ``aten::lstm``, the operator behind nn.LSTM.

A trace is written for other programs, which know that operator. It serves every length and batch size,
where recorded steps would be as many as the example has.
"""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from manual_lstm.engine.context import traced_number

_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")  # in the operator's order


def run_traced(
    x: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Mapping[str, Tensor]],
    D: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run all layers and directions together; the arguments are those of ``run_stack``.

    Returns:
        The output, h_n and c_n.
    """
    flat = [w[kind] for w in weights for kind in _KINDS if kind in w]
    has_biases = "bias_ih" in weights[0]
    options = has_biases, len(weights) // D, dropout, dropout != 0, D == 2
    if batch_sizes is None:
        return torch.lstm(x, (h_0, c_0), flat, *options, False)
    return torch.lstm(x, batch_sizes, (h_0, c_0), flat, *options)


def warn_of_recorded_steps(T: int) -> None:
    """Warn that a trace of a changed cell, for which there is no operator, serves one length only."""
    warnings.warn(
        f"the cell is changed, so torch.jit.trace records the {traced_number(T)} steps of its example: "
        "the trace serves sequences of this length only. torch.export records a loop for every length",
        torch.jit.TracerWarning,  # type: ignore[attr-defined]
        stacklevel=2,
    )
