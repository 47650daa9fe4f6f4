"""The main table: each contender's time as a multiple of nn.LSTM's, and peak memory."""

import math
import statistics
from dataclasses import dataclass, field

from benchmarks import memory
from benchmarks.cases import Case, Group
from benchmarks.contenders import (
    PEERS,
    Answer,
    WrongError,
    check_answer,
    official_contender,
    our_contender,
    run_once,
)
from benchmarks.floor import floor_loop
from benchmarks.table import Column, Table, format_number, format_ratio
from benchmarks.timing import Effort, Runner, interleave, median_ratio, ratio_spread
from benchmarks.workload import Settings, Workload

NN, OURS, FLOOR = "nn.LSTM", "ManualLSTM", "floor"
# A contender that takes so many times as long as nn.LSTM, and over a quarter of a second, runs once.
SLOW = 20
TITLES = {
    "inference": "INFERENCE: forward, under no_grad",
    "training": "TRAINING: forward and backward of output.sum()",
}


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    groups: dict[str, Group]
    modes: tuple[str, ...]
    peers: tuple[str, ...]
    effort: Effort
    memory: bool


@dataclass
class Measurement:
    """What was measured for a case in a mode.

    Attributes:
        seconds: the seconds of a call in each round, by contender.
        bytes: the peak memory of nn.LSTM and ManualLSTM.
        floor: the ways that were chosen for the products of the floor.
        wrong: the contenders that were not timed, and why.
    """

    group: str
    mode: str
    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    bytes: dict[str, float | None] = field(default_factory=dict)
    floor: list[str] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)

    def ratio(self, name: str, base: str = NN) -> float | None:
        if name not in self.seconds or base not in self.seconds:
            return None
        return median_ratio(self.seconds, name, base)

    def ratios(self) -> dict[str, float]:
        ratios = {name: self.ratio(name) for name in self.seconds if name != NN}
        return {name: value for name, value in ratios.items() if value is not None}

    def as_json(self) -> dict[str, object]:
        return {
            "group": self.group,
            "mode": self.mode,
            "case": str(self.case),
            "ratios": self.ratios(),
            "spreads": {n: ratio_spread(self.seconds, n, NN) for n in self.seconds if n != NN},
            "ours_to_floor": self.ratio(OURS, FLOOR),
            "floor": self.floor,
            "bytes": self.bytes,
            "not_timed": self.wrong,
            "seconds": self.seconds,
        }


def measure(group: str, case: Case, mode: str, plan: Plan, settings: Settings) -> Measurement:
    """Check all contenders, then time in turns those whose answers are right."""
    row = Measurement(group, mode, case)
    w = Workload(case, settings)
    base = official_contender(w)
    run_once(base, mode)  # to warm up: the first call is slower than the others
    expected = run_once(base, mode)
    runners = {NN: base.runner(mode)}
    for name in (OURS, *plan.peers):
        try:
            contender = our_contender(w) if name == OURS else PEERS[name].build(w)
            if contender is None:
                continue
            got = run_once(contender, mode)
            check_answer(got, expected)
        except WrongError as error:
            row.wrong[name] = str(error)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            row.wrong[name] = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
        else:
            if name != OURS and _is_slow(got, expected):
                row.seconds[name] = [got.seconds]
            else:
                runners[name] = contender.runner(mode)
    bare, row.floor = floor_loop(w, mode)
    runners[FLOOR] = Runner(bare)
    row.seconds |= interleave(runners, plan.effort, settings.threads, settings.device)
    if plan.memory:
        row.bytes = memory.measure_peaks(case, mode, settings)
    return row


def _is_slow(got: Answer, expected: Answer) -> bool:
    return got.seconds > 0.25 and got.seconds > SLOW * expected.seconds


def print_speed_table(plan: Plan, settings: Settings, rows: list[Measurement]) -> None:
    """Print the table. Each row is appended to ``rows`` when it is measured."""
    _legend(plan)
    for mode in plan.modes:
        print(f"\n{TITLES[mode]}")
        table = Table(_columns(plan))
        for name, group in plan.groups.items():
            print(f"  {group.title}", flush=True)
            for case in group.cases:
                if case in group.notes:
                    print(f"    {group.notes[case]}", flush=True)
                row = measure(name, case, mode, plan, settings)
                rows.append(row)
                table.row(_cells(row, plan))
                for who, reason in row.wrong.items():
                    print(f"    {who} is not timed here: {reason}", flush=True)
        _show_means(table, plan, [row for row in rows if row.mode == mode])


def _legend(plan: Plan) -> None:
    print("Each column is a time as a multiple of nn.LSTM's in the same run: below 1 is faster.")
    print("  ours        ManualLSTM; IQR is the interquartile range of that ratio over the rounds")
    print("  /floor      ours as a multiple of a bare loop of the matrix products an LSTM has to do")
    for name in plan.peers:
        peer = PEERS[name]
        print(f"  {peer.title:<12}--peers {name}: {peer.about}")
    if plan.memory:
        print("  peak MB     memory of one call above the model and input: nn.LSTM's, ours, ratio")
    if plan.peers:
        print(
            "A dash: not supported. A contender over 20 times slower runs once, the others many times."
        )


def _columns(plan: Plan) -> list[Column]:
    columns = [
        Column("", "T,B,I,H", 15),
        Column("nn.LSTM", "ms", 7),
        Column("", "ours", 6),
        Column("", "IQR", 5),
        Column("ours", "/floor", 7),
    ]
    columns += [Column(*PEERS[name].heading, 6) for name in plan.peers]
    if plan.memory:
        columns += [Column("peak", "nn", 6), Column("MB:", "ours", 5), Column("", "ratio", 6)]
    return columns


def _cells(row: Measurement, plan: Plan) -> list[str]:
    middle = statistics.median(row.seconds[NN]) * 1e3
    cells = [row.case.shape, format_number(middle)]
    if OURS in row.seconds:
        cells += [format_ratio(row.ratio(OURS)), f"{ratio_spread(row.seconds, OURS, NN):.2f}"]
    else:
        cells += ["wrong", "-"]
    cells.append(format_ratio(row.ratio(OURS, FLOOR)))
    cells += ["wrong" if name in row.wrong else format_ratio(row.ratio(name)) for name in plan.peers]
    return cells + (memory.memory_cells(row.bytes) if plan.memory else [])


def geometric_means(rows: list[Measurement]) -> dict[str, dict[str, float]]:
    """Return geometric means of the ratios, by group and contender.

    A contender has a mean for a group if it did all cases of the group. ``"all"`` is the mean over
    all groups, where there are several.
    """
    groups: dict[str, list[Measurement]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    if len(groups) > 1:
        groups["all"] = rows
    means: dict[str, dict[str, float]] = {}
    for group, members in groups.items():
        if len(members) > 1:
            ratios = [row.ratios() for row in members]
            names = [name for name in ratios[0] if all(name in row_ratios for row_ratios in ratios)]
            means[group] = {
                name: _geometric_mean([row_ratios[name] for row_ratios in ratios]) for name in names
            }
            over_floor = [row.ratio(OURS, FLOOR) for row in members]
            measured = [value for value in over_floor if value is not None]
            if len(measured) == len(members):
                means[group]["/floor"] = _geometric_mean(measured)
    return means


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _show_means(table: Table, plan: Plan, rows: list[Measurement]) -> None:
    means = geometric_means(rows)
    if means:
        print("  geometric means, of the contenders that did all of a group")
    for group, mean in means.items():
        names = [OURS, "", "/floor", *plan.peers]
        cells = [format_ratio(mean.get(name)) if name else "" for name in names]
        table.row([group, "", *cells])
