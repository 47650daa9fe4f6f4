"""Read files that hold objects of other packages, without those packages and without trusting the file.

Every foreign name that a file refers to gets a stand-in: a class of ours that keeps what it is given,
and does nothing. torch's own weights-only unpickler then loads the file. Nothing of the file is
imported, called or instantiated.
"""

import io
import pickle
import pickletools
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_MOST_NAMES = 10_000
_DEEPEST = 1000  # of tuples in tuples: Python's hash of one goes as deep, and ends the process
# In torch's pickles these are dicts, which are searched like any other.
_DICTS = {"builtins.dict", "__builtin__.dict", "collections.defaultdict", "collections.OrderedDict"}
_DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "b1": torch.bool,
    "c8": torch.complex64,
    "c16": torch.complex128,
}


class StandIn:
    """An object of another package: what it was made of, and the state that it was given."""

    name = ""  # the foreign name
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> "StandIn":
        stand_in = object.__new__(cls)
        object.__setattr__(stand_in, "arguments", arguments)
        object.__setattr__(stand_in, "state", [])
        return stand_in

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state.append(state)

    def append(self, item: Any) -> None:
        self.state.append(item)

    def extend(self, items: Any) -> None:
        self.state.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.state.append({key: value})

    def children(self) -> Iterator[tuple[str, Any]]:
        """What it holds, by name; the parts of a torch module by their names in it."""
        for k, value in enumerate(self.arguments):
            yield str(k), value
        for state in self.state:
            for part in state if isinstance(state, tuple) else (state,):
                if not isinstance(part, dict):
                    yield "", part
                    continue
                for key, value in part.items():
                    is_part = key in ("_parameters", "_buffers", "_modules") and isinstance(value, dict)
                    yield from value.items() if is_part else ((str(key), value),)


class _PlainDict:
    """The stand-in of a class of dicts: an empty dict."""

    def __new__(cls, *arguments: Any) -> Any:
        return {}


def _stand_in(name: str) -> type:
    if name in _DICTS:
        return type("Dict", (_PlainDict,), {})
    return type("StandIn", (StandIn,), {"name": name})


def load_with_stand_ins(path: Path) -> object:
    """Load a file of torch.save in either format, or a plain pickle.

    Raises:
        What torch.load and pickle raise for a file that they cannot read, or refuse to.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
        names = {name for data in pickles for name in _names_in(io.BytesIO(data))}
    elif _is_legacy(path):
        with path.open(
            "rb"
        ) as file:  # pickles of the magic number, the protocol, the machine, the object
            names = {name for _ in range(4) for name in _names_in(file)}
    else:
        data = io.BytesIO(path.read_bytes())
        _names_in(data)
        data.seek(0)
        return _Unpickler(data).load()
    if len(names) > _MOST_NAMES:
        raise pickle.UnpicklingError(f"{len(names)} foreign names")
    # Of the names that torch admits by itself it takes its own.
    admitted: Any = [(_stand_in(name), name) for name in sorted(names)]
    with torch.serialization.safe_globals(admitted), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _is_legacy(path: Path) -> bool:
    """Whether a file begins with the pickle that torch.save's old format begins with."""
    if pickle_protocol(path) is None:
        raise pickle.UnpicklingError("this is no pickle")
    with path.open("rb") as file:
        opcodes = pickletools.genops(file)
        first = next(
            argument for opcode, argument, _ in opcodes if opcode.name not in ("PROTO", "FRAME")
        )
    return bool(first == torch.serialization.MAGIC_NUMBER)


def pickle_protocol(path: Path) -> int | None:
    """The protocol of the pickle that a file begins with, ``None`` if it begins with none."""
    with path.open("rb") as file:
        head = file.read(2)
    if len(head) == 2 and head[0] == 0x80 and head[1] <= pickle.HIGHEST_PROTOCOL:
        return head[1]
    return 0 if head[:1] in (b"(", b"}", b"]", b"c") else None


def _names_in(file: IO[bytes]) -> set[str]:
    """Look through one pickle before it is read.

    Returns:
        The names that it refers to in protocols up to 2.

    Raises:
        ValueError: it is no pickle.
        pickle.UnpicklingError: tuples nest deeper than Python can hash, or it refers to what is not in
            the file.
    """
    names = set()
    stack: list[int] = []  # how deep tuples nest in each object on the pickle's stack; -1 is a mark
    memo: dict[Any, int] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if name == "GLOBAL":
            names.add(_name_in_python_3(*str(argument).split(" ", 1)))
        elif name.startswith("EXT"):  # the registry of this process, not the file, names these
            raise pickle.UnpicklingError("the opcode EXT")
        if name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo.get(argument, 0))
            continue
        if name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            if int(argument or 0) > count:
                raise pickle.UnpicklingError("a memo beyond the end")
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1] if stack else 0
            continue
        if name == "DUP":
            stack += stack[-1:]
            continue
        depth = 0
        if pickletools.stackslice in opcode.stack_before or name in ("POP_MARK", "STOP"):
            while stack and (top := stack.pop()) >= 0:
                depth = max(depth, top)
            rest = opcode.stack_before.index(pickletools.markobject) if name != "STOP" else 0
        else:
            rest = len(opcode.stack_before)
        for _ in range(rest if rest <= len(stack) else len(stack)):
            depth = max(depth, stack.pop())
        if "TUPLE" in name or name == "FROZENSET":
            depth += 1
            if depth > _DEEPEST:
                raise pickle.UnpicklingError(f"tuples nested deeper than {_DEEPEST}")
        stack += [-1 if name == "MARK" else depth] * len(opcode.stack_after)
    return names


def _name_in_python_3(module: str, name: str) -> str:
    module, name = NAME_MAPPING.get((module, name), (module, name))
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"


class _Unpickler(pickle.Unpickler):
    """Reads a plain pickle; all names are stand-ins, and there are no persistent ids."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in ("_codecs.encode", "builtins.bytes"):
            return type("Bytes", (_Bytes,), {})
        return _stand_in(f"{module}.{name}")


class _Bytes:
    """The stand-in of the function that makes bytes of text in pickles of protocol 2."""

    def __new__(cls, text: Any = "", encoding: Any = "latin1") -> Any:
        return text.encode("latin1") if isinstance(text, str) else b""


def as_tensor(stand_in: StandIn) -> Tensor | None:
    """The tensor of a pickled array or number of numpy, ``None`` for anything else."""
    try:
        if stand_in.name.endswith("multiarray._reconstruct"):
            (_, shape, dtype, fortran, data) = stand_in.state[-1]
        elif stand_in.name.endswith("multiarray.scalar"):
            (dtype, data), shape, fortran = stand_in.arguments, (), False
        elif stand_in.name.endswith("numeric._frombuffer"):
            data, dtype, shape, order = stand_in.arguments
            data, fortran = bytes(data), order == "F"
        else:
            return None
        code = dtype.arguments[0]
        order = dtype.state[-1][1] if dtype.state else "|"
        code = code.decode() if isinstance(code, bytes) else code
        if code not in _DTYPES or order in (">", b">") or not isinstance(data, bytes):
            return None
        values = torch.frombuffer(bytearray(data), dtype=_DTYPES[code])
        if fortran:
            return values.reshape(tuple(reversed(shape))).permute(*reversed(range(len(shape))))
        return values.reshape(tuple(shape))
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        return None
