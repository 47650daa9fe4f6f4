"""Files that try to run something when ``check`` reads them: nothing does."""

import functools
import io
import operator
import os
import pickle
import runpy
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from manual_lstm.__main__ import main
from manual_lstm.check.loading import CheckpointError, load_checkpoint
from manual_lstm.check.stand_ins import StandIn
from tests.helpers.search import SEARCH

MARK = "hostile_mark"  # a directory that a file would make


class Reduced:
    """Unpickled, it would call a function."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.parts


def mkdir() -> Reduced:
    return Reduced(os.mkdir, (MARK,))


def _nested(depth: int) -> Any:
    value: Any = mkdir()
    for _ in range(depth):
        value = [value]
    return value


def function() -> None:
    """Its defaults are what a file would change."""


HOSTILE: dict[str, Any] = {
    "os.mkdir": mkdir,
    "os.system": lambda: Reduced(os.system, (f"mkdir {MARK}",)),
    "eval": lambda: Reduced(eval, (f"__import__('os').mkdir('{MARK}')",)),
    "exec": lambda: Reduced(exec, (f"import os; os.mkdir('{MARK}')",)),
    "import": lambda: Reduced(__import__, ("antigravity",)),
    "getattr": lambda: Reduced(getattr, (Reduced(__import__, ("os",)), "mkdir")),
    "reduce": lambda: Reduced(functools.reduce, (os.mkdir, [MARK])),
    "partial": lambda: Reduced(functools.partial, (os.mkdir, MARK)),
    "methodcaller": lambda: Reduced(operator.methodcaller, ("mkdir", MARK)),
    "runpy": lambda: Reduced(runpy.run_path, (f"{MARK}.py",)),
    "torch.load": lambda: Reduced(torch.load, ("inner.pt",)),
    "torch.hub.load": lambda: Reduced(torch.hub.load, (".", MARK)),
    "pickle.loads": lambda: Reduced(pickle.loads, (pickle.dumps(mkdir()),)),
    "state": lambda: Reduced(nn.Linear, (2, 3), {"__class__": mkdir()}),
    "slots": lambda: Reduced(nn.LSTM, (2, 3), (None, {"forward": mkdir()})),
    "items": lambda: Reduced(dict, (), None, None, iter([("a", mkdir())])),
    "deep": lambda: _nested(300),
}
WAYS: dict[str, Any] = {
    "zip": lambda value, file, protocol: torch.save(value, file, pickle_protocol=protocol),
    "legacy": lambda value, file, protocol: torch.save(
        value, file, pickle_protocol=protocol, _use_new_zipfile_serialization=False
    ),
    "pickle": lambda value, file, protocol: Path(file).write_bytes(pickle.dumps(value, protocol)),
}


def read(content: bytes | None, file: Path) -> None:
    """Read a file; whatever it says, nothing has run."""
    if content is not None:
        file.write_bytes(content)
    before = set(sys.modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        message = ""
        try:
            load_checkpoint(file)
        except CheckpointError as error:
            message = str(error)
        assert "\n" not in message
        main(["check", str(file)])
    assert not Path(MARK).exists()
    assert function.__defaults__ is None
    assert not {"antigravity", "encodings.rot_13"} & (set(sys.modules) - before)
    assert not hasattr(StandIn, "__defaults__")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_runs(kind: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(f"{MARK}.py").write_text(f"import os; os.mkdir('{MARK}')", encoding="utf-8")
    for protocol in range(6):
        value = {"weights": nn.LSTM(2, 3).state_dict(), "other": HOSTILE[kind]()}
        WAYS[way](value, tmp_path / "a.pt", protocol)
        read(None, tmp_path / "a.pt")


@settings(SEARCH)
@given(
    kinds=st.lists(st.sampled_from(sorted(HOSTILE)), min_size=1, max_size=4),
    way=st.sampled_from(sorted(WAYS)),
    protocol=st.integers(0, 5),
    cut=st.integers(0, 400),
    byte=st.integers(0, 255),
)
def test_nothing_runs_combined_and_damaged(
    kinds: list[str], way: str, protocol: int, cut: int, byte: int
) -> None:
    file = Path(f"hostile_{os.getpid()}.pt")
    try:
        WAYS[way]([HOSTILE[kind]() for kind in kinds], file, protocol)
        content = bytearray(file.read_bytes())
        if cut:
            content[cut % len(content)] = byte
        try:
            read(bytes(content), file)
        except SystemExit:
            raise AssertionError("the file has ended the process") from None
    finally:
        file.unlink(missing_ok=True)


RAW: dict[str, bytes] = {
    "EXT": b"\x80\x02\x82\x01.",
    "a persistent id": b"\x80\x02X\x04\x00\x00\x00evilQ.",
    "a persistent id of text": b"Pevil\n.",
    "a codec": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
    "a memo beyond the end": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a dotted name": b"\x80\x04\x8c\x08builtins\x8c\x0cprint.__self_\x93.",
    "BUILD on a class": b"\x80\x02cos\nmkdir\n}X\x01\x00\x00\x00aK\x01sb.",
    "BUILD on a stand-in's slots": b"\x80\x02cos\nmkdir\nN}X\x0c\x00\x00\x00__defaults__K\x01s\x86b.",
    "a called attribute": b"\x80\x02cbuiltins\ngetattr\ncbuiltins\n__import__\nX\x02\x00\x00\x00os\x85R"
    b"X\x05\x00\x00\x00mkdir\x86RX\x0c\x00\x00\x00hostile_mark\x85R.",
    "slots of a function": b"\x80\x02ctests.test_hostile\nfunction\nN}X\x0c\x00\x00\x00__defaults__"
    b"K\x01\x85s\x86b.",
    "slots of an admitted function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00"
    b"__defaults__K\x01\x85s\x86b.",
    "like an admitted one": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
    "of an admitted one": b"\x80\x02ccollections\nOrderedDict.fromkeys\nX\x01\x00\x00\x00a\x85R.",
    "INST": b"(X\x0c\x00\x00\x00hostile_markios\nmkdir\n.",
    "OBJ": b"(cos\nmkdir\nX\x0c\x00\x00\x00hostile_marko.",
    "nested": b"\x80\x02" + b"]" * 30_000 + b"a" * 29_999 + b".",
    "a deep key": b"\x80\x02}K\x01" + b"\x85" * 2_000_000 + b"K\x02s.",
    "an empty stack": b"\x80\x02.",
}


def _in_zip(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", "3\n")
    return file.getvalue()


def _in_legacy(content: bytes) -> bytes:
    saved = io.BytesIO()
    torch.save(0, saved, _use_new_zipfile_serialization=False)
    head = saved.getvalue()
    return head[: head.index(pickle.dumps(0, 2))] + content + pickle.dumps([], 2)


@pytest.mark.parametrize("wrap", [bytes, _in_zip, _in_legacy])
@pytest.mark.parametrize("kind", RAW)
def test_raw_opcodes(kind: str, wrap: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    read(wrap(RAW[kind]), tmp_path / "a.pt")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((8, 999), (999, 1), 0), ((8, 2), (2, 1), 9999), ((8, 2), (10**9, 1), 0), ((8, 2), (-1, 1), 4)],
)
def test_tensors_beyond_their_storage(
    size: Any,
    stride: Any,
    offset: int,
    legacy: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Beyond:
        def __reduce__(self) -> Any:
            storage = torch.storage.TypedStorage(  # type: ignore[no-untyped-call]
                wrap_storage=torch.zeros(16).untyped_storage(), dtype=torch.float32, _internal=True
            )
            return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, {})

    file = tmp_path / "a.pt"
    weights = {"weight_ih_l0": Beyond(), "weight_hh_l0": torch.zeros(8, 2)}
    torch.save(weights, file, _use_new_zipfile_serialization=not legacy)
    assert main(["check", str(file)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_torchscript_archive_by_another_name(tmp_path: Path) -> None:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.LSTM(2, 3)), file)
    (tmp_path / "a.pt").write_bytes(file.getvalue())
    with pytest.raises(CheckpointError, match="is a TorchScript archive"):
        load_checkpoint(tmp_path / "a.pt")


def test_arrays_of_objects_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = pytest.importorskip("numpy")
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.pkl"
    for protocol in range(6):
        array = numpy.array([mkdir(), None], dtype=object)
        file.write_bytes(pickle.dumps({"weight_ih_l0": array}, protocol))
        read(None, file)
    numpy.save(tmp_path / "a.npy", numpy.array([mkdir()]), allow_pickle=True)
    read(None, tmp_path / "a.npy")
