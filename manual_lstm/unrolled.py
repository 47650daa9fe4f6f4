"""What ``layer.unroll`` returns: the answer, and the gates and states at every step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, unpack_sequence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Sequence = Tensor | PackedSequence


class Unrolled(NamedTuple):
    """What :meth:`ManualLSTM.unroll` returns: the layer's answer, and all that it was made of.

    Every field from ``i`` on holds one sequence for each layer and direction, in nn.LSTM's order:
    that of direction ``d`` in layer ``l`` is the ``l * D + d``-th. Each is in the input's layout,
    ``[T, B, features]``, with ``batch_first`` ``[B, T, features]``, unbatched ``[T, features]``, or
    a PackedSequence. Index t means the input's step t, in the backward direction too.

    Attributes:
        output: as :meth:`ManualLSTM.forward` returns it.
        states: the pair of h_n and c_n, likewise.
        i: the input gate, with H features.
        f: the forget gate, with H features.
        g: the cell gate, with H features.
        o: the output gate, with H features.
        c: the cell state after the step, with H features.
        m: the hidden state after the step before its projection, with H features.
        h: the hidden state after the step, with P features. Without ``proj_size``, this is m.

        Each has the dtype of the output, c that of c_n. Fields with the same values (m and h, the last
        layer's h and the output) may be one tensor: copy what you write to.
    """

    output: _Sequence
    states: tuple[Tensor, Tensor]
    i: tuple[_Sequence, ...]
    f: tuple[_Sequence, ...]
    g: tuple[_Sequence, ...]
    o: tuple[_Sequence, ...]
    c: tuple[_Sequence, ...]
    m: tuple[_Sequence, ...]
    h: tuple[_Sequence, ...]

    def after(self, t: int) -> tuple[Tensor, Tensor]:
        """Return the states after step ``t``: the ``hx`` to go on from step ``t + 1`` with.

        Not for the backward direction, which has come from the other end.

        Args:
            t: the step, of dense input. From the end where negative, as in an index.

        Returns:
            h, ``[L * D, B, P or H]``, and c, ``[L * D, B, H]``, without B where the input has none.

        Raises:
            TypeError: the input was packed or nested: its sequences end at steps of their own.
            IndexError: there is no such step.
        """
        if isinstance(self.output, PackedSequence) or self.output.is_nested:
            raise TypeError("after should be asked of dense input, but the input was packed or nested")
        dim = self._time_dim()
        T = self.output.size(dim)
        if not -T <= t < T:
            raise IndexError(f"t should be a step of the {T} that there are, but got {t}")
        h, c = (torch.stack([part.select(dim, t) for part in parts]) for parts in (self.h, self.c))  # type: ignore[union-attr]
        return h, c

    def plot(
        self,
        sample: int = 0,
        direction: int = 0,
        labels: Sequence[str] | None = None,
        units: Sequence[int] | None = None,
    ) -> "Figure":
        """Draw the gates and states of one sample as heat maps over time, one panel each.

        Steps are in columns, units in rows, the same in every panel. A projected hidden state has other
        units, which keep their order. The cell state's colours end at 3, because its tanh is about 1
        beyond that.

        Args:
            sample: which of the batch.
            direction: which layer and direction, ``l * D + d``.
            labels: what to write below the steps: the characters of a text, for one.
            units: which units to draw, from the top. ``None`` for all, those first whose cell state
                is largest early.

        Returns:
            The figure: ``.savefig("gates.png")`` writes it to a file, a notebook shows it.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there is no step to draw, or not a label for each.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("plot draws with matplotlib: pip install matplotlib") from None

        c = self._one(self.c[direction], sample)
        T = len(c)
        if T == 0:
            raise ValueError("plot should be given steps, but there is no step to draw")
        if labels is not None and len(labels) != T:
            raise ValueError(
                f"labels should be a label for each of the {T} steps, but got {len(labels)}"
            )
        rows = c.abs().argmax(0).argsort().tolist() if units is None else list(units)
        largest = float(c.abs().nan_to_num().max()) or 1.0
        limit = min(largest, 3.0)
        panels = [  # name, values, the least and the largest, colours
            ("input gate i", self.i, 0, 1, "viridis"),
            ("forget gate f", self.f, 0, 1, "viridis"),
            ("cell gate g", self.g, -1, 1, "RdBu_r"),
            ("output gate o", self.o, 0, 1, "viridis"),
            ("cell state c", self.c, -limit, limit, "RdBu_r"),
            ("hidden state h", self.h, -1, 1, "RdBu_r"),
        ]
        figure = Figure(figsize=(min(max(6, 2 + 0.12 * T), 16), 9), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True)
        for axis, (name, parts, low, high, colours) in zip(axes, panels):
            shown = self._one(parts[direction], sample)
            of_units = shown.size(1) == c.size(1)
            if of_units:
                shown = shown[:, rows]
            image = axis.imshow(
                shown.t().tolist(),
                aspect="auto",
                interpolation="nearest",
                cmap=colours,
                vmin=low,
                vmax=high,
            )
            axis.set_ylabel(name)
            axis.set_yticks([])
            if units is not None and of_units:
                axis.set_yticks(range(len(rows)), rows, fontsize=7)
            beyond = "both" if high == limit < largest else "neither"
            figure.colorbar(image, ax=axis, pad=0.01, aspect=10, extend=beyond)
        if labels is None:
            axes[-1].set_xlabel("step")
        else:
            axes[-1].set_xticks(range(T), labels, family="monospace")
            for axis in axes:
                axis.tick_params(axis="x", length=0)
        return figure

    def _one(self, sequence: _Sequence, sample: int) -> Tensor:
        """One sample of a sequence, ``[T, features]``, ready to be drawn."""
        if isinstance(sequence, PackedSequence):
            sequence = unpack_sequence(sequence)[sample]
        elif sequence.is_nested:
            sequence = sequence.unbind()[sample]
        elif sequence.dim() == 3:
            sequence = sequence.select(1 - self._time_dim(), sample)
        return sequence.detach().float().cpu()

    def _time_dim(self) -> int:
        """The dimension of time in dense fields, inferred because transforms keep only tensors."""
        c, c_n = self.c[0], self.states[1][0]
        assert isinstance(c, Tensor)
        if c.dim() == 2:
            return 0
        if c.size(0) != c.size(1):
            return 1 if c.size(0) == c_n.size(0) else 0
        return 1 if c.stride(0) < c.stride(1) else 0  # T == B; in memory, time comes first
