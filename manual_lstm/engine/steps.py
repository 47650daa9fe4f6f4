"""Which rows of a direction's data are which step's, and which sequences are under way.

Sequences are sorted by falling length. So step ``t`` works on the first ``b`` rows of the state, ``b``
being the number of sequences that have a step ``t``. The rows below wait: forwards in time they have
ended and keep their final state, backwards they have not begun and keep their initial one. After the
last step the state is the final state of every sequence. One loop therefore serves dense and packed
input and both directions.

Loops that take one step at a time use :class:`Steps`; where the numbers of rows are not known, as in
compiled and exported programs, :class:`PaddedSteps`, which keeps waiting rows by a mask. The fused loop
works on many steps at once and uses :class:`BlockSteps`.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from manual_lstm.cell import Step
from manual_lstm.engine.context import is_compiling, is_grad_enabled
from manual_lstm.engine.direction import AllSteps, Direction

# A block of steps has about this many rows: enough for a product to be fast, few enough for its
# result to stay in the cache. The fused loop projects the input of one block at a time.
BLOCK_ROWS = 512

_ROWS_UNKNOWN = "a compiled function does not know how many rows each step of packed input has"

T = TypeVar("T")
States = Sequence[Tensor] | Mapping[int, Tensor]


def step_index(x: Tensor, batch_sizes: Tensor | None) -> Tensor:
    """The index of the step that each row of x belongs to, ``[T, B]`` or packed ``[N]``, int64."""
    T = (x if batch_sizes is None else batch_sizes).size(0)
    index = torch.arange(T, device=x.device)
    if batch_sizes is None:
        return index.unsqueeze(1).expand(T, x.size(1))
    return index.repeat_interleave(batch_sizes.to(x.device), output_size=x.size(0))


def steps_of(d: Direction) -> "Steps":
    """The steps of a direction, for a loop that takes them one by one."""
    if d.batch_sizes is not None and is_compiling():
        return PaddedSteps(d)
    return Steps(d)


class Steps:
    """The steps of a direction, one by one."""

    def __init__(self, d: Direction) -> None:
        self.reverse = d.reverse
        self._B = d.h_0.size(0)
        # Of packed input the number of rows of each step. Dense input has B rows in every step.
        self._sizes: list[int] | None = None if d.batch_sizes is None else d.batch_sizes.tolist()

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
        if self._sizes is None or self._sizes[t] == self._B:
            return state
        return state.narrow(0, 0, self._sizes[t])

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
        self.reverse = d.reverse
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
        return state

    def carry(self, t: int, new: Tensor, state: Tensor) -> Tensor:
        """As :meth:`Steps.carry`: rows that have no step t keep their state."""
        return torch.where(self.present[t], new, state)

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        """As :meth:`Steps.join`."""
        return self.pack(torch.stack(list(parts)))

    def all(self, joined: Step, single: list[Step] | None = None) -> AllSteps:
        """As :meth:`Steps.all`: here the single steps have rows of sequences that have ended, too."""
        return AllSteps(joined, _ROWS_UNKNOWN)


class BlockSteps(Steps):
    """The steps of a direction in blocks of neighbours, for a loop that works on many rows at once.

    Attributes:
        sizes: the number of rows of each step.
        starts: the first row of each step in packed data, and last the number of rows, N.
    """

    def __init__(self, d: Direction) -> None:
        super().__init__(d)
        self.sizes = [d.x.size(1)] * d.x.size(0) if self._sizes is None else self._sizes
        self.starts = list(accumulate(self.sizes, initial=0))
        rows = self.starts[-1]
        if self._sizes is not None and rows != d.x.size(0):
            raise ValueError(
                f"data should have {rows} rows, the sum of batch_sizes, but got {d.x.size(0)}"
            )

    def blocks(self) -> list[range]:
        """Ranges of neighbouring steps with about ``BLOCK_ROWS`` rows, in the order they are taken."""
        bounds = [0]
        for t in range(1, len(self.sizes)):
            if self.starts[t + 1] - self.starts[bounds[-1]] > BLOCK_ROWS:
                bounds.append(t)
        bounds.append(len(self.sizes))
        return self.in_order(range(a, b) for a, b in pairwise(bounds) if a < b)

    def widened(self, block: range) -> range:
        """The block and the steps next to it."""
        return range(max(block.start - 1, 0), min(block.stop + 1, len(self.sizes)))

    def rows(self, block: range) -> slice:
        """The rows of the block, in packed data."""
        return slice(self.starts[block.start], self.starts[block.stop])

    def rows_of(self, x: Tensor, block: range) -> Tensor:
        """The block's rows of the input, ``[n, I]``."""
        if self._sizes is None:
            return x[block.start : block.stop].reshape(-1, x.size(2))
        return x[self.rows(block)]

    def before(self, t: int) -> int | None:
        """The step that the direction takes before step t; ``None`` if t is the first."""
        before = t + 1 if self.reverse else t - 1
        return before if 0 <= before < len(self.sizes) else None

    def previous(self, t: int, states: States, first: Tensor) -> Tensor:
        """The state before step t: of the step taken before it, and of sequences that begin, ``first``.

        Args:
            t: the step.
            states: the states after each step, by step, ``[b, features]`` each.
            first: the initial states, ``[B, features]``.
        """
        b, before = self.sizes[t], self.before(t)
        if before is None:
            return first if first.size(0) == b else first[:b]
        state, size = states[before], self.sizes[before]
        if size == b:
            return state
        return state[:b] if size > b else torch.cat([state, first[size:b]])

    def last(self, states: Sequence[Tensor], first: Tensor) -> Tensor:
        """The final state of each sequence, ``[B, features]``: where it ended, or the initial one."""
        parts: list[Tensor] = []
        done = 0  # the number of sequences, the longest first, whose final state is in parts
        for t in range(len(self.sizes)) if self.reverse else range(len(self.sizes) - 1, -1, -1):
            if self.sizes[t] > done:
                parts.append(states[t][done:])
                done = self.sizes[t]
        return torch.cat([*parts, first[done:]])  # always a copy
