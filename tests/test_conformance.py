"""The conformance suite: the mistakes it finds, and that every row of its table can fail."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence

from manual_lstm import ManualLSTM
from manual_lstm.check.parity import data_of
from manual_lstm.engine import stack
from manual_lstm.engine.cuts import cuts_of
from manual_lstm.testing import Case, assert_same_layer, cases, check_lstm, lstm_checks
from manual_lstm.testing.__main__ import load_quantizable
from manual_lstm.testing.cases import OPTIONS, Factory
from manual_lstm.testing.conformance import (
    AS_OFFICIAL,
    DIFFERS,
    FAILS,
    FOLDED,
    LACKS,
    NOT_OFFERED,
    OK,
    Check,
)
from manual_lstm.testing.probes import PROBES
from tests.helpers.loops import patched
from tests.helpers.planted import MISTAKES, PlainLSTM, planted
from tests.helpers.search import SEARCH

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("check", lstm_checks(ManualLSTM, max_examples=10), ids=str)
def test_manual_lstm(check: Check) -> None:
    check()


@pytest.mark.parametrize("check", lstm_checks(nn.LSTM, max_examples=5), ids=str)
def test_nn_lstm_itself(check: Check) -> None:
    outcome = check.run()
    others = {"no steps": AS_OFFICIAL, "lengths": NOT_OFFERED, "resets": NOT_OFFERED}
    assert outcome.status == others.get(check.name, OK), outcome


# As many cases as a property has in the quick run; with fewer, some mistakes are not met.
AS_IN_THE_QUICK_RUN = settings(SEARCH, max_examples=60)


def compare_on_drawn_cases(factory: Factory, large: bool = False) -> None:
    @AS_IN_THE_QUICK_RUN
    @given(case=cases(large=large))
    def test(case: Case) -> None:
        reference, layer = case.pair(factory)
        assert_same_layer(layer, reference, case)

    test()


def test_the_plain_loop_without_a_mistake() -> None:
    compare_on_drawn_cases(PlainLSTM)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_in_the_quick_run(mistake: str) -> None:
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        compare_on_drawn_cases(planted(*MISTAKES[mistake]), large="33rd step" in mistake)


# Every row of the table fails for some class.


def sometimes(condition: str) -> type[PlainLSTM]:
    """Wrong numbers where the condition holds."""
    return planted("o * c_t.tanh()", f"o * c_t.tanh() * (1.5 if {condition} else 1)")


def refusing(condition: str) -> type[PlainLSTM]:
    """No answer where the condition holds."""
    return planted("B, D = ", f"assert not ({condition})\n        B, D = ")


class _Wrapped(nn.LSTM):
    """nn.LSTM, with something about its forward changed by a subclass."""

    def around(self, call: Callable[..., Any], input: Any, hx: Any) -> Any:
        raise NotImplementedError

    def forward(self, input: Any, hx: Any = None) -> Any:
        return self.around(super().forward, input, hx)


class _NeedsBias(_Wrapped):
    def around(self, call: Callable[..., Any], input: Any, hx: Any) -> Any:
        output, (h_n, c_n) = call(input, hx)
        return output, (h_n if self.bias else h_n + 1, c_n)


class _OddStrides(_Wrapped):
    def around(self, call: Callable[..., Any], input: Any, hx: Any) -> Any:
        output, states = call(input, hx)
        if isinstance(output, Tensor):
            output = output.transpose(0, 1).contiguous().transpose(0, 1)
        return output, states


class _Writes(_Wrapped):
    def around(self, call: Callable[..., Any], input: Any, hx: Any) -> Any:
        output, states = call(input, hx)
        with torch.no_grad():
            data_of(input)[-1:].add_(1)
        return output, states


class _AlwaysGradients(_Wrapped):
    def around(self, call: Callable[..., Any], input: Any, hx: Any) -> Any:
        with torch.enable_grad():
            return call(input, hx)


class _NoneFrozen(_Wrapped):
    def around(self, call: Callable[..., Any], input: Any, hx: Any) -> Any:
        with torch.set_grad_enabled(all(p.requires_grad for p in self.parameters())):
            return call(input, hx)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _FirstOrder(_Wrapped):
    def around(self, call: Callable[..., Any], input: Any, hx: Any) -> Any:
        output, states = call(input, hx)
        return _Once.apply(output), states  # type: ignore[no-untyped-call]


class _NoAutocast(_Wrapped):
    def around(self, call: Callable[..., Any], input: Any, hx: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return call(input, hx)


class _OtherErrors(_Wrapped):
    def around(self, call: Callable[..., Any], input: Any, hx: Any) -> Any:
        try:
            return call(input, hx)
        except Exception as error:
            raise LookupError from error


class _OtherName(nn.LSTM):
    def forward(self, x: Any, hx: Any = None) -> Any:
        return super().forward(x, hx)


class _Nothing(nn.LSTM):
    """An answer to a sequence of no steps, and a wrong one."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        if input.numel() == 0:
            return input, super().forward(input.new_ones(1, *input.shape[1:]), hx)[1]
        return super().forward(input, hx)


class _OtherOrder(nn.LSTM):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parameters = dict(reversed(self._parameters.items()))


class _OtherPositions(nn.LSTM):
    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, *args: Any, **kwargs: Any):
        super().__init__(input_size, hidden_size, *args, bias=bias, **kwargs)


class _OtherDraws(nn.LSTM):
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter)


class _Buffer(nn.LSTM):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("steps", torch.zeros(()))


class _NoAssign(nn.LSTM):
    def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:  # type: ignore[override]
        return super().load_state_dict(state_dict, strict)


class _Silent(nn.LSTM):
    def extra_repr(self) -> str:
        return ""


class _Lenient(nn.LSTM):
    def __init__(self, *args: Any, dropout: Any = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, dropout=dropout if type(dropout) is float else 0.0, **kwargs)


class _NoCopy(nn.LSTM):
    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


class _Stays(nn.LSTM):
    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self


class _NoHooks(nn.LSTM):
    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)


class _HoldsWeights(nn.LSTM):
    """Runs on the Parameters it was made with, whatever its attributes come to be."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.held = [nn.LSTM(*args, **kwargs)]
        for name, parameter in self.named_parameters():
            setattr(self.held[0], name, parameter)

    def forward(self, *args: Any) -> Any:
        return self.held[0](*args)


class _NoMask(ManualLSTM):
    """Runs through the padding."""

    def forward(self, input: Any, hx: Any = None, *_: Any, lengths: Any = None, **options: Any) -> Any:
        return super().forward(input, hx, **options)


class _CutsOneWay(ManualLSTM):
    """Lets the state through where a sequence ends, in the backward direction."""

    def forward(self, input: Any, hx: Any = None, *_: Any, resets: Any = None, **options: Any) -> Any:

        with patched(stack, cuts_of=lambda resets, sizes, reverse: cuts_of(resets, sizes, False)):
            return super().forward(input, hx, resets=resets, **options)


SPOILED: dict[str, Factory] = {
    "lengths": _NoMask,
    "resets": _CutsOneWay,
    "parameters": lambda *args, **kwargs: nn.LSTM(*args, **kwargs).requires_grad_(False),
    "float64": planted(*MISTAKES["float32 in between"]),
    "num_layers": planted(*MISTAKES["every layer starts from the first's state"]),
    "bias": _NeedsBias,
    "bidirectional": planted(*MISTAKES["outputs left in reverse"]),
    "batch_first": planted(*MISTAKES["hx batch first"]),
    "proj_size": planted(*MISTAKES["projection without a gradient"]),
    "hx": planted(*MISTAKES["h_0 detached"]),
    "unbatched": sometimes("not batched"),
    "packed": planted(*MISTAKES["h_n of sequences that have ended"]),
    "packed unsorted": planted(*MISTAKES["order of the output forgotten"]),
    "packed by hand": sometimes("packed and order is None"),
    "batch of 0": refusing("len(steps[0]) == 0"),
    "strides": sometimes("not x.is_contiguous()"),
    "dropout": planted("torch.dropout(torch.cat(steps)", "torch.dropout(torch.cat(steps).flip(0)"),
    "dropout in eval": planted(*MISTAKES["dropout in eval"]),
    "one step": sometimes("len(steps) == 1"),
    "all together": sometimes("D == 2 and layer > 0 and packed and self.proj_size"),
    "float32": sometimes("x.dtype == torch.float32"),
    "bfloat16": sometimes("x.dtype == torch.bfloat16"),
    "float16": sometimes("x.dtype == torch.float16"),
    "complex128": sometimes("x.is_complex()"),
    "no steps": _Nothing,
    "form of the output": _OddStrides,
    "input left alone": _Writes,
    "no_grad, inference_mode": _AlwaysGradients,
    "gradients, one by one": _NoneFrozen,
    "double backward": _FirstOrder,
    "arguments": _OtherPositions,
    "dtype": lambda *args, dtype=None, **kwargs: nn.LSTM(*args, **kwargs),
    "device": lambda *args, device=None, **kwargs: nn.LSTM(*args, **kwargs),
    "call by name": _OtherName,
    "order of parameters": _OtherOrder,
    "initial values": _OtherDraws,
    "state_dict": _Buffer,
    "load from meta": _NoAssign,
    "repr": _Silent,
    "errors of arguments": _Lenient,
    "errors of input": _OtherErrors,
    "errors of hx": _OtherErrors,
    "deepcopy": _NoCopy,
    "pickle": _NoCopy,
    "to another dtype": _Stays,
    "hooks": _NoHooks,
    "functional_call": _HoldsWeights,
    "parametrized weights": _HoldsWeights,
    "autocast to bfloat16": _NoAutocast,
}


@pytest.mark.parametrize("row", PROBES)
def test_every_row_can_fail(row: str) -> None:
    check = next(check for check in lstm_checks(SPOILED[row]) if check.name == row)
    outcome = check.run()
    assert outcome.status == FAILS, outcome
    assert outcome.note
    assert outcome.error is not None
    with pytest.raises(type(outcome.error)):
        check()


def test_what_is_spoiled_in_one_row_is_found_there_alone() -> None:
    report = check_lstm(_NeedsBias, max_examples=3)
    assert [failure.name for failure in report.failures] == ["bias"]
    # Declared, it fails nobody; and the report still says what is the matter.
    accepted = check_lstm(_NeedsBias, accepts={"bias": "because"}, max_examples=3)
    assert accepted.passed
    assert {o.name: o.note for o in accepted.outcomes if o.status == DIFFERS} == {"bias": "because"}
    assert not any(o.note for o in accepted.outcomes if o.status == OK)


class _Off(nn.LSTM):
    def forward(self, *args: Any) -> Any:
        output, states = super().forward(*args)
        data = data_of(output) * 1.001
        return (output._replace(data=data) if isinstance(output, PackedSequence) else data), states


class _Raises(nn.LSTM):
    def forward(self, *args: Any) -> Any:
        raise RuntimeError("no")


class _NoStates(nn.LSTM):
    def forward(self, *args: Any) -> Any:
        return super().forward(*args)[0]


ROWS_OF_ONE_MISTAKE = ["bias", "hx", "packed", "one step", "gradients, one by one", "double backward"]


@pytest.mark.parametrize("cls", [_Off, _NoStates, _Raises])
def test_one_mistake_is_one_failure(cls: type[nn.Module]) -> None:
    report = check_lstm(cls, max_examples=2, rows=["float64", "no steps", *ROWS_OF_ONE_MISTAKE])
    status = {outcome.name: outcome.status for outcome in report.outcomes}
    assert status.pop("float64") == FAILS
    # A class that always raises does not do there as nn.LSTM.
    assert status.pop("no steps") == (FOLDED if cls is _Raises else AS_OFFICIAL)
    assert status == dict.fromkeys(ROWS_OF_ONE_MISTAKE, FOLDED)
    assert not report.passed


def test_another_mistake_is_another_failure() -> None:
    class Both(_Off):
        def state_dict(self, *args: Any, **options: Any) -> Any:
            return {f"x.{name}": value for name, value in super().state_dict(*args, **options).items()}

    def load(layer: nn.Module, reference: nn.LSTM) -> None:
        layer.load_state_dict(reference.state_dict())

    report = check_lstm(Both, load=load, max_examples=2, rows=["float64", "bias", "state_dict"])
    assert [outcome.status for outcome in report.outcomes] == [FAILS, FOLDED, FAILS]


# Declarations.


def test_what_is_lacking_is_shown_and_not_tried() -> None:
    def limited(I: int, H: int, num_layers: int = 1) -> nn.Module:
        return nn.LSTM(I, H, num_layers)

    lacks = {*OPTIONS, "dtype", "device", "packed"} - {"num_layers"}
    report = check_lstm(limited, lacks=lacks, max_examples=2)
    found = {outcome.name: outcome.status for outcome in report.outcomes}
    assert list(found) == list(PROBES)
    implied = {"packed unsorted", "packed by hand", "dropout in eval"}
    assert {name for name, status in found.items() if status == LACKS} == lacks | implied
    # It has other names for the sizes.
    assert {name for name, status in found.items() if status == FAILS} == {"arguments"}
    with pytest.raises(AssertionError, match=r"(?s)1 as nn.LSTM.*arguments: TypeError: .*'input_size'"):
        report.raise_for_failures()
    skipped = next(each for each in lstm_checks(limited, lacks=lacks) if each.name == "packed")
    with pytest.raises(BaseException, match="lacks: declared") as stopped:
        skipped()
    assert stopped.type.__name__ == "SkipTest"


@pytest.mark.slow
def test_in_float32_alone() -> None:
    report = check_lstm(ManualLSTM, lacks={"float64"}, max_examples=2)
    report.raise_for_failures()
    spoiled = check_lstm(planted(*MISTAKES["c detached"]), lacks={"float64"}, max_examples=4)
    assert "num_layers" in [failure.name for failure in spoiled.failures]


def test_other_names_for_the_parameters() -> None:
    peer = pytest.importorskip("torch.ao.nn.quantizable").LSTM
    lacks = {"proj_size", "packed", "unbatched", "dropout", "parameters", "float64"}
    report = check_lstm(peer, load=load_quantizable, lacks=lacks, max_examples=4)
    found = {outcome.name: outcome for outcome in report.outcomes}
    assert found["num_layers"].status == found["bias"].status == found["hx"].status == OK
    assert found["bidirectional"].status == FAILS  # its second layer is too narrow
    # And with the wrong weights it is found out.
    wrong = check_lstm(peer, load=lambda *_: None, lacks=lacks, max_examples=4)
    assert {"num_layers", "bias", "hx"} <= {failure.name for failure in wrong.failures}


def test_what_does_not_differ_after_all_is_said_to() -> None:
    report = check_lstm(nn.LSTM, accepts={"packed": "really"}, max_examples=2)
    notes = {outcome.name: outcome.note for outcome in report.outcomes if outcome.status == OK}
    assert {name: note for name, note in notes.items() if note} == {
        "packed": "declared to differ, and does not"
    }


@pytest.mark.parametrize("declared", [{"lacks": {"projection"}}, {"accepts": {"projection": "none"}}])
def test_a_declaration_that_names_no_row(declared: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(?s)proj_size.*got \['projection'\]"):
        check_lstm(nn.LSTM, **declared)


def test_random_numbers_elsewhere_stay_as_they_are() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    check_lstm(nn.LSTM, max_examples=1)
    assert torch.equal(torch.rand(3), expected)
