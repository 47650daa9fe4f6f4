"""Probes on exceptions, and on what every Module can do: copies, hooks, functional_call, autocast."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from manual_lstm.check.parity import autocast_fails, data_of, official_under_autocast
from manual_lstm.testing import mistakes
from manual_lstm.testing.probes.subject import Probe, Probes, Subject, assert_near

PROBES = Probes()


# Exceptions.

ErrorPair = tuple[type[Exception] | None, type[Exception] | None]  # of nn.LSTM, of the layer


def _error_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> type[Exception] | None:
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error)
    return None


def _assert_same_errors(errors: dict[str, ErrorPair]) -> None:
    """Assert that for every mistake for which nn.LSTM raises, the layer raises the same."""
    wrong = [
        f"{mistake}: {ours.__name__ if ours else 'nothing'} instead of {theirs.__name__}"
        for mistake, (theirs, ours) in errors.items()
        if theirs is not None and ours is not theirs
    ]
    message = f"{len(wrong)} of {len(errors)} mistakes raise other errors: "
    assert not wrong, message + "\n  ".join(wrong)


@PROBES.add("errors of arguments")
def _errors_of_arguments(subject: Subject) -> None:
    _assert_same_errors({
        f"{args} {kwargs}": (
            _error_of(nn.LSTM, *args, **kwargs),
            _error_of(subject.factory, *args, **kwargs),
        )
        for args, kwargs in mistakes.ARGUMENTS
        if not mistakes.unchecked_by_older_torch(args, kwargs) and not set(kwargs) & subject.without
    })  # fmt: skip


def _compares_errors(of_states: bool) -> Probe:
    """Make a probe that compares the exceptions of wrong calls: of the states, or of the input."""

    def run(subject: Subject) -> None:
        errors = {}
        for name, call in mistakes.CALLS.items():
            about_states = any(word in name for word in ("hx", "h_0", "c_0"))
            form = name.split(",")[0] if "," in name else "dense"
            if about_states == of_states and form not in subject.without:
                errors[name] = _error_of(call, nn.LSTM(3, 4)), _error_of(call, subject.make(3, 4))
        _assert_same_errors(errors)

    return run


PROBES.add("errors of input")(_compares_errors(of_states=False))
PROBES.add("errors of hx")(_compares_errors(of_states=True))


# What every Module can do.


def _compares_copy(make_copy: Callable[[nn.Module], nn.Module]) -> Probe:
    """Make a probe: a copy gives the same results, and changing the copy does not change the layer."""

    def run(subject: Subject) -> None:
        case = subject.case()
        layer = case.layer(subject.make)
        expected = layer(case.input())[0]
        copied = make_copy(layer)
        assert_near("output", copied(case.input())[0], expected)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert_near("output", layer(case.input())[0], expected)
        assert not copied(case.input())[0].any(), "the copy should have weights of its own"

    return run


PROBES.add("deepcopy")(_compares_copy(copy.deepcopy))
PROBES.add("pickle")(_compares_copy(lambda layer: pickle.loads(pickle.dumps(layer))))


@PROBES.add("to another dtype")
def _to_another_dtype(subject: Subject) -> None:
    case = subject.case(dtype=torch.float32)
    reference, layer = subject.pair(case)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        x = case.input().to(dtype)
        assert_near("output", layer.to(dtype)(x)[0], reference.to(dtype)(x)[0])


@PROBES.add("hooks")
def _hooks(subject: Subject) -> None:
    case, calls = subject.case(), list[str]()
    layer = case.layer(subject.make)
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer(data_of(case.input()).requires_grad_())[0].sum().backward()
    assert calls == ["before", "after", "backward"], f"the hooks that ran: {calls}"


@PROBES.add("functional_call")
def _functional_call(subject: Subject) -> None:
    case = subject.case()
    reference, layer = case.layer(nn.LSTM), replace(case, seed=1).layer(subject.make)
    weights: dict[str, Tensor] = dict(reference.named_parameters())
    output = torch.func.functional_call(layer, weights, (case.input(),))[0]
    assert_near("output", output, reference(case.input())[0])


class _Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@PROBES.add("parametrized weights")
def _parametrized(subject: Subject) -> None:
    case = subject.case()
    reference, layer = subject.pair(case)
    for name in [name for name, _ in reference.named_parameters()]:
        parametrize.register_parametrization(layer, name, _Half())
        with torch.no_grad():
            getattr(reference, name).div_(2)
        output = layer(case.input())[0]
        assert_near("output", output, reference(case.input())[0])
        original = layer.parametrizations[name].original  # type: ignore[index, union-attr]
        (gradient,) = torch.autograd.grad(output.sum(), original)
        (expected,) = torch.autograd.grad(reference(case.input())[0].sum(), getattr(reference, name))
        assert_near(f"grad of {name}", gradient, expected / 2)


@PROBES.add("autocast to bfloat16")
def _autocast(subject: Subject) -> None:
    """The results have nn.LSTM's dtypes, and its values within the precision of bfloat16."""
    case = replace(subject.case(dtype=torch.float32), with_hx="hx" not in subject.without)
    reference, layer = subject.pair(case)
    reference = official_under_autocast(reference, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            output, states = layer(case.input(), case.hx())
        except RuntimeError:
            if autocast_fails(torch.bfloat16):
                return  # as nn.LSTM does on this CPU
            raise
        output.float().sum().backward()
        expected, their_states = reference(case.input(), case.hx())
    for name, ours, theirs in zip(
        ("output", "h_n", "c_n"), (output, *states), (expected, *their_states)
    ):
        assert ours.dtype == theirs.dtype, f"{name} should be {theirs.dtype}, but is {ours.dtype}"
        assert_near(name, ours, theirs, torch.bfloat16)
