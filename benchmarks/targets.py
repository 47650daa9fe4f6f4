"""The targets for ManualLSTM's times, as multiples of nn.LSTM's in the same run."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.cases import GROUPS, Case
from benchmarks.contenders import OWN_VARIANTS
from benchmarks.workload import INFERENCE, MODES, TRAINING

# The most that each case of a group may take, by mode.
MOST_PER_CASE = {
    "one-step": {INFERENCE: 0.9, TRAINING: 1.0},
    "overhead": {INFERENCE: 3.0, TRAINING: 2.5},
    "arithmetic": {INFERENCE: 2.0, TRAINING: 1.4},
    "one-sequence": {INFERENCE: 2.0, TRAINING: 2.0},
    "packed": {INFERENCE: 0.8, TRAINING: 0.8},
}
# The most that the geometric mean of a group may be, by mode.
MOST_MEAN = {"arithmetic": {INFERENCE: 1.3, TRAINING: 1.0}}

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


def verdicts(ratios: Ratios, means: dict[str, dict[str, dict[str, float]]]) -> Iterator[Verdict]:
    """Compare what was measured with the targets.

    Args:
        ratios: each contender's time as a multiple of nn.LSTM's, by mode and case.
        means: the geometric means of these, by mode, group and contender.
    """
    for mode in MODES:
        for name, group in GROUPS.items():
            mean = means.get(mode, {}).get(name, {}).get("ManualLSTM")
            if name in MOST_MEAN and mean is not None:
                yield Verdict(mode, f"{name}, geometric mean", MOST_MEAN[name][mode], mean)
            for case in group.cases:
                measured = ratios.get((mode, case))
                if measured is None:
                    continue
                our = measured["ManualLSTM"]
                if name in MOST_PER_CASE:
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
