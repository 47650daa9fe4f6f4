"""The LSTM you can open: a drop-in replacement for torch.nn.LSTM, written as a gate loop."""

import warnings

from manual_lstm.check.interrupt import guard_imports

guard_imports("manual_lstm", "benchmarks")
with warnings.catch_warnings():
    # torch says so where numpy is not installed. Nothing here needs it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch  # noqa: F401

from manual_lstm import cells
from manual_lstm.cell import Step, gates, output_step
from manual_lstm.engine.context import plain_loop
from manual_lstm.engine.custom import CellWeights
from manual_lstm.functional import lstm_forward
from manual_lstm.module import ManualLSTM
from manual_lstm.swap import SwapCandidate, find_lstm, replace_lstm, restore_lstm
from manual_lstm.unrolled.result import Unrolled

__all__ = [
    "ManualLSTM",
    "lstm_forward",
    "plain_loop",
    "replace_lstm",
    "restore_lstm",
    "find_lstm",
    "SwapCandidate",
    "Unrolled",
    "cells",
    "Step",
    "CellWeights",
    "gates",
    "output_step",
]
__version__ = "0.1.0"
