"""python -m benchmarks: what it prints and writes, at tiny shapes. No speed is asserted."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import contenders, deploy, memory, per_sample, plot, speed, targets
from benchmarks.__main__ import main
from benchmarks.cases import GROUPS, MODELS, Case, Group
from benchmarks.contenders import (
    PEERS,
    Contender,
    Peer,
    check_answer,
    official_contender,
    our_contender,
    run_once,
)
from benchmarks.floor import floor_loop
from benchmarks.timing import Effort
from benchmarks.workload import MODES, Settings, Workload

Capture = pytest.CaptureFixture[str]
SHORT = ["--seconds", "0", "--rounds", "1", "--threads", "1"]
TINY = ["--shapes", "3,2,4,8", *SHORT]
SETTINGS = Settings(threads=1)
CASES = [
    Case(3, 2, 4, 8),
    Case(1, 2, 4, 8),
    Case(3, 2, 4, 8, packed=True),
    Case(3, 2, 4, 8, layers=2, bidirectional=True),
]


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = tf32


def test_the_main_table_and_its_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(memory, "measure_peak", lambda *arguments: 2e6)
    file = tmp_path / "figures.json"
    assert main([*TINY, "--json", str(file), "--targets"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert f"torch {torch.__version__}" in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith("3,2,4,8")]
    assert len(rows) == 2
    installed = [name for name in PEERS if PEERS[name].installed()]
    assert all(len(row) == 5 + len(installed) + 3 for row in rows)
    assert all(re.fullmatch(r"[\d.]+", cell) for row in rows for cell in row[1:5])
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["machine"]["torch"] == torch.__version__
    assert [row["mode"] for row in written["rows"]] == list(MODES)
    for row in written["rows"]:
        assert row["not_timed"] == {}
        assert row["bytes"].keys() == {"nn.LSTM", "ManualLSTM"}
        assert {"nn.LSTM", "ManualLSTM", "floor", *installed} == row["seconds"].keys()
        assert all(seconds > 0 for turns in row["seconds"].values() for seconds in turns)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_contender_gives_the_answer_of_nn_lstm(case: Case, mode: str) -> None:
    w = Workload(case, Settings(threads=1, dtype=torch.float64))
    expected = run_once(official_contender(w), mode)
    builds = {name: peer.build for name, peer in PEERS.items() if peer.installed()}
    built = {"ours": our_contender(w), **{name: build(w) for name, build in builds.items()}}
    assert sum(contender is not None for contender in built.values()) >= 3
    for contender in built.values():
        if contender is not None:
            check_answer(run_once(contender, mode), expected)
    step, chosen = floor_loop(w, mode)
    step()
    assert len(chosen) >= 2 * case.layers


@pytest.mark.parametrize("harm", ["output", "gradients", "shape", "failure"])
def test_a_wrong_peer_is_not_timed(
    harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def build(w: Workload) -> Contender:
        contender = official_contender(w)
        forward = contender.forward

        def wrong(x: Any) -> torch.Tensor:
            output = forward(x)
            if harm == "failure":
                raise RuntimeError("no such kernel")
            if harm == "output":
                return output + 0.01
            return output[:1] if harm == "shape" else output + (output - output.detach())

        contender.forward = wrong
        return contender

    monkeypatch.setitem(PEERS, "cell", Peer(("LSTM", "Cell"), "a wrong one", build))
    file = tmp_path / "figures.json"
    arguments = ["--peers", "cell", "--mode", "training", "--no-memory", "--json", str(file)]
    assert main([*TINY, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "cell is not timed here: " in printed
    assert re.search(r"^3,2,4,8.* wrong$", printed, re.MULTILINE)
    (row,) = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert "cell" in row["not_timed"]
    assert "cell" not in row["seconds"]


def test_ours_wrong_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def wrong(w: Workload) -> Contender:
        contender = official_contender(w)
        contender.as_official = torch.neg
        return contender

    monkeypatch.setattr(speed, "our_contender", wrong)
    assert main([*TINY, "--peers", "none", "--mode", "inference", "--no-memory"]) == 1
    assert "ManualLSTM is not timed here: its output differs" in capsys.readouterr().out


def test_a_peer_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    missing = Peer(("DP-", "LSTM"), "Opacus' DPLSTM", PEERS["opacus"].build, "no_such_module_here")
    monkeypatch.setitem(PEERS, "opacus", missing)
    arguments = ["--peers", "opacus,cell", "--mode", "inference", "--no-memory"]
    assert main([*TINY, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "opacus is not installed" in printed
    assert "DP-" not in printed.split("INFERENCE")[1]


def test_a_slow_peer_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_is_slow", lambda got, expected: True)
    groups = {"given": Group("the shapes given", (CASES[0],))}
    plan = speed.Plan(groups, ("inference",), ("cell",), Effort(0, 2), memory=False)
    row = speed.measure("given", CASES[0], "inference", plan, SETTINGS)
    assert [len(row.seconds[name]) for name in ("nn.LSTM", "ManualLSTM", "cell")] == [2, 2, 1]
    assert row.ratio("cell")


def test_the_quick_setting_and_groups(capsys: Capture) -> None:
    arguments = ["--quick", "--groups", "one-step", "--peers", "none", "--targets", *SHORT]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "1,100,6,32" in printed
    assert "1,16,512,512" not in printed  # the quick setting leaves it out
    assert "28,64,28,128" not in printed  # of another group
    assert "one-step" in printed.split("geometric means")[1]
    assert re.search(r"inference\s+one-step 1,100,6,32\s+0.90\s+[\d.]+  (met|MISSED)", printed)


def test_the_targets() -> None:
    two_layers = Case(50, 16, 256, 256, layers=2, bidirectional=True)
    ratios = {
        ("inference", Case(100, 32, 256, 256)): {"ManualLSTM": 1.9, "cell": 2.0, "plain-loop": 1.0},
        ("inference", Case(50, 16, 256, 256)): {"ManualLSTM": 1.2},
        ("inference", two_layers): {"ManualLSTM": 1.3, "nn-no-onednn": 1.1},
    }
    means = {"inference": {"arithmetic": {"ManualLSTM": 1.31}}}
    found = {v.what: (v.most, v.met) for v in targets.verdicts(ratios, means, threads=2)}
    assert found == {
        "arithmetic, geometric mean": (1.25, False),
        "arithmetic 100,32,256,256": (2.0, True),
        f"{two_layers}: as one layer": (1.2, False),
        "100,32,256,256: as cell": (2.0, True),  # the plain loop is no other LSTM
        f"{two_layers}: as nn-no-onednn": (1.1, False),
    }


def test_the_published_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    two = Case(3, 1, 2, 4, layers=2, bidirectional=True)
    group = Group("published models", (two, CASES[0]), {two: "a name, 2 layers, bidirectional"})
    monkeypatch.setitem(GROUPS, "models", group)
    file = tmp_path / "times.png"
    options = ["--peers", "plain-loop,nn-no-onednn", "--no-memory", "--targets"]
    pytest.importorskip("matplotlib")
    assert main(["models", *options, *SHORT, "--plot", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "1 thread" in printed
    assert "    a name, 2 layers, bidirectional\n3,1,2,4 " in printed
    assert "28,64,28,128" not in printed
    assert file.read_bytes().startswith(b"\x89PNG")


def test_models_and_their_targets_are_those_of_the_table() -> None:
    assert set(GROUPS["models"].cases) == set(GROUPS["models"].notes) == set(MODELS)
    assert set(MODELS) <= set(targets.MOST_OF_CASE)


def test_a_picture_needs_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*TINY, "--plot", str(tmp_path / "times.png")]) == 1
    assert 'pip install ".[plot]"' in capsys.readouterr().err


def test_the_picture_has_every_row_and_contender(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    groups = {"given": Group("the shapes given", tuple(CASES[:2]))}
    rows = []
    for mode in MODES:
        for k, case in enumerate(CASES[:2]):
            seconds = {"nn.LSTM": [1.0], "ManualLSTM": [2.0 + k], "cell": [3.0]}
            rows.append(speed.Measurement("given", mode, case, seconds))
    figure = plot.save_plot(rows, groups, "a machine", tmp_path / "times.svg")
    for axis in figure.axes:
        drawn = {line.get_label(): list(line.get_xdata()) for line in axis.lines}
        assert drawn["ManualLSTM"] == [2.0, 3.0]
        assert drawn["LSTM Cell"] == [3.0, 3.0]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(map(str, CASES[:2]))


@pytest.mark.slow
def test_first_calls(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "cold.json"
    assert main(["cold", "--rounds", "1", "--threads", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [(row["who"], row["loads_dynamo"]) for row in rows] == [
        ("nn.LSTM", False),
        ("ManualLSTM", False),
    ]
    assert re.search(r"^ManualLSTM( +[\d.]+){3} +no$", capsys.readouterr().out, re.MULTILINE)


def test_deployed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """With the forms that need no compiler; one of them fails, and one is not installed."""

    def fails(*_: Any) -> Any:
        raise RuntimeError("no compiler\nat all")

    forms = {name: deploy.FORMS[name] for name in ("eager", "exported")}
    forms |= {"compiled": fails, "AOTI": lambda *_: None}
    monkeypatch.setattr(deploy, "FORMS", {name: forms[name] for name in deploy.FORMS if name in forms})
    file = tmp_path / "deploy.json"
    assert main(["deploy", *TINY, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert set(row["seconds"]) == {
        f"{who} {form}" for who in ("nn.LSTM", "ManualLSTM") for form in ("eager", "exported")
    }
    printed = capsys.readouterr().out
    assert "    ManualLSTM compiled: RuntimeError: no compiler\n" in printed
    assert "ManualLSTM AOTI: pip install" in printed
    assert re.search(r"^3,2,4,8( +[\d.]+){2} +- +-( +[\d.]+){2} +- +-$", printed, re.MULTILINE)


@pytest.mark.slow
def test_deployed_in_every_form(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "deploy.json"
    assert main(["deploy", *TINY, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert all("pip install" in reason for reason in row["missing"].values()), row["missing"]
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


@pytest.mark.slow
def test_memory_finds_what_is_allocated(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "memory.json"
    arguments = ["--shapes", "50,64,8,64", "--mode", "training", "--threads", "1"]
    assert main(["memory", *arguments, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert re.search(r"^50,64,8,64\s+training\s+0.1\s+0.8 ", printed, re.MULTILINE)
    (row,) = json.loads(file.read_text(encoding="utf-8"))["rows"]
    for size in row["bytes"].values():
        assert size is None or 50 * 64 * 64 * 4 <= size < 100e6  # the output at least


def test_memory_that_cannot_be_measured_is_a_dash(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(memory, "measure_peak", lambda *arguments: None)
    assert main(["memory", "--shapes", "1,1,1,1", "--mode", "training"]) == 0
    assert re.search(r"^1,1,1,1 .* -\s+-\s+-$", capsys.readouterr().out, re.MULTILINE)


def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(memory, "measure_peak", lambda *arguments: 2e6)
    file = tmp_path / "scaling.json"
    arguments = ["--T", "2,4", "--layers", "1,2", "--base", "2,2,3,4", "--json", str(file)]
    assert main(["scaling", *arguments, *SHORT]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "steps, T: training" in printed
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [(row["axis"], row["value"]) for row in rows] == [
        *[("T", 2), ("T", 4)] * 2,
        *[("layers", 1), ("layers", 2)] * 2,
    ]


def test_precision(capsys: Capture) -> None:
    assert main(["precision", "--dtypes", "float64,bfloat16", *TINY]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    exact, narrow = (
        re.findall(rf"^3,2,4,8\s+{dtype}\s+(\S+)\s+(\S+)", printed, re.MULTILINE)
        for dtype in ("float64", "bfloat16")
    )
    assert all(float(error) < 1e-14 for error in exact[0])
    assert all(1e-5 < float(error) < 1e-1 for error in narrow[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "1,2,3"], "a shape is T,B,I,H, four whole numbers, but got '1,2,3'"),
        (["--shapes", "1,2,3,0"], "should be positive, but got '1,2,3,0'"),
        (["--peers", "cells"], "'cells' is none of: none, all, opacus"),
        (["--mode", "train"], "inference, training or both, but got 'train'"),
        (["--groups", "small"], "'small' is none of: one-step"),
        (["--threads", "0"], "a positive whole number is wanted, but got '0'"),
        (["--seconds", "-1"], "seconds are wanted, but got '-1'"),
        (["--json", "no/such/folder/file.json"], "no file can be written at"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["scaling", "--base", "1,1,1,1;2,2,2,2"], "one shape is wanted"),
        (["scaling", "--T", "1,x"], "a positive whole number is wanted, but got 'x'"),
        (["precision", "--dtypes", "float8"], "'float8' is none of: float32"),
        (["speeds"], "invalid choice: 'speeds'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_argument_errors_are_clear(arguments: list[str], message: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "this torch finds no CUDA device" in capsys.readouterr().err


def test_the_notebooks_function_is_left_out_where_its_tiles_do_not_fit() -> None:
    case = Case(1, 8, 64, 64)
    bytes_of_tiles = 8 * 256 * 128 * 4
    w = Workload(case, SETTINGS)
    notebook = PEERS["notebook"].build
    assert notebook(w) is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders, "MOST_TILE_BYTES", bytes_of_tiles - 1)
        assert notebook(w) is None


def test_opacus_counts_as_installed_only_where_it_is() -> None:
    assert PEERS["opacus"].installed() == (importlib.util.find_spec("opacus") is not None)


@pytest.mark.optional
@pytest.mark.skipif(not PEERS["opacus"].installed(), reason="needs opacus")
def test_the_table_of_per_sample_gradients(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "figures.json"
    assert main(["per-sample", *TINY, "--json", str(file)]) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["who"] for row in rows] == list(per_sample.CONTENDERS)
    assert all(row["gap"] < 1e-5 and row["bytes"] is not None for row in rows)
    assert rows[0]["ratio"] == 1.0
    printed = capsys.readouterr().out
    assert all(who in printed for who in per_sample.CONTENDERS)


def test_per_sample_gradients_say_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(Peer, "installed", lambda peer: False)
    assert main(["per-sample", *TINY]) == 1
    assert "pip install opacus" in capsys.readouterr().err


def test_the_table_of_sequences(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "figures.json"
    assert main(["sequences", *TINY, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    rows = [line for line in printed.splitlines() if line.startswith("3,2,4,8")]
    assert len(rows) == 6
    assert all(re.search(r"[\d.]+ +[\d.]+ +[\d.]+$", row) for row in rows)
    written = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["what"] for row in written] == ["lengths"] * 2 + ["resets 2%"] * 2 + ["resets 30%"] * 2
