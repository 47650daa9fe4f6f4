"""Rows on weights that are computed from others: parametrizations, pruning, weight drop."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

from manual_lstm.report.function import (
    FLOATS,
    LayerFunction,
    Point,
    loss,
    results_by_name,
    to_float64,
)
from manual_lstm.report.row import ReportRow, Setting


class _Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class _WeightDrop(nn.Module):
    """DropConnect (Wan et al. 2013): each call drops other elements of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def forward(self, weight: Tensor) -> Tensor:
        self.masks.append(torch.empty_like(weight).bernoulli_(0.5) * 2)
        return weight * self.masks[-1]


def check_computed_weights(change: Callable[[nn.Module, str], Any]) -> Callable[[Setting], None]:
    """Make the check that a layer computes with the changed weights, before and after a step.

    ``change`` registers the computation for a layer's weight of a name.
    """

    def check(setting: Setting) -> None:
        # In eval mode, because in training each call of spectral_norm changes its estimate.
        function = LayerFunction(setting, training=False)
        layer = function.layer
        names = list(function.official.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for name in names:
                if name.startswith("weight"):
                    change(layer, name)
            for _ in range(2):
                leaves = function.leaves()
                results = function.step(*leaves.values())
                effective = {name: getattr(layer, name) for name in names}
                gradients = _compare(function, leaves, results, effective)
                with torch.no_grad():
                    for parameter, gradient in zip(layer.parameters(), gradients):
                        parameter.sub_(0.1 * gradient)

    return check


def check_weight_drop(setting: Setting) -> None:
    """Each call draws one mask for every weight_hh, and computes with it."""
    function = LayerFunction(setting, training=False)
    layer, point = function.layer, function.point
    drops = {name: _WeightDrop() for name in point if name.startswith("weight_hh")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, drop in drops.items():
            parametrize.register_parametrization(layer, name, drop)
        masks_of_calls = []
        for _ in range(2):
            for drop in drops.values():
                drop.masks.clear()
            leaves = function.leaves()
            results = function.step(*leaves.values())
            effective: Point = dict(layer.named_parameters())
            for name, drop in drops.items():
                assert len(drop.masks) == 1, f"{name} is drawn {len(drop.masks)} times in a call"
                effective[name] = effective.pop(f"parametrizations.{name}.original") * drop.masks[0]
            masks_of_calls.append([drop.masks[0] for drop in drops.values()])
            _compare(function, leaves, results, effective)
    assert not any(torch.equal(*masks) for masks in zip(*masks_of_calls)), (
        "two calls have the same mask"
    )


def _compare(
    function: LayerFunction, leaves: Point, results: tuple[Tensor, ...], effective: Point
) -> tuple[Tensor, ...]:
    """Compare with nn.LSTM on the effective weights; return the gradients of the parameters."""
    hx = leaves["h_0"].double(), leaves["c_0"].double()
    input = function.like(leaves["input"].double())
    output, states = functional_call(function.official, to_float64(effective), (input, hx))
    expected = results_by_name(output, *states)
    actual = dict(zip(expected, results))
    function.assert_close(actual, expected)
    sources = [*leaves.values(), *function.layer.parameters()]
    gradients = torch.autograd.grad(loss(actual), sources, retain_graph=True)
    function.assert_close(gradients, torch.autograd.grad(loss(expected), sources))
    return gradients[len(leaves) :]


def _halve(layer: nn.Module, name: str) -> None:
    parametrize.register_parametrization(layer, name, _Half())


def _prune(layer: nn.Module, name: str) -> None:
    prune.RandomUnstructured.apply(layer, name, amount=0.5)  # type: ignore[no-untyped-call]


ROWS = [
    ReportRow("parametrize", check_computed_weights(_halve), packed=True, dtypes=FLOATS),
    ReportRow(
        "weight_norm",
        check_computed_weights(parametrizations.weight_norm),
        packed=True,
        dtypes=FLOATS,
    ),
    ReportRow(
        "spectral_norm",
        check_computed_weights(parametrizations.spectral_norm),
        packed=True,
        dtypes=FLOATS,
    ),
    ReportRow(
        "orthogonal",
        check_computed_weights(parametrizations.orthogonal),
        packed=True,
        dtypes=FLOATS,
    ),
    ReportRow("pruning", check_computed_weights(_prune), packed=True, dtypes=FLOATS),
    ReportRow("weight drop, drawn anew in each call", check_weight_drop, packed=True, dtypes=FLOATS),
]
