"""The choice of the loop: the only file that decides which one runs."""

from collections.abc import Mapping, Sequence
from enum import Enum

from torch import Tensor

from manual_lstm.engine.context import (
    are_of_one_kind,
    autocast_dtype,
    in_plain_loop,
    is_batched,
    is_compiling,
    is_exporting,
    is_grad_enabled,
    is_tracing,
    only_vmap_and_grad,
    scan_compiles,
    scan_operator,
    traced_number,
    transforms_active,
)
from manual_lstm.engine.workspace import is_small

# The devices that the operator is tested on; meta runs no kernel.
_DEVICES = {"cpu", "cuda", "meta"}

_FEW_STEPS = 2  # of small states


class Loop(Enum):
    """The ways to run a layer."""

    PLAIN = "plain"  # loop.py, step by step
    FUSED = "fused"  # engine/fused.py, the same as one operator
    VMAP = "vmap"  # engine/vmap.py, the operator under torch.func's vmap and grad
    SCAN = "scan"  # engine/scan.py, as torch's scan
    OPACUS = "opacus"  # engine/opacus.py, the operator with a gradient for each sample
    OPACUS_PLAIN = "opacus, plain"  # the same, but its forward goes step by step
    TRACED = "traced"  # engine/traced.py, nn.LSTM's operator


def choose(
    x: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Mapping[str, Tensor]],
    changed: bool = False,
    as_scan: bool = True,
    keep: bool = False,
    opacus: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> Loop:
    """Choose the loop for one call of a layer.

    Args:
        x, batch_sizes, h_0, c_0: the input and the states of all layers and directions.
        weights: the weights of each direction, by kind.
        changed: whether the cell is not nn.LSTM's.
        as_scan: whether a changed cell may be compiled and exported as torch's scan.
        keep: whether the call wants the steps.
        opacus: whether Opacus wants a gradient for each sample.
        lengths: of padded input the number of steps of each sequence.
        resets: at which steps of the input sequences begin anew.
    """
    if opacus:
        return Loop.OPACUS_PLAIN if in_plain_loop() else Loop.OPACUS
    if in_plain_loop():
        return Loop.PLAIN
    T = (x if batch_sizes is None else batch_sizes).size(0)
    compiling = is_compiling()
    if compiling and scan_operator is not None and as_scan:
        if is_exporting():
            return Loop.SCAN
        # Dynamo does not trace scan under a transform, and Inductor not without a step.
        if changed and scan_compiles and T > 1 and not transforms_active():
            return Loop.SCAN
    watched = is_grad_enabled() or is_tracing() or transforms_active()
    if changed or (keep and (watched or lengths is not None)):
        return Loop.PLAIN
    if is_tracing():
        # nn.LSTM's operator knows no transform, and refuses a sequence without steps.
        fits = not transforms_active() and traced_number(T) > 0 and resets is None
        return Loop.TRACED if fits else Loop.PLAIN
    # One step leaves nothing to fuse, and few small ones take less time than preparing the operator.
    # A compiled program should serve any length, and only the operator knows how many rows a step of
    # packed input has there.
    few = T == 1 or (T <= _FEW_STEPS and not compiling and is_small(c_0))
    if few and not (compiling and batch_sizes is not None):
        return Loop.PLAIN
    data = [x, h_0, c_0, *(t for t in (batch_sizes, lengths, resets) if t is not None)]
    if transforms_active():
        # In an ensemble the weights are batched themselves: the samples do not become one batch.
        fits = (
            only_vmap_and_grad()
            and lengths is None
            and _operator_takes(data, weights)
            and not any(is_batched(t) for w in weights for t in w.values())
        )
        return Loop.VMAP if fits else Loop.PLAIN
    return Loop.FUSED if _operator_takes(data, weights) else Loop.PLAIN


def choose_backward(forward: Loop) -> Loop:
    """Choose which loop's derivative the backward of an operator uses.

    PLAIN where the gradients are to be differentiated themselves: autograd then goes through the plain
    loop. Otherwise the derivative derived by hand.

    Args:
        forward: the loop that ran, FUSED or VMAP.
    """
    if forward is Loop.VMAP:
        return Loop.VMAP if only_vmap_and_grad() else Loop.PLAIN
    return Loop.PLAIN if is_grad_enabled() or transforms_active() else Loop.FUSED


def _operator_takes(data: Sequence[Tensor], weights: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether the operator serves these tensors, but for torch.func's transforms.

    torch.export wants a program of torch's own operators. Under autocast the plain loop's operations
    are cast one by one; a layer casts, and switches autocast off, before this.
    """
    tensors = [*data]
    for w in weights:
        tensors.extend(w.values())
    return (
        not (is_compiling() and is_exporting())
        and autocast_dtype(data[0].device) is None
        and are_of_one_kind(tensors)
        and (
            all(tensor.is_cpu for tensor in tensors)  # which is faster to ask
            or all(tensor.device.type in _DEVICES for tensor in tensors)
        )
    )
