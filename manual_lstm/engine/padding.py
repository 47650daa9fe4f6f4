"""Padded sequences: their steps packed, and back; or, while lengths are not known, filled up."""

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from manual_lstm.engine.context import has_numbers, is_compiling
from manual_lstm.engine.direction import Direction, Result
from manual_lstm.engine.forward import Kept
from manual_lstm.engine.steps import has_step


class Padding:
    """Where the steps of padded sequences lie.

    Args:
        lengths: the number of steps of each sequence, ``[B]``, int64, on the CPU.
        T: the number of steps of the padded input.
        batch_first: whether that is ``[B, T, ...]``, otherwise ``[T, B, ...]``.
        device: where it is.

    Attributes:
        order: the sequences that are not empty, by falling length. Ties are in the order that
            ``pack_padded_sequence`` has them, because dropout draws row by row.
        batch_sizes: the number of rows of each step, ``[longest]``, int64, on the CPU.
    """

    def __init__(self, lengths: Tensor, T: int, batch_first: bool, device: torch.device) -> None:
        self._T, self._B, self._batch_first = T, lengths.size(0), batch_first
        # As packing, which refuses empty sequences, sorts the others.
        filled = lengths.nonzero().squeeze(1)
        lengths, place = lengths[filled].sort(descending=True)
        order = filled[place]
        step = torch.arange(int(lengths[0]) if len(lengths) else 0).unsqueeze(1)
        present = step < lengths  # [longest, sequences]
        row = order * T + step if batch_first else step * self._B + order
        self._rows = row[present].to(device)  # of each packed row that in the padded input, [N]
        self.batch_sizes = present.sum(1)
        self.order = order.to(device)

    def pack(self, padded: Tensor) -> Tensor:
        """``[T, B, ...]``, or with batch_first ``[B, T, ...]``, to ``[N, ...]``."""
        # torch's own packing takes several times as long, most of all backwards.
        return padded.flatten(0, 1).index_select(0, self._rows)

    def pad(self, rows: Tensor) -> Tensor:
        """``[N, ...]`` to ``[T, B, ...]``, or ``[B, T, ...]``, with zeros where there is no step."""
        sizes = (self._B, self._T) if self._batch_first else (self._T, self._B)
        padded = rows.new_zeros(self._T * self._B, *rows.shape[1:])
        return padded.index_copy(0, self._rows, rows).view(*sizes, *rows.shape[1:])


def fill(x: Tensor, lengths: Tensor) -> Tensor:
    """Replace what stands in the padding, which may be anything, before a loop computes with it.

    A cell may not take zeros: the gradient of 1 / 0 is nan, however it is masked later. So each
    sequence is continued by its last step, and one without a step is the first step of the longest.

    Args:
        x: ``[T, B, I]``.
        lengths: ``[B]``, int64.
    """
    T, B = x.shape[:2]
    if T == 0 or B == 0:
        return x
    t = torch.arange(T, device=x.device).unsqueeze(1)  # [T, 1]
    step = torch.minimum(t, (lengths - 1).clamp(min=0))  # [T, B]
    sequence = torch.where(lengths > 0, torch.arange(B, device=x.device), lengths.argmax())  # [B]
    rows = x.flatten(0, 1).index_select(0, (step * B + sequence).flatten())
    # Where all are empty, there is no step to take.
    return rows.view(x.shape).masked_fill(lengths.eq(0).all(), 1)


def run_masked(d: Direction, run: Callable[[Direction], Result]) -> Result:
    """Run a loop on a padded direction, where it computes every row of every step.

    A sequence without a step gets no part in it, and keeps its states.

    Args:
        d: the direction.
        run: the loop.
    """
    assert d.lengths is not None
    empty = d.lengths.eq(0).unsqueeze(1)  # [B, 1]
    h_0, c_0 = d.h_0.masked_fill(empty, 0), d.c_0.masked_fill(empty, 0)
    result = run(d._replace(x=fill(d.x, d.lengths), h_0=h_0, c_0=c_0))
    h_n, c_n = torch.where(empty, d.h_0, result.h_n), torch.where(empty, d.c_0, result.c_n)
    return result._replace(h_n=h_n, c_n=c_n)


def without_padding(resets: Tensor, lengths: Tensor) -> Tensor:
    """The resets ``[T, B]`` that are in a sequence."""
    return resets & has_step(lengths, resets.size(0))


def as_lengths(lengths: Any, T: int, B: int) -> Tensor:
    """Make a tensor of the lengths, ``[B]``, int64, and check them as far as they are known.

    Raises:
        TypeError: they are no integers.
        ValueError: they are not one for each sequence, between 0 and T.
        RuntimeError: they are on the meta device.
    """
    values = lengths if isinstance(lengths, Tensor) else _listed(lengths, T, B)
    return _checked(values, T, B)


def _listed(lengths: Any, T: int, B: int) -> Tensor:
    """Make a tensor of numbers that are not in one: in a list, a tuple, an array of numpy."""
    if is_compiling() and hasattr(lengths, "dtype"):  # Dynamo makes tensors of numpy's arrays
        return torch.as_tensor(lengths)
    refused = isinstance(lengths, (str, bytes, Mapping, PackedSequence))
    if refused or not (hasattr(lengths, "__getitem__") and hasattr(lengths, "__len__")):
        raise TypeError(
            f"lengths should be a list or a tensor of {B} integers, but got {lengths!r} "
            f"({type(lengths).__name__})"
        )
    numbers = [_number(number) for number in lengths]
    for number in numbers:
        if isinstance(number, Tensor):
            return torch.stack([torch.as_tensor(n, device=number.device) for n in numbers])
    if not is_compiling():  # before they become a tensor, which takes no number above 2 ** 63
        _check_range(numbers, T)
    return torch.as_tensor(numbers if numbers else torch.zeros(0, dtype=torch.int64))


def _number(number: Any) -> Any:
    """One length: an int, or a tensor of one integer without dimensions."""
    if is_compiling() and hasattr(number, "dtype"):
        number = torch.as_tensor(number)
    if isinstance(number, Tensor):
        if number.dim() == 0 and _is_integer(number):
            return number.to(torch.int64)
    elif hasattr(number, "__index__") and not isinstance(number, bool):
        if is_compiling():
            return number
        with suppress(TypeError):  # an array of numpy that is not an integer has the method, too
            return operator.index(number)
    raise TypeError(f"lengths should be integers, but got {number!r} ({type(number).__name__})")


def _is_integer(tensor: Tensor) -> bool:
    dtype = tensor.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _checked(lengths: Tensor, T: int, B: int) -> Tensor:
    if not _is_integer(lengths) or lengths.layout != torch.strided:
        raise TypeError(
            f"lengths should be integers in a dense tensor, but got {lengths.dtype} ({lengths.layout})"
        )
    if lengths.dim() != 1 or lengths.size(0) != B:
        raise ValueError(
            f"lengths should be [{B}], one for each sequence, but got {list(lengths.shape)}"
        )
    lengths = lengths.to(torch.int64)
    if has_numbers(lengths):
        _check_range(lengths.tolist(), T)
    return lengths


def _check_range(lengths: Sequence[int], T: int) -> None:
    wrong = {b: n for b, n in enumerate(lengths) if not 0 <= n <= T}
    if wrong:
        raise ValueError(
            f"lengths should be between 0 and the {T} steps of the input, but got "
            + ", ".join(f"{n} for sequence {b}" for b, n in list(wrong.items())[:3])
        )


def run_forward_packed(d: Direction, save: bool, run: Callable[[Direction, bool], Kept]) -> Kept:
    """Run the forward of an operator on a padded direction, whose lengths are known by now.

    Args:
        d: the direction.
        save: whether to keep what the backward needs.
        run: the forward, of a packed direction.
    """
    padding, packed = _pack(d)
    kept = run(packed, save)
    T, B = d.x.shape[:2]
    return Kept(
        padding.pad(kept.output),
        d.h_0.index_copy(0, padding.order, kept.h_n),
        d.c_0.index_copy(0, padding.order, kept.c_n),
        _lengthen(kept.gates, 4 * T * B if save else 0),
        _lengthen(kept.cells, T * B if save else 0),
    )


def run_backward_packed(
    d: Direction, arguments: Sequence[Any], run: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Run the backward of an operator on a padded direction.

    Args:
        d: the direction.
        arguments: what the operator takes besides. It is never asked for single rows.
        run: the backward, of a packed direction.
    """
    padding, packed = _pack(d)
    assert not arguments[-1]
    gates, cells, (grad_output, grad_h_n, grad_c_n), need, by_row = arguments
    N = packed.x.size(0)
    grads = (
        None if grad_output is None else padding.pack(grad_output),
        None if grad_h_n is None else grad_h_n[padding.order],
        None if grad_c_n is None else grad_c_n[padding.order],
    )
    d_x, d_h, d_c, *rest = run(packed, gates[: 4 * N], cells[:N], grads, need, by_row)
    d_x = padding.pad(d_x) if need.x else d_x
    # The gradient of an empty sequence's state passes through.
    of_h = torch.zeros_like(d.h_0) if grad_h_n is None else grad_h_n
    of_c = torch.zeros_like(d.c_0) if grad_c_n is None else grad_c_n
    d_h, d_c = of_h.index_copy(0, padding.order, d_h), of_c.index_copy(0, padding.order, d_c)
    return d_x, d_h, d_c, *rest


def _pack(d: Direction) -> tuple[Padding, Direction]:
    assert d.lengths is not None
    padding = Padding(d.lengths.cpu(), d.x.size(0), False, d.x.device)
    return padding, d._replace(
        x=padding.pack(d.x),
        batch_sizes=padding.batch_sizes,
        lengths=None,
        cuts=None if d.cuts is None else padding.pack(d.cuts),
        h_0=d.h_0[padding.order],
        c_0=d.c_0[padding.order],
    )


def _lengthen(rows: Tensor, n: int) -> Tensor:
    """Add rows, of any numbers, until there are n."""
    longer = rows.new_empty(n, rows.size(1))
    longer[: rows.size(0)] = rows
    return longer
