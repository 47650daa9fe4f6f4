"""``python -m manual_lstm``: compare with nn.LSTM; ``check`` does so for a checkpoint; ``report``."""

import argparse
import json
import sys

import torch

from manual_lstm.check.command import STATUSES, Progress, choose_rows, run_command
from manual_lstm.check.files import check_file, print_line
from manual_lstm.check.parity import print_comparison


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m manual_lstm",
        description="Compare ManualLSTM with nn.LSTM, option by option. "
        f"Status 0 if all agrees, 1 if not, {STATUSES}",
    )
    commands = parser.add_subparsers(dest="command")
    check = commands.add_parser(
        "check",
        help="compare them on the LSTMs of a checkpoint",
        description="Find every LSTM in a checkpoint by its weights and run both layers with them. "
        "Nothing of the file is run: foreign objects are passed over. Status 0 if all agree in "
        f"float64, 1 if one differs, or a file cannot be read or has no LSTM, {STATUSES}",
    )
    check.add_argument(
        "file", nargs="+", help="saved by torch.save or pickle, .safetensors, .npz, .npy"
    )
    check.add_argument(
        "--json", action="store_true", help="print one JSON list, with all that was found"
    )
    report = commands.add_parser(
        "report",
        help="try what else PyTorch offers on both: vmap, compile, export, ...",
        description="Try the rest of PyTorch on nn.LSTM and ManualLSTM, and print what each raises. "
        f"Takes minutes. Status 0 if ManualLSTM does all that can be tried here, 1 if not, {STATUSES}",
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
        found = []
        progress, count = Progress("file"), len(arguments.file)
        for number, path in enumerate(arguments.file, start=1):  # a bad file stops no other
            progress(number, count, path)
            for line in check_file(path):
                found.append(line)
                if not arguments.json:
                    progress.end()
                    print_line(line, named=count > 1)
                    progress(number, count, path)
        progress.end()
        if arguments.json:
            print(json.dumps(found, indent=1, default=str, allow_nan=False))
        return 1 if any(line["status"] in ("error", "differs") for line in found) else 0
    if arguments.command == "report":
        progress = Progress()
        progress.say("report", "imports")
        # Imported here because it imports compilers, distributed training and more.
        from manual_lstm.report.table import ROWS, print_report

        progress.end()
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
