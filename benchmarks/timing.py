"""Timing in turns: each round runs every contender for some milliseconds, so that drift cancels."""

import statistics
import time
import timeit
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.benchmark import Timer

from manual_lstm.check.command import Progress

BURST = 0.005  # seconds of a turn, or longer where one call takes longer
MOST_ROUNDS = 101


@dataclass(frozen=True)
class Runner:
    """A call to time, and the context of its turns."""

    step: Callable[[], object]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Effort:
    """How long to measure: for ``seconds``, but at least ``rounds`` rounds."""

    seconds: float
    rounds: int


def clock(device: torch.device) -> Callable[[], float]:
    """Return a clock that first waits for all work queued on the device."""
    if device.type == "cpu":
        return timeit.default_timer

    def synchronized() -> float:
        torch.accelerator.synchronize(device)
        return timeit.default_timer()

    return synchronized


def interleave(
    runners: dict[str, Runner], effort: Effort, threads: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of a call in each round, by name."""
    now = clock(device)
    progress = Progress("contender")
    timers: dict[str, tuple[Timer, int]] = {}
    for number, (name, runner) in enumerate(runners.items(), start=1):
        progress(number, len(runners), f"{name}, first calls")
        timer = Timer("step()", globals={"step": runner.step}, num_threads=threads, timer=now)
        with runner.around():
            runner.step()
            start = now()
            runner.step()
            seconds = now() - start
        timers[name] = timer, max(1, round(BURST / max(seconds, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in runners}
    start = time.perf_counter()
    progress = Progress("round")
    for k in range(max(MOST_ROUNDS, effort.rounds)):
        if k >= effort.rounds and time.perf_counter() - start > effort.seconds:
            break
        progress(k + 1, max(MOST_ROUNDS, effort.rounds), f"at least {effort.seconds:.0f} s")
        for name in list(runners) if k % 2 == 0 else list(runners)[::-1]:
            timer, number = timers[name]
            with runners[name].around():
                times[name].append(timer.timeit(number).mean)
    progress.end()
    return times


def median_ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """Return the median over the rounds of the ratio within a round."""
    return statistics.median(_ratios(times, name, base))


def ratio_spread(times: dict[str, list[float]], name: str, base: str) -> float:
    """Return the interquartile range of the ratio within a round."""
    ratios = _ratios(times, name, base)
    if len(ratios) < 2:
        return 0.0
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return high - low


def _ratios(times: dict[str, list[float]], name: str, base: str) -> list[float]:
    if len(times[name]) == len(times[base]):
        return [a / b for a, b in zip(times[name], times[base])]
    # A slow contender has fewer rounds than the base, and is compared with its median.
    return [a / statistics.median(times[base]) for a in times[name]]
