"""``python -m benchmarks``, from the root of the repository: the command line."""

import argparse
import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from benchmarks import (
    cold,
    deploy,
    machine,
    memory,
    per_sample,
    plot,
    precision,
    scaling,
    sequences,
    speed,
    targets,
)
from benchmarks.cases import GROUPS, Case, Group, parse_shapes, quick_groups
from benchmarks.contenders import PEERS
from benchmarks.timing import Effort
from benchmarks.workload import DTYPES, MODES, Settings
from manual_lstm.check.command import STATUSES, positive_number, run_command

_STATUS = f"Status 0 if all is printed, 1 if something is missed or wrong, {STATUSES}"
EPILOG = """\
python -m benchmarks                        everything, which takes a while
python -m benchmarks --quick --targets      the most telling shapes, two minutes
python -m benchmarks models --plot FILE     published models at their own sizes, and a picture
python -m benchmarks --peers none --mode training --shapes "28,64,28,128;50,32,64,64"
python -m benchmarks speed -h               all options of a command
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [memory.PEAK]:
        memory.measure_in_this_process(argv[1], {**memory.CONTENDERS, **per_sample.CONTENDERS})
        return 0
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["speed", *argv]
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        settings = _settings(arguments)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(settings.threads)
    # By default cuDNN rounds to TF32 and matmul does not. For a fair comparison nothing does.
    torch.backends.cudnn.allow_tf32 = False
    with_dtype = arguments.run is not _precision  # its rows show the dtype
    print(f"{machine.header(settings, with_dtype)}\n", flush=True)
    results: list[dict[str, object]] = []
    run: Callable[..., int] = arguments.run
    try:
        return run(arguments, settings, results)
    finally:
        if arguments.json is not None:
            written = {"machine": machine.describe(settings), "rows": results}
            arguments.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def _speed(arguments: argparse.Namespace, settings: Settings, results: list[dict[str, object]]) -> int:
    groups = {name: GROUPS[name] for name in arguments.groups or GROUPS}
    if arguments.quick:
        groups = quick_groups(groups)
    if arguments.shapes:
        groups = {"given": Group("the shapes given", arguments.shapes)}
    for name in arguments.peers:
        if not PEERS[name].installed():
            print(f"{name} is not installed, and has no column: {PEERS[name].about}", flush=True)
    plan = speed.Plan(
        groups,
        arguments.mode,
        tuple(name for name in arguments.peers if PEERS[name].installed()),
        _effort(arguments, 4.0, 3) if arguments.quick else _effort(arguments, 10.0, 5),
        not (arguments.quick or arguments.no_memory),
    )
    rows: list[speed.Measurement] = []
    if arguments.plot is not None:
        try:
            plot.require_matplotlib()  # before the time is spent
        except ImportError as error:
            print(error, file=sys.stderr)
            return 1
    try:
        speed.print_speed_table(plan, settings, rows)
    finally:
        results += [row.as_json() for row in rows]
    if arguments.targets:
        ratios = {(row.mode, row.case): row.ratios() for row in rows}
        means = {
            mode: speed.geometric_means([row for row in rows if row.mode == mode])
            for mode in plan.modes
        }
        targets.print_verdicts(list(targets.verdicts(ratios, means, settings.threads)))
    if arguments.plot is not None:
        plot.save_plot(rows, groups, machine.header(settings, True).replace("\n", "; "), arguments.plot)
    return 1 if any(speed.OURS in row.wrong for row in rows) else 0


def _memory(arguments: argparse.Namespace, settings: Settings, results: list[dict[str, object]]) -> int:
    rows = memory.ROWS
    if arguments.shapes:
        rows = [(case, mode, None) for case in arguments.shapes for mode in arguments.mode]
    results.extend(memory.print_memory_table(rows, settings))
    return 0


def _scaling(
    arguments: argparse.Namespace, settings: Settings, results: list[dict[str, object]]
) -> int:
    chosen = {axis: getattr(arguments, axis) for axis in scaling.AXES}
    axes = {axis: values for axis, values in chosen.items() if values is not None} or scaling.AXES
    (base,) = arguments.base
    effort = _effort(arguments, 1.0, 2)
    with_memory = not arguments.no_memory
    results.extend(
        scaling.print_scaling_table(base, axes, arguments.mode, effort, with_memory, settings)
    )
    return 0


def _precision(
    arguments: argparse.Namespace, settings: Settings, results: list[dict[str, object]]
) -> int:
    dtypes = tuple(DTYPES[name] for name in arguments.dtypes)
    cases = arguments.shapes or precision.CASES
    results.extend(precision.print_precision_table(cases, dtypes, _effort(arguments, 3.0, 5), settings))
    return 0


def _per_sample(
    arguments: argparse.Namespace, settings: Settings, results: list[dict[str, object]]
) -> int:
    if not PEERS["opacus"].installed():
        print("Opacus, which this compares with, is not installed: pip install opacus", file=sys.stderr)
        return 1
    cases = arguments.shapes or per_sample.CASES
    results.extend(per_sample.print_per_sample_table(cases, _effort(arguments, 20.0, 5), settings))
    return 0


def _sequences(
    arguments: argparse.Namespace, settings: Settings, results: list[dict[str, object]]
) -> int:
    cases = arguments.shapes or sequences.CASES
    results.extend(sequences.print_sequences_table(cases, _effort(arguments, 3.0, 5), settings))
    return 0


def _cold(arguments: argparse.Namespace, settings: Settings, results: list[dict[str, object]]) -> int:
    results.extend(cold.print_cold_table(arguments.rounds or 7, settings))
    return 0


def _deploy(arguments: argparse.Namespace, settings: Settings, results: list[dict[str, object]]) -> int:
    effort = _effort(arguments, 6.0, 5)
    results.extend(deploy.print_deploy_table(arguments.shapes or deploy.CASES, effort, settings))
    return 0


def _effort(arguments: argparse.Namespace, seconds: float, rounds: int) -> Effort:
    """Return the effort of the command line, with defaults for what it leaves open."""
    return Effort(
        seconds if arguments.seconds is None else arguments.seconds, arguments.rounds or rounds
    )


def _settings(arguments: argparse.Namespace) -> Settings:
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch finds no CUDA device")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: this torch finds no MPS device")
    return Settings(arguments.threads, DTYPES[arguments.dtype], device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time and memory of ManualLSTM, of nn.LSTM and of other open LSTMs. " + _STATUS,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    command = _command(commands, "speed", _speed, "the main table (the default command)")
    command.add_argument("--quick", action="store_true", help="fewer shapes, no memory: two minutes")
    command.add_argument("--groups", type=_names(GROUPS), help=f"of: {', '.join(GROUPS)}")
    _shapes(command)
    _of_speed(command)

    command = _command(commands, "models", _speed, "published models, with one thread by default")
    command.set_defaults(threads=1, groups=("models",), quick=False, shapes=None)
    _of_speed(command)

    command = _command(commands, "memory", _memory, "peak memory at long sequences, with targets")
    _shapes(command)
    _mode(command)

    command = _command(commands, "scaling", _scaling, "time and memory against T, H, B and layers")
    command.add_argument(
        "--base",
        type=_one_shape,
        default=(scaling.BASE,),
        metavar="T,B,I,H",
        help="the case in which one number at a time is changed",
    )
    for axis, values in scaling.AXES.items():
        shown = ",".join(map(str, values))
        command.add_argument(
            f"--{axis}", type=_numbers, metavar="N,...", help=f"values of {axis}, as {shown}"
        )
    _mode(command)
    _timing(command)
    command.add_argument("--no-memory", action="store_true", help="do not measure memory")

    command = _command(commands, "precision", _precision, "errors in bfloat16 and others, and time")
    command.add_argument(
        "--dtypes",
        type=_names(DTYPES),
        default=("float32", "bfloat16"),
        help=f"of: {', '.join(DTYPES)}; float32,bfloat16 by default",
    )
    _shapes(command)
    _timing(command)

    command = _command(
        commands, "deploy", _deploy, "eager, compiled, exported, AOTInductor, onnxruntime"
    )
    _shapes(command)
    _timing(command)

    command = _command(
        commands, "sequences", _sequences, "padded batches, and many sequences in one row"
    )
    _shapes(command)
    _timing(command)

    command = _command(commands, "cold", _cold, "the import and the first calls of a fresh process")
    command.add_argument("--rounds", type=positive_number, metavar="N", help="the number of processes")

    command = _command(commands, "per-sample", _per_sample, "gradients for every sample, and Opacus'")
    _shapes(command)
    _timing(command)
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace, Settings, list[dict[str, object]]], int],
    about: str,
) -> argparse.ArgumentParser:
    """Add a command with the options that all commands have."""
    command = commands.add_parser(name, help=about, description=f"{about}. {_STATUS}")
    command.set_defaults(run=run)
    command.add_argument(
        "--threads", type=positive_number, default=torch.get_num_threads(), metavar="N"
    )
    if run is _precision:
        command.set_defaults(dtype="float32")
    else:
        command.add_argument("--dtype", choices=DTYPES, default="float32")
    command.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu")
    command.add_argument("--json", type=_file, metavar="FILE", help="write all measurements to it")
    return command


def _of_speed(command: argparse.ArgumentParser) -> None:
    """Add the options of the commands that print the main table."""
    command.add_argument(
        "--peers",
        type=_peers,
        default=tuple(PEERS),
        help=f"none, all (the default), or of: {', '.join(PEERS)}",
    )
    command.add_argument("--targets", action="store_true", help="then list the targets, met or missed")
    command.add_argument("--plot", type=_file, metavar="FILE", help="draw the table (needs matplotlib)")
    _mode(command)
    _timing(command)
    command.add_argument("--no-memory", action="store_true", help="do not measure memory")


def _shapes(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--shapes", type=_shape_list, metavar="T,B,I,H;...", help="measure these shapes instead"
    )


def _mode(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--mode", type=_modes, default=MODES, help="inference, training or both (the default)"
    )


def _timing(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--seconds", type=_seconds, metavar="S", help="the least time to measure each row for"
    )
    command.add_argument(
        "--rounds", type=positive_number, metavar="N", help="the least number of rounds"
    )


def _shape_list(text: str) -> tuple[Case, ...]:
    try:
        return parse_shapes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _one_shape(text: str) -> tuple[Case, ...]:
    cases = _shape_list(text)
    if len(cases) != 1:
        raise argparse.ArgumentTypeError(f"one shape is wanted, but got {text!r}")
    return cases


def _modes(text: str) -> tuple[str, ...]:
    if text == "both":
        return MODES
    if text not in MODES:
        raise argparse.ArgumentTypeError(f"{', '.join(MODES)} or both, but got {text!r}")
    return (text,)


def _names(valid: Collection[str], also: tuple[str, ...] = ()) -> Callable[[str], tuple[str, ...]]:
    """Make a parser of names with commas between them. An error message names ``also`` too."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in valid:
                valid_names = ", ".join([*also, *valid])
                raise argparse.ArgumentTypeError(f"{name!r} is none of: {valid_names}")
        return names

    return parse


def _peers(text: str) -> tuple[str, ...]:
    if text in ("none", "all"):
        return tuple(PEERS) if text == "all" else ()
    return _names(PEERS, also=("none", "all"))(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(positive_number, text.split(",")))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"seconds are wanted, but got {text!r}")
    return seconds


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no file can be written at {text!r}")
    return path


if __name__ == "__main__":
    sys.exit(run_command(main))
