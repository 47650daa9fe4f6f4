"""What ``layer.unroll`` returns: the answer, and the gates and states at every step."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, unpack_sequence

from manual_lstm.cell import Step
from manual_lstm.engine.context import is_compiling, register_pytree_node
from manual_lstm.unrolled import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Sequence = Tensor | PackedSequence
_Sequences = tuple[_Sequence, ...]
_Steps = tuple[list[Step] | Callable[[], list[Step]], ...]

COMPILED = "a compiled function returned this Unrolled: read its steps inside of that function"
_COPIED = (
    "this Unrolled is a copy, as torch.func's transforms, tree_map and pickle make it: "
    "read the steps of the original, inside of the transformed function"
)


class Layout(NamedTuple):
    """The form of the input, and so of every field.

    Attributes:
        form: ``"dense"``, ``"padded"``, ``"packed"`` or ``"nested"``.
        batched: of dense input, whether it has a dimension of the batch.
        time_dim: of dense input, the dimension of time, from the end: -3 or -2.
        backward: whether some directions go from the last step to the first.
    """

    form: str
    batched: bool
    time_dim: int
    backward: bool


class Unrolled(tuple[Any, ...]):
    """What :meth:`ManualLSTM.unroll` returns: the layer's answer, and all that it was made of.

    This is a tuple of nine fields: ``output, states, i, f, g, o, c, m, h``. Each field from ``i`` on
    holds one sequence for each layer and direction, in nn.LSTM's order: that of direction ``d`` in
    layer ``l`` is the ``l * D + d``-th. Each sequence is in the input's layout, ``[T, B, features]``,
    with ``batch_first`` ``[B, T, features]``, unbatched ``[T, features]``, nested, or a PackedSequence.
    Index t means the input's step t, in the backward direction too.

    The sequences have the dtype of the output, those of c that of c_n. They are differentiable, but
    the answer is not computed from them: for the gradient of the loss by a state, take :attr:`steps`.
    Fields with the same values (m and h, the last layer's h and the output) may be one tensor: copy
    what you write to.

    torch.func's transforms, ``torch.compile``, ``torch.export``, pickle and ``tree_map`` keep the
    class, its fields and its methods. They lose :attr:`steps`.
    """

    _layout: Layout
    _steps: _Steps | str
    _sample_of: Tensor | None
    _compiled: bool

    def __new__(
        cls,
        output: _Sequence,
        states: tuple[Tensor, Tensor],
        i: _Sequences,
        f: _Sequences,
        g: _Sequences,
        o: _Sequences,
        c: _Sequences,
        m: _Sequences,
        h: _Sequences,
        layout: Layout,
        steps: _Steps | str = _COPIED,
        sample_of: Tensor | None = None,
    ) -> "Unrolled":
        return tuple.__new__(cls, (output, states, i, f, g, o, c, m, h))

    def __init__(
        self, *arguments: Any, layout: Layout, steps: Any = _COPIED, sample_of: Any = None
    ) -> None:
        self._layout, self._steps, self._sample_of = layout, steps, sample_of
        self._compiled = is_compiling()

    @property
    def output(self) -> Any:
        """The output, as :meth:`ManualLSTM.forward` and the layer's hooks return it."""
        return self[0]

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """The pair of h_n and c_n, likewise."""
        return self[1]  # type: ignore[no-any-return]

    @property
    def i(self) -> tuple[Any, ...]:
        """The input gate, with H features."""
        return self[2]  # type: ignore[no-any-return]

    @property
    def f(self) -> tuple[Any, ...]:
        """The forget gate, with H features."""
        return self[3]  # type: ignore[no-any-return]

    @property
    def g(self) -> tuple[Any, ...]:
        """The cell gate, with H features."""
        return self[4]  # type: ignore[no-any-return]

    @property
    def o(self) -> tuple[Any, ...]:
        """The output gate, with H features."""
        return self[5]  # type: ignore[no-any-return]

    @property
    def c(self) -> tuple[Any, ...]:
        """The cell state after the step, with H features."""
        return self[6]  # type: ignore[no-any-return]

    @property
    def m(self) -> tuple[Any, ...]:
        """The hidden state after the step before its projection, with H features."""
        return self[7]  # type: ignore[no-any-return]

    @property
    def h(self) -> tuple[Any, ...]:
        """The hidden state after the step, with P features. Without ``proj_size``, this is m."""
        return self[8]  # type: ignore[no-any-return]

    @property
    def steps(self) -> tuple[list[Step], ...]:
        """Every step that the loop took, on the path of the gradients.

        ``steps[k][t]`` is the :class:`manual_lstm.Step` of the k-th layer and direction at the input's
        step t. The loop computed the answer from these very tensors, ``[b, features]``. So
        ``torch.autograd.grad(loss, [s.c for s in unrolled.steps[k]])``, ``s.h.retain_grad()`` and
        ``s.h.register_hook(...)`` give the whole derivative, by way of all later steps and layers.

        Row r of a step belongs to the sequence ``sample_of[r]`` of the caller. Step t of packed and
        nested input has a row for each sequence that is longer than t; unbatched input has one row. For
        dense, time-first input ``torch.stack([s.h for s in unrolled.steps[k]])`` equals ``h[k]``. The
        dtype is that in which the loop computes, float32 for bfloat16 and float16.

        Raises:
            RuntimeError: there are no steps; the message says why. A transform or a compiled function
                returned this, or the loop ran as torch's scan.

        Example:
            >>> layer = ManualLSTM(10, 20)
            >>> unrolled = layer.unroll(torch.randn(5, 3, 10))
            >>> loss = unrolled.output[-1].square().sum()
            >>> gradients = torch.autograd.grad(loss, [step.c for step in unrolled.steps[0]])
            >>> len(gradients), gradients[0].shape
            (5, torch.Size([3, 20]))
        """
        steps = COMPILED if self._compiled and not is_compiling() else self._steps
        if isinstance(steps, str):
            raise RuntimeError(f"steps are not there, because {steps}")
        self._steps = tuple(single() if callable(single) else single for single in steps)
        return self._steps

    @property
    def sample_of(self) -> Tensor:
        """Which of the caller's sequences each row of a step belongs to, ``[B]``, int64.

        Raises:
            RuntimeError: there are no :attr:`steps`.
        """
        of_first = self.steps[0]
        if self._sample_of is not None:
            return self._sample_of
        return torch.arange(of_first[0].c.size(0) if of_first else 0, device=self.states[0].device)

    def after(self, t: int) -> tuple[Tensor, Tensor]:
        """Return the states after step ``t``: the ``hx`` to go on from step ``t + 1`` with.

        Args:
            t: the step, of dense input. From the end where negative, as in an index.

        Returns:
            h, ``[L * D, B, P or H]``, and c, ``[L * D, B, H]``, without B where the input has none.

        Raises:
            TypeError: the input was packed, nested or padded: its sequences end at steps of their own.
                Or the layer is bidirectional: its backward direction comes from the other end.
            IndexError: there is no such step.
            RuntimeError: a transform has put a dimension of its own elsewhere than first.
        """
        if self._layout.form != "dense":
            raise TypeError(
                "after should be asked of dense input, but the input was packed, nested or padded"
            )
        if self._layout.backward:
            raise TypeError(
                "after should be asked of a layer that only goes forwards, but this one is "
                "bidirectional: its backward direction has not gone through the steps before t"
            )
        c = self.c[0]
        state_dim = -3 if self._layout.batched else -2  # of the layers, in h_n and c_n
        if c.dim() > 2 + self._layout.batched and self.states[1].size(state_dim) != len(self.c):
            raise RuntimeError(
                "after should be asked of fields whose first dimension is that of the transform, but "
                f"got c of {list(c.shape)}: vmap with out_dims=0, or ask inside of the mapped function"
            )
        T, dim = c.size(self._layout.time_dim), self._layout.time_dim
        if not -T <= t < T:
            raise IndexError(f"t should be a step of the {T} that there are, but got {t}")
        h, c = (torch.stack([p.select(dim, t) for p in parts], state_dim) for parts in (self.h, self.c))
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
            IndexError: there is no such sample, direction or unit.
            ValueError: there is no step to draw, or not a label for each; or a transform has added a
                dimension, of which one index has to be taken first.
        """
        figures.check_index("direction", direction, len(self.c), "layers and directions")
        names = ("i", "f", "g", "o", "c", "h")
        return figures.draw_gates(
            {name: self._one(getattr(self, name)[direction], sample) for name in names}, labels, units
        )

    def plot_gradients(
        self,
        loss: Tensor,
        directions: Sequence[int] | None = None,
        labels: Sequence[str] | None = None,
    ) -> "Figure":
        r"""Draw how strongly the loss depends on each step: the norm of dL/dh_t over t.

        A line for each layer and direction shows :math:`\lVert \partial L / \partial h_t \rVert_2` over
        all sequences and units, with a logarithmic scale. The gradients are those of :attr:`steps`, so
        they come by way of all later steps and layers. Where they vanish, the layer does not learn from
        step t (Pascanu et al. 2013, https://arxiv.org/abs/1211.5063). The graph is kept, so that
        ``loss.backward()`` works afterwards, and no parameter's ``.grad`` changes.

        Args:
            loss: a tensor with one element that was computed from this.
            directions: which layers and directions, ``l * D + d``; ``None`` for all.
            labels: what to write below the steps.

        Returns:
            The figure, as :meth:`plot` returns it.

        Raises:
            ImportError: matplotlib is not installed.
            RuntimeError: there are no :attr:`steps`.
            TypeError: the loss is no tensor.
            ValueError: the loss has no gradient or several elements, or was not computed from these
                directions; there is no step to draw, or not a label for each.
            IndexError: there is no such direction.

        Example:
            >>> unrolled = ManualLSTM(10, 20).unroll(torch.randn(30, 3, 10))
            >>> figure = unrolled.plot_gradients(unrolled.output[-1].square().sum())
            >>> figure.savefig("gradients.png")
        """
        steps = self.steps
        chosen = range(len(steps)) if directions is None else directions
        for k in chosen:
            figures.check_index("directions", k, len(steps), "layers and directions")
        D = 1 + self._layout.backward
        ways = ["forward", "backward"]
        states = {
            f"layer {k % len(steps) // D}, {ways[k % D]}": [step.h for step in steps[k]] for k in chosen
        }
        return figures.draw_gradients(loss, states, labels)

    def _one(self, sequence: Any, sample: int) -> Tensor:
        """One sample of a sequence, ``[T, features]``."""
        if self._layout.form in ("dense", "padded"):
            rank = 2 + self._layout.batched
            if sequence.dim() != rank:
                raise ValueError(
                    f"plot should be given sequences of {rank} dimensions, but a transform has made "
                    f"them {list(sequence.shape)}: take one index of it first, with tree_map"
                )
            if not self._layout.batched:
                sequence = sequence.unsqueeze(1)
            dim = -2 if self._layout.time_dim == -3 or not self._layout.batched else -3
            samples: Sequence[Tensor] = sequence.unbind(dim)
        else:
            samples = unpack_sequence(sequence) if self._layout.form == "packed" else sequence.unbind()
        figures.check_index("sample", sample, len(samples), "sequences")
        return samples[sample]

    def __repr__(self) -> str:
        """The shapes: all numbers of all steps would fill the screen."""
        form = self._layout.form
        shape = list(self.output.data.shape if form == "packed" else self.output.shape)
        return f"Unrolled(output={shape}, {form}, L * D = {len(self.c)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (tuple(self), tuple(self._layout))


def _restore(fields: Sequence[Any], layout: Sequence[Any]) -> Unrolled:
    """Make an Unrolled of its fields."""
    return Unrolled(*fields, layout=Layout(*layout))


if register_pytree_node is not None:
    register_pytree_node(
        Unrolled,
        lambda unrolled: (list(unrolled), unrolled._layout),
        _restore,
        serialized_type_name="manual_lstm.Unrolled",  # for programs that torch.export saves
        to_dumpable_context=list,
        from_dumpable_context=lambda layout: Layout(*layout),
    )
