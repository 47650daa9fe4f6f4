"""Weights that are computed: parametrizations, pruning, weight drop."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

from manual_lstm.report.function import BOTH, Function, Point, loss, parts, wide
from manual_lstm.report.row import Row, Setting


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class _WeightDrop(nn.Module):
    """DropConnect (Wan et al. 2013): elements of the weight are dropped, others in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def forward(self, weight: Tensor) -> Tensor:
        self.masks.append(torch.empty_like(weight).bernoulli_(0.5) * 2)
        return weight * self.masks[-1]


def computed(change: Callable[[nn.Module, str], Any]) -> Callable[[Setting], None]:
    """The check that changed weights are those the layer computes with, now and after a step."""

    def check(setting: Setting) -> None:
        function = Function(setting, training=False)  # in training spectral_norm moves on
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


def weight_drop(setting: Setting) -> None:
    """Each call draws its mask of every weight_hh, once, and computes with it."""
    function = Function(setting, training=False)
    layer, point = function.layer, function.point
    drops = {name: _WeightDrop() for name in point if name.startswith("weight_hh")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, drop in drops.items():
            parametrize.register_parametrization(layer, name, drop)
        calls = []
        for _ in range(2):
            for drop in drops.values():
                drop.masks.clear()
            leaves = function.leaves()
            results = function.step(*leaves.values())
            effective: Point = dict(layer.named_parameters())
            for name, drop in drops.items():
                assert len(drop.masks) == 1, f"{name} is drawn {len(drop.masks)} times in a call"
                effective[name] = effective.pop(f"parametrizations.{name}.original") * drop.masks[0]
            calls.append([drop.masks[0] for drop in drops.values()])
            _compare(function, leaves, results, effective)
    assert not any(torch.equal(*masks) for masks in zip(*calls)), "two calls have the same mask"


def _compare(
    function: Function, leaves: Point, results: tuple[Tensor, ...], effective: Point
) -> tuple[Tensor, ...]:
    """Compare with nn.LSTM on the effective weights; return the gradients of the layer's parameters."""
    hx = leaves["h_0"].double(), leaves["c_0"].double()
    input = function.like(leaves["input"].double())
    output, states = functional_call(function.official, wide(effective), (input, hx))
    expected = parts(output, *states)
    actual = dict(zip(expected, results))
    function.same(actual, expected)
    wanted = [*leaves.values(), *function.layer.parameters()]
    found = torch.autograd.grad(loss(actual), wanted, retain_graph=True)
    function.same(found, torch.autograd.grad(loss(expected), wanted))
    return found[len(leaves) :]


ROWS = [
    Row(
        "parametrize",
        computed(lambda layer, name: parametrize.register_parametrization(layer, name, _Halved())),
        packed=True,
        dtypes=BOTH,
    ),
    Row("weight_norm", computed(parametrizations.weight_norm), packed=True, dtypes=BOTH),
    Row("spectral_norm", computed(parametrizations.spectral_norm), packed=True, dtypes=BOTH),
    Row("orthogonal", computed(parametrizations.orthogonal), packed=True, dtypes=BOTH),
    Row(
        "pruning",
        computed(lambda layer, name: prune.RandomUnstructured.apply(layer, name, amount=0.5)),  # type: ignore[no-untyped-call]
        packed=True,
        dtypes=BOTH,
    ),
    Row("weight drop, drawn anew in each call", weight_drop, packed=True, dtypes=BOTH),
]
