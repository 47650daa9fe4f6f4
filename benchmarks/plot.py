"""The table of times as a picture: a row for each shape, a dot for each LSTM."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import Group
from benchmarks.contenders import PEERS
from benchmarks.speed import OURS, Measurement

TITLES = {"inference": "inference", "training": "forward and backward"}
MARKS = "sD^vP*X<>"


def save_plot(
    rows: Sequence[Measurement], groups: Mapping[str, Group], subtitle: str, file: Path
) -> Any:
    """Draw each contender's time as a multiple of nn.LSTM's, and write the picture to a file.

    Args:
        rows: what was measured.
        groups: the groups of their cases.
        subtitle: the machine.
        file: where to write it. The ending says the format: ``.png``, ``.svg`` or ``.pdf``.

    Returns:
        matplotlib's figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figures = require_matplotlib()
    modes = list(dict.fromkeys(row.mode for row in rows))
    labels = list(dict.fromkeys((row.group, row.case) for row in rows))
    place = {label: -k for k, label in enumerate(labels)}
    figure, axes = figures.subplots(
        1,
        len(modes),
        sharey=True,
        squeeze=False,
        figsize=(2.6 + 4.2 * len(modes), 1.8 + 0.27 * len(labels)),
        layout="constrained",
    )
    names = [name for name in PEERS if any(name in row.ratios() for row in rows)]
    for axis, mode in zip(axes[0], modes):
        chosen = [row for row in rows if row.mode == mode]
        for mark, name in zip(MARKS, names):
            points = [(r, place[row.group, row.case]) for row in chosen if (r := row.ratio(name))]
            if points:
                axis.plot(*zip(*points), mark, color="0.6", markersize=4, label=PEERS[name].title)
        points = [(r, place[row.group, row.case]) for row in chosen if (r := row.ratio(OURS))]
        if points:
            axis.plot(*zip(*points), "o", color="tab:blue", markersize=7, label=OURS)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log")
        axis.set_xticks(ticks := [0.2, 0.5, 1, 2, 5, 10, 20, 50], [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("times nn.LSTM's time (left of the line: faster)")
        axis.set_title(TITLES[mode])
        axis.grid(axis="both", color="0.92")
        axis.set_axisbelow(True)
    axes[0][0].set_yticks(list(place.values()), [_label(groups[group], case) for group, case in labels])
    axes[0][0].set_ylim(-len(labels) + 0.4, 0.6)
    figure.suptitle(subtitle, fontsize=9, color="0.4")
    handles, texts = axes[0][-1].get_legend_handles_labels()
    figure.legend(
        handles[::-1], texts[::-1], loc="outside lower center", ncols=min(5, len(texts)), frameon=False
    )
    figure.savefig(file, dpi=110)
    return figure


def _label(group: Group, case: Any) -> str:
    name = group.notes.get(case)
    return str(case) if name is None else f"{name.split(' (')[0].split(',')[0]}  {case.shape}"


def require_matplotlib() -> Any:
    """Import matplotlib, or raise an ImportError that says how to install it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('--plot needs matplotlib: pip install ".[plot]"') from error
    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
