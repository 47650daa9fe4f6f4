"""Files that hold objects of packages which are not here: ``check`` reads the weights beside them."""

import collections
import datetime
import decimal
import enum
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from manual_lstm.__main__ import main
from manual_lstm.check.checkpoint import FoundLSTM, find_lstms
from manual_lstm.check.loading import CheckpointError, load_checkpoint
from manual_lstm.check.rebuilt import OutsideStorage
from tests.test_hostile import WAYS

Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source")


class Listed(list[Any]):
    """A list of another package."""


class Mapped(dict[str, Any]):
    """A dict of another package."""


class Ordered(collections.OrderedDict[str, Any]):
    """An ordered one."""


class Slotted:
    __slots__ = ("rnn",)
    rnn: Any


class Choice(enum.Enum):
    ONE = 1


class Named(torch.Tensor):
    """A subclass of Tensor."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"rnn": nn.LSTM(3, 4, 2)})


def state_dict() -> Any:
    return nn.LSTM(3, 4).state_dict()


def slotted() -> Slotted:
    made = Slotted()
    made.rnn = state_dict()
    return made


# What a file holds, and where the LSTMs in it are.
FILES: dict[str, tuple[Any, list[str]]] = {
    "a list's subclass": (lambda: {"x": Listed([state_dict(), state_dict()])}, ["x.0", "x.1"]),
    "a dict's subclass": (lambda: Mapped(a=state_dict(), b=Mapped(c=state_dict())), ["a", "b.c"]),
    "an ordered one": (lambda: Ordered(a=state_dict(), b=state_dict()), ["a", "b"]),
    "a deque": (lambda: collections.deque([state_dict(), state_dict()], 5), ["0", "1"]),
    "a defaultdict": (lambda: collections.defaultdict(int, a=state_dict()), ["a"]),
    "a module": (Model, ["encoder.rnn"]),
    "a layer": (lambda: nn.LSTM(3, 4, proj_size=2), [""]),
    "two keys of one name": (lambda: {1: state_dict(), "1": state_dict()}, ["1", "1 (2)"]),
    "an exception": (lambda: {"a": state_dict(), "error": ValueError("x")}, ["a"]),
    "numbers": (lambda: {"a": state_dict(), "n": [decimal.Decimal(3), 2**3000, Choice.ONE]}, ["a"]),
    "a date": (lambda: {"a": state_dict(), "when": datetime.datetime(2026, 1, 2)}, ["a"]),
    "a tensor's subclass": (
        lambda: {f"a.{k}": v.as_subclass(Named) for k, v in state_dict().items()},
        ["a"],
    ),
    "parameters": (lambda: {f"a.{k}": nn.Parameter(v) for k, v in state_dict().items()}, ["a"]),
    "dtypes": (
        lambda: {
            "a": {k: v.bfloat16() for k, v in state_dict().items()},
            "b": nn.LSTM(2, 3, dtype=torch.complex64).state_dict(),
            "few": torch.zeros(3, dtype=torch.uint16),
        },
        ["a", "b"],
    ),
}
SLOTTED = (slotted, ["rnn"])  # from protocol 2 on
# Protocol 0 has text for persistent ids; torch.save writes it, and torch.load does not read it.
PROTOCOLS = {"zip": (1, 2, 5), "legacy": (1, 2, 5), "pickle": (0, 2, 5)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [*FILES, "slots"])
def test_every_format_and_protocol(kind: str, way: str, tmp_path: Path) -> None:
    make, names = FILES.get(kind, SLOTTED)
    file = tmp_path / "file"
    first = 2 if kind == "slots" else PROTOCOLS[way][0]
    for protocol in range(first, 6):
        WAYS[way](make(), file, protocol)
        found = find_lstms(load_checkpoint(file))
        assert all(isinstance(lstm, FoundLSTM) for lstm in found), (protocol, found)
        assert [lstm.name for lstm in found if isinstance(lstm, FoundLSTM)] == names, protocol


@pytest.mark.parametrize("way", WAYS)
def test_the_weights_are_those_of_the_file(way: str, tmp_path: Path) -> None:
    whole = torch.randn(40, 7)
    weights = state_dict()
    weights["weight_hh_l0"] = whole[3:19, 1:5]  # part of another tensor's numbers
    weights["weight_ih_l0"] = torch.randn(3, 16).t()
    for protocol in PROTOCOLS[way]:
        WAYS[way]({"a": Mapped(weights), "whole": whole}, tmp_path / "file", protocol)
        (found,) = find_lstms(load_checkpoint(tmp_path / "file"))
        assert isinstance(found, FoundLSTM)
        torch.testing.assert_close(found.weights, dict(weights), rtol=0, atol=0)


def test_arrays_of_either_order_of_bytes(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    weights = {name: weight.numpy() for name, weight in state_dict().items()}
    swapped = {name: array.astype(">f4") for name, array in weights.items()}
    numpy.save(tmp_path / "dict.npy", weights)
    numpy.savez(tmp_path / "swapped.npz", **swapped, text=numpy.array(["a"]), long=numpy.longdouble(1))
    numpy.savez(tmp_path / "objects.npz", rnn=numpy.array([weights, None], dtype=object))
    (tmp_path / "swapped.npz").rename(tmp_path / "swapped.bin")
    (tmp_path / "swapped.pkl").write_bytes(pickle.dumps(swapped))
    for name, path in (
        ("dict.npy", ""),
        ("swapped.bin", ""),
        ("objects.npz", "rnn.0"),
        ("swapped.pkl", ""),
    ):
        (found,) = find_lstms(load_checkpoint(tmp_path / name))
        assert isinstance(found, FoundLSTM), name
        assert found.name == path
        for key, array in weights.items():
            assert found.weights[key].tolist() == array.tolist(), name


def _nested(depth: int) -> bytes:
    """Tuples that hold the one before twice, as a key: their hash takes 2 ** depth steps."""
    return (
        b"\x80\x02}K\x01q\x00"
        + b"".join(b"h%ch%c\x86q%c" % (k, k, k + 1) for k in range(depth))
        + b"K\x02s."
    )


TAKES_LONG: dict[str, bytes] = {
    "tuples held twice": _nested(60),
    "a large key": b"\x80\x02(" + b"K\x01" * 90_000 + b"tq\x00}" + b"h\x00K\x01s" * 90_000 + b".",
    "a long key": b"\x80\x02}X\x40\x0d\x03\x00" + b"a" * 200_000 + b"](" + b"}" * 5000 + b"es.",
    "deep dicts": b"\x80\x02" + b"}U\x01a" * 30_000 + b"K\x01" + b"s" * 30_000 + b".",
    "names": b"\x80\x02(" + b"".join(b"ca\nb%d\n" % k for k in range(9_999)) + b"l.",
}


def test_small_files_do_not_take_long(tmp_path: Path) -> None:
    files = []
    for kind, content in TAKES_LONG.items():
        files += [tmp_path / kind, tmp_path / f"{kind}.zip"]
        files[-2].write_bytes(content)
        torch.save({}, tmp_path / "empty")
        with zipfile.ZipFile(tmp_path / "empty") as old, zipfile.ZipFile(files[-1], "w") as new:
            for name in old.namelist():
                new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    # In a process of its own: nothing else can end a hash that takes for ever.
    words = [sys.executable, "-m", "manual_lstm", "check", *map(str, files)]
    done = subprocess.run(words, timeout=90, capture_output=True, text=True, check=False)
    assert done.stderr.count("\n") == len(files)


def test_a_small_file_asks_for_no_large_memory(tmp_path: Path) -> None:
    few = {name: weight[:1, ...].expand(weight.shape) for name, weight in state_dict().items()}
    torch.save(few, tmp_path / "few.pt")  # as nn.LSTM would load it
    assert isinstance(find_lstms(load_checkpoint(tmp_path / "few.pt"))[0], FoundLSTM)
    for wrapped in (dict, Mapped):
        many = {"weight_ih_l0": torch.zeros(1).expand(120_000, 30_000)}
        many["weight_hh_l0"] = torch.zeros(1).expand(120_000, 30_000)
        torch.save(wrapped(many), tmp_path / "many.pt")
        try:
            found = find_lstms(load_checkpoint(tmp_path / "many.pt"))
        except OutsideStorage:
            continue
        assert all(isinstance(lstm, CheckpointError) for lstm in found)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02]" + b"N0" * 10**7 + b".")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "bomb.pt")


def test_a_pipe_is_read(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "model.pt")
    words = [sys.executable, "-m", "manual_lstm", "check", "/dev/stdin"]
    done = subprocess.run(
        words, input=(tmp_path / "model.pt").read_bytes(), capture_output=True, check=False
    )
    assert b"ManualLSTM(3, 4)" in done.stdout
    with pytest.raises(CheckpointError, match="is a device"):
        load_checkpoint(os.devnull)


@pytest.mark.parametrize("ending", [".h5", ".onnx", ".pb", ".ckpt", ""])
def test_the_bytes_say_what_a_file_is(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{ending}"
    for way, write in WAYS.items():
        for protocol in PROTOCOLS[way]:
            write({"pytorch_version": "2", "onnx": "x" * 2000, "a": state_dict()}, file, protocol)
            assert isinstance(find_lstms(load_checkpoint(file))[0], FoundLSTM)


def test_json_has_no_number_that_is_none(tmp_path: Path, capsys: Capture) -> None:
    layer = nn.LSTM(3, 4, proj_size=2)
    nn.init.constant_(layer.get_parameter("weight_hr_l0"), 3e38)
    torch.save(layer.state_dict(), tmp_path / "model.pt")
    main(["check", "--json", str(tmp_path / "model.pt")])
    out = capsys.readouterr().out
    assert not re.search("Infinity|NaN", out)
    (line,) = json.loads(out)
    assert line["difference"] is None or line["own_difference"] is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.LSTMCell])
def test_quantized_layers_are_named(cls: Any, tmp_path: Path, capsys: Capture) -> None:
    model = nn.ModuleDict({"enc": cls(3, 4)})
    quantize: Any = torch.ao.quantization.quantize_dynamic
    quantized = quantize(model, {cls})
    for saved in (quantized, quantized.state_dict()):
        torch.save(saved, tmp_path / "model.pt")
        assert main(["check", str(tmp_path / "model.pt")]) == 1
        assert "'enc' is a quantized" in capsys.readouterr().err
