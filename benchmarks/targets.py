"""The targets for ManualLSTM's times, as multiples of nn.LSTM's in the same run."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.cases import GROUPS, Case
from benchmarks.contenders import OWN_VARIANTS
from benchmarks.workload import INFERENCE, MODES, TRAINING

# The most that each case of a group may take, by mode.
MOST_PER_CASE = {
    "one-step": {INFERENCE: 0.9, TRAINING: 0.95},
    "overhead": {INFERENCE: 1.7, TRAINING: 1.6},
    "arithmetic": {INFERENCE: 2.0, TRAINING: 1.4},
    "one-sequence": {INFERENCE: 2.0, TRAINING: 2.0},
}
# With one thread, and with more: the most that the geometric mean of a group may be.
MOST_MEAN = {
    "arithmetic": ({INFERENCE: 1.15, TRAINING: 0.95}, {INFERENCE: 1.25, TRAINING: 1.0}),
    "packed": ({INFERENCE: 0.95, TRAINING: 0.8}, {INFERENCE: 0.85, TRAINING: 0.8}),
}
# The most that single cases may take in inference and in training.
MOST_OF_CASE = {
    Case(28, 64, 28, 128): (1.3, 1.2),
    Case(50, 32, 64, 64): (1.7, 1.5),
    Case(293, 1, 60, 128, 4, True): (2.6, 2.6),
    Case(300, 1, 150, 150, 2): (2.3, 2.4),
    Case(15, 1, 64, 64, 2, True): (2.2, 2.2),
    Case(85, 1, 64, 150, 2, True): (2.2, 2.2),
    Case(140, 1, 128, 256, 3, True): (1.7, 1.6),
    Case(160, 13, 40, 256, 3): (1.4, 1.2),
    Case(47, 64, 256, 256, 2): (1.15, 1.0),
    Case(32, 8, 512, 256, 2, True): (1.2, 1.15),
    Case(2000, 1, 1, 24): (16.0, 14.0),
    Case(2, 1, 64, 64): (1.5, 1.5),
}

Ratios = dict[tuple[str, Case], dict[str, float]]  # by mode and case, then by name


@dataclass(frozen=True)
class Verdict:
    """A target, the most that it allows, and what was measured."""

    mode: str
    what: str
    most: float
    measured: float

    @property
    def met(self) -> bool:
        return self.measured <= self.most


def verdicts(
    ratios: Ratios, means: dict[str, dict[str, dict[str, float]]], threads: int
) -> Iterator[Verdict]:
    """Compare what was measured with the targets.

    Args:
        ratios: each contender's time as a multiple of nn.LSTM's, by mode and case.
        means: the geometric means of these, by mode, group and contender.
        threads: how many threads torch had.
    """
    for k, mode in enumerate(MODES):
        for name, group in GROUPS.items():
            mean = means.get(mode, {}).get(name, {}).get("ManualLSTM")
            if name in MOST_MEAN and len(group.cases) == 1:
                mean = ratios.get((mode, group.cases[0]), {}).get("ManualLSTM")
            if name in MOST_MEAN and mean is not None:
                most = MOST_MEAN[name][threads > 1][mode]
                yield Verdict(mode, f"{name}, geometric mean", most, mean)
            for case in group.cases:
                measured = ratios.get((mode, case))
                if measured is None:
                    continue
                our = measured["ManualLSTM"]
                if case in MOST_OF_CASE:
                    yield Verdict(mode, str(case), MOST_OF_CASE[case][k], our)
                elif name in MOST_PER_CASE:
                    yield Verdict(mode, f"{name} {case.shape}", MOST_PER_CASE[name][mode], our)
                single = ratios.get((mode, Case(case.T, case.B, case.I, case.H)))
                if case.layers > 1 and single:
                    yield Verdict(mode, f"{case}: as one layer", single["ManualLSTM"], our)
    for (mode, case), measured in ratios.items():
        others = {k: v for k, v in measured.items() if k not in {*OWN_VARIANTS, "ManualLSTM", "floor"}}
        if others:
            best = min(others, key=lambda name: others[name])
            yield Verdict(mode, f"{case}: as {best}", others[best], measured["ManualLSTM"])


def print_verdicts(verdicts: list[Verdict]) -> None:
    """Print each target, what was measured, and whether it is met."""
    print("\nTargets: the most that ManualLSTM may take, as a multiple of nn.LSTM's time")
    print(f"{'mode':<11}{'target':<62}{'most':>6}{'measured':>10}")
    for v in verdicts:
        verdict = "met" if v.met else "MISSED"
        print(f"{v.mode:<11}{v.what:<62}{v.most:>6.2f}{v.measured:>10.2f}  {verdict}")
    print(f"{sum(v.met for v in verdicts)} of {len(verdicts)} met", flush=True)
