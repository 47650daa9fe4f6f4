"""Cuts: where a new sequence begins within a row, and the state before it counts no more.

A caller's ``resets`` says at which steps of the input a new sequence begins. A direction is cut there:
forwards, the step with the reset begins from a state of zeros, and backwards the step before it does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manual_lstm.engine.context import is_tracing
from manual_lstm.engine.steps import step_index


def cuts_of(resets: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """Which steps of a direction begin from zeros, in the shape of ``resets``.

    Args:
        resets: which steps of the input begin a sequence, ``[T, B]`` or packed ``[N]``, bool.
        batch_sizes: of packed input the number of rows of each step.
        reverse: whether the direction goes from the last step to the first.
    """
    if not reverse:
        return resets
    if batch_sizes is None:
        return torch.cat([resets, resets.new_zeros(1, resets.size(1))])[1:]
    # Of each row, the row of the same sequence one step later.
    N, device = resets.size(0), resets.device
    if N == 0:
        return resets
    sizes = batch_sizes.to(device)
    t = step_index(resets, sizes)  # [N]
    row = torch.arange(N, device=device)
    position = row - (sizes.cumsum(0) - sizes)[t]
    later_sizes = torch.cat([sizes[1:], sizes.new_zeros(1)])
    later = (row + sizes[t]).clamp(max=N - 1)
    return resets[later] & (position < later_sizes[t])


def check_resets(resets: Any, expected: Sequence[int], device: torch.device) -> None:
    """Check that resets are a tensor of the input's kind, with a bool for each of its steps."""
    if not isinstance(resets, Tensor) or resets.is_nested:
        kind = "a nested tensor" if isinstance(resets, Tensor) else type(resets).__name__
        raise TypeError(f"resets should be a Tensor of torch.bool like the input, but got {kind}")
    if resets.dtype != torch.bool:
        raise TypeError(
            f"resets should be of torch.bool, but got {resets.dtype}: pass resets.bool() if other "
            "numbers than 0 mark the beginning of a sequence"
        )
    if not is_tracing() and tuple(resets.shape) != tuple(expected):
        raise ValueError(
            f"resets should be {list(expected)}, one for each step of the input, "
            f"but got {list(resets.shape)}"
        )
    if resets.device != device:
        raise RuntimeError(
            f"resets should be on the device of the input, {device}, but got {resets.device}"
        )
