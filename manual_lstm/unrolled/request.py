"""The request of ``unroll``: one forward of one layer is to keep its steps.

``unroll`` calls the layer as everybody does, so hooks, offloading and sharding take part. The request
reaches ``forward`` beside the arguments, because a hook may replace these. It stands for one forward:
neither another layer that a hook calls, nor a further call of the same layer, gets it.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils.hooks import RemovableHandle

from manual_lstm.engine.context import is_compiling, register_pytree_node
from manual_lstm.engine.direction import AllSteps
from manual_lstm.unrolled.result import Layout, Unrolled

# Hooks on all modules. Where torch has another name for them, one may not call the layer itself.
_global_forward_pre_hooks: Any = getattr(_module, "_global_forward_pre_hooks", {})


class Kept(NamedTuple):
    """What a forward keeps for ``unroll``.

    Attributes:
        fields: i, f, g, o, c, m and h in the form of the input, a tuple of sequences each.
        layout: the form of the input.
        steps: the steps of each direction.
        sample_of: for each row of a step its sequence in the caller's batch; ``None`` if it is the row.
    """

    fields: list[tuple[Any, ...]]
    layout: Layout
    steps: Sequence[AllSteps]
    sample_of: Tensor | None


class Request:
    """What one call of ``unroll`` asks of its layer, in the block of a ``with``.

    Attributes:
        layer: the layer that is called.
        kept: what its forward has kept, once it has run: one item.
        is_open: whether the next forward of the layer is the one.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.kept: list[Kept] = []
        self._calls = 0  # of the layer whose forward pre-hooks are running
        self._handles: list[RemovableHandle] = []
        # Without hooks before the forward, nobody can call the layer in between.
        self.is_open = is_compiling() or not (layer._forward_pre_hooks or _global_forward_pre_hooks)

    def __enter__(self) -> "Request":
        if (before := _last()) is not None and before.layer is self.layer and before.is_open:
            kind = type(self.layer).__qualname__
            raise RuntimeError(
                f"unroll calls forward, so the forward of a {kind} should not call its own unroll: "
                "let another module hold the layer, and call unroll there"
            )
        _thread.requests.append(self)
        if not self.is_open:
            register = self.layer.register_forward_pre_hook
            self._handles = [register(self.begin_hooks, prepend=True), register(self.end_hooks)]
        return self

    def __exit__(self, *_: Any) -> None:
        _thread.requests.pop()
        for handle in self._handles:
            handle.remove()

    def begin_hooks(self, *_: Any) -> None:
        """The first forward pre-hook of the layer."""
        if _last() is self:
            self._calls += 1

    def end_hooks(self, *_: Any) -> None:
        """The last forward pre-hook. What its hooks have called began and ended in between."""
        if _last() is self:
            self._calls -= 1
            if self._calls == 0 and not self.kept:
                self.is_open = True

    def keep(self, output: Any, states: tuple[Tensor, Tensor], kept: Kept) -> "KeptPair":
        """Note what the forward has kept, and return its answer, which a hook can hold on to."""
        self.kept.append(kept)
        return KeptPair(output, states, kept.steps)

    def unrolled(self, answer: Any) -> Unrolled:
        """Make an :class:`Unrolled` of what the forward has kept and what the layer's call returned."""
        kind = type(self.layer).__qualname__
        if not self.kept:
            raise RuntimeError(
                f"unroll should see the forward of ManualLSTM run, but the forward of this {kind} did "
                "not call it: let it call super().forward(...)"
            )
        if not (_is_pair(answer) and _is_pair(answer[1])):
            raise TypeError(
                "unroll should get (output, (h_n, c_n)) from forward and its hooks, but got "
                f"{type(answer).__name__}: unroll a {kind} without the hook that changes this"
            )
        output, (h_n, c_n) = answer
        fields, layout, steps, sample_of = self.kept[0]
        single = [of_direction.single for of_direction in steps]
        reason = next((s for s in single if isinstance(s, str)), None)
        return Unrolled(
            output,
            (h_n, c_n),
            *fields,
            layout=layout,
            steps=reason or tuple(single),
            sample_of=sample_of,
        )


def _is_pair(answer: Any) -> bool:
    return isinstance(answer, (tuple, list)) and len(answer) == 2


@dataclass(init=False, repr=False, eq=False)
class KeptPair(tuple[Any, Any]):
    """The pair of output and states that a forward returns when it keeps its steps.

    FSDP2 hangs the hook that gathers the weights for the backward on the tensors that it finds in here.
    So those kept beside the pair can be found in it: a loss may be made of gates alone. Some versions
    look into the fields of a dataclass, and some take the leaves of torch's registry of containers.
    """

    output: Any
    states: Any
    steps: Sequence[AllSteps]

    def __new__(cls, output: Any, states: Any = None, steps: Sequence[AllSteps] = ()) -> "KeptPair":
        # Hooks make a container of the same class anew, of its parts or of an iterable of them.
        pair = tuple.__new__(cls, output if states is None else (output, states))
        pair.output, pair.states = pair
        pair.steps = steps
        return pair


if register_pytree_node is not None:
    register_pytree_node(
        KeptPair,
        lambda pair: ([*pair, pair.steps], None),
        lambda children, _: tuple(children[:2]),
    )


class _Thread(threading.local):
    """Requests and what they kept are lists: Dynamo forgets what is assigned after a scan."""

    def __init__(self) -> None:
        self.requests: list[Request] = []


_thread = _Thread()


def _last() -> Request | None:
    return _thread.requests[-1] if _thread.requests else None


def request_of(layer: nn.Module) -> Request | None:
    """The request that the forward of ``layer`` that begins now has to answer, if there is one."""
    request = _last()
    if request is None or request.layer is not layer or not request.is_open:
        return None
    request.is_open = False
    return request
