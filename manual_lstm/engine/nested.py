"""Nested tensors: sequences of different lengths end to end, to packed steps and back."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


class Jagged:
    """Where the steps of a nested tensor's sequences lie.

    Args:
        input: a nested tensor ``[B, j, I]`` of layout ``torch.jagged``.

    Attributes:
        B: how many sequences there are.
        order: those that are not empty, by falling length.
        packed: those, packed.
    """

    def __init__(self, input: Any) -> None:  # a Tensor, but for the types of its methods
        self._input = input
        values, offsets = input.values(), input.offsets()  # [rows, I], [B + 1]
        starts, lengths = offsets[:-1], input.lengths()
        if lengths is None:  # without gaps
            lengths = offsets.diff()
        self.B = lengths.size(0)
        order = lengths.argsort(descending=True, stable=True)
        self.order = order[: int((lengths > 0).sum())]
        lengths = lengths[self.order]
        steps = torch.arange(int(lengths[0]) if len(lengths) else 0, device=offsets.device)
        present = steps.unsqueeze(1) < lengths  # [T, sequences]
        self._rows = (starts[self.order] + steps.unsqueeze(1))[present]  # [N], step by step
        self.packed = PackedSequence(values[self._rows], present.sum(1).cpu())

    def nest(self, sequence: PackedSequence) -> Tensor:
        """Give a packed result the form of the input, which may have gaps: they are zero."""
        values = self._input.values()
        data = sequence.data.new_zeros(values.size(0), sequence.data.size(1))
        nested: Tensor = torch.nested.nested_tensor_from_jagged(
            data.index_copy(0, self._rows, sequence.data),
            self._input.offsets(),
            self._input.lengths(),
        )
        return nested
