"""``python -m manual_lstm``: the notebook's comparison; ``check`` a checkpoint; ``report``."""

import argparse
import sys

from manual_lstm.check.checkpoint import CheckpointError, find, load, trial
from manual_lstm.check.parity import show


def check(path: str) -> bool:
    """Print a line for each LSTM in the file; return whether ManualLSTM agrees with nn.LSTM on all."""
    good = True
    try:
        found = find(load(path))
        if not found:
            raise CheckpointError("no LSTM in it: no weight_ih_l0 and weight_hh_l0 of one")
    except CheckpointError as error:
        found = [error]
    except Exception as error:  # a hostile file's containers may raise anything
        found = [CheckpointError(f"cannot be read ({type(error).__name__})")]
    for lstm in found:
        try:
            if isinstance(lstm, CheckpointError):
                raise lstm
            gap, wide_gap, tolerance = trial(lstm)
        except CheckpointError as error:
            print(f"{_line(path)}: {_line(str(error))}", file=sys.stderr)
            good = False
            continue
        within = wide_gap <= tolerance
        finite = all(bool(weight.isfinite().all()) for weight in lstm.weights.values())
        good = good and within
        print(
            f"{_line(lstm.name) or '(top level)'}: {lstm}  largest difference {gap:.1e}, "
            f"in float64 {wide_gap:.1e}{'' if within else '  DIFFERS'}"
            f"{'' if finite else '  (not all weights are finite)'}"
        )
    return good


def _line(text: str) -> str:
    """Show text from a file on one line, without what would steer a terminal."""
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m manual_lstm",
        description="Compare ManualLSTM with nn.LSTM, option by option. Status 0 if all agrees.",
    )
    commands = parser.add_subparsers(dest="command")
    checking = commands.add_parser(
        "check",
        help="compare them on the LSTMs of a checkpoint",
        description="Find every LSTM in a checkpoint by its weights and run both layers with them. "
        "Only tensors and plain containers are loaded. Status 0 if all agree.",
    )
    checking.add_argument("file", nargs="+", help="saved by torch.save, or .safetensors")
    reporting = commands.add_parser(
        "report",
        help="try what else PyTorch offers on both: vmap, compile, export, ...",
        description="Try the rest of PyTorch on nn.LSTM and ManualLSTM, and print what each raises. "
        "Takes minutes. Status 0 if ManualLSTM does all that can be tried here.",
    )
    reporting.add_argument("--device", default="cpu", help="where the layers are: cpu, cuda, ...")
    arguments = parser.parse_args(argv)
    if arguments.command == "check":
        results = [check(path) for path in arguments.file]  # all of them, whatever the first says
        return 0 if all(results) else 1
    if arguments.command == "report":
        from manual_lstm.report.table import show as report  # loads much that nothing else needs

        return 0 if report(arguments.device) else 1
    return 0 if show() else 1


if __name__ == "__main__":
    sys.exit(main())
