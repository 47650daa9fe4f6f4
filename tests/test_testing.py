"""manual_lstm.testing: what it draws, what it finds, and what it says."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence

import manual_lstm.testing
from manual_lstm import ManualLSTM
from manual_lstm.testing import Case, assert_same_layer, cases, check_lstm, lstm_checks
from manual_lstm.testing.__main__ import PEERS, check_peer, load_quantizable, main
from manual_lstm.testing.cases import FEATURES, FORMS, LAYOUTS, OPTIONS, Factory
from manual_lstm.testing.comparing import data
from manual_lstm.testing.conformance import AS_OFFICIAL, DIFFERS, FAILS, LACKS, OK, Check
from manual_lstm.testing.probes import PROBES
from tests.planted import MISTAKES, PlainLSTM, planted

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("check", lstm_checks(ManualLSTM), ids=str)
def test_manual_lstm(check: Check) -> None:
    check()


@pytest.mark.parametrize("check", lstm_checks(nn.LSTM, max_examples=10), ids=str)
def test_nn_lstm_itself(check: Check) -> None:
    outcome = check.run()
    assert outcome.status == (AS_OFFICIAL if check.name == "no steps" else OK), outcome


# Finding mistakes.

SETTINGS = settings(
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def compare_200(factory: Factory, large: bool = False) -> None:
    @SETTINGS
    @given(case=cases(large=large))
    def test(case: Case) -> None:
        reference, layer = case.pair(factory)
        assert_same_layer(layer, reference, case)

    test()


def test_the_plain_loop_without_a_mistake() -> None:
    compare_200(PlainLSTM)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_within_200_examples(mistake: str) -> None:
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        compare_200(planted(*MISTAKES[mistake]), large="33rd step" in mistake)


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
            data(input)[-1:].add_(1)
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


SPOILED: dict[str, Factory] = {
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


# Declarations.


def test_what_is_lacking_is_shown_and_not_tried() -> None:
    def limited(I: int, H: int, num_layers: int = 1) -> nn.Module:
        return nn.LSTM(I, H, num_layers)

    lacks = {*OPTIONS, "dtype", "device", "packed"} - {"num_layers"}
    report = check_lstm(limited, lacks=lacks, max_examples=5)
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


def test_in_float32_alone() -> None:
    report = check_lstm(ManualLSTM, lacks={"float64"}, max_examples=4)
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


# What is drawn.


@given(case=cases(without=FEATURES))
def test_what_is_left_out_is_not_drawn(case: Case) -> None:
    sizes = {name: case.options[name] for name in ("input_size", "hidden_size")}
    assert case.options == {**sizes, **OPTIONS}
    assert case.given == {}
    assert (case.form, case.layout, case.with_hx) == ("dense", "contiguous", False)
    assert case.lengths


@given(case=cases(always={*OPTIONS, "hx"}, devices=("cpu",)))
def test_what_is_always_wanted_is_always_drawn(case: Case) -> None:
    assert set(case.given) == set(OPTIONS)
    assert case.with_hx


@given(case=cases(large=False))
def test_a_case_makes_the_same_again_and_what_it_says(case: Case) -> None:
    again = eval(repr(case), {"Case": Case, "torch": torch})
    assert again == case
    for first, second in ((case.input(), again.input()), (case.hx() or (), again.hx() or ())):
        assert all(torch.equal(a, b) for a, b in zip(first, second) if isinstance(a, Tensor))
    input = case.input()
    assert isinstance(input, PackedSequence) == case.form.startswith("packed")
    if isinstance(input, PackedSequence):
        assert (input.sorted_indices is not None) == (case.form == "packed unsorted")
    layer = case.layer(nn.LSTM)
    assert all(
        torch.equal(*pair) for pair in zip(layer.parameters(), again.layer(nn.LSTM).parameters())
    )
    assert layer.training == case.training


@pytest.mark.parametrize("wanted", [*FORMS, *LAYOUTS, *OPTIONS, "hx", "batch of 0", "long", "wide"])
def test_everything_is_drawn(wanted: str) -> None:
    def is_it(case: Case) -> bool:
        longest = max(case.lengths, default=0)
        sizes = {"long": longest > 50, "wide": case.options["hidden_size"] > 60 and longest > 0}
        return wanted in (case.form, case.layout, *case.given, *[k for k, v in sizes.items() if v]) or (
            (wanted == "hx" and case.with_hx) or (wanted == "batch of 0" and not case.lengths)
        )

    find(cases(), is_it, settings=SETTINGS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_layouts_are_what_they_say(layout: str, form: str) -> None:
    options = {"input_size": 3, "hidden_size": 4, **OPTIONS}
    case = Case(options, form, [5] if form == "unbatched" else [5, 5, 5], layout, with_hx=True)
    for tensor in (data(case.input()), *(case.hx() or ())):
        one = tensor.size(0) == 1 and layout != "sliced"  # which lies in order however it does
        assert tensor.is_contiguous() == (layout == "contiguous" or one)


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match=r"always should name.*got \['packed'\]"):
        find(cases(always={"packed"}), bool)
    with pytest.raises(ValueError, match=r"leave a form.*got \['dense', 'packed', 'unbatched'\]"):
        find(cases(without={"dense", "packed", "unbatched"}), bool)
    with pytest.raises(ValueError, match=r"proj_size.*got \['projection'\]"):
        find(cases(without={"projection"}), bool)


# What is said.

EXAMPLE = {"input_size": 3, "hidden_size": 4, **OPTIONS}


def shifted(case: Case, change: Callable[[Any, Any, Any], None]) -> tuple[nn.LSTM, nn.Module]:
    """nn.LSTM, and the same with something done to what comes out."""

    class Shifted(nn.LSTM):
        def forward(self, input: Any, hx: Any = None) -> Any:
            output, (h_n, c_n) = super().forward(input, hx)
            if isinstance(output, PackedSequence):
                output = output._replace(data=output.data.clone())
            else:
                output = output.clone()
            h_n, c_n = h_n.clone(), c_n.clone()
            change(output, h_n, c_n)
            return output, (h_n, c_n)

    return case.pair(Shifted)


def add_to(position: int, *place: int) -> Callable[[Any, Any, Any], None]:
    def change(*results: Any) -> None:
        data(results[position])[place].add_(0.25)

    return change


@pytest.mark.parametrize(
    ("options", "form", "lengths", "change", "said"),
    [
        ({}, "dense", [5, 5], add_to(0, 3, 1, 2), "output differs first at step 3, sequence 1, feat"),
        ({"batch_first": True}, "dense", [5, 5], add_to(0, 1, 3, 2), "step 3, sequence 1, feature 2"),
        ({}, "unbatched", [5], add_to(0, 3, 2), "output differs first at step 3, feature 2"),
        # Rows of packed data: lengths 4, 2, 1 are sequences 1, 2, 0; row 4 is step 1's second.
        ({}, "packed unsorted", [1, 4, 2], add_to(0, 4, 2), "step 1, sequence 2, feature 2"),
        ({}, "packed by hand", [4, 2, 1], add_to(0, 5, 2), "step 2, sequence 0, feature 2"),
        ({"bidirectional": True}, "dense", [5, 5], add_to(1, 1, 0, 2),
         r"h_n differs most at layer 0 \(reverse\), sequence 0, feature 2"),
        ({"num_layers": 2}, "unbatched", [5], add_to(2, 1, 3), "c_n differs most at layer 1, feat"),
    ],
)  # fmt: skip
def test_the_message_names_the_place(
    options: dict[str, Any], form: str, lengths: list[int], change: Any, said: str
) -> None:
    case = Case({**EXAMPLE, **options}, form, lengths)
    reference, layer = shifted(case, change)
    with pytest.raises(AssertionError, match=said + r".*: by 2\.5e-01, allowed is 1\.0e-12") as error:
        assert_same_layer(layer, reference, case)
    assert "1 of" in str(error.value)
    assert repr(case) in str(error.value)


def test_the_message_names_the_gate_and_the_first_step() -> None:
    case = Case(EXAMPLE, "dense", [5, 5])
    reference, layer = case.pair(nn.LSTM)
    with torch.no_grad():
        layer.get_parameter("weight_hh_l0")[4 + 2, 1] += 1e-3  # the forget gate of unit 2
    with pytest.raises(AssertionError, match="output differs first at step 1, ") as error:
        assert_same_layer(layer, reference, case)
    assert "in steps 1 to 4" in str(error.value)
    case = Case(EXAMPLE, "dense", [1, 1], with_hx=True)  # one step: no gate acts on another's
    reference, layer = case.pair(planted("f.sigmoid(), g", "f.sigmoid().detach(), g"))
    with pytest.raises(AssertionError, match=r"grad of weight_ih_l0 differs most at gate f, unit \d"):
        assert_same_layer(layer, reference, case)


@pytest.mark.parametrize(
    ("returns", "said"),
    [
        (lambda output, states: output, "should return output, "),
        (lambda output, states: (output[:-1], states), "the shape of output should be"),
        (lambda output, states: (output, states[::-1]), None),
        (lambda output, states: (output.float(), states), "the dtype of output should be"),
        (lambda output, states: ((output, 0), states), "output should be a Tensor, but is a tuple"),
    ],
)
def test_another_form(returns: Any, said: str | None) -> None:
    class Other(nn.LSTM):
        def forward(self, input: Any, hx: Any = None) -> Any:
            return returns(*super().forward(input, hx))

    case = Case(EXAMPLE, "dense", [3])
    reference, layer = case.pair(Other)
    with pytest.raises(AssertionError, match=said or "h_n differs most"):
        assert_same_layer(layer, reference, case)


def test_other_parameters() -> None:
    case = Case(EXAMPLE, "dense", [3])
    reference, layer = case.pair(nn.LSTM)
    layer.register_parameter("peephole", nn.Parameter(torch.zeros(4)))
    with pytest.raises(AssertionError, match=r"the parameters are named .*peephole"):
        assert_same_layer(layer, reference, case)
    assert_same_layer(layer, reference, case, parameters=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(value: float) -> None:
    case = Case({**EXAMPLE, "proj_size": 2}, "dense", [3])
    reference, layer = shifted(case, lambda output, h_n, c_n: h_n.fill_(value))
    with pytest.raises(AssertionError, match="h_n differs most"):
        assert_same_layer(layer, reference, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_measured_by_the_references_error(dtype: torch.dtype) -> None:
    case = Case({**EXAMPLE, "num_layers": 2, "dropout": 0.3}, "dense", [7, 7], dtype=dtype)
    reference, layer = case.pair(ManualLSTM)
    assert_same_layer(layer, reference, case)
    far = 64 * torch.finfo(dtype).eps
    reference, layer = shifted(case, lambda output, h_n, c_n: h_n.add_(far))
    with pytest.raises(AssertionError, match="h_n differs most"):
        assert_same_layer(layer, reference, case)


# The command, and what it needs.


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["torch.nn:LSTM", "--examples", "1", "--lacks", "packed", "proj_size"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("LSTM: ")
    assert "  proj_size               lacks       declared\n" in printed
    assert main(["tests.planted:PlainLSTM", "--examples", "1"]) == 1  # which checks nothing
    assert "errors of hx            FAILS" in capsys.readouterr().out


def shown() -> dict[str, list[str]]:
    """The README's table: its columns by their heads."""
    path = Path(__file__).parent.parent / "manual_lstm" / "testing" / "README.md"
    readme = path.read_text(encoding="utf-8")
    lines = readme[readme.index(f"{'':<24}nn.LSTM      ManualLSTM") :].split("\n```")[0].splitlines()
    columns = {"": 0} | {head: 24 + 13 * k for k, head in enumerate(lines[0].split())}
    return {
        head: [line[start : start + (13 if start else 24)].rstrip() for line in lines[1:]]
        for head, start in columns.items()
    }


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--examples", "1"]) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    # The first two columns; what so few cases find in the others is another matter.
    expected = zip(*(shown()[head] for head in ("", "nn.LSTM", "ManualLSTM")))
    assert [(row[:24].rstrip(), row[24:37].rstrip(), row[37:50].rstrip()) for row in rows] == list(
        expected
    )


@pytest.mark.parametrize("label", PEERS)
def test_the_peers(label: str) -> None:
    report = check_peer(label, max_examples=10)
    if report is None:
        pytest.skip(f"{label} is not installed")
    assert [outcome.status for outcome in report.outcomes] == shown()[label], report


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_package_itself_does_not_need_hypothesis() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import manual_lstm; "
    assert python(code).returncode == 0
    failed = python(code + "import manual_lstm.testing")
    assert failed.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: manual_lstm.testing needs hypothesis: pip install hypothesis"
    )
    assert python("import manual_lstm, sys; assert 'hypothesis' not in sys.modules").returncode == 0


def test_all_names_are_there() -> None:
    assert all(hasattr(manual_lstm.testing, name) for name in manual_lstm.testing.__all__)
