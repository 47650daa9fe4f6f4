"""Probes on results: parameters, values and gradients, dtypes, and the form of the output."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from manual_lstm.check.parity import data_of
from manual_lstm.testing.cases import FEATURES, KEYWORDS, Case
from manual_lstm.testing.probes.subject import Probe, Probes, Subject, assert_near

PROBES = Probes()
_MANY = ("num_layers", "bidirectional", "proj_size")


def _compares_with(*features: str, **draw_options: Any) -> Probe:
    """Make a probe that compares values and gradients on cases with these features."""
    return lambda subject: subject.draw(subject.assert_same, features, **draw_options)


@PROBES.add("parameters")
def _parameters(subject: Subject) -> None:
    """The parameters have nn.LSTM's names, shapes, dtypes and requires_grad."""

    def test(case: Case) -> None:
        ours, theirs = (
            {
                (n, tuple(p.shape), str(p.dtype), p.requires_grad)
                for n, p in case.layer(make).named_parameters()
            }
            for make in (subject.make, nn.LSTM)
        )
        assert ours == theirs, f"parameters {sorted(ours - theirs)} should be {sorted(theirs - ours)}"

    subject.draw(test)


# Values and gradients with each option and each form of input alone, then with all together.

PROBES.add("float64")(_compares_with())
for _name, _features in {
    "num_layers": ("hx",),
    "bias": (),
    "bidirectional": ("hx", "num_layers"),
    "batch_first": ("hx",),
    "proj_size": ("hx",),
    "hx": ("num_layers",),
}.items():
    PROBES.add(_name)(_compares_with(_name, *_features, always={_name}))

PROBES.add("unbatched")(_compares_with("unbatched", "hx", "batch_first", dense=False))
for _name in ("packed", "packed unsorted", "packed by hand"):
    PROBES.add(_name)(_compares_with("packed", _name, "hx", "bidirectional", dense=False))
PROBES.add("batch of 0")(_compares_with("batch of 0", "hx", "batch_first", "bidirectional"))
PROBES.add("strides")(_compares_with("strides", "hx", "unbatched", "packed"))


@PROBES.add("dropout")
def _dropout(subject: Subject) -> None:
    """The same seed gives nn.LSTM's dropout, and leaves the generator in the same state."""

    def test(case: Case) -> None:
        case = replace(case, training=True)
        subject.assert_same(case)
        after = []
        for layer in subject.pair(case):
            torch.manual_seed(case.seed)
            layer(case.input(), case.hx())
            after.append(float(torch.rand(())))
        assert after[0] == after[1], f"dropout should draw as many numbers as nn.LSTM's\n  {case}"

    features = {"dropout", "num_layers", "bidirectional", "packed", "batch_first"}
    subject.draw(test, features, always={"dropout", "num_layers"})


@PROBES.add("dropout in eval")
def _dropout_in_eval(subject: Subject) -> None:
    case = subject.case(training=False)
    case.options["dropout"] = 0.5
    subject.assert_same(case)


@PROBES.add("one step")
def _one_step(subject: Subject) -> None:
    subject.draw(lambda case: subject.assert_same(replace(case, lengths=[1] * len(case.lengths))))


@PROBES.add("all together")
def _all_together(subject: Subject) -> None:
    subject.draw(subject.assert_same, large=True)


def _compares_in(dtype: torch.dtype) -> Probe:
    # Near the poles of the complex functions no two ways to compute agree. So complex cases are simple.
    features = ("bias", "batch_first", "hx") if dtype.is_complex else FEATURES
    return lambda subject: subject.draw(subject.assert_same, features, dtype)


for _dtype in (torch.float32, torch.bfloat16, torch.float16, torch.complex128):
    PROBES.add(str(_dtype).removeprefix("torch."))(_compares_in(_dtype))


@PROBES.add("no steps")
def _no_steps(subject: Subject) -> None:
    """Input without steps gives an empty output, and returns the initial states."""
    case = subject.case()
    layer = case.layer(subject.make)
    hx = None if "hx" in subject.without else replace(case, with_hx=True).hx()
    output, states = layer(case.input()[:0], hx)
    assert output.size(0) == 0, f"the output should be empty, but has shape {list(output.shape)}"
    initial = hx or [torch.zeros_like(state) for state in states]
    for name, final, start in zip(("h_n", "c_n"), states, initial):
        assert torch.equal(final, start), f"{name} should be the initial state"


# What nn.LSTM has no arguments for.

PROBES.add("lengths")(
    _compares_with("hx", "batch_first", *_MANY, "dropout", dense=False, beyond={"lengths"})
)
PROBES.add("resets")(
    _compares_with(
        "hx", "batch_first", *_MANY, "unbatched", "packed unsorted", "packed", beyond=KEYWORDS
    )
)


# The output, apart from its values.


@PROBES.add("form of the output")
def _form_of_the_output(subject: Subject) -> None:
    """Strides and requires_grad are nn.LSTM's. Other rows compare types, shapes and dtypes."""

    def test(case: Case) -> None:
        reference, layer = subject.pair(case)
        results = [module(case.input(), case.hx()) for module in (layer, reference)]
        ours, theirs = ([data_of(output), *states] for output, states in results)
        for name, got, should in zip(("output", "h_n", "c_n"), ours, theirs):
            # The stride of a dimension of one element has no meaning.
            strides = [(a, b) for n, a, b in zip(should.shape, got.stride(), should.stride()) if n > 1]
            assert should.numel() == 0 or all(a == b for a, b in strides), (
                f"{name} should have strides {should.stride()}, but has {got.stride()}\n  {case}"
            )
            assert got.requires_grad == should.requires_grad, f"{name}.requires_grad differs\n  {case}"

    subject.draw(test)


@PROBES.add("input left alone")
def _input_left_alone(subject: Subject) -> None:
    """The layer does not write to the input or the states, with gradients or without."""

    def test(case: Case) -> None:
        layer, input, hx = case.layer(subject.make), case.input(), case.hx()
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                output, states = layer(input, hx)
                if not gradients:
                    # The results must not share memory with the input or the states either.
                    data_of(output).zero_()
                    for state in states:
                        state.zero_()
        assert torch.equal(data_of(input), data_of(case.input())), f"the input was changed\n  {case}"
        for ours, before in zip(hx or (), case.hx() or ()):
            assert torch.equal(ours, before), f"hx was changed\n  {case}"

    subject.draw(test)


@PROBES.add("no_grad, inference_mode")
def _without_gradients(subject: Subject) -> None:
    case = subject.case()
    reference, layer = subject.pair(case)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output, expected = layer(case.input())[0], reference(case.input())[0]
        assert not output.requires_grad, "the output should not require a gradient"
        assert output.is_inference() == expected.is_inference(), "output.is_inference() differs"
        assert_near("output", output, expected)


# Gradients that assert_same_layer does not compare.


@PROBES.add("gradients, one by one")
def _gradients_one_by_one(subject: Subject) -> None:
    """Each result alone gives gradients; frozen parameters get none; two backwards add up."""

    def test(case: Case) -> None:
        gradients_of_both = []
        for module in subject.pair(case):
            gradients: dict[str, Tensor] = {}
            parameters = sorted(module.named_parameters())
            for k, (_, parameter) in enumerate(parameters):
                parameter.requires_grad_(k % 3 != case.seed % 3)
            for part, of in enumerate(("output", "h_n", "c_n")):
                module.zero_grad(set_to_none=True)
                output, states = module(case.input(), case.hx())
                result = (data_of(output), *states)[part]
                if result.requires_grad:
                    loss = result.square().sum()
                    loss.backward(retain_graph=True)
                    loss.backward()
                for name, p in parameters:
                    gradients[f"grad of {name} from {of}"] = (
                        torch.zeros_like(p) if p.grad is None else p.grad
                    )
            gradients_of_both.append(gradients)
        expected, actual = gradients_of_both
        for name, theirs in expected.items():
            assert_near(name, actual[name], theirs)

    subject.draw(test)


@PROBES.add("double backward")
def _double_backward(subject: Subject) -> None:
    second_derivatives = []
    case = subject.case()
    for module in subject.pair(case):
        x = data_of(case.input()).requires_grad_()
        output, (_, c_n) = module(x)
        (gradient,) = torch.autograd.grad((output.square().sum() + c_n.sum()), x, create_graph=True)
        second_derivatives.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    theirs, ours = second_derivatives
    assert_near("the second derivative", ours, theirs)
