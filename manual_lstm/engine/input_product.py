"""The input's part of the gates: its products with weight_ih."""

from collections.abc import Sequence

import torch
from torch import Tensor

from manual_lstm.engine.direction import Direction
from manual_lstm.engine.gemm import by_gate, ifog, row_product
from manual_lstm.engine.steps import BlockSteps


def input_product(d: Direction, steps: BlockSteps) -> "InputProduct":
    """Choose how to multiply the input of a direction with weight_ih."""
    B = d.h_0.size(0)
    # One product a step is as fast as one for many steps, and leaves its result in the cache.
    if steps.dense and len(steps.sizes) >= 4 and B >= 16 and d.weight_ih.numel() <= 1 << 18:
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
        bias = None if d.bias is None else ifog(d.bias)
        self._product = row_product(ifog(d.weight_ih), bias, rows)

    def enter(self, block: range, a: Tensor) -> Sequence[Tensor | None]:
        """Compute the block's part of the gates: each step's by itself, in the order i, f, o, g.

        Args:
            block: the block.
            a: receives it, ``[4n, H]``.

        Returns:
            For every step what it passes to :meth:`of_step`, or ``None``.
        """
        x = self._steps.rows_of(self._x, block)  # [n, I]
        if self._steps.of_one:
            self._product(x, a.view(x.size(0), -1))
        else:
            self._steps.lay_by_step(self._product(x, None), block, a)
        return [None] * len(block)

    def of_step(self, x: Tensor, a: Tensor) -> None:
        """Compute a step's part of the gates, ``[4, B, H]``."""


class _OfEachStep(InputProduct):
    """The same for a step at a time."""

    by_step = True

    def __init__(self, d: Direction, steps: BlockSteps) -> None:
        self._steps, self._x = steps, d.x
        self.most_rows = steps.starts[-1]
        self._weight = by_gate(d.weight_ih)  # [4, I, H]
        self._bias = None if d.bias is None else ifog(d.bias).view(4, 1, -1)

    def enter(self, block: range, a: Tensor) -> Sequence[Tensor | None]:
        x = self._steps.rows_of(self._x, block)
        sizes = self._steps.sizes[block.start : block.stop]
        return x.expand(4, *x.shape).split_with_sizes(sizes, 1)  # T' times [4, B, I]

    def of_step(self, x: Tensor, a: Tensor) -> None:
        if self._bias is None:
            torch.bmm(x, self._weight, out=a)
        else:
            torch.baddbmm(self._bias, x, self._weight, out=a)
