"""``python -m manual_lstm.testing``: check_lstm on nn.LSTM, ManualLSTM and their peers."""

import argparse
import functools
import pkgutil
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from manual_lstm.check.command import STATUSES, Progress, positive_number, run_command
from manual_lstm.module import ManualLSTM
from manual_lstm.testing.conformance import Conformance, check_lstm
from manual_lstm.testing.probes import PROBES


def load_quantizable(layer: nn.Module, reference: nn.LSTM) -> None:
    """Copy nn.LSTM's weights into torch.ao's quantizable.LSTM, which gives them other names."""
    weights = dict(layer.named_parameters())
    for name, weight in reference.named_parameters():
        kind, source, place = name.split("_", 2)  # such as weight, ih, l0_reverse
        layer_number = place.removeprefix("l").removesuffix("_reverse")
        cell = "bw" if place.endswith("_reverse") else "fw"
        with torch.no_grad():
            weights[f"layers.{layer_number}.layer_{cell}.cell.{source[0]}gates.{kind}"].copy_(weight)


# Where each class is, and the arguments of check_lstm: how to load it, and what it says it lacks; and
# what it is constructed with where its defaults are others.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "quantizable": (
        "torch.ao.nn.quantizable:LSTM",
        {
            "load": load_quantizable,
            "lacks": {"proj_size", "packed", "unbatched", "dropout", "parameters"},
        },
    ),
    "DPLSTM": ("opacus.layers:DPLSTM", {"lacks": {"proj_size", "dtype", "device"}}),
    # Its batch_first is True by default, which is not what the rows are about.
    "TorchRL": (
        "torchrl.modules:LSTM",
        {"lacks": {"bidirectional", "packed", "unbatched"}, "defaults": {"batch_first": False}},
    ),
}


def check_peer(label: str, **options: Any) -> Conformance | None:
    """Check one of the peers; return None if it is not installed.

    Args:
        label: its name in ``PEERS``.
        options: arguments of :func:`check_lstm`.
    """
    path, declared = PEERS[label]
    try:
        factory = pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return None
    arguments = {**declared, **options}
    if "defaults" in arguments:
        factory = functools.partial(factory, **arguments.pop("defaults"))
    return check_lstm(factory, label=label, **arguments)


def side_by_side(reports: list[Conformance]) -> str:
    """Return a table with a row for each check and a column for each report."""
    lines = [f"{'':<24}" + "".join(f"{report.label:<13}" for report in reports)]
    for row in zip(*(report.outcomes for report in reports)):
        lines.append(f"{row[0].name:<24}" + "".join(f"{outcome.status:<13}" for outcome in row))
    return "\n".join(line.rstrip() for line in lines)


def _names(text: str) -> list[str]:
    """Rows, with commas between them."""
    by_name = {row.lower(): row for row in PROBES}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name.lower() not in by_name:
            raise argparse.ArgumentTypeError(
                f"no row is named {name!r}; there are: {', '.join(PROBES)}"
            )
    return [by_name[name.lower()] for name in names]


def _factory(text: str) -> Callable[..., nn.Module]:
    """The class, or the function that makes a layer, of a name such as ``package.module:Class``."""
    try:
        found = pkgutil.resolve_name(text)
    except (Exception, SystemExit) as error:  # importing it runs code that may raise anything
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be found: {type(error).__name__}: {error}. "
            "A class is named as in mypackage.module:MyLSTM"
        ) from None
    if not callable(found) or (isinstance(found, type) and not issubclass(found, nn.Module)):
        kind = found.__name__ if isinstance(found, type) else type(found).__name__
        raise argparse.ArgumentTypeError(
            f"{text!r} should be a class of modules, but is {kind}{_classes_in(text, found)}"
        )
    try:
        layer = found(3, 4)
    except (Exception, SystemExit) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} should take (input_size, hidden_size), but for (3, 4) it raised "
            f"{type(error).__name__}: {error}"
        ) from None
    if not isinstance(layer, nn.Module):
        raise argparse.ArgumentTypeError(
            f"{text!r} should make an nn.Module, but makes {type(layer).__name__}"
        )
    factory: Callable[..., nn.Module] = found
    return factory


def _classes_in(text: str, found: Any) -> str:
    """The classes that may have been meant by the name of a module."""
    classes = (
        [
            name
            for name, value in vars(found).items()
            if isinstance(value, type) and issubclass(value, nn.Module)
        ]
        if isinstance(found, ModuleType)
        else []
    )
    return f"; in it are: {', '.join(f'{text}:{name}' for name in classes)}" if classes else ""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m manual_lstm.testing",
        description="Try on a class all that nn.LSTM does for its callers. By default on nn.LSTM, "
        "ManualLSTM, torch.ao's quantizable.LSTM, Opacus' DPLSTM and TorchRL's LSTM. "
        f"Status 0 if all is well, 1 if a row fails, {STATUSES}",
    )
    parser.add_argument("name", nargs="?", type=_factory, help="the class, as package.module:Class")
    rows: dict[str, Any] = {"type": _names, "action": "extend", "metavar": "ROW,ROW"}
    parser.add_argument("--lacks", default=[], help="what the class lacks", **rows)
    parser.add_argument("--rows", default=None, help="run only these rows", **rows)
    parser.add_argument("--list", action="store_true", help="list the rows, and run none")
    parser.add_argument(
        "--examples", type=positive_number, default=30, help="how many cases a row draws"
    )
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join(PROBES))
        return 0
    if arguments.lacks and arguments.name is None:
        parser.error("--lacks is about a class: name it, as package.module:Class")
    warnings.simplefilter("ignore")  # of deprecations in the peers
    progress = Progress()
    options = {"max_examples": arguments.examples, "rows": arguments.rows}
    try:
        if arguments.name is not None:
            report = check_lstm(arguments.name, lacks=arguments.lacks, progress=progress, **options)
            progress.end()
            print(report)
            return 0 if report.passed else 1

        def named(label: str) -> Callable[[int, int, str], None]:
            return lambda number, count, row: progress(number, count, f"{label}, {row}")

        ours = [
            check_lstm(nn.LSTM, label="nn.LSTM", progress=named("nn.LSTM"), **options),
            check_lstm(ManualLSTM, progress=named("ManualLSTM"), **options),
        ]
        peers = [check_peer(label, progress=named(label), **options) for label in PEERS]
    finally:
        progress.end()
    print(side_by_side(ours + [peer for peer in peers if peer is not None]))
    for label, peer in zip(PEERS, peers):
        if peer is None:
            print(f"{label} is not installed: {PEERS[label][0]}", file=sys.stderr)
    return 0 if all(report.passed for report in ours) else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
