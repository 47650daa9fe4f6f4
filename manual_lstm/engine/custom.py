"""A cell of the user's in the loops: what it finds in ``w``, and how the loops call it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from manual_lstm.cell import Step
from manual_lstm.engine.context import is_exporting
from manual_lstm.engine.direction import Direction
from manual_lstm.loop import Cell, Prepare, Prepared


class CellWeights:
    """What one direction of one layer passes to its cell, by name.

    Attributes:
        weight_ih: ``[4H, I]``, above the first layer ``[4H, D * (P or H)]``.
        weight_hh: ``[4H, P or H]``.
        weight_hr: ``[P, H]``, or ``None`` without a projection.
        bias: the sum of both biases, ``[4H]``, or ``None``.

        And by their own names this direction's :meth:`ManualLSTM.cell_parameters` and what
        :meth:`ManualLSTM.per_sequence` returned, cut to the sequences that have the step.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    weight_hr: Tensor | None
    bias: Tensor | None

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    if TYPE_CHECKING:  # the names that the user has chosen

        def __getattr__(self, name: str) -> Any: ...


class ChangedCell(Protocol):
    """The methods of a layer that a subclass may override."""

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: CellWeights) -> Step: ...
    def per_sequence(self, h_0: Tensor, c_0: Tensor) -> dict[str, Tensor]: ...
    def project(self, x: Tensor, w: CellWeights) -> Tensor: ...


def prepare_custom(layer: ChangedCell, own: Mapping[str, Tensor]) -> Prepare:
    """Give a layer's own cell to a loop, in one direction.

    Args:
        layer: the layer.
        own: the cell's own parameters in this direction.
    """

    # Dynamo evaluates this line, and does not know tuple[...].
    def prepare(d: Direction) -> Prepared:
        shared = {"weight_ih": d.weight_ih, "bias": d.bias, **own}
        w = CellWeights(weight_hh=d.weight_hh, weight_hr=d.weight_hr, **shared)
        return layer.project(d.x, w), _as_cell(layer, shared, layer.per_sequence(d.h_0, d.c_0))

    return prepare


def _as_cell(
    layer: ChangedCell, shared: Mapping[str, Tensor | None], per_sequence: Mapping[str, Tensor]
) -> Cell:
    """The layer's cell with the arguments that a loop has."""

    def cell(x_t: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor, weight_hr: Tensor | None) -> Step:
        b = x_t.size(0)
        rows = {name: t if t.size(0) == b else t[:b] for name, t in per_sequence.items()}
        own = shared
        if is_exporting():
            # A scan takes no tensor together with a view of it, and unpacking one (p, q = w.own)
            # makes views outside of the scan, unless it is itself made in the step.
            own = {name: t if t is None else t.view_as(t) for name, t in shared.items()}
        w = CellWeights(weight_hh=weight_hh, weight_hr=weight_hr, **own, **rows)
        step = layer.cell(x_t, h, c, w)
        if not isinstance(step, Step):
            raise TypeError(f"cell should return a Step, but got {type(step).__name__}")
        return step

    return cell
