"""Load a checkpoint of any format that is known, or say in one line why not."""

import importlib
import io
import stat
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from manual_lstm.check.formats import describe_format
from manual_lstm.check.stand_ins import load_with_stand_ins


class CheckpointError(Exception):
    """A file cannot be read, or an LSTM in it is incomplete. The message is one line."""


def load_checkpoint(path: str | Path) -> object:
    """Load a file saved by torch.save, a pickle, or a .safetensors, .npz or .npy file, onto the CPU.

    Objects of other packages are :class:`manual_lstm.check.stand_ins.StandIn`.

    Raises:
        CheckpointError: the file cannot be read; the message says what it is, or why.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
            raise CheckpointError("is a device, not a file")
        with path.open("rb") as opened:
            # A pipe can be read once only, and a file is looked at several times.
            file = io.BytesIO(opened.read()) if stat.S_ISFIFO(mode) else opened
            return _load(file, path.suffix.lower())
    except OSError as error:
        raise CheckpointError(error.strerror or str(error).splitlines()[0]) from None


def _load(file: IO[bytes], ending: str) -> object:
    try:
        head = file.read(16)
        file.seek(0)
        if ending == ".safetensors" or (head[8:10] == b'{"' and head[:1] != b"\x80"):
            return _load_safetensors(file)
        if head.startswith(b"\x93NUMPY") or (zipfile.is_zipfile(file) and _is_npz(file)):
            file.seek(0)
            return _load_numpy(file)
        file.seek(0)
        what = describe_format(file, ending)
        if what is not None:
            raise CheckpointError(what)
        file.seek(0)
        return load_with_stand_ins(file)
    except CheckpointError:
        raise
    except MemoryError:
        raise CheckpointError("is too large for the memory") from None
    except Exception:  # a broken or hostile file may make the readers raise anything
        raise CheckpointError(
            "is damaged, or holds what is not read without trust: load it with the package that made "
            "it, and save the model's state_dict() with torch.save"
        ) from None


def _is_npz(file: IO[bytes]) -> bool:
    names = zipfile.ZipFile(file).namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def _load_numpy(file: IO[bytes]) -> object:
    try:
        numpy = importlib.import_module("numpy")
    except ModuleNotFoundError:
        raise CheckpointError("reading .npz and .npy files needs: pip install numpy") from None
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return _array(numpy, file.read())
    archive = zipfile.ZipFile(file)
    return {name.removesuffix(".npy"): _array(numpy, archive.read(name)) for name in archive.namelist()}


def _array(numpy: Any, data: bytes) -> object:
    """An array of numpy as a tensor; one of objects, which is a pickle, as what is in that."""
    try:
        array = numpy.load(io.BytesIO(data), allow_pickle=False)
    except ValueError:
        width = 2 if data[6] == 1 else 4
        start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
        return load_with_stand_ins(io.BytesIO(data[start:]))
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    except TypeError:  # text, or numbers that torch does not have
        return None


def _load_safetensors(file: IO[bytes]) -> object:
    try:
        reader = importlib.import_module("safetensors.torch")
    except ModuleNotFoundError:
        raise CheckpointError("reading .safetensors files needs: pip install safetensors") from None
    return reader.load(file.read())
