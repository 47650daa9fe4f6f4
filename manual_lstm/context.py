"""Which loop may run: the one choice between the fused operator and the plain loop."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from manual_lstm.precision import autocast_dtype

# What torch knows but does not say in public. Where a name is gone, the answer is the cautious one.
_functorch_active: Callable[[], bool] | None = getattr(
    torch._C, "_are_functorch_transforms_active", None
)
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
# Where the operator has been tried, or needs no kernel.
_DEVICES = {"cpu", "cuda", "meta"}


def may_fuse(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the fused operator may run, for more than one step, and not the plain loop.

    Not where something has to see the steps: torch.func's transforms and forward-mode AD, which batch
    and differentiate them themselves; torch.jit.trace and torch.export, which look for a program of
    torch's own operators; subclasses of Tensor, which know only those; and not on other devices.
    Nor under autocast, which casts the plain loop's operations one by one (ManualLSTM casts, and
    switches it off, before it chooses).
    """
    tensors = list(tensors)
    if tensors[0] is not None and autocast_dtype(tensors[0].device) is not None:
        return False
    return not (transforms_active() or is_tracing() or is_exporting()) and all(
        tensor is None or (type(tensor) in (Tensor, Parameter) and tensor.device.type in _DEVICES)
        for tensor in tensors
    )


def transforms_active() -> bool:
    """Whether one of torch.func's transforms, or forward-mode AD, is at work."""
    if _functorch_active is None or _functorch_active():
        return True
    level: Any = getattr(forward_ad, "_current_level", 0)
    return bool(level >= 0)


def is_tracing() -> bool:
    """Whether torch.jit.trace is watching: sizes are traced there, not known."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]
