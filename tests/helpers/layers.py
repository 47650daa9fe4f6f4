"""Layers, options and inputs that many tests take."""

from typing import Any

import torch
from torch import Tensor

from manual_lstm import ManualLSTM, Unrolled
from manual_lstm.check.parity import data_of
from tests.helpers.equations import Made

DEEP: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "proj_size": 3}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make_layer(**options: Any) -> ManualLSTM:
    torch.manual_seed(0)
    return ManualLSTM(3, 4, **{"dtype": torch.float64, **options})


# Each option by itself, and several together.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"num_layers": 2},
    {"bidirectional": True},
    {"proj_size": 2},
    {"batch_first": True},
    {"num_layers": 2, "bidirectional": True, "proj_size": 1},
]

FIELDS = Made._fields  # of a step; Unrolled's have the same names


def fields(unrolled: Unrolled) -> list[Tensor]:
    """Every tensor that there is."""
    made = [data_of(part) for name in FIELDS for part in getattr(unrolled, name)]
    return [data_of(unrolled.output), *unrolled.states, *made]
