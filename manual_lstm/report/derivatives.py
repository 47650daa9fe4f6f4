"""Derivatives of every order and kind: torch.func, forward-mode AD, torch.autograd.functional."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp

from manual_lstm.report.function import (
    BOTH,
    Function,
    Point,
    Results,
    contract,
    direction,
    loss,
    pick,
    ramp,
    slope,
)
from manual_lstm.report.row import Row, Setting

forward_ad: Any = torch.autograd.forward_ad  # whose functions have no types
functional: Any = torch.autograd.functional
# A whole Hessian is of few parts; the rest is held still.
SOME = ("input", "h_0", "c_0", "weight_hh_l0")


def reverse_mode(setting: Setting) -> None:
    """torch.func.grad, vjp and jacrev."""
    function = Function(setting)
    point = function.point
    expected = function.gradients(point)
    function.same(grad(lambda p: loss(function(p)))(point), expected)

    results, pull = cast(Any, vjp(function, point))
    function.same(results, function.expected(point))
    function.same(pull({name: ramp(part) for name, part in results.items()})[0], expected)

    step = direction(point)
    jacobian = jacrev(function)(point)
    function.same(contract(jacobian, step), slope(function.expected, point, step))


def forward_mode(setting: Setting) -> None:
    """torch.func.jvp, jacfwd and linearize."""
    function = Function(setting)
    point, step = function.point, direction(function.point)
    expected = function.expected(point), slope(function.expected, point, step)
    function.same(jvp(function, (point,), (step,)), expected)
    jacobian = jacfwd(function, randomness="same")(point)
    function.same(contract(jacobian, step), expected[1])
    # linearize computes constants of its graph anew, with other random numbers: no dropout.
    still = Function(setting, T=2, training=False)
    point, step = still.point, direction(still.point)
    results, push = linearize(still, point)
    expected = still.expected(point), slope(still.expected, point, step)
    still.same((results, push(step)), expected)


def second_order(
    method: Callable[[Any, Point, Point], Any], training: bool = True
) -> Callable[[Setting], None]:
    """The check of what multiplies the loss's Hessian by a direction."""

    def check(setting: Setting) -> None:
        function = Function(setting, T=3, training=training)
        some = pick(function.point, *SOME)
        step = direction(some)

        def value(part: Point) -> Tensor:
            return loss(function(function.point | part))

        def gradients(part: Point) -> Point:
            return function.gradients(function.point | part, SOME)

        function.same(method(value, some, step), slope(gradients, some, step))

    return check


def _hessian(value: Any, point: Point, step: Point) -> Results:
    return contract(hessian(value)(point), step)


def _forward_over_reverse(value: Any, point: Point, step: Point) -> Point:
    return cast(Point, jvp(grad(value), (point,), (step,))[1])


def _reverse_over_forward(value: Any, point: Point, step: Point) -> Point:
    return cast(Point, grad(lambda p: jvp(value, (p,), (step,))[1])(point))


def _reverse_over_reverse(value: Any, point: Point, step: Point) -> Point:
    return cast(Point, cast(Any, vjp(grad(value), point))[1](step)[0])


def dual_numbers(setting: Setting) -> None:
    """torch.autograd.forward_ad, and autograd's own gradients of what it gives."""
    function = Function(setting)
    point = {name: t.clone().requires_grad_() for name, t in function.point.items()}
    step = direction(point)
    expected = slope(function.expected, point, step)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(t, step[name]) for name, t in point.items()}
        found = {name: forward_ad.unpack_dual(t).tangent for name, t in function(dual).items()}
    function.same(found, expected)
    gradients = torch.autograd.grad(loss(found), list(point.values()))
    # The tangent is linear in the step, so that its gradient is the gradients' slope.
    function.same(dict(zip(point, gradients)), slope(function.gradients, function.point, step))


def autograd_functional(setting: Setting) -> None:
    """torch.autograd.functional's jacobian, hessian, jvp, vjp, hvp and vhp."""
    function = Function(setting, T=3)
    point = pick(function.point, *SOME)
    step = direction(point)
    steps, primals = tuple(step.values()), tuple(point.values())

    def results(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(function.point | dict(zip(SOME, tensors))).values())

    def value(*tensors: Tensor) -> Tensor:
        return loss(function(function.point | dict(zip(SOME, tensors))))

    def gradients(part: Point) -> Point:
        return function.gradients(function.point | part, SOME)

    pushed = tuple(slope(lambda p: function.expected(function.point | p), point, step).values())
    curved = tuple(slope(gradients, point, step).values())
    ramps = tuple(ramp(part) for part in results(*primals))
    function.same(functional.jvp(results, primals, steps)[1], pushed)
    function.same(functional.vjp(results, primals, ramps)[1], tuple(gradients(point).values()))
    function.same(functional.hvp(value, primals, steps)[1], curved)
    function.same(functional.vhp(value, primals, steps)[1], curved)
    function.same(_times(functional.hessian(value, primals), steps), curved)
    function.same(_times(functional.hessian(value, primals, vectorize=True), steps), curved)
    for options in ({}, {"vectorize": True}):
        function.same(_times(functional.jacobian(results, primals, **options), steps), pushed)


def _times(rows: tuple[tuple[Tensor, ...], ...], steps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A Jacobian times a direction, as tuples."""
    jacobian = {str(k): dict(zip("abcd", row)) for k, row in enumerate(rows)}
    return tuple(contract(jacobian, dict(zip("abcd", steps))).values())


def double_backward(setting: Setting) -> None:
    """gradgradcheck through output, h_n and c_n, of the input, both states and every weight."""
    function = Function(setting.but(I=2, H=3), T=3)
    tensors = tuple(t.clone().requires_grad_() for t in function.point.values())

    def results(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = function(dict(zip(function.point, tensors)))
        return *found.values(), loss(found)  # gradcheck passes over a result without a gradient

    assert gradcheck(results, tensors, fast_mode=True)
    assert gradgradcheck(results, tensors, fast_mode=True)


def triple_backward(setting: Setting) -> None:
    """The third derivative, twice in one direction."""
    function = Function(setting, T=2)
    step = direction(function.point)

    def along(run: Callable[[Point], Results], point: Point, order: int) -> Point:
        leaves = {name: t.detach().clone().requires_grad_() for name, t in point.items()}
        value = loss(run(leaves))
        for k in range(order):
            further = k < order - 1
            gradients = torch.autograd.grad(value, list(leaves.values()), create_graph=further)
            products = [(t * step[name].to(t)).sum() for name, t in zip(leaves, gradients)]
            value = torch.stack(products).sum()
        return dict(zip(leaves, gradients))

    second = slope(lambda point: along(function.expected, point, 2), function.point, step)
    function.same(along(function, function.point, 3), second)


def wgan_gp(setting: Setting) -> None:
    """A critic's step with a penalty on the gradient of its score (Gulrajani et al. 2017)."""
    function = Function(setting)
    weights: Point = dict(function.layer.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    inputs = function.point["input"], direction(function.point)["input"]

    def critic(run: Callable[[Point], Results], weights: Point, create_graph: bool) -> Tensor:
        point = function.point | weights
        real, fake = (x.to(weights["weight_ih_l0"]) for x in inputs)
        between = (0.3 * real + 0.7 * fake).requires_grad_()
        scores = [loss(run(point | {"input": x})) for x in (real, fake, between)]
        (slopes,) = torch.autograd.grad(scores[2], between, create_graph=create_graph)
        penalty: Tensor = (slopes.norm(dim=-1) - 1).square().mean()
        return scores[1] - scores[0] + 10 * penalty

    optimizer = torch.optim.SGD(weights.values(), lr=1.0)
    critic(function, weights, True).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    step = direction(before)
    moved = torch.stack([((before[name] - weights[name]) * step[name]).sum() for name in step]).sum()
    expected = slope(lambda p: {"": critic(function.expected, p, False)}, before, step)[""]
    function.same(moved, expected)


def maml(setting: Setting) -> None:
    """The gradient of a loss after two steps of learning, through those steps (Finn et al. 2017)."""
    function = Function(setting)
    weights = function.weights
    query = {"input": direction(function.point)["input"]}

    def adapted(run: Callable[[Point], Results], weights: Point, create_graph: bool) -> Tensor:
        for _ in range(2):
            value = loss(run(function.point | weights))
            slopes = torch.autograd.grad(value, list(weights.values()), create_graph=create_graph)
            weights = {name: weights[name] - 0.05 * t for name, t in zip(weights, slopes)}
            if not create_graph:
                weights = {name: t.detach().requires_grad_() for name, t in weights.items()}
        return loss(run(function.point | weights | query))

    def asking(weights: Point) -> Point:
        return {name: t.detach().clone().requires_grad_() for name, t in weights.items()}

    leaves, step = asking(weights), direction(weights)
    gradients = torch.autograd.grad(adapted(function, leaves, True), list(leaves.values()))
    actual = torch.stack([(t * step[name]).sum() for name, t in zip(step, gradients)]).sum()
    expected = slope(lambda p: {"": adapted(function.expected, asking(p), False)}, weights, step)[""]
    function.same(actual, expected)


def eval_mode(setting: Setting) -> None:
    """Gradients of a layer that is not training, on every kind of device here."""
    devices = {setting.device, *(["cuda"] if torch.cuda.is_available() else [])}
    for device in sorted(devices):
        function = Function(setting.but(device=device), training=False)
        function.same(function.train(), function.trained())


ROWS = [
    Row("torch.func.grad, vjp, jacrev", reverse_mode, packed=True, dtypes=BOTH),
    Row("torch.func.jvp, jacfwd, linearize", forward_mode, packed=True, dtypes=BOTH),
    # Its vmap takes no randomness: no dropout.
    Row("torch.func.hessian", second_order(_hessian, training=False), packed=True, dtypes=BOTH),
    Row("forward over reverse", second_order(_forward_over_reverse), packed=True, dtypes=BOTH),
    Row("reverse over forward", second_order(_reverse_over_forward), packed=True, dtypes=BOTH),
    Row("reverse over reverse", second_order(_reverse_over_reverse), packed=True, dtypes=BOTH),
    Row("torch.autograd.forward_ad", dual_numbers, packed=True, dtypes=BOTH),
    Row("torch.autograd.functional", autograd_functional, packed=True, dtypes=BOTH),
    Row("double backward (gradgradcheck)", double_backward, packed=True),
    Row("triple backward", triple_backward, packed=True, dtypes=BOTH),
    Row("WGAN-GP step", wgan_gp, packed=True, dtypes=BOTH),
    Row("MAML inner loop", maml, packed=True, dtypes=BOTH),
    Row("backward in eval mode", eval_mode, packed=True, dtypes=BOTH),
]
