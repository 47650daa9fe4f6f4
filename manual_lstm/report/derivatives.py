"""Rows on derivatives of all orders: torch.func, forward-mode AD, torch.autograd.functional."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp

from manual_lstm.check.parity import ramp
from manual_lstm.report.function import (
    FLOATS,
    LayerFunction,
    Point,
    Results,
    directional_derivative,
    jacobian_times,
    loss,
    random_direction,
    select,
)
from manual_lstm.report.row import ReportRow, Setting

forward_ad: Any = torch.autograd.forward_ad  # Any, because its functions have no types
functional: Any = torch.autograd.functional
# The tensors that Hessians are taken of. The rest is constant, to save time.
HESSIAN_PARTS = ("input", "h_0", "c_0", "weight_hh_l0")


def check_reverse_mode(setting: Setting) -> None:
    """torch.func.grad, vjp and jacrev."""
    function = LayerFunction(setting)
    point = function.point
    expected = function.gradients(point)
    function.assert_close(grad(lambda p: loss(function(p)))(point), expected)

    results, pull = cast(Any, vjp(function, point))
    function.assert_close(results, function.expected(point))
    function.assert_close(pull({name: ramp(part) for name, part in results.items()})[0], expected)

    step = random_direction(point)
    jacobian = jacrev(function)(point)
    function.assert_close(
        jacobian_times(jacobian, step), directional_derivative(function.expected, point, step)
    )


def check_forward_mode(setting: Setting) -> None:
    """torch.func.jvp, jacfwd and linearize."""
    function = LayerFunction(setting)
    point, step = function.point, random_direction(function.point)
    expected = function.expected(point), directional_derivative(function.expected, point, step)
    function.assert_close(jvp(function, (point,), (step,)), expected)
    jacobian = jacfwd(function, randomness="same")(point)
    function.assert_close(jacobian_times(jacobian, step), expected[1])
    # linearize recomputes constants of its graph, with new random numbers. So there is no dropout.
    function = LayerFunction(setting, T=2, training=False)
    point, step = function.point, random_direction(function.point)
    results, push = linearize(function, point)
    expected = function.expected(point), directional_derivative(function.expected, point, step)
    function.assert_close((results, push(step)), expected)


def check_second_order(
    method: Callable[[Any, Point, Point], Any], training: bool = True
) -> Callable[[Setting], None]:
    """Make the check of a method that multiplies the Hessian of the loss by a direction."""

    def check(setting: Setting) -> None:
        function = LayerFunction(setting, T=3, training=training)
        variables = select(function.point, *HESSIAN_PARTS)
        step = random_direction(variables)

        def value(part: Point) -> Tensor:
            return loss(function(function.point | part))

        def gradients(part: Point) -> Point:
            return function.gradients(function.point | part, HESSIAN_PARTS)

        expected = directional_derivative(gradients, variables, step)
        function.assert_close(method(value, variables, step), expected)

    return check


def _hessian(value: Any, point: Point, step: Point) -> Results:
    return jacobian_times(hessian(value)(point), step)


def _forward_over_reverse(value: Any, point: Point, step: Point) -> Point:
    return cast(Point, jvp(grad(value), (point,), (step,))[1])


def _reverse_over_forward(value: Any, point: Point, step: Point) -> Point:
    return cast(Point, grad(lambda p: jvp(value, (p,), (step,))[1])(point))


def _reverse_over_reverse(value: Any, point: Point, step: Point) -> Point:
    return cast(Point, cast(Any, vjp(grad(value), point))[1](step)[0])


def check_dual_numbers(setting: Setting) -> None:
    """torch.autograd.forward_ad, and gradients of the tangents that it computes."""
    function = LayerFunction(setting)
    point = {name: t.clone().requires_grad_() for name, t in function.point.items()}
    step = random_direction(point)
    expected = directional_derivative(function.expected, point, step)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(t, step[name]) for name, t in point.items()}
        tangents = {name: forward_ad.unpack_dual(t).tangent for name, t in function(dual).items()}
    function.assert_close(tangents, expected)
    gradients = torch.autograd.grad(loss(tangents), list(point.values()))
    # The loss is linear in the results. So the gradient of the tangents' loss is the directional
    # derivative of the gradients.
    function.assert_close(
        dict(zip(point, gradients)), directional_derivative(function.gradients, function.point, step)
    )


def check_autograd_functional(setting: Setting) -> None:
    """torch.autograd.functional's jacobian, hessian, jvp, vjp, hvp and vhp."""
    function = LayerFunction(setting, T=3)
    point = select(function.point, *HESSIAN_PARTS)
    step = random_direction(point)
    steps, primals = tuple(step.values()), tuple(point.values())

    def results(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(function.point | dict(zip(HESSIAN_PARTS, tensors))).values())

    def value(*tensors: Tensor) -> Tensor:
        return loss(function(function.point | dict(zip(HESSIAN_PARTS, tensors))))

    def gradients(part: Point) -> Point:
        return function.gradients(function.point | part, HESSIAN_PARTS)

    pushed = tuple(
        directional_derivative(lambda p: function.expected(function.point | p), point, step).values()
    )
    curved = tuple(directional_derivative(gradients, point, step).values())
    ramps = tuple(ramp(part) for part in results(*primals))
    function.assert_close(functional.jvp(results, primals, steps)[1], pushed)
    function.assert_close(functional.vjp(results, primals, ramps)[1], tuple(gradients(point).values()))
    function.assert_close(functional.hvp(value, primals, steps)[1], curved)
    function.assert_close(functional.vhp(value, primals, steps)[1], curved)
    function.assert_close(_times(functional.hessian(value, primals), steps), curved)
    function.assert_close(_times(functional.hessian(value, primals, vectorize=True), steps), curved)
    for options in ({}, {"vectorize": True}):
        function.assert_close(_times(functional.jacobian(results, primals, **options), steps), pushed)


def _times(rows: tuple[tuple[Tensor, ...], ...], steps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Multiply a Jacobian by a direction, both as the tuples of torch.autograd.functional."""
    jacobian = {str(k): dict(zip("abcd", row)) for k, row in enumerate(rows)}
    return tuple(jacobian_times(jacobian, dict(zip("abcd", steps))).values())


def check_double_backward(setting: Setting) -> None:
    """gradgradcheck from output, h_n and c_n to the input, both states and every weight."""
    function = LayerFunction(setting.with_changes(I=2, H=3), T=3)
    tensors = tuple(t.clone().requires_grad_() for t in function.point.values())

    def results(*tensors: Tensor) -> tuple[Tensor, ...]:
        by_name = function(dict(zip(function.point, tensors)))
        # gradcheck ignores a result without a gradient; the loss has one from each of them.
        return *by_name.values(), loss(by_name)

    assert gradcheck(results, tensors, fast_mode=True)
    assert gradgradcheck(results, tensors, fast_mode=True)


def check_triple_backward(setting: Setting) -> None:
    """The gradient of the second derivative in a direction."""
    function = LayerFunction(setting, T=2)
    step = random_direction(function.point)

    def along(run: Callable[[Point], Results], point: Point, order: int) -> Point:
        leaves = {name: t.detach().clone().requires_grad_() for name, t in point.items()}
        value = loss(run(leaves))
        for k in range(order):
            further = k < order - 1
            gradients = torch.autograd.grad(value, list(leaves.values()), create_graph=further)
            products = [(t * step[name].to(t)).sum() for name, t in zip(leaves, gradients)]
            value = torch.stack(products).sum()
        return dict(zip(leaves, gradients))

    second = directional_derivative(
        lambda point: along(function.expected, point, 2), function.point, step
    )
    function.assert_close(along(function, function.point, 3), second)


def check_wgan_gp(setting: Setting) -> None:
    """A step of a critic with a penalty on the gradient of its score (Gulrajani et al. 2017)."""
    function = LayerFunction(setting)
    weights: Point = dict(function.layer.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    inputs = function.point["input"], random_direction(function.point)["input"]

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
    step = random_direction(before)
    moved = torch.stack([((before[name] - weights[name]) * step[name]).sum() for name in step]).sum()
    expected = directional_derivative(
        lambda p: {"": critic(function.expected, p, False)}, before, step
    )[""]
    function.assert_close(moved, expected)


def check_maml(setting: Setting) -> None:
    """The gradient of the loss after two steps of learning, through these steps (Finn et al. 2017)."""
    function = LayerFunction(setting)
    weights = function.weights
    query = {"input": random_direction(function.point)["input"]}

    def adapted(run: Callable[[Point], Results], weights: Point, create_graph: bool) -> Tensor:
        for _ in range(2):
            value = loss(run(function.point | weights))
            slopes = torch.autograd.grad(value, list(weights.values()), create_graph=create_graph)
            weights = {name: weights[name] - 0.05 * t for name, t in zip(weights, slopes)}
            if not create_graph:
                weights = {name: t.detach().requires_grad_() for name, t in weights.items()}
        return loss(run(function.point | weights | query))

    def requiring_grad(weights: Point) -> Point:
        return {name: t.detach().clone().requires_grad_() for name, t in weights.items()}

    leaves, step = requiring_grad(weights), random_direction(weights)
    gradients = torch.autograd.grad(adapted(function, leaves, True), list(leaves.values()))
    actual = torch.stack([(t * step[name]).sum() for name, t in zip(step, gradients)]).sum()
    expected = directional_derivative(
        lambda p: {"": adapted(function.expected, requiring_grad(p), False)}, weights, step
    )[""]
    function.assert_close(actual, expected)


def check_eval_mode(setting: Setting) -> None:
    """Gradients of a layer in eval mode, on the CPU and on CUDA where there is one."""
    devices = {setting.device, *(["cuda"] if torch.cuda.is_available() else [])}
    for device in sorted(devices):
        function = LayerFunction(setting.with_changes(device=device), training=False)
        function.assert_close(function.train(), function.trained())


ROWS = [
    ReportRow("torch.func.grad, vjp, jacrev", check_reverse_mode, packed=True, dtypes=FLOATS),
    ReportRow(
        "torch.func.jvp, jacfwd, linearize", check_forward_mode, packed=True, dtypes=FLOATS, slow=True
    ),
    # Without dropout, because the vmap inside hessian takes no randomness.
    ReportRow(
        "torch.func.hessian",
        check_second_order(_hessian, training=False),
        packed=True,
        dtypes=FLOATS,
    ),
    ReportRow(
        "forward over reverse", check_second_order(_forward_over_reverse), packed=True, dtypes=FLOATS
    ),
    ReportRow(
        "reverse over forward", check_second_order(_reverse_over_forward), packed=True, dtypes=FLOATS
    ),
    ReportRow(
        "reverse over reverse", check_second_order(_reverse_over_reverse), packed=True, dtypes=FLOATS
    ),
    ReportRow("torch.autograd.forward_ad", check_dual_numbers, packed=True, dtypes=FLOATS),
    ReportRow(
        "torch.autograd.functional", check_autograd_functional, packed=True, dtypes=FLOATS, slow=True
    ),
    ReportRow("double backward (gradgradcheck)", check_double_backward, packed=True, slow=True),
    ReportRow("triple backward", check_triple_backward, packed=True, dtypes=FLOATS),
    ReportRow("WGAN-GP step", check_wgan_gp, packed=True, dtypes=FLOATS),
    ReportRow("MAML inner loop", check_maml, packed=True, dtypes=FLOATS),
    ReportRow("backward in eval mode", check_eval_mode, packed=True, dtypes=FLOATS),
]
