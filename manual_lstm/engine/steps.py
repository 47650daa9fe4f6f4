"""Which rows of a direction's data are which step's, and which sequences are under way.

Sequences are sorted by falling length. So step ``t`` works on the first ``b`` rows of the state, ``b``
being the number of sequences that have a step ``t``. The rows below wait: forwards in time they have
ended and keep their final state, backwards they have not begun and keep their initial one. After the
last step the state is the final state of every sequence. One loop therefore serves dense and packed
input and both directions.

Loops that take one step at a time use :class:`Steps`. Where the numbers of rows are not known, as in
compiled and exported programs, they use :class:`PaddedSteps` for packed and :class:`MaskedSteps` for
padded input, which keep waiting rows by a mask. The fused loop works on many steps at once and uses
:class:`BlockSteps`.

A sequence may begin anew at some steps: there the state that the step works on is zeros.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from manual_lstm.cell import Step
from manual_lstm.engine.context import is_compiling, is_grad_enabled
from manual_lstm.engine.direction import AllSteps, Direction

_ROWS_UNKNOWN = "a compiled or transformed function does not know how many rows each step has"

T = TypeVar("T")


def step_index(x: Tensor, batch_sizes: Tensor | None) -> Tensor:
    """The index of the step that each row of x belongs to, ``[T, B]`` or packed ``[N]``, int64."""
    T = (x if batch_sizes is None else batch_sizes).size(0)
    index = torch.arange(T, device=x.device)
    if batch_sizes is None:
        return index.unsqueeze(1).expand(T, x.size(1))
    return index.repeat_interleave(batch_sizes.to(x.device), output_size=x.size(0))


def begin_anew(cut: Tensor, state: Tensor) -> Tensor:
    """The state of sequences that begin anew: zeros, which pass nothing back either, nan included.

    Args:
        cut: which do, ``[..., 1]``, bool.
        state: ``[..., features]``.
    """
    return state.masked_fill(cut, 0)


def has_step(lengths: Tensor, T: int) -> Tensor:
    """Which padded sequences, of these ``lengths`` ``[B]``, have which of T steps: ``[T, B]``, bool."""
    return torch.arange(T, device=lengths.device).unsqueeze(1) < lengths


def steps_of(d: Direction) -> "Steps":
    """The steps of a direction, for a loop that takes them one by one."""
    if d.lengths is not None:
        return MaskedSteps(d)
    if d.batch_sizes is not None and is_compiling():
        return PaddedSteps(d)
    return Steps(d)


def split_gates(d: Direction, gates: Tensor) -> tuple[Tensor, ...]:
    """The gates i, f, g and o of all steps, ``[T, B, H]`` or packed ``[N, H]`` each.

    Args:
        d: their direction.
        gates: as the fused loop lays them out, each step's by itself: ``[4N, H]``.
    """
    if d.batch_sizes is None:
        i, f, o, g = gates.view(d.x.size(0), 4, d.x.size(1), gates.size(1)).unbind(1)
        return i, f, g, o
    places = _places_by_step(d.batch_sizes.to(gates.device), d.x.size(0))  # [N, 4]
    i, f, o, g = gates[places.t()].unbind(0)
    return i, f, g, o


def join_gates(d: Direction, i: Tensor, f: Tensor, g: Tensor, o: Tensor) -> Tensor:
    """The way back from :func:`split_gates`."""
    if d.batch_sizes is None:
        return torch.stack([i, f, o, g], 1).flatten(0, 2)
    places = _places_by_step(d.batch_sizes.to(i.device), d.x.size(0))  # [N, 4]
    gates = torch.stack([i, f, o, g], 1)  # [N, 4, H]
    return torch.zeros_like(gates).flatten(0, 1).index_copy(0, places.flatten(), gates.flatten(0, 1))


class Steps:
    """The steps of a direction, one by one."""

    def __init__(self, d: Direction) -> None:
        self._take_order_and_cuts(d)
        self._B = d.h_0.size(0)
        # Of packed input the number of rows of each step. Dense input has B rows in every step.
        self._sizes: list[int] | None = None if d.batch_sizes is None else d.batch_sizes.tolist()

    def _take_order_and_cuts(self, d: Direction) -> None:
        self.reverse = d.reverse
        self._cut_rows = None if d.cuts is None else d.cuts.unsqueeze(-1)  # [T, B, 1] or [N, 1]
        self._cut_steps: Sequence[Tensor] | None = None

    def order(self, T: int) -> range:
        """T steps in the order in which the direction takes them."""
        return range(T - 1, -1, -1) if self.reverse else range(T)

    def in_order(self, steps: Iterable[T]) -> list[T]:
        """Put what belongs to neighbouring steps in the order in which these are taken, or back."""
        return list(steps)[::-1] if self.reverse else list(steps)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """The rows of each step: T times ``[b, features]``."""
        return x.unbind(0) if self._sizes is None else x.split_with_sizes(self._sizes)

    def under_way(self, t: int, state: Tensor) -> Tensor:
        """The rows of a state ``[B, features]`` that step t works on, ``[b, features]``."""
        if self._sizes is not None and self._sizes[t] != self._B:
            state = state.narrow(0, 0, self._sizes[t])
        return self.cut(t, state)

    def cut(self, t: int, state: Tensor) -> Tensor:
        """The rows ``[b, features]`` before step t: of zeros where a sequence begins anew."""
        if self._cut_rows is None:
            return state
        if self._cut_steps is None:
            self._cut_steps = self.split(self._cut_rows)
        return begin_anew(self._cut_steps[t], state)

    def carry(self, t: int, new: Tensor, state: Tensor) -> Tensor:
        """The state after step t, ``[B, features]``: ``new``, and the rows that wait."""
        if self._sizes is None or self._sizes[t] == self._B:
            return new
        b = self._sizes[t]
        return torch.cat([new, state.narrow(0, b, self._B - b)])

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        """Make one tensor of T times ``[b, features]``: the way back from :meth:`split`."""
        return torch.stack(list(parts)) if self._sizes is None else torch.cat(list(parts))

    def all(self, joined: Step, single: list[Step] | None = None) -> AllSteps:
        """All steps, together and one by one.

        Args:
            joined: together.
            single: one by one as the loop has made them, in the order of the input; ``None`` for views.
        """

        def views() -> list[Step]:
            return [Step(*parts) for parts in zip(*map(self.split, joined))]

        if single is not None and is_grad_enabled():
            return AllSteps(joined, single)
        # Without gradients, views do as well, and the tensors of the single steps can be freed.
        return AllSteps(joined, views() if is_compiling() else views)


class PaddedSteps(Steps):
    """The steps of packed data whose numbers of rows are elements of a tensor.

    Everything is done by operators, so a compiled or exported program serves all lengths.

    Attributes:
        present: which sequence has which step, ``[T, B, 1]``, bool.
    """

    def __init__(self, d: Direction) -> None:
        assert d.batch_sizes is not None
        self._take_order_and_cuts(d)
        batch_sizes = d.batch_sizes.to(d.x.device)
        N, B = d.x.size(0), d.h_0.size(0)
        ends = batch_sizes.cumsum(0)  # [T]
        starts = ends - batch_sizes
        sequence = torch.arange(B, device=d.x.device)
        self.present = (sequence < batch_sizes.unsqueeze(1)).unsqueeze(2)  # [T, B, 1]
        self._row = (starts.unsqueeze(1) + sequence).clamp(max=N - 1)  # [T, B]
        row = torch.arange(N, device=d.x.device)
        step = torch.searchsorted(ends, row, right=True)  # [N]
        self._place = step * B + row - starts[step]  # [N]

    def fill(self, data: Tensor) -> Tensor:
        """``[N, ...]`` to ``[T, B, ...]``. A sequence that has no step gets a row of another one.

        Zeros in their place would be input that a cell may not take: 1 / 0 or log 0, whose gradient is
        nan however it is masked later.
        """
        return data[self._row]

    def pad(self, data: Tensor) -> Tensor:
        """``[N, features]`` to ``[T, B, features]``, with zeros where a sequence has no step."""
        return torch.where(self.present, self.fill(data), data.new_zeros(()))

    def pack(self, padded: Tensor) -> Tensor:
        """``[T, B, features]`` to ``[N, features]``."""
        return padded.flatten(0, 1)[self._place]

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """As :meth:`Steps.split`, filled up: T times ``[B, features]``."""
        return self.fill(x).unbind(0)

    def under_way(self, t: int, state: Tensor) -> Tensor:
        """As :meth:`Steps.under_way`: here every step works on all rows."""
        return self.cut(t, state)

    def carry(self, t: int, new: Tensor, state: Tensor) -> Tensor:
        """As :meth:`Steps.carry`: rows that have no step t keep their state."""
        return torch.where(self.present.select(0, t), new, state)

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        """As :meth:`Steps.join`."""
        return self.pack(torch.stack(list(parts)))

    def all(self, joined: Step, single: list[Step] | None = None) -> AllSteps:
        """As :meth:`Steps.all`: here the single steps have rows of sequences that have ended, too."""
        return AllSteps(joined, _ROWS_UNKNOWN)


class MaskedSteps(PaddedSteps):
    """The steps of padded input whose lengths are elements of a tensor: the same without packing."""

    def __init__(self, d: Direction) -> None:
        assert d.lengths is not None
        self._take_order_and_cuts(d)
        self.present = has_step(d.lengths, d.x.size(0)).unsqueeze(2)  # [T, B, 1]

    def fill(self, data: Tensor) -> Tensor:
        """``[T, B, ...]``: the padding has been filled for all directions."""
        return data

    def pack(self, padded: Tensor) -> Tensor:
        """``[T, B, features]`` with zeros in the padding."""
        return torch.where(self.present, padded, 0)


class BlockSteps(Steps):
    """The steps of a direction in blocks of neighbours, for a loop that works on many rows at once.

    Attributes:
        sizes: the number of rows of each step.
        starts: the first row of each step in packed data, and last the number of rows, N.
        dense: whether every step has all rows.
        of_one: whether every step has a single row: what is laid out gate by gate is then a row, too.
    """

    def __init__(self, d: Direction) -> None:
        super().__init__(d)
        self.dense = self._sizes is None
        if self._sizes is not None:
            self._sizes = [
                b for b in self._sizes if b
            ]  # one built by hand may end in steps without rows
        self.sizes = [d.x.size(1)] * d.x.size(0) if self._sizes is None else self._sizes
        self.of_one = self._B == 1 and self.sizes[-1:] == [1]
        self.starts = list(accumulate(self.sizes, initial=0))
        rows = self.starts[-1]
        if self._sizes is not None and rows != d.x.size(0):
            raise ValueError(
                f"data should have {rows} rows, the sum of batch_sizes, but got {d.x.size(0)}"
            )
        if self.sizes and self.sizes[0] != self._B:  # a compiled caller cannot look into batch_sizes
            raise RuntimeError(
                f"h_0 and c_0 should have {self.sizes[0]} sequences, as the input, but got {self._B}"
            )
        if d.batch_sizes is not None:
            self._by_step = _places_by_step(d.batch_sizes.to(d.x.device), rows)

    def blocks(self, most_rows: int, most_steps: int) -> list[range]:
        """Ranges of neighbouring steps, in the order they are taken.

        Args:
            most_rows, most_steps: how many a block has at most, or more rows if one step has more.
        """
        if self.dense:
            T = len(self.sizes)
            n = min(most_steps, max(1, most_rows // max(1, self._B)))
            return self.in_order(range(t, min(t + n, T)) for t in range(0, T, n))
        bounds = [0]
        for t in range(1, len(self.sizes)):
            begin = bounds[-1]
            if t - begin == most_steps or self.starts[t + 1] - self.starts[begin] > most_rows:
                bounds.append(t)
        bounds.append(len(self.sizes))
        return self.in_order(range(a, b) for a, b in pairwise(bounds) if a < b)

    def rows(self, block: range) -> slice:
        """The rows of the block, in packed data."""
        return slice(self.starts[block.start], self.starts[block.stop])

    def rows_of(self, x: Tensor, block: range) -> Tensor:
        """The block's rows of the input, ``[n, I]``."""
        if self.dense:
            return x[block.start : block.stop].reshape(-1, x.size(2))
        return x[self.rows(block)]

    def lay_by_step(self, a: Tensor, block: range, out: Tensor) -> None:
        """Write the gates of a block step by step, and those of each step gate by gate.

        Args:
            a: by row, ``[n, 4H]``.
            block: their steps.
            out: receives them, ``[4n, H]``.
        """
        H = out.size(1)
        if self.dense:
            by_row = a.view(len(block), -1, 4, H)
            out.view(len(block), 4, -1, H).copy_(by_row.transpose(1, 2))
        else:
            rows = self.rows(block)
            out.index_copy_(0, self._by_step[rows].flatten() - 4 * rows.start, a.view(-1, H))

    def by_gate(self, gates: Tensor, block: range) -> tuple[Tensor, ...]:
        """The gates i, f, g and o of a block: ``[T', B, H]`` each, or of packed input ``[n, H]``.

        Args:
            gates: of all steps, as :meth:`lay_by_step` lays them out, ``[4N, H]``.
        """
        rows, H = self.rows(block), gates.size(1)
        if self.dense:
            by_step = gates[4 * rows.start : 4 * rows.stop].view(len(block), 4, -1, H)
            i, f, o, g = by_step.unbind(1)
            return i, f, g, o
        i, f, o, g = gates[self._by_step[rows].t()].unbind(0)  # a copy
        return i, f, g, o

    def before_block(self, block: range) -> range | None:
        """The one step that the direction takes before a block; ``None`` if the block is the first."""
        t = block.stop if self.reverse else block.start - 1
        return range(t, t + 1) if 0 <= t < len(self.sizes) else None

    def resized(self, state: Tensor, b: int, first: Tensor) -> Tensor:
        """The state before a step of b rows: fewer than after the one before, or more, which begin.

        Args:
            state: after the step before, ``[..., b', features]``.
            b: how many rows the step has.
            first: the initial states, ``[..., B, features]``.
        """
        before = state.size(-2)
        if b < before:
            return state.narrow(-2, 0, b)
        return torch.cat([state, first.narrow(-2, before, b - before)], -2)

    def shift(self, states: Tensor, block: range, edge: Tensor, first: Tensor) -> Tensor:
        """The state before each step of a block, ``[n, features]``.

        Args:
            states: the states after its steps, ``[n, features]``.
            block: the block.
            edge: the state before the block, of the sequences that had a step there.
            first: the initial states, ``[B, features]``.
        """
        if self.dense:
            n, B = states.size(0), self._B
            parts = [states[B:], edge] if self.reverse else [edge, states[: n - B]]
            return torch.cat(parts)
        of_steps: list[list[Tensor]] = []
        before = edge
        by_step = states.split_with_sizes(self.sizes[block.start : block.stop])
        for t, state in self.in_order(zip(block, by_step)):
            b = self.sizes[t]
            of_steps.append([before[:b], first[len(before) : b]])  # and of sequences that begin
            before = state
        return torch.cat([part for parts in self.in_order(of_steps) for part in parts])

    def last(self, rows: Tensor, first: Tensor) -> Tensor:
        """The final state of each sequence, ``[B, features]``: where it ended, or the initial one.

        Args:
            rows: the states after all steps, ``[N, features]``.
            first: the initial states, ``[B, features]``.
        """
        if self.dense and self.sizes:
            last = rows[: self._B] if self.reverse else rows[-self._B :]
            return last.clone(memory_format=torch.contiguous_format)
        parts: list[Tensor] = []
        done = 0  # the number of sequences, the longest first, whose final state is in parts
        for t in range(len(self.sizes)) if self.reverse else range(len(self.sizes) - 1, -1, -1):
            if self.sizes[t] > done:
                parts.append(rows[self.starts[t] + done : self.starts[t + 1]])
                done = self.sizes[t]
            if done == len(first):
                break
        return torch.cat([*parts, first[done:]])  # always a copy


def _places_by_step(batch_sizes: Tensor, rows: int) -> Tensor:
    """Where the fused loop keeps the gates i, f, o, g of packed rows: their rows in ``[4N, H]``.

    Returns:
        For every row and gate, ``[N, 4]``, int64.
    """
    starts = batch_sizes.cumsum(0) - batch_sizes  # [T]
    b = batch_sizes.repeat_interleave(batch_sizes, output_size=rows)  # of each row's step, [N]
    start = starts.repeat_interleave(batch_sizes, output_size=rows)
    row = torch.arange(rows, device=batch_sizes.device)
    gate = torch.arange(4, device=batch_sizes.device)
    return (3 * start + row).unsqueeze(1) + b.unsqueeze(1) * gate
