"""manual_lstm.testing: what it draws, and what it says."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import find, given
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import manual_lstm.testing
from manual_lstm import ManualLSTM
from manual_lstm.check.parity import data_of
from manual_lstm.testing import Case, assert_same_layer, cases
from manual_lstm.testing.__main__ import PEERS, check_peer, main
from manual_lstm.testing.cases import FEATURES, FORMS, LAYOUTS, OPTIONS
from tests.helpers.planted import planted
from tests.helpers.search import SEARCH

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


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

    find(cases(), is_it, settings=SEARCH)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_layouts_are_what_they_say(layout: str, form: str) -> None:
    options = {"input_size": 3, "hidden_size": 4, **OPTIONS}
    case = Case(options, form, [5] if form == "unbatched" else [5, 5, 5], layout, with_hx=True)
    for tensor in (data_of(case.input()), *(case.hx() or ())):
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
        data_of(results[position])[place].add_(0.25)

    return change


@pytest.mark.parametrize(
    ("options", "form", "lengths", "change", "said"),
    [
        ({}, "dense", [5, 5], add_to(0, 3, 1, 2), "output differs first at step 3, sequence 1, feat"),
        ({"batch_first": True}, "dense", [5, 5], add_to(0, 1, 3, 2), "step 3, sequence 1, feature 2"),
        ({}, "unbatched", [5], add_to(0, 3, 2), "output differs first at step 3, feature 2"),
        # Rows of packed data_of: lengths 4, 2, 1 are sequences 1, 2, 0; row 4 is step 1's second.
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
    assert main(["torch.nn:LSTM", "--examples", "1", "--lacks", "packed,proj_size"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("LSTM: ")
    assert "  proj_size               lacks       declared\n" in printed
    assert main(["tests.helpers.planted:PlainLSTM", "--examples", "1"]) == 1  # which checks nothing
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
