"""unroll calls the layer: hooks, norms, replaced forwards; and its request goes to nobody else."""

import functools
import importlib.util
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, prune
from torch.utils._pytree import tree_leaves, tree_map

from manual_lstm import ManualLSTM, Unrolled
from manual_lstm.engine import context
from manual_lstm.unrolled import result
from tests.helpers.layers import fields, make_layer, randn

exactly = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-14)
NAME = "weight_hh_l0"


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize(
    "prepare",
    [
        lambda layer: torch.nn.utils.weight_norm(layer, NAME),
        lambda layer: torch.nn.utils.spectral_norm(layer, NAME, n_power_iterations=100),
        lambda layer: prune.l1_unstructured(layer, NAME, 0.5),  # type: ignore[no-untyped-call]
        lambda layer: parametrizations.weight_norm(layer, NAME),
        lambda layer: torch.nn.utils.parametrize.register_parametrization(layer, NAME, Halved()),
    ],
    ids=["weight_norm", "spectral_norm", "pruning", "new weight_norm", "parametrization"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_are_computed_anew_after_an_optimizer_step(prepare: Callable[[nn.Module], Any]) -> None:
    layer, x = make_layer(), randn(5, 2, 3)
    prepare(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(x)[0].square().sum().backward()
    before = layer.unroll(x).output
    optimizer.step()
    unrolled = layer.unroll(x)
    exactly((unrolled.output, unrolled.states), layer(x))
    exactly(unrolled.h[0], unrolled.output)
    assert not torch.allclose(unrolled.output, before)


def test_hooks_change_input_and_output() -> None:
    layer, x, hx = make_layer(), randn(5, 2, 3), (randn(1, 2, 4), randn(1, 2, 4))
    expected = layer.unroll(2 * x, hx)
    answers: list[Any] = []
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
    layer.register_forward_hook(lambda module, args, answer: answers.append(answer))
    layer.register_forward_hook(lambda module, args, answer: (answer[0] + 1, answer[1]))
    unrolled = layer.unroll(x, hx)
    exactly(unrolled.output, expected.output + 1)
    exactly(unrolled.states, expected.states)
    exactly(fields(unrolled)[3:], fields(expected)[3:])  # as the loop has computed them
    (answer,) = answers
    assert isinstance(answer, tuple)
    assert not isinstance(answer, Unrolled)
    assert len(answer) == 2
    exactly(answer, (expected.output, expected.states))


def test_the_arguments_reach_hooks_as_they_were_given() -> None:
    layer, x, hx = make_layer(), randn(5, 2, 3), (randn(1, 2, 4), randn(1, 2, 4))
    seen: list[Any] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        seen.append((len(args), sorted(kwargs)))
        return tuple(args), dict(kwargs)  # fresh ones

    layer.register_forward_pre_hook(hook, with_kwargs=True)
    calls: list[Any] = [((x,), {}), ((x, hx), {}), ((x,), {"hx": hx}), ((), {"input": x, "hx": hx})]
    for args, kwargs in calls:
        unrolled = layer.unroll(*args, **kwargs)
        exactly((unrolled.output, unrolled.states), layer(*args, **kwargs))
    assert seen[::2] == seen[1::2] == [(1, []), (2, []), (1, ["hx"]), (0, ["hx", "input"])]


def test_a_hook_that_maps_over_the_answer_leaves_the_gates() -> None:
    layer, x = make_layer(), randn(5, 2, 3)
    expected = layer.unroll(x)
    layer.register_forward_hook(lambda module, args, answer: tree_map(lambda t: 2 * t, answer))
    unrolled = layer.unroll(x)
    exactly((unrolled.output, unrolled.states), tree_map(lambda t: 2 * t, expected[:2]))
    exactly(fields(unrolled)[3:], fields(expected)[3:])


@pytest.mark.parametrize("everywhere", [False, True])
def test_backward_hooks(everywhere: bool) -> None:
    layer, x, norms = make_layer(), randn(5, 2, 3).requires_grad_(), []

    def note(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        norms.append(float(grad_output[0].norm()))

    if everywhere:
        handle = nn.modules.module.register_module_full_backward_hook(note)
    else:
        handle = layer.register_full_backward_hook(note)
    try:
        layer.unroll(x).output.sum().backward()
    finally:
        handle.remove()
    assert norms == pytest.approx([40**0.5])


class Doubled(ManualLSTM):
    def forward(self, input: Any, hx: Any = None, times: int = 2, **options: Any) -> Any:
        output, states = super().forward(input, hx, **options)
        return times * output, states


def test_a_forward_of_a_subclass() -> None:
    layer, x = Doubled(3, 4, dtype=torch.float64), randn(5, 2, 3)
    for options in ({}, {"times": 3}):
        unrolled = layer.unroll(x, **options)
        exactly((unrolled.output, unrolled.states), layer(x, **options))
        exactly(options.get("times", 2) * unrolled.h[0], unrolled.output)


def test_a_forward_replaced_on_the_object() -> None:
    """As accelerate does it: the weights are there only while the forward runs."""
    layer, x = make_layer(), randn(5, 2, 3)
    expected = layer.unroll(x)
    old_forward, weights = layer.forward, {k: v.detach() for k, v in layer.named_parameters()}
    layer.to("meta")

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, weight in weights.items():
            setattr(module, name, nn.Parameter(weight))
        answer = old_forward(*args, **kwargs)
        module.to("meta")
        kind: Any = type(answer)
        return kind(part for part in answer)

    layer.forward = functools.partial(forward, layer)  # type: ignore[method-assign]
    exactly(fields(layer.unroll(x)), fields(expected))


def _calls_in_hooks(
    layer: ManualLSTM, other: ManualLSTM, when: str, how: str, answers: list[Any]
) -> None:
    """Register a hook that calls another layer, or this one again."""
    inside: list[bool] = []

    def hook(module: Any, args: Any, *_: Any) -> None:
        if inside:
            return
        inside.append(True)
        called = {"other": other, "again": module, "forward": module.forward}[how]
        answers.append(called(args[0] * 0))
        inside.clear()

    if when == "before":
        layer.register_forward_pre_hook(hook)
    else:
        layer.register_forward_hook(hook)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("how", ["other", "again", "forward"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_calls_in_hooks_keep_nothing(when: str, how: str, replaced: bool) -> None:
    layer, other, x = make_layer(), make_layer(), randn(5, 2, 3)
    answers: list[Any] = []
    expected = layer.unroll(x)
    other.register_forward_pre_hook(lambda module, args: None)
    _calls_in_hooks(layer, other, when, how, answers)
    if replaced:
        layer.register_forward_hook(lambda module, args, answer: (answer[0] + 1, answer[1]))
    unrolled = layer.unroll(x)
    exactly(fields(unrolled)[1:], fields(expected)[1:])
    exactly(unrolled.output, expected.output + replaced)
    assert [type(answer) for answer in answers] == [tuple]
    assert len(layer._forward_pre_hooks) == (when == "before")  # as before


def test_hooks_on_all_modules() -> None:
    layer, x = make_layer(), randn(5, 2, 3)
    expected = layer.unroll(2 * x)
    double: Any = lambda module, args: (2 * args[0],)  # noqa: E731
    add_one: Any = lambda module, args, answer: (answer[0] + 1, answer[1])  # noqa: E731
    before, after = register_module_forward_pre_hook(double), register_module_forward_hook(add_one)
    try:
        unrolled = layer.unroll(x)
    finally:
        before.remove()
        after.remove()
    exactly(unrolled.output, expected.output + 1)
    exactly(unrolled.c, expected.c)


def test_unroll_in_a_hook_of_an_unroll() -> None:
    layer, x = make_layer(), randn(5, 2, 3)
    inner: list[Any] = []
    expected = layer.unroll(x)

    def hook(module: Any, args: Any) -> None:
        if not inner:
            inner.append(None)
            inner[0] = module.unroll(args[0] * 0)

    layer.register_forward_pre_hook(hook)
    exactly(fields(layer.unroll(x)), fields(expected))
    exactly(fields(inner[0]), fields(layer.unroll(0 * x)))


def test_an_error_ends_the_request() -> None:
    layer, x = make_layer(), randn(5, 2, 3)
    handle = layer.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer.unroll(x)
    handle.remove()
    assert not layer._forward_pre_hooks
    assert type(layer(x)) is tuple
    with pytest.raises(RuntimeError, match=r"input.size"):
        layer.unroll(randn(5, 2, 7))
    assert type(layer(x)) is tuple


def test_threads_have_requests_of_their_own() -> None:
    layer, x = make_layer(), randn(5, 2, 3)
    layer.register_forward_pre_hook(lambda module, args: None)
    expected, found = layer.unroll(x), []

    def work() -> None:
        for _ in range(30):
            found.append(type(layer(x)) is tuple and torch.equal(layer.unroll(x).c[0], expected.c[0]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 120


class Own(ManualLSTM):
    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        return input, hx


class Inside(ManualLSTM):
    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        return self.unroll(input, hx)[:2]


def test_what_unroll_cannot_see_it_says() -> None:
    x = torch.randn(5, 2, 3)
    with pytest.raises(RuntimeError, match=r"forward of this Own did not call it.*super\(\)\.forward"):
        Own(3, 4).unroll(x)
    with pytest.raises(RuntimeError, match=r"forward of a Inside should not call its own unroll"):
        Inside(3, 4)(x)
    layer = ManualLSTM(3, 4)
    layer.register_forward_hook(lambda module, args, answer: answer[0])
    with pytest.raises(TypeError, match=r"should get \(output, \(h_n, c_n\)\) .* got Tensor"):
        layer.unroll(x)


@pytest.mark.parametrize("fullgraph", [pytest.param(False, marks=pytest.mark.slow), True])
def test_hooks_in_a_compiled_function(fullgraph: bool) -> None:
    torch.compiler.reset()
    layer, x = make_layer(), randn(5, 2, 3)
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    layer.register_forward_hook(lambda module, args, answer: (answer[0] + 1, answer[1]))
    expected = layer.unroll(x)
    actual = torch.compile(layer.unroll, backend="eager", fullgraph=fullgraph)(x)
    exactly(fields(actual), fields(expected))
    layer.compile(backend="eager", fullgraph=fullgraph)
    exactly(fields(layer.unroll(x)), fields(expected))
    assert type(layer(x)) is tuple


def test_without_torchs_registry_of_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only transforms need it."""
    monkeypatch.setattr(context, "register_pytree_node", None)
    spec = importlib.util.spec_from_file_location("a_copy", result.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    original = make_layer().unroll(randn(5, 2, 3))
    unrolled = module.Unrolled(*original, layout=original._layout)
    exactly(unrolled.after(2), original.after(2))
    assert len(tree_leaves(unrolled)) == 1
    assert len(tree_leaves(original)) > 1
