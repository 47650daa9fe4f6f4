"""The fused operator against its twin, the plain loop."""

from itertools import product
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from manual_lstm import ManualLSTM
from manual_lstm.check.parity import forward_and_backward, official_under_autocast, twins
from manual_lstm.engine import backward, forward, fused
from manual_lstm.engine.direction import Direction, Gradients
from manual_lstm.testing import Case, cases
from manual_lstm.testing.comparing import assert_close, run_case
from tests.helpers.loops import (
    DIFFERENTIABLE,
    Arguments,
    arguments,
    assert_the_operator_is_the_plain_loop,
    drawn_arguments,
    fused_direction,
    patched,
    plain_direction,
    plainly,
)


@given(
    direction_args=drawn_arguments(dtypes=(torch.float64, torch.complex128)),
    wanted=st.lists(st.booleans(), min_size=3, max_size=3).filter(any),
    most=st.sampled_from([1, 2, 3, 64]),
)
def test_the_operator_equals_the_plain_loop(
    direction_args: Arguments, wanted: list[bool], most: int
) -> None:
    with patched(forward, _BLOCK_STEPS=most), patched(backward, _BLOCK_STEPS=most):
        assert_the_operator_is_the_plain_loop(direction_args, wanted)


CONFIGURATIONS: list[dict[str, Any]] = [
    {"sizes": [2, 2, 2], "packed": False},
    {"sizes": [2, 2, 2], "packed": False, "P": 2, "reverse": True},
    {"sizes": [3, 2, 2, 1], "packed": True, "bias": False},
    {"sizes": [3, 2, 2, 1], "packed": True, "P": 2, "reverse": True},
    {"sizes": [1, 1, 1], "packed": False, "reverse": True},
]


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("most", [1, 64])
def test_gradcheck_and_gradgradcheck(
    configuration: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "_BLOCK_STEPS", most)
    monkeypatch.setattr(backward, "_BLOCK_STEPS", most)
    direction_args = arguments(**configuration, I=2, H=3)
    assert torch.autograd.gradcheck(fused_direction, direction_args, fast_mode=True)
    assert torch.autograd.gradgradcheck(fused_direction, direction_args, fast_mode=True)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(configuration: dict[str, Any], save: bool) -> None:
    direction_args = arguments(**configuration)
    if not save:
        direction_args = tuple(a.detach() if isinstance(a, Tensor) else a for a in direction_args)
    torch.library.opcheck(fused.direction, (*direction_args, save))
    if save:
        detached: list[Any] = [a.detach() if isinstance(a, Tensor) else a for a in direction_args]
        d = Direction(*detached)
        output, h_n, c_n, *kept = fused.direction(*d, True)
        needs = [tensor is not None for tensor in Gradients.of(d)]
        backward_args = (*d, *kept, output, h_n, c_n, needs)
        torch.library.opcheck(fused.direction_backward, (*backward_args, False))
        if d.lengths is None:
            torch.library.opcheck(fused.direction_backward, (*backward_args, True))


@pytest.mark.parametrize("sizes", [[], [2], [2, 2]], ids=str)
@pytest.mark.parametrize("result", range(3))
def test_second_order_where_a_result_depends_on_little(sizes: list[int], result: int) -> None:
    for wanted in DIFFERENTIABLE:
        direction_args: list[Any] = [
            t.detach() if isinstance(t, Tensor) else t for t in arguments(sizes, False, P=2)
        ]
        direction_args[wanted].requires_grad_()
        found = []
        for create_graph in (False, True):
            loss = fused_direction(*direction_args)[result].sum()
            (gradient,) = torch.autograd.grad(
                loss, direction_args[wanted], create_graph=create_graph, allow_unused=True
            )
            found.append(torch.zeros_like(direction_args[wanted]) if gradient is None else gradient)
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_strides_are_those_that_a_compiled_caller_is_told(packed: bool) -> None:
    *tensors, reverse = (
        t.detach() if isinstance(t, Tensor) else t for t in arguments([3, 3, 3], packed, P=2)
    )
    direction_args = [t.t().contiguous().t() if t is not None and t.dim() == 2 else t for t in tensors]
    for save in (False, True):
        results = fused.direction(*direction_args, reverse, save)
        assert all(part.is_contiguous() for part in results)
    output, h_n, c_n, *kept = results
    for grads in ((output, h_n.t().contiguous().t(), c_n.t().contiguous().t()), (output, None, None)):
        backward = fused.direction_backward(*direction_args, reverse, *kept, *grads, [True] * 7, False)
        assert all(part.is_contiguous() for part in backward)


def test_nothing_is_kept_that_nobody_needs() -> None:
    layer = ManualLSTM(3, 4, 2, bidirectional=True)
    x = torch.randn(6, 2, 3)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    saves: list[bool] = []
    original = forward.run_forward

    def spy(d: Any, save: bool) -> Any:
        saves.append(save)
        return original(d, save)

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, patched(fused, run_forward=spy):
        with torch.no_grad():
            layer(x)
        assert not kept
        layer.requires_grad_(False)(x)
        assert not kept
        assert not any(saves)
        layer.requires_grad_(True)(x)
    assert kept
    assert saves == [False] * 8 + [True] * 4


@pytest.mark.parametrize("frozen", range(7))
def test_no_gradient_is_computed_that_nobody_needs(
    frozen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    direction_args = arguments([3, 3, 2], packed=True, P=2)
    direction_args[DIFFERENTIABLE[frozen]].requires_grad_(False)
    seen: list[Any] = []
    original = backward.run_backward

    def spy(*args: Any) -> Any:
        seen.append((list(args[-2]), original(*args)))
        return seen[-1][1]

    monkeypatch.setattr(fused, "run_backward", spy)
    fused_direction(*direction_args)[0].sum().backward()  # type: ignore[no-untyped-call]
    ((needs, gradients),) = seen
    assert needs == [k != frozen for k in range(7)]
    if frozen not in (1, 2):  # the states' gradients are the loop's working memory
        assert gradients[frozen].numel() == 0
    for k in DIFFERENTIABLE:
        assert (direction_args[k].grad is None) == (k == DIFFERENTIABLE[frozen])


@pytest.mark.parametrize("reverse", [False, True])
def test_a_gradient_does_not_depend_on_which_others_are_wanted(reverse: bool) -> None:
    direction_args = arguments([3, 3, 2], packed=True, P=2, reverse=reverse)
    expected = torch.autograd.grad(
        plain_direction(*direction_args)[0].square().sum(), [direction_args[k] for k in DIFFERENTIABLE]
    )
    for wanted in product((False, True), repeat=7):
        for k, want in zip(DIFFERENTIABLE, wanted):
            direction_args[k].requires_grad_(want)
        output = fused_direction(*direction_args)[0]
        assert output.requires_grad == any(wanted)
        if any(wanted):
            inputs = [direction_args[k] for k in DIFFERENTIABLE if direction_args[k].requires_grad]
            actual = torch.autograd.grad(output.square().sum(), inputs)
            some = tuple(gradient for gradient, want in zip(expected, wanted) if want)
            torch.testing.assert_close(actual, some, rtol=0, atol=1e-12)


@pytest.mark.parametrize("create_graph", [False, True])
def test_one_tensor_for_both_states(create_graph: bool) -> None:
    d = Direction(*arguments([2, 2, 2], packed=False))
    d = d._replace(c_0=d.h_0)
    gradients = [
        torch.autograd.grad(function(*d)[0].square().sum(), d.h_0, create_graph=create_graph)
        for function in (fused_direction, plain_direction)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


def test_the_results_may_be_written_to_before_the_backward() -> None:
    for options in ({}, {"proj_size": 2}, {"bidirectional": True, "num_layers": 2}):
        reference, layer = twins(3, 4, dtype=torch.float64, **options)
        x = torch.randn(5, 2, 3, dtype=torch.float64)
        gradients = []
        for lstm, write in ((reference, False), (layer, True)):
            output, (h_n, c_n) = lstm(x)
            for part in (output, h_n, c_n):
                if write:
                    part.mul_(2)
            loss = (output.sum() + h_n.sum() + c_n.sum()) * (1 if write else 2)
            gradients.append(torch.autograd.grad(loss, list(lstm.parameters())))
        torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)


def test_backward_twice_and_after_the_weights_have_changed() -> None:
    layer = ManualLSTM(3, 4)
    loss = layer(torch.randn(5, 2, 3))[0].sum()
    first = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    with torch.no_grad():
        layer.all_weights[0][1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_batched_by_vmap(packed: bool) -> None:
    layer = ManualLSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    output, (h_n, _) = layer(pack_padded_sequence(x, [5, 3]) if packed else x)
    flat = torch.cat([(output.data if packed else output).flatten(), h_n.flatten()])
    rows = torch.eye(flat.numel(), dtype=torch.float64)
    batched = torch.autograd.grad(flat, x, rows, retain_graph=True, is_grads_batched=True)[0]
    for row, gradient in zip(rows, batched):
        expected = torch.autograd.grad(flat, x, row, retain_graph=True)[0]
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_a_sequence_of_20000_steps() -> None:
    layer = ManualLSTM(2, 3)
    x = torch.randn(20_000, 1, 2, requires_grad=True)
    output, _ = layer(x)
    output.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    reference = nn.LSTM(2, 3)
    reference.load_state_dict(layer.state_dict())
    torch.testing.assert_close(output, reference(x)[0], rtol=0, atol=1e-5)


def test_the_numbers_do_not_depend_on_the_threads() -> None:
    layer, x = ManualLSTM(40, 64), torch.randn(20, 16, 40)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(forward_and_backward(layer, x, None))
    finally:
        torch.set_num_threads(before)
    assert_close(found[0], found[1], 1e-5)


@pytest.mark.parametrize("inside", [False, True])
def test_backward_under_autocast(inside: bool) -> None:
    reference, layer = twins(3, 4, 2, bidirectional=True)
    x = torch.randn(5, 2, 3)
    gradients = []
    if inside:
        official_under_autocast(reference, torch.bfloat16)
    for lstm in (reference, layer):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            value = lstm(x)[0].float().sum()
        with torch.autocast("cpu", torch.bfloat16):
            gradients.append(torch.autograd.grad(value, list(lstm.parameters())))
    atol = 0.2 if inside else 1e-5
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=atol)


def test_second_order_under_autocast_is_as_exact_as_outside() -> None:
    layer, x = ManualLSTM(3, 4, 2, proj_size=2), torch.randn(5, 2, 3, requires_grad=True)
    loss = layer(x)[0].sum()
    expected = torch.autograd.grad(loss, x, create_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_flops_are_counted() -> None:
    layer, x = ManualLSTM(3, 4, proj_size=2), torch.randn(5, 2, 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    forward = 2 * 10 * (16 * 3 + 16 * 2 + 2 * 4)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        layer(x)[0].sum().backward()
    # x has no gradient; the recurrent and the projecting product have two in the backward.
    assert counter.get_total_flops() == 2 * forward + 2 * 10 * (16 * 2 + 2 * 4)


@given(case=cases(large=False, without={"dropout"}))
def test_the_layer_with_and_without_the_operator(case: Case) -> None:
    layer = case.layer(ManualLSTM)
    actual = run_case(layer, case)
    with plainly():
        expected = run_case(layer, case)
    assert_close(actual, expected, 1e-12)
