"""The figures of an unrolled layer, drawn with matplotlib, which is imported when it is needed."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS: dict[
    str, tuple[str, float, float, str]
] = {  # the title of each panel, the least and the largest value, the colours
    "i": ("input gate i", 0, 1, "viridis"),
    "f": ("forget gate f", 0, 1, "viridis"),
    "g": ("cell gate g", -1, 1, "RdBu_r"),
    "o": ("output gate o", 0, 1, "viridis"),
    "c": ("cell state c", -3, 3, "RdBu_r"),
    "h": ("hidden state h", -1, 1, "RdBu_r"),
}


def draw_gates(
    parts: Mapping[str, Tensor], labels: Sequence[str] | None, units: Sequence[int] | None
) -> "Figure":
    """Draw heat maps over time; :meth:`manual_lstm.Unrolled.plot` describes them.

    Args:
        parts: i, f, g, o, c and h of one sequence, ``[T, features]`` each.
        labels: what to write below the steps.
        units: which units to draw; ``None`` for all.
    """
    parts = {name: part.detach().float().cpu() for name, part in parts.items()}
    c = parts["c"]
    T, H = c.shape
    check_steps(T, labels)
    for unit in units or ():
        check_index("units", unit, H, "units")
    rows = c.abs().argmax(0).argsort().tolist() if units is None else list(units)
    largest = float(c.abs().nan_to_num().max()) or 1.0
    figure = new_figure(T, height=9)
    axes = figure.subplots(len(parts), 1, sharex=True)
    for axis, (name, part) in zip(axes, parts.items()):
        title, low, high, colours = _PANELS[name]
        if name == "c" and largest < high:
            low, high = -largest, largest
        of_units = part.size(1) == H
        image = axis.imshow(
            (part[:, rows] if of_units else part).t().tolist(),
            aspect="auto",
            interpolation="nearest",
            cmap=colours,
            vmin=low,
            vmax=high,
        )
        axis.set_ylabel(title)
        axis.set_yticks([])
        if units is not None and of_units:
            axis.set_yticks(range(len(rows)), rows, fontsize=7)
        beyond = "both" if name == "c" and largest > high else "neither"
        figure.colorbar(image, ax=axis, pad=0.01, aspect=10, extend=beyond)
    label_steps(axes, T, labels)
    return figure


def draw_gradients(
    loss: Tensor, states: Mapping[str, Sequence[Tensor]], labels: Sequence[str] | None
) -> "Figure":
    """Draw lines over time; :meth:`manual_lstm.Unrolled.plot_gradients` describes them.

    Args:
        loss: a tensor with one element.
        states: h of every step, ``[b, features]`` each, by the name of the layer and direction.
        labels: what to write below the steps.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss should be a tensor, but got {type(loss).__name__}")
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            "loss should be one number with a gradient, computed from what unroll returned, but got "
            f"{list(loss.shape)} with requires_grad={loss.requires_grad}"
        )
    wanted = [h for of_direction in states.values() for h in of_direction]
    T = max(map(len, states.values()), default=0)
    check_steps(T, labels)
    if not all(h.requires_grad for h in wanted):
        raise ValueError("loss should have gradients by the steps, but no weight and no input has one")
    found = torch.autograd.grad(loss.sum(), wanted, retain_graph=True, allow_unused=True)
    if all(gradient is None for gradient in found):
        raise ValueError("loss should be computed from what this unroll returned, but it is not")
    norms = iter([0.0 if gradient is None else float(gradient.norm()) for gradient in found])
    figure = new_figure(T, height=4)
    axis = figure.subplots()
    for name, of_direction in states.items():
        # A logarithm has no place for zero: a gap in the line.
        line = [next(norms) or float("nan") for _ in of_direction]
        axis.plot(range(T), line, marker="." if T < 100 else None, label=name)
    axis.set_yscale("log")
    axis.set_ylabel("norm of dL/dh")
    if len(states) > 1:
        axis.legend()
    label_steps([axis], T, labels)
    return figure


def check_index(name: str, index: int, size: int, what: str) -> None:
    """Raise IndexError unless there is such a one of ``size``."""
    if not -size <= index < size:
        raise IndexError(f"{name} should be one of the {size} {what} that there are, but got {index}")


def check_steps(T: int, labels: Sequence[str] | None) -> None:
    """Raise ValueError unless there are steps, and as many labels."""
    if T == 0:
        raise ValueError("plot should be given steps, but there is no step to draw")
    if labels is not None and len(labels) != T:
        raise ValueError(f"labels should be a label for each of the {T} steps, but got {len(labels)}")


def new_figure(T: int, height: float) -> "Figure":
    """A figure as wide as T steps want it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot draws with matplotlib: pip install matplotlib") from None
    return Figure(figsize=(min(max(6, 2 + 0.12 * T), 16), height), layout="constrained")


def label_steps(axes: Sequence[Any], T: int, labels: Sequence[str] | None) -> None:
    """Write the labels below the steps, or what the axis is."""
    if labels is None:
        axes[-1].set_xlabel("step")
        return
    axes[-1].set_xticks(range(T), labels, family="monospace")
    for axis in axes:
        axis.tick_params(axis="x", length=0)
