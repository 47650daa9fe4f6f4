"""The report's rows, with more options than the report has time for; and that each row can fail."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from manual_lstm import ManualLSTM
from manual_lstm.__main__ import main
from manual_lstm.check.parity import autocast_fails
from manual_lstm.report import derivatives, nested, table, tools, training, transforms, weights
from manual_lstm.report.row import MissingRequirement, ReportRow, Setting
from tests.helpers.loops import plainly
from tests.helpers.rows import row_grid, run_row

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "bias=False": {"bias": False},
    "three layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "proj_size": {"proj_size": 2},
    "batch_first": {"batch_first": True},
    "dropout": {"num_layers": 2, "dropout": 0.4},
    "everything": {
        "num_layers": 3,
        "bidirectional": True,
        "proj_size": 2,
        "batch_first": True,
        "dropout": 0.3,
    },
}
ROWS = [*transforms.ROWS, *derivatives.ROWS, *training.ROWS, *weights.ROWS, *tools.ROWS, *nested.ROWS]


@pytest.fixture(autouse=True)
def _random_numbers_as_before() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("row", "options", "packed"), row_grid(ROWS, SETTINGS))
def test_a_row(row: ReportRow, options: dict[str, Any], packed: bool) -> None:
    run_row(row, Setting(ManualLSTM, options, packed=packed))


# Layers that are wrong in one way each.

Output = Tensor | PackedSequence


class _OtherOutput(ManualLSTM):
    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        output, states = super().forward(input, hx, **options)
        return _with_data(output, lambda data: data * 1.01), states


class _OtherStates(ManualLSTM):
    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        output, (h_n, c_n) = super().forward(input, hx, **options)
        return output, (h_n, c_n * 1.01)


class _OtherGradient(ManualLSTM):
    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        output, states = super().forward(input, hx, **options)
        return _with_data(output, lambda data: data + 0.1 * (data - data.detach())), states


class _NoGradientOfStates(ManualLSTM):
    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        output, (h_n, c_n) = super().forward(input, hx, **options)
        return output, (h_n.detach(), c_n.detach())


class _Stale(ManualLSTM):
    """Goes on with the weights of its first call."""

    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        if not hasattr(self, "_stale"):
            self._stale = [getattr(self, name) for names in self._all_weights for name in names]
        names = [name for names in self._all_weights for name in names]
        layer = ManualLSTM(self.input_size, self.hidden_size, dtype=self._stale[0].dtype)
        layer.__dict__.update({k: v for k, v in self.__dict__.items() if not k.startswith("_")})
        layer._all_weights = self._all_weights
        return torch.func.functional_call(layer, dict(zip(names, self._stale)), (input, hx))


class _ReadsTwice(ManualLSTM):
    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        _ = self.all_weights
        return super().forward(input, hx, **options)


class _Hoards(ManualLSTM):
    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        self.hoard = [getattr(self, "hoard", None), torch.zeros(20_000)]
        return super().forward(input, hx, **options)


class _Drifts(ManualLSTM):
    calls = 0

    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        self.calls += 1
        output, states = super().forward(input, hx, **options)
        return _with_data(output, lambda data: data * (1 + self.calls * 1e-6)), states


class _InFloat32(ManualLSTM):
    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        output, states = super().forward(input, hx, **options)
        return _with_data(output, lambda data: data.float()), states


class _MultipliesMore(ManualLSTM):
    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        _ = self.all_weights[0][1] @ self.all_weights[0][1].t()
        return super().forward(input, hx, **options)


class _Frozen(ManualLSTM):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requires_grad_(False)


def _with_data(output: Output, change: Callable[[Tensor], Tensor]) -> Output:
    if isinstance(output, PackedSequence):
        return output._replace(data=change(output.data))
    return change(output)


def breaks() -> Iterator[Any]:
    special: dict[str, list[type[ManualLSTM]]] = {
        "autocast to bfloat16": [_InFloat32],
        "autocast to float16": [_InFloat32],
        "activation checkpointing": [_Hoards],
        "activation checkpointing, reentrant": [_Hoards],
        "saved_tensors_hooks, to disk": [_Hoards],
        "use_deterministic_algorithms": [_Drifts],
        "parametrize": [_Stale],
        "pruning": [_Stale],
        "weight drop, drawn anew in each call": [_Stale, _ReadsTwice],
        "flop_counter": [_MultipliesMore],
        "torchinfo": [_Frozen],
    }
    values = [row.label for row in transforms.ROWS]
    gradients = [row.label for row in [*derivatives.ROWS, *training.ROWS, *weights.ROWS, *nested.ROWS]]
    gradients += ["ensemble: stack_module_state", "per-sample gradients: vmap(grad(...))"]
    for row in ROWS:
        wrong = list(special.get(row.label, []))
        if row.label in values and row.label not in gradients:
            wrong += [_OtherOutput] if "different" in row.label else [_OtherOutput, _OtherStates]
        if row.label in gradients:
            wrong += [_OtherGradient, _NoGradientOfStates]
        for make in wrong:
            yield pytest.param(row, make, id=f"{row.label}-{make.__name__[1:]}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("row", "make"), list(breaks()))
def test_a_row_sees_what_is_wrong(row: ReportRow, make: type[ManualLSTM]) -> None:
    if row.missing():
        pytest.skip(f"needs {', '.join(row.missing())}")
    with pytest.raises((AssertionError, RuntimeError)):
        row.run(Setting(make))


@pytest.mark.filterwarnings("ignore")
def test_the_profile_of_the_plain_loop_shows_no_lstm() -> None:
    with plainly(), pytest.raises(AssertionError, match="no LSTM"):
        tools.check_profiler(Setting(ManualLSTM))


# The table.


def _raise(error: Exception) -> Callable[[Setting], None]:
    def check(_: Setting) -> None:
        raise error

    return check


def _only_manual(setting: Setting) -> None:
    print("printed by a check")
    if setting.make is nn.LSTM:
        raise RuntimeError("first | line\nsecond line" if not setting.packed else "packed")


def test_the_table(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [
        ReportRow("one", _only_manual),
        ReportRow("longer label", _raise(MissingRequirement("a compiler"))),
        ReportRow("third", _raise(ValueError("no")), needs=("nowhere",)),
        ReportRow(
            "fourth", lambda setting: _only_manual(setting) if setting.packed else None, packed=True
        ),
        ReportRow("fifth", lambda setting: None),
    ]
    monkeypatch.setattr(table, "ROWS", rows)
    assert main(["report"]) == 0
    printed, progress = capfd.readouterr()
    assert printed.splitlines()[1:] == [
        "",
        "## What nn.LSTM refuses",
        "",
        "|        | ManualLSTM | nn.LSTM |",
        "|--------|---|---|",
        "| one    | ✓ | RuntimeError: first \\| line |",
        "| fourth | ✓ | packed: RuntimeError: packed |",
        "",
        "## What both do",
        "",
        "|       | ManualLSTM | nn.LSTM |",
        "|-------|---|---|",
        "| fifth | ✓ | ✓ |",
        "",
        "## What could not be tried here",
        "",
        "|              | ManualLSTM | nn.LSTM |",
        "|--------------|---|---|",
        "| longer label | needs a compiler | needs a compiler |",
        "| third        | needs nowhere, not installed | needs nowhere, not installed |",
    ]
    assert progress == ""  # which is for terminals


def test_a_row_that_fails_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "ROWS", [ReportRow("bad", _raise(ValueError("x" * 200)))])
    assert main(["report"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "## What fails for ManualLSTM" in lines
    line = lines[-1]
    assert line.startswith("| bad | ValueError: xxx")
    assert line.count("...") == 2


def test_the_report_has_every_row() -> None:
    assert {row.label for row in ROWS} <= {row.label for row in table.ROWS}
    assert len({row.label for row in table.ROWS}) == len(table.ROWS)


def test_the_readme_shows_the_tables() -> None:
    path = Path(__file__).parent.parent / "manual_lstm" / "report" / "README.md"
    readme = path.read_text(encoding="utf-8")
    _, refused, both = readme.split("| ManualLSTM | nn.LSTM |\n")
    order = [row.label for row in table.ROWS]
    shown: list[str] = []
    for part, which in ((refused, "ManualLSTM only"), (both, "both")):
        lines = part[: part.index("\n\n")].splitlines()[1:]
        cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
        assert f"\n{len(lines)} features work with {which}:\n" in readme
        assert all(ours.startswith(table.YES) for _, ours, _ in cells)
        assert {theirs == table.YES for _, _, theirs in cells} == {which == "both"}
        labels = [label for label, _, _ in cells]
        assert labels == [label for label in order if label in labels]
        shown += labels
    assert sorted(shown) == sorted(order)
    assert f"tries {len(order)} features" in readme


def test_nn_lstm_is_what_the_rows_compare_with() -> None:
    """A row that nn.LSTM can do passes for it: the numbers are right, not only ours."""
    for row in (derivatives.ROWS[-2], training.ROWS[0], weights.ROWS[0]):
        if row is not training.ROWS[0] or not autocast_fails(torch.bfloat16):
            row.run(Setting(nn.LSTM))
