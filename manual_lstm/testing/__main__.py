"""``python -m manual_lstm.testing``: check_lstm on nn.LSTM, ManualLSTM and their peers."""

import argparse
import pkgutil
import sys
import warnings
from typing import Any

import torch
from torch import nn

from manual_lstm import ManualLSTM
from manual_lstm.testing import Conformance, check_lstm


def load_quantizable(layer: nn.Module, reference: nn.LSTM) -> None:
    """Copy nn.LSTM's weights into torch.ao's quantizable.LSTM, which has other names for them."""
    weights = dict(layer.named_parameters())
    for name, weight in reference.named_parameters():
        kind, which, place = name.split("_", 2)  # such as weight, ih, l0_reverse
        number, cell = place.removeprefix("l").removesuffix("_reverse"), "fw"
        if place.endswith("_reverse"):
            cell = "bw"
        with torch.no_grad():
            weights[f"layers.{number}.layer_{cell}.cell.{which[0]}gates.{kind}"].copy_(weight)


# What each says that it lacks; the rest is found.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "quantizable": (
        "torch.ao.nn.quantizable:LSTM",
        {
            "load": load_quantizable,
            "lacks": {"proj_size", "packed", "unbatched", "dropout", "parameters"},
        },
    ),
    "DPLSTM": ("opacus.layers:DPLSTM", {"lacks": {"proj_size", "dtype", "device"}}),
}


def check_peer(label: str, max_examples: int = 30) -> Conformance | None:
    """Check one of the peers, if it is installed."""
    path, declared = PEERS[label]
    try:
        factory = pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return None
    return check_lstm(factory, label=label, max_examples=max_examples, **declared)


def side_by_side(found: list[Conformance]) -> str:
    """The outcomes side by side."""
    lines = [f"{'':<24}" + "".join(f"{report.label:<13}" for report in found)]
    for row in zip(*(report.outcomes for report in found)):
        lines.append(f"{row[0].name:<24}" + "".join(f"{outcome.status:<13}" for outcome in row))
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m manual_lstm.testing",
        description="Try on a class all that nn.LSTM does for its callers. Without one: on nn.LSTM, "
        "ManualLSTM, torch.ao's quantizable.LSTM and Opacus' DPLSTM.",
    )
    parser.add_argument("name", nargs="?", help="the class, as package.module:Class")
    parser.add_argument("--lacks", nargs="+", default=[], metavar="ROW", help="what the class lacks")
    parser.add_argument("--examples", type=int, default=30, help="how many cases a row draws")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # the peers' deprecations
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
