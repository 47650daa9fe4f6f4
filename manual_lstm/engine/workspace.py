"""Buffers that one call after another uses.

Small steps spend more time on making views of buffers than on computing. So the buffers of a block of
small steps are kept, with the views of its steps, until the next call in the same thread that can use
them. A call takes them away while it runs, so nobody else writes to them.
"""

import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

SMALL = 2048  # elements of a small step's cell state, at most
_MOST = 4  # kept in each thread
_thread = threading.local()


def is_small(state: Tensor) -> bool:
    """Whether a step with this state, ``[..., B, H]``, is small. It has to be on the CPU.

    Elsewhere, work in several streams would write to the same buffers.
    """
    return state.size(-2) * state.size(-1) <= SMALL and state.device.type == "cpu"


def take(key: Hashable, make: Callable[[], Any]) -> Any:
    """Take away the buffers that are kept under a key, or make new ones."""
    kept: dict[Hashable, Any] = _thread.__dict__.setdefault("kept", {})
    if key in kept:
        return kept.pop(key)
    with torch.inference_mode(False):  # nobody may write to an inference tensor later
        return make()


def give_back(key: Hashable, buffers: Any) -> None:
    """Keep buffers for the next call."""
    kept: dict[Hashable, Any] = _thread.__dict__.setdefault("kept", {})
    if len(kept) >= _MOST:
        del kept[next(iter(kept))]  # the one that was given back first
    kept[key] = buffers
