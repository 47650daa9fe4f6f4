"""A layer as a function of its input, states and weights, and the results it should have.

The expected results come from nn.LSTM with the same weights in float64, called in ordinary eager mode
on one set of tensors at a time, and from finite differences of it. So the report compares two
different computations in the row of nn.LSTM too.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

from manual_lstm.check.parity import data_of, ramp
from manual_lstm.report.row import Setting

# Tensors by name: input (of packed input, the data), h_0, c_0 and the weights, or some of these.
Point = dict[str, Tensor]
Results = dict[str, Tensor]  # output (of packed output, the data), h_n and c_n
HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float64, torch.float32)  # both, because nn.LSTM has another kernel for float32


class LayerFunction:
    """The layer of a setting, and nn.LSTM beside it, as functions of a point."""

    def __init__(self, setting: Setting, T: int = 5, B: int = 2, training: bool = True) -> None:
        self.layer = setting.layer().train(training)
        self.official = setting.with_changes(dtype=torch.float64).official(self.layer)
        self.dropout = training and setting.options.get("dropout", 0.0) > 0
        self.input = setting.input(T, B)
        h_0, c_0 = setting.hx(B)
        self.weights = {name: t.detach().clone() for name, t in self.layer.named_parameters()}
        self.point: Point = {"input": data_of(self.input), "h_0": h_0, "c_0": c_0, **self.weights}
        self.tolerance = 1e-9 if setting.dtype == torch.float64 else 2e-5

    def __call__(self, point: Point) -> Results:
        """Call the layer at a point. The point may lack both states, or any weights."""
        return self._run(self.layer, point)

    def expected(self, point: Point) -> Results:
        """Call nn.LSTM in float64 at a point."""
        with torch.backends.cudnn.flags(enabled=False):  # cuDNN has no second derivative
            return self._run(self.official, to_float64(point))

    def _run(self, layer: nn.Module, point: Point) -> Results:
        weights = {name: t for name, t in point.items() if name not in ("input", "h_0", "c_0")}
        states = [point[name] for name in ("h_0", "c_0") if name in point]
        input = self.like(point["input"])
        if self.dropout:
            torch.manual_seed(0)
        output, (h_n, c_n) = functional_call(layer, weights, (input, tuple(states) or None))
        return results_by_name(output, h_n, c_n)

    def like(self, data: Tensor) -> Tensor | PackedSequence:
        """Return data in the form of the setting's input."""
        return self.input._replace(data=data) if isinstance(self.input, PackedSequence) else data

    def gradients(self, point: Point, names: Iterable[str] | None = None) -> Point:
        """Return the gradients of the loss at a point, computed by nn.LSTM in float64."""
        leaves = {name: t.detach().clone().requires_grad_() for name, t in to_float64(point).items()}
        value = loss(self.expected(leaves))
        sources = list(names or point)
        return dict(zip(sources, torch.autograd.grad(value, [leaves[name] for name in sources])))

    def step(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the layer with its own weights, as models do, on input data, h_0 and c_0."""
        data, h_0, c_0 = tensors
        output, hx = self.layer(self.like(data), (h_0, c_0))
        return tuple(results_by_name(output, *hx).values())

    def leaves(self) -> Point:
        """Return copies of the input data, h_0 and c_0 that require gradients."""
        return {name: self.point[name].clone().requires_grad_() for name in ("input", "h_0", "c_0")}

    def train(self, call: Callable[..., Any] = lambda step, *tensors: step(*tensors)) -> Results:
        """Call :meth:`step` by way of ``call``, then backward; return results and gradients."""
        leaves = self.leaves()
        self.layer.zero_grad()
        torch.manual_seed(0)  # for dropout
        results = dict(zip(("output", "h_n", "c_n"), call(self.step, *leaves.values())))
        loss(results).backward()  # type: ignore[no-untyped-call]
        for name, leaf in (leaves | dict(self.layer.named_parameters())).items():
            assert leaf.grad is not None, f"{name} has no gradient"
            results[f"grad of {name}"] = leaf.grad
        return results

    def trained(self) -> Results:
        """Return what :meth:`train` should return, computed by nn.LSTM in float64."""
        gradients = {f"grad of {name}": t for name, t in self.gradients(self.point).items()}
        return self.expected(self.point) | gradients

    def assert_close(self, actual: Any, expected: Any) -> None:
        """Assert that tensors, or dicts and sequences of them, are as close as the dtype allows."""
        torch.testing.assert_close(
            actual, expected, rtol=self.tolerance, atol=self.tolerance, check_dtype=False
        )


def results_by_name(output: Tensor | PackedSequence, h_n: Tensor, c_n: Tensor) -> Results:
    """Return the results of a layer by name."""
    return {"output": data_of(output), "h_n": h_n, "c_n": c_n}


def loss(results: Results) -> Tensor:
    """Return a scalar that depends on every element of the results, each with its own weight."""
    whole = [part.float() if part.dtype in HALF else part for part in results.values()]
    return torch.stack([(part * ramp(part)).sum() for part in whole]).sum()


def to_float64(point: Point) -> Point:
    """Return the point in float64."""
    return {name: t.double() for name, t in point.items()}


def select(point: Point, *names: str) -> Point:
    """Return some tensors of a point."""
    return {name: point[name] for name in names}


def random_direction(point: Point) -> Point:
    """Draw a direction in which to leave a point: for each tensor one of its shape."""
    torch.manual_seed(7)
    return {name: torch.randn(t.shape, dtype=torch.float64).to(t) for name, t in point.items()}


def directional_derivative(
    function: Callable[[Point], Results | Point], point: Point, step: Point
) -> Results:
    """Differentiate a function in a direction, by central differences of fourth order in float64."""
    h = 1e-4
    point, step = to_float64(point), to_float64(step)

    def at(k: int) -> Results:
        moved = {name: point[name] + k * h * t for name, t in step.items()}
        return {name: t.detach() for name, t in function(point | moved).items()}

    plus, minus, plus_two, minus_two = at(1), at(-1), at(2), at(-2)
    return {
        name: (8 * (plus[name] - minus[name]) - (plus_two[name] - minus_two[name])) / (12 * h)
        for name in plus
    }


def jacobian_times(jacobian: dict[str, Point], step: Point) -> Results:
    """Multiply a Jacobian by a direction."""
    return {
        name: torch.stack([torch.tensordot(row[k], step[k], step[k].dim()) for k in step]).sum(0)
        for name, row in jacobian.items()
    }
