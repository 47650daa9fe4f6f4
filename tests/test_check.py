"""python -m manual_lstm, and check on checkpoints: whole, hidden, broken and hostile."""

import argparse
import collections
import datetime
import io
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from manual_lstm import ManualLSTM
from manual_lstm.__main__ import main
from manual_lstm.cell import lstm_cell
from manual_lstm.cells import PeepholeLSTM
from manual_lstm.check.checkpoint import FoundLSTM, find_lstms
from manual_lstm.check.loading import load_checkpoint
from manual_lstm.check.parity import CONFIGURATIONS, compare_layers, twins

Capture = pytest.CaptureFixture[str]


def test_the_comparison_prints_every_row_and_succeeds() -> None:
    command = [sys.executable, "-W", "error", "-m", "manual_lstm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for row in CONFIGURATIONS:
        assert row.label in done.stdout
    assert "weight_hh_l0  [128, 32]" in done.stdout
    assert "All within tolerance." in done.stdout


def test_the_comparison_fails_where_the_layers_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def wrong(x_t: Tensor, *rest: Any) -> Any:
        return lstm_cell(-x_t, *rest)

    monkeypatch.setattr("manual_lstm.loop.lstm_cell", wrong)
    assert main([]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_compare_sees_a_difference_in_one_element() -> None:
    reference, layer = twins(3, 4, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    assert max(compare_layers(reference, layer, x).values()) < 1e-14
    with torch.no_grad():
        layer.all_weights[0][3][7] += 1e-6
    assert min(compare_layers(reference, layer, x).values()) > 1e-9


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 3},
    {"bias": False},
    {"bidirectional": True, "num_layers": 2},
    {"proj_size": 2},
    {"proj_size": 1, "num_layers": 2, "bidirectional": True, "bias": False},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
    {"dtype": torch.complex64},
]
NESTINGS: dict[str, Any] = {
    "": lambda weights: weights,
    "module": lambda weights: {f"module.{key}": value for key, value in weights.items()},
    "state_dict.encoder.rnn": lambda weights: {
        "epoch": 3,
        "state_dict": OrderedDict({f"encoder.rnn.{key}": value for key, value in weights.items()}),
    },
    "nets.1.0.lstm": lambda weights: {"nets": [None, ({"lstm": weights}, "text")], 5: torch.zeros(2)},
}


@pytest.mark.parametrize("name", NESTINGS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_check_finds_the_lstm(
    name: str, options: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "model.pt"
    torch.save(NESTINGS[name](nn.LSTM(3, 4, **options).state_dict()), file)
    assert main(["check", str(file)]) == 0
    out, err = capsys.readouterr()
    call = repr(ManualLSTM(3, 4, **options))[:-1]
    assert out.startswith(f"{name or '(top level)'}: {call}")
    assert out.count("\n") == 1
    assert err == ""
    (found,) = find_lstms(load_checkpoint(file))
    assert isinstance(found, FoundLSTM)
    rebuilt = ManualLSTM(**found.options)  # type: ignore[arg-type]
    rebuilt.load_state_dict(found.weights)


@pytest.mark.parametrize("legacy", [False, True])
def test_check_several_in_a_training_checkpoint(legacy: bool, tmp_path: Path, capsys: Capture) -> None:
    model = nn.ModuleDict(
        {"a": nn.LSTM(3, 4), "gru": nn.GRU(3, 4), "rnn": nn.RNN(3, 4), "b": nn.LSTM(4, 5, 2)}
    )
    model["cell"] = nn.LSTMCell(3, 4)
    optimizer = torch.optim.Adam(model.parameters())
    torch.cat([p.flatten() for p in model.parameters()]).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    file = tmp_path / "last.ckpt"
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "lr": 0.1}
    torch.save(checkpoint, file, _use_new_zipfile_serialization=not legacy)
    assert main(["check", str(file), str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        [str(file), "model.a"],
        [str(file), "'model.gru' is a GRU, which is not compared"],
        [str(file), "'model.rnn' is a RNN, which is not compared"],
        [str(file), "model.b"],
        [str(file), "model.cell"],
    ] * 2
    assert all("  ok (at most 1e-09)" in line for line in lines if "is a " not in line)
    assert lines[4].endswith("(an LSTMCell, as one layer)")


class _Hostile:
    """Unpickled, it would make a file."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


def _without(key: str) -> dict[str, Tensor]:
    weights = nn.LSTM(3, 4, 2, bidirectional=True).state_dict()
    del weights[key]
    return weights


def _changed(key: str, value: Tensor) -> dict[str, Tensor]:
    return {**nn.LSTM(3, 4, 2, proj_size=2).state_dict(), key: value}


def _saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _saved_legacy(value: object) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def _scripted() -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.LSTM(3, 4)), file)
    return file.getvalue()


def _itself() -> list[object]:
    nest: list[object] = []
    nest.append(nest)
    return nest


def _zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


WHOLE = _saved(nn.LSTM(3, 4).state_dict())
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"[project]\nname = 1\n", "not a checkpoint"),
    "a byte": (b"\x80", "not a checkpoint"),
    "a zip's head": (b"PK\x03\x04", "not a checkpoint"),
    "truncated": (WHOLE[: len(WHOLE) // 2], "damaged"),
    "truncated at the end": (WHOLE[:-10], "damaged"),
    "truncated legacy": (WHOLE[100:], "damaged"),
    "hostile": (_saved({"weights": _Hostile()}), "mkdir"),
    "hostile pickle": (pickle.dumps(_Hostile(), protocol=2), "mkdir"),
    "TorchScript": (_scripted(), "TorchScript"),
    "a tensor": (_saved(torch.zeros(3)), "no LSTM"),
    "a number": (_saved(3), "no LSTM"),
    "no LSTM": (_saved(nn.Linear(3, 4).state_dict()), "no LSTM"),
    "a GRU": (_saved(nn.GRU(3, 4, 2).state_dict()), "no LSTM.* a GRU"),
    "an RNN": (_saved({"x": nn.RNN(3, 4).state_dict()}), "no LSTM.* 'x' is a RNN"),
    "a GRUCell": (_saved({"x": nn.GRUCell(3, 4).state_dict()}), "no LSTM.* 'x' is a GRUCell"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "is HDF5, as Keras writes it: .* state_dict"),
    "GGUF": (b"GGUF" + bytes(99), "is GGUF"),
    "gzip": (b"\x1f\x8b" + bytes(99), "gzip: unpack"),
    "ONNX": (b"\x08\x08\x12\x07pytorch" + bytes(99), "is an ONNX model"),
    "HTML": (b"<!DOCTYPE html><html></html>", "HTML"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "a zip": (_zipped("readme.txt"), "is a zip archive of other files"),
    "a Keras archive": (_zipped("config.json", "model.weights.h5"), "is a Keras archive"),
    "torch.package": (_zipped("p/.data/version", "p/.data/extern_modules"), "torch.package"),
    ".pt2": (_zipped("m/archive_format", "m/models/model.json"), r"torch.export \(.pt2\)"),
    "holds itself": (_saved(_itself()), "no LSTM"),
    "no weight_hh": (_saved(_without("weight_hh_l1_reverse")), "missing weight_hh_l1_reverse"),
    "no weight_ih": (_saved(_without("weight_ih_l0")), "missing weight_ih_l0"),
    "one bias": (_saved(_without("bias_hh_l0")), "missing bias_hh_l0"),
    "misshapen": (
        _saved(_changed("weight_hh_l1", torch.zeros(16, 3))),
        r"weight_hh_l1 should be \[16, 2\], but is \[16, 3\]",
    ),
    "rows": (
        _saved(_changed("weight_hh_l0", torch.zeros(15, 2))),
        r"weight_ih_l0 should be|weight_hh_l0",
    ),
    "flat": (_saved(_changed("weight_hh_l0", torch.zeros(64))), "should be 2-D"),
    "no values": (_saved(nn.LSTM(3, 4, device="meta").state_dict()), "meta tensor"),
    "sparse": (_saved(_changed("weight_ih_l0", torch.eye(16, 3).to_sparse())), "sparse"),
    "float8": (_saved(_changed("weight_ih_l0", torch.zeros(16, 3).to(torch.float8_e4m3fn))), "float8"),
    "no rows": (
        _saved({"weight_ih_l0": torch.zeros(0, 3), "weight_hh_l0": torch.zeros(0, 2)}),
        "hidden_size",
    ),
    "integers": (_saved(_changed("weight_ih_l0", torch.zeros(16, 3).long())), "torch.int64"),
    "two dtypes": (
        _saved(_changed("weight_hr_l1", torch.zeros(2, 4).half())),
        "weight_hr_l1 .* torch.float16",
    ),
    "layers": (_saved(_changed("weight_ih_l99999999", torch.zeros(16, 3))), "99999999|100000000"),
    "a line break": (_saved({"a\nb.weight_ih_l0": torch.zeros(8, 3)}), "missing weight_hh_l0"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_check_tells_in_one_line_what_is_wrong(
    kind: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, shown = BROKEN[kind]
    Path("model.pt").write_bytes(content)
    assert main(["check", "model.pt"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("model.pt: ")
    assert re.search(shown, err)
    assert not Path("unpickled").exists()


class Foreign:
    """What a package that is not installed here has put beside the weights."""

    def __init__(self) -> None:
        self.path, self.when = PurePosixPath("a/b"), datetime.datetime(2026, 1, 2)
        self.options = argparse.Namespace(hidden=4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"lstm": nn.LSTM(3, 4, 2)})


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source")
def test_check_reads_around_foreign_objects(legacy: bool, tmp_path: Path, capsys: Capture) -> None:
    numpy = pytest.importorskip("numpy")
    file = tmp_path / "last.ckpt"
    counts: dict[str, list[int]] = collections.defaultdict(list)
    counts["a"].append(1)
    checkpoint = {
        "state_dict": {f"net.{k}": v for k, v in nn.LSTM(3, 4).state_dict().items()},
        "arrays": {f"rnn.{k}": v.numpy() for k, v in nn.LSTM(2, 3).state_dict().items()},
        "model": Model(),
        "extra": [Foreign(), numpy.float64(3.0), numpy.array(["a", None], dtype=object), counts],
    }
    torch.save(checkpoint, file, _use_new_zipfile_serialization=not legacy)
    assert main(["check", str(file)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    *layers, last = out.splitlines()
    names = [line.split(":")[0] for line in layers]
    assert names == ["state_dict.net", "arrays.rnn", "model.encoder.lstm"]
    assert re.match(r"passed over \d+ foreign objects: ", last)


@pytest.mark.parametrize("protocol", range(6))
def test_check_reads_plain_pickles_of_arrays(protocol: int, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("numpy")
    file = tmp_path / "weights.pkl"
    weights = {name: weight.numpy() for name, weight in nn.LSTM(3, 4).state_dict().items()}
    weights["weight_ih_l0"] = weights["weight_ih_l0"].copy(order="F")
    file.write_bytes(pickle.dumps({"rnn": weights, "config": Foreign()}, protocol=protocol))
    assert main(["check", str(file)]) == 0
    assert capsys.readouterr().out.startswith("rnn: ManualLSTM(3, 4)  largest difference")


def test_check_reads_numpy_files(tmp_path: Path, capsys: Capture) -> None:
    numpy = pytest.importorskip("numpy")
    file = tmp_path / "weights.npz"
    numpy.savez(file, **{f"rnn.{k}": v.numpy() for k, v in nn.LSTM(3, 4).state_dict().items()})
    assert main(["check", str(file)]) == 0
    assert capsys.readouterr().out.startswith("rnn: ManualLSTM(3, 4)")


def _normed(old: bool) -> nn.Module:
    layer = nn.LSTM(3, 4)
    make: Any = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(layer, "weight_hh_l0")
        make(layer, "weight_ih_l0", dim=None if old else 1)
    return layer


def _pruned() -> nn.Module:
    layer = nn.LSTM(3, 4)
    prune.random_unstructured(layer, "weight_hh_l0", 0.5)  # type: ignore[no-untyped-call]
    return layer


COMPUTED: dict[str, tuple[Any, str]] = {
    "old weight_norm": (lambda: _normed(True), "weight_norm of x.weight_hh_l0_g, x.weight_hh_l0_v"),
    "weight_norm": (lambda: _normed(False), "weight_norm of x.parametrizations.weight_hh_l0.original0"),
    "pruning": (_pruned, "pruning of x.weight_hh_l0_orig, x.weight_hh_l0_mask"),
    "spectral_norm over columns": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.LSTM(3, 4).eval(), "weight_hh_l0", dim=1),
        "spectral_norm of x.parametrizations.weight_hh_l0.original",
    ),
    "spectral_norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.LSTM(3, 4).eval(), "weight_hh_l0"),
        "spectral_norm of x.parametrizations.weight_hh_l0.original",
    ),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_check_computes_weights(kind: str, tmp_path: Path, capsys: Capture) -> None:
    make, shown = COMPUTED[kind]
    layer = make().eval()
    layer(torch.randn(2, 1, 3))
    file = tmp_path / "model.pt"
    torch.save({"x": layer.state_dict()}, file)
    assert main(["check", str(file)]) == 0
    assert shown in capsys.readouterr().out
    (found,) = find_lstms(load_checkpoint(file))
    assert isinstance(found, FoundLSTM)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        torch.testing.assert_close(found.weights[name], getattr(layer, name).detach())


class Halves(nn.Module):
    """A parametrization with two parts, as weight_norm has, that is none."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def right_inverse(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        return whole / 2, whole / 2


@pytest.mark.parametrize("weight", ["weight_hh_l0", "bias_ih_l0"])
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("made", [Halves, nn.Tanh])
def test_check_names_parametrizations(
    weight: str, cls: Any, made: Any, tmp_path: Path, capsys: Capture
) -> None:
    layer = cls(3, 4)
    parametrize.register_parametrization(layer, weight, made())
    torch.save({"x": layer.state_dict()}, tmp_path / "model.pt")
    assert main(["check", str(tmp_path / "model.pt")]) == 1
    err = capsys.readouterr().err
    assert f"'x': {weight} is made by a parametrization that is not known, of x.param" in err


def test_check_names_what_it_does_not_compare(tmp_path: Path, capsys: Capture) -> None:
    layer = nn.LSTM(3, 4)
    parametrize.register_parametrization(layer, "weight_hh_l0", nn.Tanh())
    file = tmp_path / "model.pt"
    torch.save({"x": layer.state_dict(), "y": PeepholeLSTM(3, 4).state_dict()}, file)
    assert main(["check", str(file)]) == 1
    out, err = capsys.readouterr()
    assert "without the cell's own peephole_l0" in out
    assert "weight_hh_l0" in err


def test_check_as_json(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "model.pt"
    torch.save({"a": nn.LSTM(3, 4).state_dict(), "b": nn.GRU(3, 4).state_dict()}, file)
    assert main(["check", "--json", str(file), str(tmp_path / "none.pt")]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    lstm, gru, missing = json.loads(out)
    assert (lstm["file"], lstm["name"], lstm["status"]) == (str(file), "a", "ok")
    assert lstm["difference_in_float64"] <= lstm["tolerance"]
    assert gru["status"] == "not compared"
    assert missing["status"] == "error"


def test_a_large_difference_is_shown_beside_nn_lstms_own(tmp_path: Path, capsys: Capture) -> None:
    weights = {name: 4 * weight for name, weight in nn.LSTM(30, 60, 2).state_dict().items()}
    torch.save({name: weight.bfloat16() for name, weight in weights.items()}, tmp_path / "model.pt")
    assert main(["check", str(tmp_path / "model.pt")]) == 0
    assert re.search(r"difference \S+ \(nn.LSTM's own from float64 \S+\), in", capsys.readouterr().out)


def test_check_tells_the_good_lstms_from_the_bad(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "mixed.pt"
    whole, large = nn.LSTM(3, 4).state_dict(), nn.LSTM(20, 30, 3, bidirectional=True).state_dict()
    large = {name: 5 * torch.randn_like(weight) for name, weight in large.items()}  # chaotic
    torch.save(
        {
            "a": whole,
            "b": _without("bias_hh_l0"),
            "c": large,
            "d": dict(nn.LSTM(3, 4).named_parameters()),
        },
        file,
    )
    assert main(["check", str(file)]) == 1
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == ["a", "c", "d"]
    assert "DIFFERS" not in out
    assert err.count("\n") == 1
    assert "LSTM 'b': missing bias_hh_l0" in err


def test_check_goes_on_after_a_bad_file(tmp_path: Path, capsys: Capture) -> None:
    good = tmp_path / "good.pt"
    good.write_bytes(WHOLE)
    assert main(["check", str(tmp_path / "none.pt"), str(tmp_path), str(good)]) == 1
    out, err = capsys.readouterr()
    assert out.count("ManualLSTM(3, 4)") == 1
    assert len(err.splitlines()) == 2
    assert "No such file" in err.splitlines()[0]


def test_check_in_a_process_of_its_own_leaves_no_traceback(tmp_path: Path) -> None:
    file = tmp_path / "cut.pt"
    file.write_bytes(WHOLE[:700])
    command = [sys.executable, "-m", "manual_lstm", "check", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_safetensors(tmp_path: Path, capsys: Capture) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    file = tmp_path / "model.safetensors"
    weights = {f"rnn.{key}": value for key, value in nn.LSTM(3, 4, proj_size=2).state_dict().items()}
    safetensors.save_file(weights, file)
    assert main(["check", str(file)]) == 0
    assert capsys.readouterr().out.startswith("rnn: ManualLSTM(3, 4, proj_size=2)")
    file.write_bytes(file.read_bytes()[:100])
    assert main(["check", str(file)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_safetensors_missing_says_what_to_install(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    file = tmp_path / "model.safetensors"
    file.touch()
    assert main(["check", str(file)]) == 1
    assert "pip install safetensors" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_weights_that_are_not_finite_still_compare(tmp_path: Path, capsys: Capture) -> None:
    layer = nn.LSTM(3, 4)
    with torch.no_grad():
        layer.all_weights[0][2][0] = float("nan")
    torch.save(layer.state_dict(), tmp_path / "nan.pt")
    assert main(["check", str(tmp_path / "nan.pt")]) == 0
    assert "not all weights are finite" in capsys.readouterr().out
