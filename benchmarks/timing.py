"""Timing in turns: in every round each contender runs a few milliseconds, so that drift cancels."""

import statistics
import time
import timeit
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.benchmark import Timer

BURST = 0.005  # seconds of a turn, where one call is shorter
MOST_ROUNDS = 101


@dataclass(frozen=True)
class Runner:
    """Something to time: a call, and what to enter around its turns."""

    step: Callable[[], object]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds are added until ``seconds`` are over, but at least ``rounds``."""

    seconds: float
    rounds: int


def clock(device: torch.device) -> Callable[[], float]:
    """The time, after all work queued on the device is done."""
    if device.type == "cpu":
        return timeit.default_timer

    def synchronized() -> float:
        torch.accelerator.synchronize(device)
        return timeit.default_timer()

    return synchronized


def interleave(
    runners: dict[str, Runner], effort: Effort, threads: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of a call of each, for every round."""
    now = clock(device)
    timers: dict[str, tuple[Timer, int]] = {}
    for name, runner in runners.items():
        timer = Timer("step()", globals={"step": runner.step}, num_threads=threads, timer=now)
        with runner.around():
            runner.step()
            start = now()
            runner.step()
            seconds = now() - start
        timers[name] = timer, max(1, round(BURST / max(seconds, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in runners}
    start = time.perf_counter()
    for k in range(max(MOST_ROUNDS, effort.rounds)):
        if k >= effort.rounds and time.perf_counter() - start > effort.seconds:
            break
        for name in list(runners) if k % 2 == 0 else list(runners)[::-1]:
            timer, number = timers[name]
            with runners[name].around():
                times[name].append(timer.timeit(number).mean)
    return times


def median_ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """The median over the rounds of the ratio within a round."""
    return statistics.median(_ratios(times, name, base))


def ratio_spread(times: dict[str, list[float]], name: str, base: str) -> float:
    """The interquartile range of the ratio."""
    ratios = _ratios(times, name, base)
    if len(ratios) < 2:
        return 0.0
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return high - low


def _ratios(times: dict[str, list[float]], name: str, base: str) -> list[float]:
    if len(times[name]) == len(times[base]):
        return [a / b for a, b in zip(times[name], times[base])]
    return [a / statistics.median(times[base]) for a in times[name]]  # one that took few turns
