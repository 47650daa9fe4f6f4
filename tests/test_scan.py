"""Exported layers of any length and batch, where the loop is the operator scan."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.changed import make_recipe
from tests.helpers.grids import quick_sample
from tests.helpers.layers import fields, make_layer, randn
from tests.helpers.recipes import RECIPES


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    # Dynamo compiles the step of a scan. A step that it has compiled before, for a batch of 2, makes it
    # write a guard into the next program: that its batch is not 2.
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("strict", [pytest.param(False, marks=pytest.mark.slow), True])
def test_unrolled_with_any_length_and_batch(strict: bool) -> None:
    class Opened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make_layer(bidirectional=True, proj_size=3)

        def forward(self, x: Tensor) -> list[Tensor]:
            return fields(self.layer.unroll(x))

    opened, dim = Opened(), torch.export.Dim.DYNAMIC
    program = torch.export.export(
        opened, (randn(5, 3, 3),), dynamic_shapes=({0: dim, 1: dim},), strict=strict
    )
    for T, B in ((5, 3), (9, 2), (2, 7)):
        x = randn(T, B, 3)
        torch.testing.assert_close(program.module()(x), opened(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "strict"),
    quick_sample(product(RECIPES, [False, True]), [("VariationalLSTM", True)]),
)
def test_a_changed_cell_with_any_length_and_batch(name: str, strict: bool) -> None:
    layer = make_recipe(name, bidirectional=True)
    dim = torch.export.Dim.DYNAMIC
    # The operator scan of torch 2.13, exported strictly with gradients, wants a gradient of each gate,
    # and CoupledLSTM leaves one alone.
    with torch.set_grad_enabled(not (strict and name == "CoupledLSTM")):
        program = torch.export.export(
            layer, (randn(5, 3, 3),), dynamic_shapes=({0: dim, 1: dim},), strict=strict
        )
    for T, B in ((5, 3), (9, 2), (2, 7)):
        x = randn(T, B, 3)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=1e-13)
