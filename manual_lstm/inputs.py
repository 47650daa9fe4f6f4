"""The door of the layer: input in any form becomes steps here, and the answer gets that form back.

:func:`enter` takes what the caller gave, checks it as nn.LSTM does, and returns an :class:`Inputs`.
Behind it there are only steps, ``[T, B, I]`` or packed ``[N, I]``, and states ``[L * D, B, features]``
with the sequences sorted by falling length. Nothing there knows of ``batch_first``, unbatched input,
sorting or nested tensors. :meth:`Inputs.leave` is the way out.

A new form of input is a new subclass of :class:`Inputs` and a line in :func:`enter`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from manual_lstm.cell import Step
from manual_lstm.engine.context import autocast_dtype, has_numbers, is_compiling, is_tracing
from manual_lstm.engine.cuts import check_resets
from manual_lstm.engine.dtypes import answer_dtypes, autocast, compute_dtype
from manual_lstm.engine.nested import Jagged
from manual_lstm.engine.padding import Padding, as_lengths
from manual_lstm.engine.stack import Answer
from manual_lstm.unrolled.request import Kept
from manual_lstm.unrolled.result import Layout

States = tuple[Tensor, Tensor]

_NO_BLOCK = nullcontext()
_FEW_ROWS = 4
_ONLY_PADDED = "should come with a batch of padded sequences, [T, B, I] or with batch_first [B, T, I]"


class Layer(Protocol):
    """What the door asks of a layer. A subclass may override its checks, which have nn.LSTM's names."""

    input_size: int
    proj_size: int
    batch_first: bool
    _all_weights: list[list[str]]
    _sample_hooks: dict[int, Any] | None

    def _cell_is_changed(self) -> bool: ...
    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None: ...
    def check_hidden_size(
        self, hx: Tensor, expected_hidden_size: tuple[int, int, int], msg: str = ...
    ) -> None: ...
    def check_forward_args(self, input: Tensor, hidden: States, batch_sizes: Tensor | None) -> None: ...
    def get_expected_hidden_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]: ...
    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]: ...
    def permute_hidden(self, hx: States, permutation: Tensor | None) -> States: ...


def enter(
    layer: Layer,
    input: Any,
    hx: Any,
    weights: Sequence[Mapping[str, Tensor]],
    lengths: Any = None,
    resets: Any = None,
) -> "Inputs":
    """Check what a call got and make steps of it.

    Args:
        layer: the layer that is called.
        input, hx, lengths, resets: what its caller gave.
        weights: the weights of each direction by kind.

    Raises:
        What :class:`manual_lstm.ManualLSTM` documents.
    """
    form: type[Inputs] = Dense
    if isinstance(input, PackedSequence):
        form = Packed
    elif isinstance(input, Tensor) and input.is_nested:
        form = Nested
    if lengths is not None:
        if form is not Dense:
            raise ValueError(f"lengths {_ONLY_PADDED}, but got {form.__name__.lower()} input")
        inputs: Inputs = Padded(layer, input, hx, weights[0]["weight_ih"], lengths)
    else:
        inputs = form(layer, input, hx, weights[0]["weight_ih"])
    if resets is not None:
        inputs.resets = inputs.enter_resets(resets)
    inputs.convert_dtypes(layer, weights)
    return inputs


class Inputs(ABC):
    """The input of one call as steps.

    Attributes:
        x: ``[T, B, I]``, or packed ``[N, I]``.
        batch_sizes: of packed input the number of rows of each step, ``[T]``; otherwise ``None``.
        h_0: ``[L * D, B, P or H]``, sequences sorted.
        c_0: ``[L * D, B, H]``, likewise.
        weights: the weights of each direction by kind, in the dtype in which the loop computes.
        sample_of: for each sorted sequence its index in the caller's batch; ``None`` if sorted already.
        lengths: of padded input that could not be packed the number of steps of each sequence, ``[B]``,
            int64. Their order is the caller's.
        resets: at which steps sequences begin anew, ``[T, B]`` or packed ``[N]``, bool; or ``None``.
    """

    x: Tensor
    batch_sizes: Tensor | None = None
    h_0: Tensor
    c_0: Tensor
    weights: Sequence[Mapping[str, Tensor]]
    sample_of: Tensor | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None
    _states: States | None = None  # as the caller gave them, where empty sequences keep theirs
    _cast_to: torch.dtype | None = None  # by autocast
    _answer_dtypes: tuple[torch.dtype, torch.dtype] | None = None  # of output and h_n, and of c_n

    @abstractmethod
    def __init__(self, layer: Layer, input: Any, hx: Any, weight: Tensor) -> None: ...

    def batch_size(self) -> int:
        """How many sequences the caller gave, empty ones included."""
        return self._states[0].size(1) if self._states is not None else self.h_0.size(1)

    @abstractmethod
    def enter_resets(self, resets: Any) -> Tensor:
        """Check the caller's resets, which have the form of the input, and make steps of them."""

    @abstractmethod
    def leave_sequence(self, rows: Tensor) -> Any:
        """Give steps the form of the input."""

    @abstractmethod
    def _layout(self, backward: bool) -> Layout:
        """The form of the input."""

    @abstractmethod
    def leave_states(self, h_n: Tensor, c_n: Tensor) -> States:
        """Give states the form in which the caller has them."""

    def leave(self, answer: Answer) -> tuple[Any, States]:
        """The way out: the output and (h_n, c_n)."""
        output, h_n, c_n = answer.output, answer.h_n, answer.c_n
        if self._answer_dtypes is not None:
            h_dtype, c_dtype = self._answer_dtypes
            output, h_n, c_n = output.to(h_dtype), h_n.to(h_dtype), c_n.to(c_dtype)
        return self.leave_sequence(output), self.leave_states(h_n, c_n)

    def leave_steps(self, answer: Answer, backward: bool) -> Kept:
        """The way out of the steps that were kept.

        Args:
            answer: what the stack has returned.
            backward: whether some directions go from the last step to the first.
        """
        fields: list[tuple[Any, ...]] = []
        for name, parts in zip(Step._fields, zip(*(steps.joined for steps in answer.steps))):
            if self._answer_dtypes is not None:
                dtype = self._answer_dtypes[name == "c"]
                parts = tuple(part.to(dtype) for part in parts)
            fields.append(tuple(self.leave_sequence(part) for part in parts))
        return Kept(fields, self._layout(backward), answer.steps, self.sample_of)

    def convert_dtypes(self, layer: Layer, weights: Sequence[Mapping[str, Tensor]]) -> None:
        """Cast as autocast does, check dtypes and devices, and convert to the dtype of the loop."""
        self._cast_to = cast_to = autocast_dtype(self.x.device)
        x, h_0, c_0 = self.x, self.h_0, self.c_0
        if cast_to is not None:
            x, h_0, c_0 = (autocast(t, cast_to) for t in (x, h_0, c_0))
            weights = [{kind: autocast(t, cast_to) for kind, t in w.items()} for w in weights]
        self.weights = weights
        _check_alike((x, h_0, c_0), weights, layer)
        weight = weights[0]["weight_ih"]
        compute = compute_dtype(weight.dtype)
        if cast_to is None and compute == weight.dtype:
            return
        packed = self.batch_sizes is not None or self.lengths is not None
        projected = layer.proj_size > 0
        self._answer_dtypes = answer_dtypes(self.x, self.c_0, weight, cast_to, packed, projected)
        self.x, self.h_0, self.c_0 = (t.to(compute) for t in (x, h_0, c_0))
        # To convert the matrices takes longer than one step of few rows by torch's products in their
        # dtype, whose results are rounded once. nn.LSTM does not do better.
        narrow = (
            not packed
            and x.size(0) == 1
            and x.size(1) <= _FEW_ROWS
            and layer._sample_hooks is None
            and not (is_compiling() or is_tracing() or layer._cell_is_changed())
        )
        self.weights = [
            {kind: t if narrow and t.dim() == 2 else t.to(compute) for kind, t in w.items()}
            for w in weights
        ]

    def without_autocast(self) -> AbstractContextManager[Any]:
        """Turn autocast off in a block: its casts are done already."""
        if self._cast_to is None:
            return _NO_BLOCK
        return torch.autocast(self.x.device.type, enabled=False)

    def _zero_states(self, layer: Layer, x: Tensor) -> None:
        """Make initial states of zeros for x in the caller's layout."""
        layer.check_input(x, self.batch_sizes)
        expected_h = layer.get_expected_hidden_size(x, self.batch_sizes)
        expected_c = layer.get_expected_cell_size(x, self.batch_sizes)
        self.h_0 = x.new_zeros(expected_h)
        self.c_0 = self.h_0  # safe to share: never written to
        if expected_c[2] != expected_h[2]:
            self.c_0 = x.new_zeros(*self.h_0.shape[:2], expected_c[2])


class Dense(Inputs):
    """A tensor ``[T, B, I]``, ``[B, T, I]`` or unbatched ``[T, I]``."""

    def __init__(self, layer: Layer, input: Any, hx: Any, weight: Tensor) -> None:
        x = _as_tensor(input)
        self._batched = x.dim() == 3
        self._sizes = x.shape[:-1]
        self._batch_first = layer.batch_first
        if not self._batched:
            x = x.unsqueeze(0 if self._batch_first else 1)
        _check_input_dtype(x, weight, packed=False)
        if hx is None:
            self._zero_states(layer, x)
        else:
            h_0, c_0 = _as_pair(hx, 3 if self._batched else 2, packed=False, indexed=True)
            if not self._batched:
                h_0, c_0 = h_0.unsqueeze(1), c_0.unsqueeze(1)
            layer.check_forward_args(x, (h_0, c_0), None)
            self.h_0, self.c_0 = layer.permute_hidden((h_0, c_0), None)
        self.x = x.transpose(0, 1) if self._batch_first else x

    def enter_resets(self, resets: Any) -> Tensor:
        check_resets(resets, self._sizes, self.x.device)
        if not self._batched:
            return resets.unsqueeze(1)  # type: ignore[no-any-return]
        return resets.transpose(0, 1) if self._batch_first else resets  # type: ignore[no-any-return]

    def leave_sequence(self, rows: Tensor) -> Tensor:
        if not self._batched:
            return rows.squeeze(1)
        return rows.transpose(0, 1) if self._batch_first else rows

    def _layout(self, backward: bool) -> Layout:
        time_first = self._batched and not self._batch_first
        return Layout("dense", self._batched, -3 if time_first else -2, backward)

    def leave_states(self, h_n: Tensor, c_n: Tensor) -> States:
        return (h_n, c_n) if self._batched else (h_n.squeeze(1), c_n.squeeze(1))


class Padded(Dense):
    """A batch whose sequences end in padding: packed where the lengths are known, otherwise left so."""

    def __init__(self, layer: Layer, input: Any, hx: Any, weight: Tensor, lengths: Any) -> None:
        super().__init__(layer, input, hx, weight)
        if not self._batched:
            raise ValueError(f"lengths {_ONLY_PADDED}, but got unbatched input: {list(input.shape)}")
        T, B = self.x.shape[:2]
        lengths = as_lengths(lengths, T, B)
        if lengths.is_meta and not self.x.is_meta:
            raise RuntimeError(
                f"lengths should be on a device with numbers, such as {self.x.device}, but got meta"
            )
        self._padding: Padding | None = None
        if not has_numbers(lengths):
            self.lengths = lengths.to(self.x.device)
            return
        self._padding = padding = Padding(lengths.cpu(), T, self._batch_first, self.x.device)
        self.batch_sizes, self.sample_of = padding.batch_sizes, padding.order
        self.x = padding.pack(input)
        self._states = self.h_0, self.c_0
        self.h_0, self.c_0 = layer.permute_hidden(self._states, padding.order)

    def enter_resets(self, resets: Any) -> Tensor:
        steps = super().enter_resets(resets)
        return steps if self._padding is None else self._padding.pack(resets)

    def leave_sequence(self, rows: Tensor) -> Tensor:
        if self._padding is not None:
            return self._padding.pad(rows)
        # As padding returns it.
        return super().leave_sequence(rows).clone(memory_format=torch.contiguous_format)

    def _layout(self, backward: bool) -> Layout:
        return super()._layout(backward)._replace(form="padded")

    def leave_states(self, h_n: Tensor, c_n: Tensor) -> States:
        if self._padding is None:
            return h_n, c_n
        assert self._states is not None
        return _among(self._states, (h_n, c_n), self._padding.order)


class Packed(Inputs):
    """A PackedSequence, sorted or not, or built by hand."""

    def __init__(self, layer: Layer, input: PackedSequence, hx: Any, weight: Tensor) -> None:
        x, self.batch_sizes, self._sorted, self._unsorted = input
        self._layer = layer
        if not is_tracing() and not is_compiling():  # the sizes are data there
            rows = _check_batch_sizes(x, self.batch_sizes)
            x = x if rows == x.size(0) else x[:rows]  # no sequence has the rest
        _check_input_dtype(x, weight, packed=True)
        if hx is None:
            self._zero_states(layer, x)
        else:
            h_0, c_0 = _as_pair(hx, 3, packed=True, indexed=self._sorted is not None)
            layer.check_forward_args(x, (h_0, c_0), self.batch_sizes)
            self.h_0, self.c_0 = layer.permute_hidden((h_0, c_0), self._sorted)
        self.sample_of = self._sorted
        self.x = x

    def enter_resets(self, resets: Any) -> Tensor:
        if not isinstance(resets, PackedSequence):
            raise TypeError(
                f"resets should be a PackedSequence like the input, but got {type(resets).__name__}"
            )
        assert self.batch_sizes is not None
        N = self.x.size(0)
        rows = resets.data.narrow(0, 0, N) if resets.data.size(0) > N else resets.data
        check_resets(rows, (N,), self.x.device)
        given = resets.batch_sizes, resets.sorted_indices
        wanted = self.batch_sizes, self._sorted
        known = all(t is None or has_numbers(t) for t in (*given, *wanted))
        if known and not all(map(_are_equal, given, wanted)):
            raise ValueError(
                "resets should be packed like the input, with batch_sizes and sorted_indices "
                f"{_described(*wanted)}, but got {_described(*given)}"
            )
        return rows

    def leave_sequence(self, rows: Tensor) -> PackedSequence:
        assert self.batch_sizes is not None
        return PackedSequence(rows, self.batch_sizes, self._sorted, self._unsorted)

    def _layout(self, backward: bool) -> Layout:
        return Layout("packed", True, 0, backward)

    def leave_states(self, h_n: Tensor, c_n: Tensor) -> States:
        return self._layer.permute_hidden((h_n, c_n), self._unsorted)


class Nested(Inputs):
    """A nested tensor ``[B, j, I]`` of layout ``torch.jagged``. An empty sequence keeps its states."""

    def __init__(self, layer: Layer, input: Tensor, hx: Any, weight: Tensor) -> None:
        if input.layout != torch.jagged or input.dim() != 3 or input.size(-1) != layer.input_size:
            raise ValueError(
                f"a nested input should be [B, j, {layer.input_size}] of layout torch.jagged, "
                f"but got {list(input.shape) if input.layout == torch.jagged else input.dim()} "
                f"of layout {input.layout}"
            )
        self._jagged = jagged = Jagged(input)
        self.x, self.batch_sizes, self.sample_of = jagged.data, jagged.batch_sizes, jagged.order
        layer.check_input(self.x, self.batch_sizes)
        _check_input_dtype(self.x, weight, packed=True)
        # The batch_sizes do not tell how many sequences are empty, which have states too.
        L, _, P = layer.get_expected_hidden_size(self.x, self.batch_sizes)
        *_, H = layer.get_expected_cell_size(self.x, self.batch_sizes)
        expected_h, expected_c = (L, jagged.B, P), (L, jagged.B, H)
        if hx is None:
            h_0, c_0 = jagged.data.new_zeros(expected_h), jagged.data.new_zeros(expected_c)
        else:
            h_0, c_0 = _as_pair(hx, 3, packed=True, indexed=False)
            layer.check_hidden_size(h_0, expected_h, "Expected h_0 of size {}, got {}")
            layer.check_hidden_size(c_0, expected_c, "Expected c_0 of size {}, got {}")
        self._states = h_0, c_0
        self.h_0, self.c_0 = layer.permute_hidden((h_0, c_0), self.sample_of)

    def enter_resets(self, resets: Any) -> Tensor:
        if not isinstance(resets, Tensor) or resets.layout != torch.jagged or resets.dim() != 2:
            given = type(resets).__name__
            if isinstance(resets, Tensor):
                given = f"{resets.dim()}-D of layout {resets.layout}"
            raise TypeError(f"resets should be nested [B, j] like the input, but got {given}")
        jagged = Jagged(resets)
        if not torch.equal(jagged.lengths, self._jagged.lengths):
            raise ValueError(
                f"resets should have the lengths of the input, {self._jagged.lengths.tolist()}, "
                f"but got {jagged.lengths.tolist()}"
            )
        rows: Tensor = jagged.data
        check_resets(rows, self.x.shape[:1], self.x.device)
        return rows

    def leave_sequence(self, rows: Tensor) -> Tensor:
        return self._jagged.nest(rows)

    def _layout(self, backward: bool) -> Layout:
        return Layout("nested", True, 0, backward)

    def leave_states(self, h_n: Tensor, c_n: Tensor) -> States:
        assert self._states is not None
        return _among(self._states, (h_n, c_n), self._jagged.order)


def _among(states: States, final: States, order: Tensor) -> States:
    """The final states, among those that empty sequences keep."""
    h, c = (s.to(f.dtype).index_copy(1, order, f) for s, f in zip(states, final))
    return h, c


def _check_alike(
    data: tuple[Tensor, Tensor, Tensor], weights: Sequence[Mapping[str, Tensor]], layer: Layer
) -> None:
    """Check that input, states and weights are on the first weight's device and of its dtype."""
    device, dtype = weights[0]["weight_ih"].device, weights[0]["weight_ih"].dtype
    tensors = [*data]
    for w in weights:
        tensors.extend(w.values())
    for tensor in tensors:
        if tensor.dtype is not dtype or tensor.device != device:
            break
    else:
        return
    names = ["input", "h_0", "c_0"]
    for w, weight_names in zip(weights, layer._all_weights):
        suffix = weight_names[0].removeprefix("weight_ih")  # _l0, _l0_reverse, ...
        names += [kind + suffix for kind in w]
    for name, tensor in zip(names, tensors):
        for what, actual, expected in (
            ("device", tensor.device, device),
            ("dtype", tensor.dtype, dtype),
        ):
            if actual != expected:
                raise RuntimeError(
                    f"input, hx and weights should be of one {what}, that of the first weight, "
                    f"{expected}, but got {name} of {actual}"
                )


def _as_tensor(input: Any) -> Tensor:
    if not isinstance(input, Tensor):
        # nn.LSTM asks for input.dim() and finds none
        raise AttributeError(
            f"input should be a Tensor or a PackedSequence, but got {type(input).__name__}"
        )
    if input.dim() not in (2, 3):
        raise ValueError(
            f"input should be 2-D (unbatched) or 3-D, but got {input.dim()}-D: {list(input.shape)}"
        )
    return input


def _check_input_dtype(input: Tensor, weight: Tensor, packed: bool) -> None:
    if input.dtype != weight.dtype and autocast_dtype(input.device) is None:
        error = RuntimeError if packed else ValueError  # as nn.LSTM
        raise error(
            f"input should have the dtype of the weights, {weight.dtype}, but got {input.dtype}. "
            f"Convert the input: input.to({weight.dtype}), or the model: model.to({input.dtype})"
        )


def _as_pair(hx: Any, rank: int, packed: bool, indexed: bool) -> tuple[Tensor, Tensor]:
    """Check that ``hx`` is (h_0, c_0), with the exceptions that nn.LSTM has for each mistake.

    Args:
        hx: what the caller gave.
        rank: that of both states.
        packed: the input is packed; nn.LSTM's kernel then finds mistakes, not its own checks.
        indexed: nn.LSTM takes hx[0] and hx[1] before it counts them.
    """
    expected = f"hx should be a pair (h_0, c_0) of {rank}-D tensors, but got "
    if isinstance(hx, Tensor) and not packed:
        message = expected + f"one tensor of shape {list(hx.shape)}"
        if hx.dim() == 0 or hx.size(0) < 2:
            raise IndexError(message)
        raise RuntimeError(message) if hx.dim() != rank + 1 else TypeError(message)
    if not isinstance(hx, Sequence):
        raise TypeError(expected + type(hx).__name__)
    if len(hx) != 2:
        error = IndexError if len(hx) < 2 and indexed else RuntimeError
        raise error(expected + f"{len(hx)} elements")
    h_0, c_0 = hx
    if not isinstance(h_0, Tensor) or not isinstance(c_0, Tensor):
        message = f"({type(h_0).__name__}, {type(c_0).__name__})"
        raise (AttributeError if indexed else TypeError)(expected + message)
    if h_0.dim() != rank or c_0.dim() != rank:
        flat = packed and min(h_0.dim(), c_0.dim()) < rank
        message = f"{h_0.dim()}-D and {c_0.dim()}-D: {list(h_0.shape)} and {list(c_0.shape)}"
        raise (IndexError if flat else RuntimeError)(expected + message)
    return h_0, c_0


def _are_equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.tolist() == b.tolist())


def _described(*tensors: Tensor | None) -> str:
    return " and ".join(str(None if t is None else t.tolist()) for t in tensors)


def _check_batch_sizes(input: Tensor, batch_sizes: Tensor) -> int:
    """Check a PackedSequence that may have been built by hand, and count the rows that are used."""
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1:
        error = RuntimeError if batch_sizes.dtype == torch.int32 else TypeError  # as nn.LSTM
        raise error(
            "batch_sizes should be one-dimensional and of torch.int64, but got "
            f"{list(batch_sizes.shape)} of {batch_sizes.dtype}"
        )
    sizes: list[int] = batch_sizes.tolist()
    if any(b > a for a, b in pairwise(sizes)) or min(sizes, default=0) < 0:
        raise RuntimeError(f"batch_sizes should not grow, nor be negative, but got {sizes}")
    rows = sum(sizes)
    if rows > input.size(0):
        raise RuntimeError(
            f"data should have a row for each of the {rows} steps in batch_sizes, {sizes}, "
            f"but got {input.size(0)}"
        )
    return rows
