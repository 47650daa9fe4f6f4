"""What torch is doing right now, and whether the caller wants the plain loop.

Some of it torch tells only under private names, which are looked up here. Where one is missing, the
answer is the cautious one.
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_functorch_active: Callable[[], bool] | None = getattr(
    torch._C, "_are_functorch_transforms_active", None
)
_functorch: Any = getattr(torch._C, "_functorch", None)
_interpreters: Callable[[], list[Any] | None] | None = getattr(
    _functorch, "get_interpreter_stack", None
)
# A transform that has ended leaves its tensors in a wrapper, which the next one takes for its own.
unwrap_if_dead: Callable[[Tensor], Tensor] = getattr(
    _functorch, "unwrap_if_dead", lambda tensor: tensor
)
_sees_wrappers = all(
    hasattr(_functorch, name) for name in ("is_batchedtensor", "is_gradtrackingtensor", "get_unwrapped")
)
# torch's scan operator is not public yet.
scan_operator: Callable[..., Any] | None
try:
    from torch._higher_order_ops.scan import scan

    scan_operator = scan
except ImportError:
    scan_operator = None
# Before torch 2.13, torch.compile refuses the scan of most cells: "scan might be aliasing the input".
scan_compiles = torch.__version__ >= "2.13"  # which compares numbers: it is a TorchVersion
# torch's registry of containers is not public yet; without it, transforms take Unrolled for a tuple.
register_pytree_node: Callable[..., None] | None
try:
    from torch.utils._pytree import register_pytree_node
except ImportError:
    register_pytree_node = None
is_grad_enabled: Callable[[], bool] = torch.is_grad_enabled
is_compiling: Callable[[], bool] = torch.compiler.is_compiling
# Whether torch.jit.trace is watching. Sizes are symbolic there.
is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]
# torch.compiler.is_exporting() is true under plain torch.compile, too, before torch 2.12.
_knows_export = hasattr(torch.compiler, "_is_exporting_flag")

# The kinds of tensor that an operator takes: torch's own, or fake ones, which have no numbers. It
# does not take both together, nor other subclasses, which know only torch's own operators.
_KINDS: list[set[type[Tensor]]] = [{Tensor, Parameter}]
try:
    from torch._subclasses.fake_tensor import FakeTensor
except ImportError:
    pass
else:
    _KINDS.append({FakeTensor})

# Switches off what autograd does at every operation, for code that it does not watch.
below_autograd: Callable[[], AbstractContextManager[Any]] = getattr(
    torch._C, "_AutoDispatchBelowAutograd", torch.no_grad
)
# How many TorchDispatchModes see each operation.
_count_modes: Callable[[], int] | None = getattr(torch._C, "_len_torch_dispatch_stack", None)
# Whether it is a batch of gradients, of torch.autograd.grad with is_grads_batched.
_is_legacy_batched: Callable[[Tensor], bool] | None = getattr(
    _functorch, "is_legacy_batchedtensor", None
)
# Whether autocast is on for any device.
_any_autocast: Callable[[], bool] | None = getattr(torch._C, "_is_any_autocast_enabled", None)
_NO_BLOCK = nullcontext()
# Dynamo of torch 2.11 and before does not trace the question which devices have autocast.
_AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)
)

_thread = threading.local()
# Set here, so that compiled code of this thread need not guard on a missing attribute. Calls read only
# the boolean, so that compiled code does not depend on how deep blocks are nested.
_thread.plain_loop, _thread.plain_loop_blocks = False, 0


@contextmanager
def plain_loop() -> Iterator[None]:
    """Run every layer step by step through ``cell.py`` and ``loop.py``.

    Outside, a layer runs its loop as one operator where it can. Inside, breakpoints, prints and
    profilers see each step. The numbers are the same but for rounding. The block holds for this thread
    only. It can be nested, and is undone when an exception leaves it. It also works inside a compiled
    function. Calling a compiled function inside it compiles that function once more.

    A backward pass that computes the forward again (:func:`torch.utils.checkpoint.checkpoint`) has to
    run inside the block too if the forward did, because it expects the same operations. On CUDA,
    autograd runs it in a thread of its own, where the block does not hold.

    ``torch.export`` and ``torch.jit.trace`` record the steps of their example inside the block, so the
    program serves that length only.

    Example:
        >>> from manual_lstm import ManualLSTM, plain_loop
        >>> layer = ManualLSTM(10, 20)
        >>> with plain_loop():
        ...     output, _ = layer(torch.randn(5, 3, 10))  # a breakpoint in cell.py stops five times
    """
    # Blocks are counted, because those of asyncio tasks and generators may overlap without nesting.
    _thread.plain_loop_blocks = getattr(_thread, "plain_loop_blocks", 0) + 1
    _thread.plain_loop = True
    try:
        yield
    finally:
        _thread.plain_loop_blocks -= 1
        _thread.plain_loop = _thread.plain_loop_blocks > 0


def in_plain_loop() -> bool:
    """Whether this thread is inside :func:`plain_loop`."""
    return getattr(_thread, "plain_loop", False)


def is_exporting() -> bool:
    """Whether torch.export is at work."""
    return bool(torch.compiler._is_exporting_flag) if _knows_export else is_compiling()


def transforms_active() -> bool:
    """Whether one of torch.func's transforms, or forward-mode AD, is at work."""
    if _functorch_active is None or _functorch_active():
        return True
    level: Any = getattr(forward_ad, "_current_level", 0)
    return bool(level >= 0)


def only_vmap_and_grad() -> bool:
    """Whether all of torch.func's transforms at work are vmap and grad (so vjp, jacrev too)."""
    if _functorch_active is None or _interpreters is None or is_compiling():
        return False
    level: Any = getattr(forward_ad, "_current_level", 0)
    return bool(level < 0) and all(
        interpreter.key().name in ("Vmap", "Grad") for interpreter in _interpreters() or []
    )


def is_batched(tensor: Tensor) -> bool:
    """Whether a vmap runs over this tensor, at any level."""
    if not _sees_wrappers:
        return True
    while not _functorch.is_batchedtensor(tensor):
        if not _functorch.is_gradtrackingtensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return True


def no_donated_buffers() -> None:
    """Keep the function that is being compiled from donating what it has saved for its backward.

    Dynamo calls this while it compiles. Inductor 2.13 takes the numbers of the donated inputs of a
    backward for those of the step of a scan in it, too, and overwrites what is still needed: gradients
    come out wrong. This setting of torch is put back when the compilation ends.
    """
    try:
        from torch._dynamo.callback import callback_handler
        from torch._functorch import config
    except ImportError:
        return
    if getattr(config, "donated_buffer", False):
        config.donated_buffer = False
        if _donate_again not in callback_handler.end_callbacks:
            callback_handler.register_end_callback(_donate_again)
        _thread.donates = True


# What torch.compiler.assume_constant_result does, which would import torch._dynamo for everybody.
no_donated_buffers._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _donate_again(*_: Any) -> None:
    if getattr(_thread, "donates", False):
        _thread.donates = False
        torch._functorch.config.donated_buffer = True


def traced_number(size: int) -> int:
    """The value that a size has in the example of a trace, without the tracer's warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return int(size)


def is_onednn_enabled() -> bool:
    """Whether torch's own switch, ``torch.backends.mkldnn.flags``, lets oneDNN be used."""
    return bool(torch.backends.mkldnn.enabled)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, during which nobody can look at numbers."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def has_numbers(tensor: Tensor) -> bool:
    """Whether Python can look at the numbers of a tensor now."""
    return (
        type(tensor) in _KINDS[0]
        and tensor.device.type != "meta"
        and not (is_compiling() or is_tracing() or is_batched(tensor) or is_capturing(tensor.device))
    )


def are_of_one_kind(tensors: Iterable[Tensor]) -> bool:
    """Whether an operator takes these tensors together."""
    kinds = set(map(type, tensors))
    return any(kinds <= kind for kind in _KINDS)


def nobody_watches(*tensors: Tensor | None) -> bool:
    """Whether no compiler, no mode, no vmap, and no subclass of Tensor would see an operator."""
    return (
        _count_modes is not None
        and _is_legacy_batched is not None
        and not is_compiling()
        and _count_modes() == 0
        and all(
            tensor is None
            or (
                type(tensor) in _KINDS[0]
                and tensor.device.type != "meta"
                and not _is_legacy_batched(tensor)
            )
            for tensor in tensors
        )
    )


def profiled(name: str) -> AbstractContextManager[Any]:
    """Show a block to torch's profiler under a name, where it is at work."""
    if getattr(torch.autograd.profiler, "_is_profiler_enabled", True):
        return torch.autograd.profiler.record_function(name)
    return _NO_BLOCK


def _has_autocast(device: str) -> bool:
    if is_compiling():
        return device in _AUTOCAST_DEVICES
    return torch.amp.is_autocast_available(device)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype to which autocast casts on this device, ``None`` where it is off."""
    if _any_autocast is not None and not is_compiling() and not _any_autocast():
        return None
    if not _has_autocast(device.type):
        return None
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
