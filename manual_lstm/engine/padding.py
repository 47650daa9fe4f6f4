"""Padded sequences: their steps packed, and back; or, while lengths are not known, filled up."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manual_lstm.engine.context import has_numbers, is_compiling
from manual_lstm.engine.direction import Direction
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
    sequence is continued by its last step; only one without a step gets zeros.

    Args:
        x: ``[T, B, I]``.
        lengths: ``[B]``, int64.
    """
    if x.size(0) == 0:
        return x
    t = torch.arange(x.size(0), device=x.device).unsqueeze(1)  # [T, 1]
    last = (lengths - 1).clamp(min=0)
    steps = torch.minimum(t, last).unsqueeze(2).expand(x.shape)
    return x.gather(0, steps).masked_fill(lengths.eq(0).view(1, -1, 1), 0)


def without_padding(resets: Tensor, lengths: Tensor) -> Tensor:
    """The resets ``[T, B]`` that are in a sequence."""
    return resets & has_step(lengths, resets.size(0))


def as_lengths(lengths: Any, T: int, B: int) -> Tensor:
    """Make a tensor of the lengths, ``[B]``, int64, and check them as far as they are known.

    Raises:
        TypeError: they are no integers.
        ValueError: they are not one for each sequence, between 0 and T.
    """
    values = lengths if isinstance(lengths, Tensor) else _listed(lengths, B)
    return _checked(values, T, B)


def _listed(lengths: Any, B: int) -> Tensor:
    """Make a tensor of numbers that are not in one: in a list, a tuple, an array of numpy."""
    try:
        numbers = None if isinstance(lengths, (str, bytes, Mapping)) else list(lengths)
    except TypeError:
        numbers = None
    if numbers is None:
        raise TypeError(
            f"lengths should be a list or a tensor of {B} integers, but got {lengths!r} "
            f"({type(lengths).__name__})"
        )
    if not is_compiling():
        for number in numbers:
            if isinstance(number, bool) or not hasattr(number, "__index__"):
                kind = type(number).__name__
                raise TypeError(f"lengths should be integers, but got {number!r} ({kind})")
    return torch.as_tensor(numbers if numbers else torch.zeros(0, dtype=torch.int64))


def _checked(lengths: Tensor, T: int, B: int) -> Tensor:
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise TypeError(f"lengths should be integers, but got {lengths.dtype}")
    if lengths.dim() != 1 or lengths.size(0) != B:
        raise ValueError(
            f"lengths should be [{B}], one for each sequence, but got {list(lengths.shape)}"
        )
    lengths = lengths.to(torch.int64)
    if has_numbers(lengths):
        values: list[int] = lengths.tolist()
        wrong = {b: n for b, n in enumerate(values) if not 0 <= n <= T}
        if wrong:
            raise ValueError(
                f"lengths should be between 0 and the {T} steps of the input, but got "
                + ", ".join(f"{n} for sequence {b}" for b, n in list(wrong.items())[:3])
            )
    return lengths


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
