"""Time of ManualLSTM as a multiple of nn.LSTM's, and of Opacus' DPLSTM where that is installed.

    python benchmarks/speed.py [--threads N] [--seconds S]

The layers take turns within each measurement, so that a busy machine slows all of them alike.
"""

import argparse
import importlib
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

from manual_lstm import ManualLSTM

SHAPES = [(1, 100, 6, 32), (28, 64, 28, 128), (100, 32, 256, 256), (50, 16, 512, 512)]  # T, B, I, H
ROUNDS = 5


def layers(I: int, H: int) -> dict[str, nn.Module]:
    """nn.LSTM, ManualLSTM and, where installed, DPLSTM."""
    made: dict[str, nn.Module] = {"nn.LSTM": nn.LSTM(I, H), "ManualLSTM": ManualLSTM(I, H)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made["DPLSTM"] = importlib.import_module("opacus.layers").DPLSTM(I, H)
    except ImportError:
        pass
    return made


def inference(layer: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        layer(x)


def training(layer: nn.Module, x: torch.Tensor) -> None:
    layer(x)[0].sum().backward()


def medians(
    step: Callable[[nn.Module, torch.Tensor], None], shape: tuple[int, ...], arguments: Any
) -> dict[str, float]:
    """The median time of each layer over rounds in which all take a turn."""
    T, B, I, H = shape
    x = torch.randn(T, B, I)
    timers = {
        name: Timer(
            "step(layer, x)",
            globals={"step": step, "layer": layer, "x": x},
            num_threads=arguments.threads,
        )
        for name, layer in layers(I, H).items()
    }
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            measured = timer.blocked_autorange(min_run_time=arguments.seconds / ROUNDS)
            times[name].append(measured.median)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each layer and shape")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {arguments.threads} threads, float32; nn.LSTM's time is 1\n")
    print(f"{'T, B, I, H':<20}{'':<12}{'ManualLSTM':<12}DPLSTM")
    for shape in SHAPES:
        for step in (inference, training):
            times = medians(step, shape, arguments)
            base = times.pop("nn.LSTM")
            cells = "".join(f"{time / base:<12.2f}" for time in times.values())
            label = ", ".join(map(str, shape))
            print(f"{label:<20}{step.__name__:<12}{cells}", flush=True)


if __name__ == "__main__":
    main()
