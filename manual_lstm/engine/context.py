"""Which loop may run: the one choice between the fused operator and the plain loop."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from manual_lstm.engine.dtypes import autocast_dtype

# What torch knows but does not say in public. Where a name is gone, the answer is the cautious one.
_functorch_active: Callable[[], bool] | None = getattr(
    torch._C, "_are_functorch_transforms_active", None
)
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
_interpreters: Callable[[], list[Any] | None] | None = getattr(
    getattr(torch._C, "_functorch", None), "get_interpreter_stack", None
)
# A transform that has ended leaves its tensors in a wrapper, which the next one takes for its own.
unwrap_if_dead: Callable[[Tensor], Tensor] = getattr(
    getattr(torch._C, "_functorch", None), "unwrap_if_dead", lambda tensor: tensor
)
# What tensors the operator takes: torch's own, or without their numbers, which it takes only together.
_KINDS: list[set[type[Tensor]]] = [{Tensor, Parameter}]
try:
    from torch._subclasses.fake_tensor import FakeTensor
except ImportError:
    pass
else:
    _KINDS.append({FakeTensor})
# Where the operator has been tried, or needs no kernel.
_DEVICES = {"cpu", "cuda", "meta"}


def may_fuse(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the fused operator may run, for more than one step, and not the plain loop.

    Not where something has to see the steps: torch.func's transforms and forward-mode AD, which batch
    and differentiate them themselves; torch.jit.trace and torch.export, which look for a program of
    torch's own operators; other subclasses of Tensor, which know only those; and not on other devices.
    Nor under autocast, which casts the plain loop's operations one by one (ManualLSTM casts, and
    switches it off, before it chooses).
    """
    return not transforms_active() and _fusible(list(tensors))


def _fusible(tensors: list[Tensor | None]) -> bool:
    """Whether the operator serves these tensors, but for torch.func's transforms."""
    if tensors[0] is not None and autocast_dtype(tensors[0].device) is not None:
        return False
    present = [tensor for tensor in tensors if tensor is not None]
    kinds = {type(tensor) for tensor in present}
    return (
        not (is_tracing() or is_exporting())
        and any(kinds <= known for known in _KINDS)
        and all(tensor.device.type in _DEVICES for tensor in present)
    )


def transforms_active() -> bool:
    """Whether one of torch.func's transforms, or forward-mode AD, is at work."""
    if _functorch_active is None or _functorch_active():
        return True
    level: Any = getattr(forward_ad, "_current_level", 0)
    return bool(level >= 0)


def batches_only() -> bool:
    """Whether all of torch.func's transforms at work are vmap and grad (so vjp, jacrev too)."""
    if _interpreters is None or torch.compiler.is_compiling():
        return False
    level: Any = getattr(forward_ad, "_current_level", 0)
    return bool(level < 0) and all(
        each.key().name in ("Vmap", "Grad") for each in _interpreters() or []
    )


def may_fold(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the operator may run with the samples of a vmap as rows of one batch.

    Not where the weights are batched themselves, as in an ensemble.
    """
    tensors = list(tensors)  # input, h_0, c_0 and the weights
    return (
        batches_only()
        and _fusible(tensors)
        and not any(weight is not None and _is_batched(weight) for weight in tensors[3:])
    )


def _is_batched(tensor: Tensor) -> bool:
    """Whether a vmap runs over this tensor, at any level."""
    functorch = torch._C._functorch
    while not functorch.is_batchedtensor(tensor):
        if not functorch.is_gradtrackingtensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
    return True


def is_tracing() -> bool:
    """Whether torch.jit.trace is watching: sizes are traced there, not known."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]
