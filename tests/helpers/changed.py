"""Layers with a changed cell, of manual_lstm.cells."""

from typing import Any

import pytest
import torch

from manual_lstm import ManualLSTM
from tests.helpers.recipes import RECIPES

every_recipe = pytest.mark.parametrize("name", RECIPES)


OWN = {"LayerNormLSTM": ["ln_x", "ln_h", "ln_c"], "PeepholeLSTM": ["peephole"]}


def stir(layer: ManualLSTM) -> None:
    """Move the cell's own parameters away from where they begin, which hides mistakes."""
    own = [name for name in layer.state_dict() if not name.startswith(("weight_", "bias_"))]
    with torch.no_grad():
        for name in own:
            parameter = layer.get_parameter(name)
            parameter.add_(0.5 * torch.randn_like(parameter))


def make_recipe(name: str, training: bool = False, **options: Any) -> ManualLSTM:
    torch.manual_seed(0)
    layer = RECIPES[name](3, 4, **{"dtype": torch.float64, **options})
    stir(layer)
    return layer.train(training)
