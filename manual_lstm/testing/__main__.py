"""``python -m manual_lstm.testing``: check_lstm on nn.LSTM, ManualLSTM and their peers."""

import argparse
import functools
import pkgutil
import sys
import warnings
from typing import Any

import torch
from torch import nn

from manual_lstm import ManualLSTM
from manual_lstm.testing import Conformance, check_lstm


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


def check_peer(label: str, max_examples: int = 30) -> Conformance | None:
    """Check one of the peers; return None if it is not installed."""
    path, declared = PEERS[label]
    try:
        factory = pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return None
    arguments = dict(declared)
    if "defaults" in arguments:
        factory = functools.partial(factory, **arguments.pop("defaults"))
    return check_lstm(factory, label=label, max_examples=max_examples, **arguments)


def side_by_side(reports: list[Conformance]) -> str:
    """Return a table with a row for each check and a column for each report."""
    lines = [f"{'':<24}" + "".join(f"{report.label:<13}" for report in reports)]
    for row in zip(*(report.outcomes for report in reports)):
        lines.append(f"{row[0].name:<24}" + "".join(f"{outcome.status:<13}" for outcome in row))
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m manual_lstm.testing",
        description="Try on a class all that nn.LSTM does for its callers. By default on nn.LSTM, "
        "ManualLSTM, torch.ao's quantizable.LSTM, Opacus' DPLSTM and TorchRL's LSTM.",
    )
    parser.add_argument("name", nargs="?", help="the class, as package.module:Class")
    parser.add_argument("--lacks", nargs="+", default=[], metavar="ROW", help="what the class lacks")
    parser.add_argument("--examples", type=int, default=30, help="how many cases a row draws")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # of deprecations in the peers
    if arguments.name is None:
        ours = [
            check_lstm(nn.LSTM, label="nn.LSTM", max_examples=arguments.examples),
            check_lstm(ManualLSTM, max_examples=arguments.examples),
        ]
        peers = [check_peer(label, arguments.examples) for label in PEERS]
        print(side_by_side(ours + [peer for peer in peers if peer is not None]))
        for label, peer in zip(PEERS, peers):
            if peer is None:
                print(f"{label} is not installed: {PEERS[label][0]}", file=sys.stderr)
        return 0 if all(report.passed for report in ours) else 1
    factory = pkgutil.resolve_name(arguments.name)
    report = check_lstm(factory, lacks=arguments.lacks, max_examples=arguments.examples)
    print(report)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
