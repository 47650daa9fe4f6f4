"""The input's part of the gates: its products with weight_ih."""

from collections.abc import Sequence

import torch
from torch import Tensor

from manual_lstm.engine.direction import Direction
from manual_lstm.engine.gemm import by_gate, row_product
from manual_lstm.engine.steps import BlockSteps


def input_product(d: Direction, steps: BlockSteps) -> "InputProduct":
    """Choose how to multiply the input of a direction with weight_ih."""
    T, B = len(steps.sizes), d.h_0.size(0)
    if steps.dense and T >= 4:
        if B == 1:
            return _OfOneSequence(d, steps)
        # One product a step is as fast as one for many steps, and leaves its result in the cache.
        if B >= 16 and d.weight_ih.numel() <= 1 << 18:
            return _OfEachStep(d, steps)
    return InputProduct(d, steps)


class InputProduct:
    """The product of the input with weight_ih, plus the bias, for a block at a time.

    Attributes:
        most_rows: how many rows a block should have at most: enough for a fast product, and where the
            weight is small, few enough for the cache.
        by_step: whether each step calls :meth:`of_step`.
    """

    by_step = False

    def __init__(self, d: Direction, steps: BlockSteps) -> None:
        self._steps, self._x = steps, d.x
        N, B = steps.starts[-1], d.h_0.size(0)
        self.most_rows = 128 if d.weight_ih.size(0) <= 512 else 512
        rows = min(N, max(self.most_rows, B))
        self._product = row_product(d.weight_ih, d.bias, rows, -(-N // rows))

    def enter(self, block: range, a: Tensor) -> Sequence[Tensor | None]:
        """Compute the block's part of the gates: each step's by itself, in the order i, f, o, g.

        Args:
            block: the block.
            a: receives it, ``[4n, H]``.

        Returns:
            For every step what it passes to :meth:`of_step`, or ``None``.
        """
        self._steps.lay_by_step(self._product(self._steps.rows_of(self._x, block)), block, a)
        return [None] * len(block)

    def of_step(self, x: Tensor, a: Tensor) -> None:
        """Compute a step's part of the gates, ``[4, B, H]``."""


class _OfOneSequence(InputProduct):
    """The same where every step has one row: then nothing has to be laid out."""

    def __init__(self, d: Direction, steps: BlockSteps) -> None:
        self._steps, self._x = steps, d.x
        self.most_rows = len(steps.sizes)
        self._weight = by_gate(d.weight_ih, rows_first=True).flatten(1)  # [I, 4H]
        self._bias = None if d.bias is None else by_gate(d.bias.unsqueeze(1)).flatten()  # [4H]

    def enter(self, block: range, a: Tensor) -> Sequence[Tensor | None]:
        x, a = self._steps.rows_of(self._x, block), a.view(len(block), -1)  # [n, I] and [n, 4H]
        if self._bias is None:
            torch.mm(x, self._weight, out=a)
        else:
            torch.addmm(self._bias, x, self._weight, out=a)
        return [None] * len(block)


class _OfEachStep(InputProduct):
    """The same for a step at a time."""

    by_step = True

    def __init__(self, d: Direction, steps: BlockSteps) -> None:
        self._steps, self._x = steps, d.x
        self.most_rows = steps.starts[-1]
        self._weight = by_gate(d.weight_ih)  # [4, I, H]
        self._bias = None if d.bias is None else by_gate(d.bias.unsqueeze(1))  # [4, 1, H]

    def enter(self, block: range, a: Tensor) -> Sequence[Tensor | None]:
        x = self._steps.rows_of(self._x, block)
        sizes = self._steps.sizes[block.start : block.stop]
        return x.expand(4, *x.shape).split_with_sizes(sizes, 1)  # T' times [4, B, I]

    def of_step(self, x: Tensor, a: Tensor) -> None:
        if self._bias is None:
            torch.bmm(x, self._weight, out=a)
        else:
            torch.baddbmm(self._bias, x, self._weight, out=a)
