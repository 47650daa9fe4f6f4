"""Nested tensors: sequences of different lengths end to end, to packed steps and back."""

from typing import Any

import torch
from torch import Tensor


class Jagged:
    """Where the steps of a nested tensor's sequences lie.

    Args:
        input: a nested tensor ``[B, j, I]`` of layout ``torch.jagged``.

    Attributes:
        B: how many sequences there are.
        lengths: how many steps each has, ``[B]``.
        order: those that are not empty, by falling length.
        data: their steps, packed, ``[N, I]``.
        batch_sizes: the number of rows of each step, ``[T]``, int64, on the CPU.
    """

    def __init__(self, input: Any) -> None:  # a Tensor, but for the types of its methods
        self._input = input
        values, offsets = input.values(), input.offsets()  # [rows, I], [B + 1]
        starts, lengths = offsets[:-1], input.lengths()
        if lengths is None:  # without gaps
            lengths = offsets.diff()
        self.B = lengths.size(0)
        self.lengths = lengths
        order = lengths.argsort(descending=True, stable=True)
        self.order = order[: int((lengths > 0).sum())]
        lengths = lengths[self.order]
        steps = torch.arange(int(lengths[0]) if len(lengths) else 0, device=offsets.device)
        present = steps.unsqueeze(1) < lengths  # [T, sequences]
        self._rows = (starts[self.order] + steps.unsqueeze(1))[present]  # [N], step by step
        self.data, self.batch_sizes = values[self._rows], present.sum(1).cpu()

    def nest(self, rows: Tensor) -> Tensor:
        """Give packed rows the form of the input. Where it has gaps, they are zero."""
        values = self._input.values()
        data = rows.new_zeros(values.size(0), rows.size(1))
        nested: Tensor = torch.nested.nested_tensor_from_jagged(
            data.index_copy(0, self._rows, rows),
            self._input.offsets(),
            self._input.lengths(),
        )
        return nested
