"""A cell of the user's: what it finds in ``w``, how the loops call it, and its mistakes."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from manual_lstm.cell import Step
from manual_lstm.engine.context import is_compiling, is_grad_enabled
from manual_lstm.engine.direction import Direction
from manual_lstm.engine.steps import step_index
from manual_lstm.loop import Cell, Prepare, Prepared

_NO_NAME = "w should be asked for one of {}, but got {}"


class CellWeights:
    """What one direction of one layer passes to its cell, by name.

    Attributes:
        weight_ih: ``[4H, I]``, above the first layer ``[4H, D * (P or H)]``.
        weight_hh: ``[4H, P or H]``.
        weight_hr: ``[P, H]``, or ``None`` without a projection.
        bias: the sum of both biases, ``[4H]``, or ``None``.
        t: the index of this step in the input, the same for each row, ``[b]``, int64. It counts from
            the beginning of the input in the backward direction too. In :meth:`ManualLSTM.cell` only.

        And by their own names this direction's :meth:`ManualLSTM.cell_parameters`; in
        :meth:`ManualLSTM.cell` also what :meth:`ManualLSTM.per_sequence` and
        :meth:`ManualLSTM.per_step` returned, the rows of the sequences that have the step.

    Raises:
        AttributeError: there is no such name; the message lists those that there are.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    weight_hr: Tensor | None
    bias: Tensor | None
    t: Tensor

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_NO_NAME.format(", ".join(vars(self)), name))


class _WeightsInScan(CellWeights):
    """The same where a scan may trace the step: tensors are views, made when they are asked for.

    A scan takes no tensor together with a view of it, and unpacking one (``p, q = w.own``) makes views
    outside of the scan, unless it is itself made in the step.
    """

    def __init__(self, **values: Any) -> None:
        self._values = values
        self._given: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        if name not in self._values:
            raise AttributeError(_NO_NAME.format(", ".join(self._values), name))
        value = self._values[name]
        if value is None:
            return None
        view = value.view_as(value)
        self._given.append(view)
        return view

    def tie(self, h: Tensor) -> Tensor:
        """Let every tensor that the cell has asked for have a gradient, of zeros if need be.

        Where a step makes none (``w.own.detach()``), the backward of the scan passes on the gradient
        that it began with, and Inductor 2.13 takes its memory for something else.
        """
        for view in self._given:
            if view.requires_grad:
                h = h + 0 * view.flatten()[0]
        return h


class ChangedCell(Protocol):
    """The methods of a layer that a subclass may override."""

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: CellWeights) -> Step: ...
    def per_sequence(self, h_0: Tensor, c_0: Tensor) -> dict[str, Tensor]: ...
    def per_step(self, x: Tensor) -> dict[str, Tensor]: ...
    def project(self, x: Tensor, w: CellWeights) -> Tensor: ...


def of_each_step(
    layer: ChangedCell, x: Tensor, batch_sizes: Tensor | None, own: Collection[str]
) -> dict[str, Tensor]:
    """What a layer returns for each step of its input, and the step's index.

    Args:
        layer: the layer.
        x: its input, ``[T, B, I]`` or packed ``[N, I]``.
        batch_sizes: of packed input the number of rows of each step.
        own: the names of the cell's own parameters.

    Returns:
        Tensors ``[T, B, ...]`` or packed ``[N, ...]``, by name.
    """
    made = layer.per_step(x)
    _check("per_step", made, x.shape[:-1], taken=[*CellWeights.__annotations__, *own])
    return {**made, "t": step_index(x, batch_sizes)}


def prepare_custom(
    layer: ChangedCell, own: Mapping[str, Tensor], of_steps: Mapping[str, Tensor]
) -> Prepare:
    """Give a layer's own cell to a loop, in one direction.

    Args:
        layer: the layer.
        own: the cell's own parameters in this direction.
        of_steps: by :func:`of_each_step`.
    """

    # Dynamo evaluates this line, and does not know tuple[...].
    def prepare(d: Direction) -> Prepared:
        shared = {"weight_ih": d.weight_ih, "bias": d.bias, **own}
        of_sequences = layer.per_sequence(d.h_0, d.c_0)
        taken = {**dict.fromkeys(CellWeights.__annotations__), **own, **of_steps}
        _check("per_sequence", of_sequences, d.h_0.shape[:1], taken)
        x = layer.project(d.x, CellWeights(weight_hh=d.weight_hh, weight_hr=d.weight_hr, **shared))
        _check("project", {"project": x}, d.x.shape[:-1])
        cell = _as_cell(layer, shared, of_sequences, list(of_steps))
        return Prepared(x, cell, list(of_steps.values()))

    return prepare


def _as_cell(
    layer: ChangedCell,
    shared: Mapping[str, Tensor | None],
    of_sequences: Mapping[str, Tensor],
    of_steps: Sequence[str],
) -> Cell:
    """The layer's cell with the arguments that a loop has."""

    def cell(
        x_t: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor, weight_hr: Tensor | None, *rows: Tensor
    ) -> Step:
        b = x_t.size(0)
        begun = {name: t if t.size(0) == b else t[:b] for name, t in of_sequences.items()}
        kind = _WeightsInScan if is_compiling() else CellWeights
        of_step = dict(zip(of_steps, rows))
        w = kind(weight_hh=weight_hh, weight_hr=weight_hr, **shared, **begun, **of_step)
        step = layer.cell(x_t, h, c, w)
        if isinstance(w, _WeightsInScan) and isinstance(step, Step) and is_grad_enabled():
            step = step._replace(h=w.tie(step.h))
        if not isinstance(step, Step):
            raise TypeError(f"cell should return a Step, but got {type(step).__name__}")
        for name, new, old in (("h", step.h, h), ("c", step.c, c)):
            if new.shape != old.shape:
                raise ValueError(
                    f"cell should return a {name} of the size of the one that it got, "
                    f"{list(old.shape)}, but got {list(new.shape)}"
                )
        return step

    return cell


def _check(
    method: str, made: Mapping[str, Any], leading: Sequence[int], taken: Collection[str] = ()
) -> None:
    """Check what a method has returned.

    Args:
        method: its name.
        made: tensors by name.
        leading: the sizes that each should begin with.
        taken: the names that are taken.
    """
    if not isinstance(made, Mapping):
        raise TypeError(f"{method} should return a dict of tensors, but got {type(made).__name__}")
    for name, value in made.items():
        if name in taken:
            raise ValueError(f"{method} should return new names, but {name!r} is taken")
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{method} should return tensors, but got {type(value).__name__} for {name}"
            )
        if value.shape[: len(leading)] != tuple(leading):
            raise ValueError(
                f"{method} should return tensors whose sizes begin with {list(leading)}, "
                f"but got {list(value.shape)} for {name}"
            )
