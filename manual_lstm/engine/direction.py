"""One direction of one layer: what every loop takes, and what every loop returns."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from manual_lstm.cell import Step


class Direction(NamedTuple):
    """The arguments of one direction. Their shapes are written down here and nowhere else.

    Sequences of packed input are sorted by falling length, so step ``t`` works on the first
    ``batch_sizes[t]`` of the B sequences. Those of padded input are in any order.
    """

    # The input of all steps, [T, B, I], or packed [N, I]. Above the first layer I is D * (P or H).
    x: Tensor
    batch_sizes: Tensor | None  # of packed input the number of rows of each step, [T], int64
    # Of padded input the number of steps of each sequence, [B], int64; None where each has T.
    lengths: Tensor | None
    # Which steps begin from a state of zeros, [T, B] or packed [N], bool; None where none does.
    cuts: Tensor | None
    h_0: Tensor  # the initial hidden state, [B, H], or [B, P] with a projection
    c_0: Tensor  # the initial cell state, [B, H]
    weight_ih: Tensor  # [4H, I]
    weight_hh: Tensor  # [4H, H], or [4H, P] with a projection
    bias: Tensor | None  # the sum of both biases, [4H]
    weight_hr: Tensor | None  # [P, H], or None without a projection
    reverse: bool  # go from the last step to the first; outputs stay at their input's step

    @classmethod
    def split(cls, arguments: Sequence[Any]) -> tuple["Direction", Sequence[Any]]:
        """Part the arguments of an operator: those of its direction, which come first, and the rest."""
        n = len(cls._fields)
        return cls(*arguments[:n]), arguments[n:]


class Gradients(NamedTuple):
    """One value for each argument of a direction that has a gradient, by the same names."""

    x: Any
    h_0: Any
    c_0: Any
    weight_ih: Any
    weight_hh: Any
    bias: Any
    weight_hr: Any

    @classmethod
    def split(cls, values: Sequence[Any]) -> tuple["Gradients", Sequence[Any]]:
        """Part the results of a backward: the gradients, which come first, and the rest."""
        n = len(cls._fields)
        return cls(*values[:n]), values[n:]

    @classmethod
    def of(cls, d: Direction) -> "Gradients":
        """Take from the arguments of a direction those that have a gradient."""
        return cls(d.x, d.h_0, d.c_0, d.weight_ih, d.weight_hh, d.bias, d.weight_hr)

    def by_argument(self) -> tuple[Any, ...]:
        """One value for each argument of a direction; ``None`` for those that have no gradient."""
        x, h_0, c_0, *weights = self
        return x, None, None, None, h_0, c_0, *weights, None


class AllSteps(NamedTuple):
    """All steps of a direction."""

    joined: Step  # [T, B, features], or packed [N, features]
    # One by one, [b, features] each, in the order of the input; or what makes them, where few callers
    # will look; or the reason why there are none.
    single: list[Step] | Callable[[], list[Step]] | str


class Result(NamedTuple):
    """What a loop returns."""

    output: Tensor  # [T, B, H], or packed [N, H]; P features with a projection
    h_n: Tensor  # the final hidden state, [B, H], or [B, P] with a projection
    c_n: Tensor  # the final cell state, [B, H]
    steps: AllSteps | None = None  # where the loop keeps them
