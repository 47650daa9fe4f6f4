"""A layer as a function of all it depends on, and what it should be equal to.

That is nn.LSTM with the same weights in float64, called one by one in ordinary eager mode, and
finite differences of it. So nn.LSTM's row in the report too compares two different computations.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

from manual_lstm.report.row import Setting

# input (a packed one's data), h_0, c_0 and the weights by their names; or a part of them.
Point = dict[str, Tensor]
Results = dict[str, Tensor]  # output (a packed one's data), h_n and c_n
HALF = (torch.float16, torch.bfloat16)
BOTH = (torch.float64, torch.float32)  # nn.LSTM has another kernel for float32


class Function:
    """The layer of a setting, and nn.LSTM beside it, as functions of a point."""

    def __init__(self, setting: Setting, T: int = 5, B: int = 2, training: bool = True) -> None:
        self.layer = setting.layer().train(training)
        options = setting.options | {"dtype": torch.float64, "device": setting.device}
        self.official = nn.LSTM(setting.I, setting.H, **options).train(training)
        self.official.load_state_dict(self.layer.state_dict())
        self.dropout = training and setting.options.get("dropout", 0.0) > 0
        self.input = setting.input(T, B)
        h_0, c_0 = setting.hx(B)
        data = self.input.data if isinstance(self.input, PackedSequence) else self.input
        self.weights = {name: t.detach().clone() for name, t in self.layer.named_parameters()}
        self.point: Point = {"input": data, "h_0": h_0, "c_0": c_0, **self.weights}
        self.tolerance = 1e-9 if setting.dtype == torch.float64 else 2e-5

    def __call__(self, point: Point) -> Results:
        """The layer at a point, which may leave out h_0 and c_0, or weights."""
        return self._run(self.layer, point)

    def expected(self, point: Point) -> Results:
        """The same of nn.LSTM in float64."""
        with torch.backends.cudnn.flags(enabled=False):  # which has no second derivative
            return self._run(self.official, wide(point))

    def _run(self, layer: nn.Module, point: Point) -> Results:
        weights = {name: t for name, t in point.items() if name not in ("input", "h_0", "c_0")}
        states = [point[name] for name in ("h_0", "c_0") if name in point]
        input = self.like(point["input"])
        if self.dropout:
            torch.manual_seed(0)
        output, (h_n, c_n) = functional_call(layer, weights, (input, tuple(states) or None))
        return parts(output, h_n, c_n)

    def like(self, data: Tensor) -> Tensor | PackedSequence:
        """Data in the form of the setting's input."""
        return self.input._replace(data=data) if isinstance(self.input, PackedSequence) else data

    def gradients(self, point: Point, names: Iterable[str] | None = None) -> Point:
        """The gradients of the loss at a point, of nn.LSTM in float64."""
        leaves = {name: t.detach().clone().requires_grad_() for name, t in wide(point).items()}
        value = loss(self.expected(leaves))
        wanted = list(names or point)
        return dict(zip(wanted, torch.autograd.grad(value, [leaves[name] for name in wanted])))

    def step(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The layer with its own weights, from input data, h_0 and c_0, as models call it."""
        data, h_0, c_0 = tensors
        output, hx = self.layer(self.like(data), (h_0, c_0))
        return tuple(parts(output, *hx).values())

    def leaves(self) -> Point:
        """Input data, h_0 and c_0 that ask for gradients."""
        return {name: self.point[name].clone().requires_grad_() for name in ("input", "h_0", "c_0")}

    def train(self, call: Callable[..., Any] = lambda step, *tensors: step(*tensors)) -> Results:
        """The results of a call of :meth:`step`, and the gradients that their loss leaves."""
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
        """What :meth:`train` should give, of nn.LSTM in float64."""
        gradients = {f"grad of {name}": t for name, t in self.gradients(self.point).items()}
        return self.expected(self.point) | gradients

    def same(self, actual: Any, expected: Any) -> None:
        """Compare tensors, or dicts and sequences of them, as exactly as the dtype allows."""
        torch.testing.assert_close(
            actual, expected, rtol=self.tolerance, atol=self.tolerance, check_dtype=False
        )


def parts(output: Tensor | PackedSequence, h_n: Tensor, c_n: Tensor) -> Results:
    """A layer's results by name."""
    data = output.data if isinstance(output, PackedSequence) else output
    return {"output": data, "h_n": h_n, "c_n": c_n}


def loss(results: Results) -> Tensor:
    """A number that depends on every element of the results, on each in another way."""
    whole = [part.float() if part.dtype in HALF else part for part in results.values()]
    return torch.stack([(part * ramp(part)).sum() for part in whole]).sum()


def ramp(like: Tensor) -> Tensor:
    """Numbers from 0.5 to 1.5."""
    steps = torch.linspace(0.5, 1.5, like.numel(), dtype=like.dtype, device=like.device)
    return steps.reshape(like.shape)


def wide(point: Point) -> Point:
    """The point in float64."""
    return {name: t.double() for name, t in point.items()}


def pick(point: Point, *names: str) -> Point:
    """A part of a point."""
    return {name: point[name] for name in names}


def direction(point: Point) -> Point:
    """Where to go from a point."""
    torch.manual_seed(7)
    return {name: torch.randn(t.shape, dtype=torch.float64).to(t) for name, t in point.items()}


def slope(function: Callable[[Point], Results | Point], point: Point, step: Point) -> Results:
    """The derivative of a function in a direction: central differences of fourth order, float64."""
    h = 1e-4
    point, step = wide(point), wide(step)

    def at(k: int) -> Results:
        moved = {name: point[name] + k * h * t for name, t in step.items()}
        return {name: t.detach() for name, t in function(point | moved).items()}

    plus, minus, further, nearer = at(1), at(-1), at(2), at(-2)
    return {
        name: (8 * (plus[name] - minus[name]) - (further[name] - nearer[name])) / (12 * h)
        for name in plus
    }


def contract(jacobian: dict[str, Point], step: Point) -> Results:
    """A Jacobian times a direction."""
    return {
        name: torch.stack([torch.tensordot(row[k], step[k], step[k].dim()) for k in step]).sum(0)
        for name, row in jacobian.items()
    }
