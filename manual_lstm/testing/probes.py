"""What nn.LSTM does for its callers, each as one function that raises where a layer does not."""

import copy
import pickle
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn
from torch.nn.utils import parametrize

from manual_lstm.check.parity import largest_difference
from manual_lstm.testing import mistakes
from manual_lstm.testing.cases import (
    DEVICES,
    FEATURES,
    OPTIONS,
    Case,
    Factory,
    Load,
    cases,
    load_state_dict,
)
from manual_lstm.testing.comparing import assert_same_layer, data_of


@dataclass(frozen=True)
class Subject:
    """The class under test, and what it is declared not to do as nn.LSTM."""

    factory: Factory
    load: Load = load_state_dict
    without: frozenset[str] = frozenset()
    max_examples: int = 30

    @property
    def dtype(self) -> torch.dtype:
        """What is compared in unless the row is about a dtype."""
        return torch.float32 if "float64" in self.without else torch.float64

    def make(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Call the factory; ``dtype`` and ``device``, where it lacks them, are seen to later."""
        missing = {name: kwargs.pop(name, None) for name in ("dtype", "device") if name in self.without}
        return self.factory(*args, **kwargs).to(**missing)

    def pair(self, case: Case) -> tuple[nn.LSTM, nn.Module]:
        return case.pair(self.make, self.load)

    def draw(
        self,
        test: Callable[[Case], None],
        features: Collection[str] = FEATURES,
        dtype: torch.dtype | None = None,
        large: bool = False,
        dense: bool = True,
        always: Collection[str] = (),
    ) -> None:
        """Run ``test`` on drawn cases with no other features than these."""
        without = {name for name in FEATURES if name not in features or name in self.without}
        if not dense:
            without.add("dense")
        # No two devices are alike in low precision, nor in what they offer of it.
        devices = ["cpu"] if dtype else DEVICES
        drawn = cases([dtype or self.dtype], devices, without, always, large)
        # Always the same cases. Not shrunk, which takes long: they are small.
        settings(
            max_examples=self.max_examples * (4 if large else 1),
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )(given(case=drawn)(test))()

    def but(self, *names: str) -> "Subject":
        """The same, without these features either."""
        return replace(self, without=self.without | set(names))

    def same(self, case: Case) -> None:
        """Assert that the layer is nn.LSTM's twin on this case."""
        reference, layer = self.pair(case)
        assert_same_layer(layer, reference, case, parameters="parameters" not in self.without)

    def case(self, **changes: Any) -> Case:
        """One case with all options that the class has, but for dropout."""
        wanted = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
        options = {
            "input_size": 3,
            "hidden_size": 4,
            **OPTIONS,
            **{name: value for name, value in wanted.items() if name not in self.without},
        }
        return replace(Case(options, "dense", [4] * 3, dtype=self.dtype), **changes)


Probe = Callable[[Subject], None]
PROBES: dict[str, Probe] = {}
# Where nn.LSTM fails itself: a class may fail there too.
BEYOND = {"no steps"}
# What goes with a row: nothing of it is left for a class that lacks the row.
IMPLIED: dict[str, tuple[str, ...]] = {
    "packed": ("packed unsorted", "packed by hand"),
    "num_layers": ("dropout", "dropout in eval"),
    "dropout": ("dropout in eval",),
    "parameters": (
        "order of parameters",
        "initial values",
        "state_dict",
        "load from meta",
        "gradients, one by one",
        "functional_call",
        "parametrized weights",
    ),
}


def probe(name: str) -> Callable[[Probe], Probe]:
    """Register the row of this name."""

    def register(function: Probe) -> Probe:
        PROBES[name] = function
        return function

    return register


def _same_with(*features: str, **how: Any) -> Probe:
    return lambda subject: subject.draw(subject.same, features, **how)


@probe("parameters")
def _parameters(subject: Subject) -> None:
    """Names, shapes, dtypes, requires_grad."""

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


# The options and the forms of input, by values and gradients: each alone, then all together.

probe("float64")(_same_with())
for _name, _features in {
    "num_layers": ("hx",),
    "bias": (),
    "bidirectional": ("hx", "num_layers"),
    "batch_first": ("hx",),
    "proj_size": ("hx",),
    "hx": ("num_layers",),
}.items():
    probe(_name)(_same_with(_name, *_features, always={_name}))

probe("unbatched")(_same_with("unbatched", "hx", "batch_first", dense=False))
for _name in ("packed", "packed unsorted", "packed by hand"):
    probe(_name)(_same_with("packed", _name, "hx", "bidirectional", dense=False))
probe("batch of 0")(_same_with("batch of 0", "hx", "batch_first", "bidirectional"))
probe("strides")(_same_with("strides", "hx", "unbatched", "packed"))


@probe("dropout")
def _dropout(subject: Subject) -> None:
    """The same numbers after the same seed, and as many drawn."""

    def test(case: Case) -> None:
        case = replace(case, training=True)
        subject.same(case)
        after = []
        for layer in subject.pair(case):
            torch.manual_seed(case.seed)
            layer(case.input(), case.hx())
            after.append(float(torch.rand(())))
        assert after[0] == after[1], f"dropout should draw as many numbers as nn.LSTM's\n  {case}"

    features = {"dropout", "num_layers", "bidirectional", "packed", "batch_first"}
    subject.draw(test, features, always={"dropout", "num_layers"})


@probe("dropout in eval")
def _dropout_in_eval(subject: Subject) -> None:
    case = subject.case(training=False)
    case.options["dropout"] = 0.5
    subject.same(case)


@probe("one step")
def _one_step(subject: Subject) -> None:
    subject.draw(lambda case: subject.same(replace(case, lengths=[1] * len(case.lengths))))


@probe("all together")
def _all_together(subject: Subject) -> None:
    subject.draw(subject.same, large=True)


def _in(dtype: torch.dtype) -> Probe:
    # The complex functions have poles: there, no two ways to compute agree.
    features = ("bias", "batch_first", "hx") if dtype.is_complex else FEATURES
    return lambda subject: subject.draw(subject.same, features, dtype)


for _dtype in (torch.float32, torch.bfloat16, torch.float16, torch.complex128):
    probe(str(_dtype).removeprefix("torch."))(_in(_dtype))


@probe("no steps")
def _no_steps(subject: Subject) -> None:
    """The output is empty, and the states come back as they went in."""
    case = subject.case()
    layer = case.layer(subject.make)
    hx = None if "hx" in subject.without else replace(case, with_hx=True).hx()
    output, states = layer(case.input()[:0], hx)
    assert output.size(0) == 0, f"the output should be empty, but has shape {list(output.shape)}"
    for name, ours, given_ in zip(("h_n", "c_n"), states, hx or [torch.zeros_like(s) for s in states]):
        assert torch.equal(ours, given_), f"{name} should be the initial state"


# What comes out, apart from the numbers.


@probe("form of the output")
def _form_of_the_output(subject: Subject) -> None:
    """Strides, contiguity and requires_grad; types, shapes and dtypes are compared everywhere."""

    def test(case: Case) -> None:
        reference, layer = subject.pair(case)
        answers = [module(case.input(), case.hx()) for module in (layer, reference)]
        ours, theirs = ([data_of(output), *states] for output, states in answers)
        for name, got, wanted in zip(("output", "h_n", "c_n"), ours, theirs):
            steps = [(a, b) for n, a, b in zip(wanted.shape, got.stride(), wanted.stride()) if n > 1]
            assert wanted.numel() == 0 or all(a == b for a, b in steps), (
                f"{name} should have strides {wanted.stride()}, but has {got.stride()}\n  {case}"
            )
            assert got.requires_grad == wanted.requires_grad, f"{name}.requires_grad differs\n  {case}"

    subject.draw(test)


@probe("input left alone")
def _input_left_alone(subject: Subject) -> None:
    """Neither the input nor the states are written to, with gradients or without."""

    def test(case: Case) -> None:
        layer, input, hx = case.layer(subject.make), case.input(), case.hx()
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                output, states = layer(input, hx)
                if not gradients:
                    data_of(output).zero_()  # nor do the results lie in their memory
                    for state in states:
                        state.zero_()
        assert torch.equal(data_of(input), data_of(case.input())), f"the input was changed\n  {case}"
        for ours, before in zip(hx or (), case.hx() or ()):
            assert torch.equal(ours, before), f"hx was changed\n  {case}"

    subject.draw(test)


@probe("no_grad, inference_mode")
def _without_gradients(subject: Subject) -> None:
    case = subject.case()
    reference, layer = subject.pair(case)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output, expected = layer(case.input())[0], reference(case.input())[0]
        assert not output.requires_grad, "the output should not require a gradient"
        assert output.is_inference() == expected.is_inference(), "output.is_inference() differs"
        _assert_near("output", output, expected)


# Gradients, beyond those that assert_same_layer compares.


@probe("gradients, one by one")
def _gradients_one_by_one(subject: Subject) -> None:
    """Of one result alone, with every third parameter frozen, and adding up from call to call."""

    def test(case: Case) -> None:
        found = []
        for module in subject.pair(case):
            kept: dict[str, Tensor] = {}
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
                    kept[f"grad of {name} from {of}"] = (
                        torch.zeros_like(p) if p.grad is None else p.grad
                    )
            found.append(kept)
        for name, theirs in found[0].items():
            _assert_near(name, found[1][name], theirs)

    subject.draw(test)


@probe("double backward")
def _double_backward(subject: Subject) -> None:
    found = []
    case = subject.case()
    for module in subject.pair(case):
        x = data_of(case.input()).requires_grad_()
        output, (_, c_n) = module(x)
        (gradient,) = torch.autograd.grad((output.square().sum() + c_n.sum()), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    _assert_near("the second derivative", found[1], found[0])


# Parameters and checkpoints.


@probe("arguments")
def _arguments(subject: Subject) -> None:
    """nn.LSTM's by name, and by position as far as there are all; each is an attribute too."""
    values: dict[str, Any] = {
        "input_size": 3,
        "hidden_size": 4,
        "num_layers": 2,
        "bias": False,
        "batch_first": True,
    }
    values |= {"dropout": 0.5, "bidirectional": True, "proj_size": 2}
    by_name = {name: value for name, value in values.items() if name not in subject.without}
    by_position = dict(takewhile(lambda item: item[0] not in subject.without, values.items()))
    for how, expected, layer in (
        ("name", by_name, subject.make(**by_name)),
        ("position", by_position, subject.make(*by_position.values())),
    ):
        for name, value in expected.items():
            found = getattr(layer, name, None)
            assert found == value, f"layer.{name}, given by {how}, should be {value}, but is {found}"


@probe("dtype")
def _dtype_argument(subject: Subject) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        parameters = subject.factory(3, 4, dtype=dtype).parameters()
        assert {p.dtype for p in parameters} == {dtype}, f"dtype={dtype} should be the parameters'"


@probe("device")
def _device_argument(subject: Subject) -> None:
    parameters = subject.factory(3, 4, device="meta").parameters()
    assert {p.device.type for p in parameters} == {"meta"}, "device should be the parameters'"


@probe("call by name")
def _call_by_name(subject: Subject) -> None:
    case = subject.case()
    layer, x = case.layer(subject.make), case.input()
    hx = {} if "hx" in subject.without else {"hx": replace(case, with_hx=True).hx()}
    _assert_near("output", layer(input=x, **hx)[0], layer(x, *hx.values())[0])


@probe("order of parameters")
def _order_of_parameters(subject: Subject) -> None:
    """An optimizer's checkpoint knows them by it."""

    def test(case: Case) -> None:
        ours, theirs = (
            [name for name, _ in case.layer(make).named_parameters()]
            for make in (subject.make, nn.LSTM)
        )
        assert ours == theirs, f"the order should be {theirs}, but is {ours}"

    subject.draw(test)


@probe("initial values")
def _initial_values(subject: Subject) -> None:
    """The same numbers from the same seed, when made and when reset."""
    # Without the argument, what is drawn is float32, whatever it becomes.
    dtype = torch.float32 if "dtype" in subject.without else None

    def test(case: Case) -> None:
        modules = case.layer(nn.LSTM), case.layer(subject.make)
        for made in (True, False):
            for module in modules:
                if not made:
                    torch.manual_seed(case.seed)
                    module.reset_parameters()  # type: ignore[operator]
            for theirs, ours in zip(*(module.parameters() for module in modules), strict=True):
                assert torch.equal(theirs, ours), f"values drawn from seed {case.seed} differ\n  {case}"

    subject.draw(test, dtype=dtype)


@probe("state_dict")
def _state_dict(subject: Subject) -> None:
    """Loads both ways, strictly."""

    def test(case: Case) -> None:
        reference, layer = case.layer(nn.LSTM), case.layer(subject.make)
        layer.load_state_dict(reference.state_dict())
        back = case.layer(nn.LSTM)
        back.load_state_dict(layer.state_dict())
        for theirs, ours in zip(reference.parameters(), back.parameters()):
            assert torch.equal(ours, theirs), "a weight came back changed"

    subject.draw(test)


@probe("load from meta")
def _load_from_meta(subject: Subject) -> None:
    """load_state_dict(assign=True) into a layer that was made without memory."""
    case = subject.case()
    reference = case.layer(nn.LSTM)
    layer = case.layer(lambda *args, **kwargs: subject.make(*args, **{**kwargs, "device": "meta"}))
    layer.load_state_dict(reference.state_dict(), assign=True)
    _assert_near("output", layer(case.input())[0], reference(case.input())[0])


@probe("repr")
def _repr(subject: Subject) -> None:
    def test(case: Case) -> None:
        reference, layer = case.layer(nn.LSTM), case.layer(subject.make)
        wanted = repr(reference).replace("LSTM(", f"{type(layer).__name__}(")
        assert repr(layer) == wanted, f"repr should be {wanted}, but is {layer!r}"

    subject.draw(test)


# Mistakes.


def _error(call: Callable[[], Any]) -> type[Exception] | None:
    try:
        call()
    except Exception as error:
        return type(error)
    return None


def _assert_same_errors(found: dict[str, tuple[type[Exception] | None, ...]]) -> None:
    """Assert that where nn.LSTM raises, the layer raises the same."""
    wrong = [
        f"{mistake}: {ours.__name__ if ours else 'nothing'} instead of {theirs.__name__}"
        for mistake, (theirs, ours) in found.items()
        if theirs is not None and ours is not theirs
    ]
    assert not wrong, f"{len(wrong)} of {len(found)} mistakes raise other errors: " + "\n  ".join(wrong)


@probe("errors of arguments")
def _errors_of_arguments(subject: Subject) -> None:
    def made(make: Factory, args: Any, kwargs: Any) -> type[Exception] | None:
        return _error(lambda: make(*args, **kwargs))

    _assert_same_errors({
        f"{args} {kwargs}": (made(nn.LSTM, args, kwargs), made(subject.factory, args, kwargs))
        for args, kwargs in mistakes.ARGUMENTS
        if not mistakes.unchecked_by_older_torch(args, kwargs) and not set(kwargs) & subject.without
    })  # fmt: skip


def _errors_of(state: bool) -> Probe:
    def run(subject: Subject) -> None:
        found = {}
        for name, call in mistakes.CALLS.items():
            about_state = any(word in name for word in ("hx", "h_0", "c_0"))
            form = name.split(",")[0] if "," in name else "dense"
            if about_state == state and form not in subject.without:
                found[name] = tuple(
                    _error(lambda make=make, call=call: call(make(3, 4)))  # type: ignore[misc]
                    for make in (nn.LSTM, subject.make)
                )
        _assert_same_errors(found)

    return run


probe("errors of input")(_errors_of(state=False))
probe("errors of hx")(_errors_of(state=True))


# The manners of a Module.


def _copied(copy_: Callable[[nn.Module], nn.Module]) -> Probe:
    """The copy gives the same numbers, and is one: changing it leaves the layer as it was."""

    def run(subject: Subject) -> None:
        case = subject.case()
        layer = case.layer(subject.make)
        expected = layer(case.input())[0]
        copied = copy_(layer)
        _assert_near("output", copied(case.input())[0], expected)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        _assert_near("output", layer(case.input())[0], expected)
        assert not copied(case.input())[0].any(), "the copy should have weights of its own"

    return run


probe("deepcopy")(_copied(copy.deepcopy))
probe("pickle")(_copied(lambda layer: pickle.loads(pickle.dumps(layer))))


@probe("to another dtype")
def _to_another_dtype(subject: Subject) -> None:
    case = subject.case(dtype=torch.float32)
    reference, layer = subject.pair(case)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        x = case.input().to(dtype)
        _assert_near("output", layer.to(dtype)(x)[0], reference.to(dtype)(x)[0])


@probe("hooks")
def _hooks(subject: Subject) -> None:
    case, seen = subject.case(), list[str]()
    layer = case.layer(subject.make)
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer(data_of(case.input()).requires_grad_())[0].sum().backward()
    assert seen == ["before", "after", "backward"], f"the hooks that ran: {seen}"


@probe("functional_call")
def _functional_call(subject: Subject) -> None:
    case = subject.case()
    reference, layer = case.layer(nn.LSTM), replace(case, seed=1).layer(subject.make)
    weights: dict[str, Tensor] = dict(reference.named_parameters())
    output = torch.func.functional_call(layer, weights, (case.input(),))[0]
    _assert_near("output", output, reference(case.input())[0])


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@probe("parametrized weights")
def _parametrized(subject: Subject) -> None:
    case = subject.case()
    reference, layer = subject.pair(case)
    for name in [name for name, _ in reference.named_parameters()]:
        parametrize.register_parametrization(layer, name, _Halved())
        with torch.no_grad():
            getattr(reference, name).div_(2)
        output = layer(case.input())[0]
        _assert_near("output", output, reference(case.input())[0])
        original = layer.parametrizations[name].original  # type: ignore[index, union-attr]
        (gradient,) = torch.autograd.grad(output.sum(), original)
        (expected,) = torch.autograd.grad(reference(case.input())[0].sum(), getattr(reference, name))
        _assert_near(f"grad of {name}", gradient, expected / 2)


@probe("autocast to bfloat16")
def _autocast(subject: Subject) -> None:
    """nn.LSTM's dtypes and, as far as bfloat16 goes, its numbers."""
    case = replace(subject.case(dtype=torch.float32), with_hx="hx" not in subject.without)
    reference, layer = subject.pair(case)
    with torch.autocast("cpu", torch.bfloat16):
        output, states = layer(case.input(), case.hx())
        output.float().sum().backward()
        expected, their_states = reference(case.input(), case.hx())
    for name, ours, theirs in zip(
        ("output", "h_n", "c_n"), (output, *states), (expected, *their_states)
    ):
        assert ours.dtype == theirs.dtype, f"{name} should be {theirs.dtype}, but is {ours.dtype}"
        _assert_near(name, ours, theirs, torch.bfloat16)


def _assert_near(name: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare single tensors: to 1e-12 in float64, otherwise to 16 units in the last place."""
    allowed = max(1e-12, 16 * torch.finfo(dtype or theirs.dtype).eps)
    gap = largest_difference(theirs, ours)
    assert gap <= allowed, f"{name} differs by {gap:.1e}, allowed is {allowed:.1e}"
