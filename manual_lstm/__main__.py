"""``python -m manual_lstm``: compare with nn.LSTM; ``check`` does so for a checkpoint; ``report``."""

import argparse
import sys

import torch

from manual_lstm.check.checkpoint import (
    CheckpointError,
    FoundLSTM,
    compare_with_official,
    find_lstms,
    load_checkpoint,
)
from manual_lstm.check.command import choose_rows, run_command
from manual_lstm.check.parity import print_comparison


def check_file(path: str, named: bool = False) -> bool:
    """Print a line for each LSTM in the file; return whether ManualLSTM agrees with nn.LSTM on all.

    Args:
        path: the file.
        named: whether each line begins with the file.
    """
    lstms: list[FoundLSTM | CheckpointError]
    try:
        lstms = find_lstms(load_checkpoint(path))
        if not lstms:
            raise CheckpointError("no LSTM in it: no weight_ih_l0 and weight_hh_l0 of one")
    except CheckpointError as error:
        lstms = [error]
    except Exception as error:  # the containers of a hostile file may raise anything
        lstms = [CheckpointError(f"cannot be read ({type(error).__name__})")]
    all_agree = True
    for lstm in lstms:
        try:
            if isinstance(lstm, CheckpointError):
                raise lstm
            gap, wide_gap, tolerance = compare_with_official(lstm)
        except CheckpointError as error:
            print(f"{_printable(path)}: {_printable(str(error))}", file=sys.stderr)
            all_agree = False
            continue
        within = wide_gap <= tolerance
        finite = all(bool(weight.isfinite().all()) for weight in lstm.weights.values())
        all_agree = all_agree and within
        print(
            f"{_printable(path) + ': ' if named else ''}"
            f"{_printable(lstm.name) or '(top level)'}: {lstm}  largest difference {gap:.1e}, "
            f"in float64 {wide_gap:.1e}  {'ok' if within else 'DIFFERS'} (at most {tolerance:.0e})"
            f"{'' if finite else '  (not all weights are finite)'}"
        )
    return all_agree


def _printable(text: str) -> str:
    """Put text from a file on one line, with the characters escaped that could control a terminal."""
    escaped = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    encoding = sys.stdout.encoding or "utf-8"
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m manual_lstm",
        description="Compare ManualLSTM with nn.LSTM, option by option. Status 0 if all agrees.",
    )
    commands = parser.add_subparsers(dest="command")
    check = commands.add_parser(
        "check",
        help="compare them on the LSTMs of a checkpoint",
        description="Find every LSTM in a checkpoint by its weights and run both layers with them. "
        "Only tensors and plain containers are loaded. Status 0 if all agree in float64, 1 if one "
        "differs or a file cannot be read, 2 for wrong usage.",
    )
    check.add_argument("file", nargs="+", help="saved by torch.save, or .safetensors")
    report = commands.add_parser(
        "report",
        help="try what else PyTorch offers on both: vmap, compile, export, ...",
        description="Try the rest of PyTorch on nn.LSTM and ManualLSTM, and print what each raises. "
        "Takes minutes. Status 0 if ManualLSTM does all that can be tried here.",
    )
    report.add_argument(
        "row", nargs="*", help="only these rows: their names, or parts of them (default: all)"
    )
    report.add_argument("--list", action="store_true", help="list the rows, and try none")
    report.add_argument(
        "--device", type=_device, default="cpu", help="where the layers are: cpu, cuda, ..."
    )
    return parser


def _device(text: str) -> str:
    """A device that this machine has."""
    try:
        torch.empty(1, device=text).tolist()
    except Exception as error:  # each backend has its own for what it lacks
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        others = [name for name in ("cuda", "mps", "xpu") if _is_available(name)]
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be used here, only {', '.join(['cpu', *others])} ({reason[:100]})"
        ) from None
    return text


def _is_available(device: str) -> bool:
    backend = getattr(torch, device, None) or getattr(torch.backends, device, None)
    return backend is not None and bool(backend.is_available())


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "check":
        several = len(arguments.file) > 1
        agreements = [check_file(path, several) for path in arguments.file]  # a bad file stops no other
        return 0 if all(agreements) else 1
    if arguments.command == "report":
        # Imported here because it imports compilers, distributed training and more.
        from manual_lstm.report.table import ROWS, print_report

        labels = [row.label for row in ROWS]
        if arguments.list:
            print("\n".join(labels))
            return 0
        try:
            chosen = choose_rows(arguments.row, labels) if arguments.row else labels
        except ValueError as error:
            parser.error(str(error))
        return 0 if print_report(arguments.device, chosen) else 1
    return 0 if print_comparison() else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
