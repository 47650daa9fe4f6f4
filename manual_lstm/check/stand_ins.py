"""Read files that hold objects of other packages, without those packages and without trusting the file.

Every foreign name that a file refers to gets a stand-in: a class of ours that keeps what it is given,
and does nothing. torch's own weights-only unpickler then loads the file. What that does not take (other
protocols, subclasses of list and dict, plain pickles) Python's unpickler loads, for which every name is
a stand-in. Nothing of the file is imported, called or instantiated.
"""

import io
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import IO, Any

import torch

from manual_lstm.check.pickles import Contents, is_legacy, look_through

_MOST_NAMES = 10_000
_MOST_NAMES_FOR_TORCH = 1000  # it looks through all of them at every name of the file
_MOST_EXPANSION = 20  # of a compressed archive; torch does not compress
# These are dicts, which are searched like any other.
_DICTS = {"builtins.dict", "__builtin__.dict", "collections.defaultdict", "collections.OrderedDict"}
# Functions of Python that make an object of a class, which they are given.
_MAKERS = {f"{module}.{name}" for module in ("copyreg", "copy_reg")
           for name in ("_reconstructor", "__newobj__", "__newobj_ex__")}  # fmt: skip


class StandIn:
    """An object of another package: what it was made of, and the state and items that it was given."""

    name = ""  # the foreign name
    arguments: tuple[Any, ...]
    state: list[Any]
    items: list[Any]

    def __new__(cls, *arguments: Any, **keywords: Any) -> "StandIn":
        rest = list(arguments)
        state: list[Any] = []
        items: list[Any] = []
        if cls.name in _MAKERS and rest and _is_stand_in(rest[0]):
            cls = rest.pop(0)
            content = rest.pop() if rest and isinstance(rest[-1], (list, dict)) else []
            state, items = ([content], []) if isinstance(content, dict) else ([], content)
        stand_in = object.__new__(cls)
        stand_in.arguments = (*rest, keywords) if keywords else tuple(rest)
        stand_in.state, stand_in.items = state, items
        return stand_in

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **keywords: Any) -> "StandIn":
        return type(self)(*arguments, **keywords)

    def __setstate__(self, state: Any) -> None:
        self.state.append(state)

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.state.append({key: value})

    def children(self) -> Iterator[tuple[str, Any]]:
        """What it holds, by name; the parts of a torch module by their names in it."""
        for k, item in enumerate(self.items):
            yield str(k), item
        for state in self.state:
            for k, part in enumerate(state if isinstance(state, tuple) else (state,)):
                if not isinstance(part, dict):
                    if isinstance(part, list) and self.name.endswith("multiarray._reconstruct"):
                        yield "", part[0] if state[1] == () and part else part  # an array of objects
                    else:
                        yield str(k), part
                    continue
                for key, value in part.items():
                    is_part = key in ("_parameters", "_buffers", "_modules") and isinstance(value, dict)
                    yield from value.items() if is_part else ((str(key), value),)
        for k, value in enumerate(self.arguments):
            yield str(k), value


class _Dict(dict[Any, Any]):
    """The stand-in of a class of dicts."""

    def __init__(self, *arguments: Any) -> None:
        for argument in arguments:
            if isinstance(argument, Mapping):
                self.update(argument)
            elif isinstance(argument, list):
                self.update(dict(pair for pair in argument if len(pair) == 2))

    def __setstate__(self, state: Any) -> None:
        """What an OrderedDict has beside its items: a module's version numbers."""


class _PlainDict:
    """The same for torch's unpickler, which fills dicts alone: an empty dict."""

    def __new__(cls, *arguments: Any) -> Any:
        return {}


class _Bytes:
    """The stand-in of the functions that make bytes of text in pickles of protocol 2."""

    def __new__(cls, text: Any = "", encoding: Any = "latin1") -> Any:
        return text.encode("latin1") if isinstance(text, str) else b""


class Storage:
    """The numbers of tensors.

    Args:
        kind: the name of torch's class of storages, such as ``"FloatStorage"``.
        data: their bytes.
    """

    def __init__(self, kind: str, data: bytearray) -> None:
        self.kind, self.data = kind, data


def _is_stand_in(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, StandIn)


def _stand_in(name: str) -> type:
    return type("StandIn", (StandIn,), {"name": name})


def load_with_stand_ins(file: IO[bytes]) -> object:
    """Load a file of torch.save in either format and any protocol, or a plain pickle.

    Args:
        file: one that can be searched, at its beginning.

    Raises:
        What torch.load and pickle raise for a file that they cannot read, or refuse to.
    """
    read: Callable[[], object]
    is_zip = zipfile.is_zipfile(file)
    file.seek(0)
    if is_zip:
        archive = zipfile.ZipFile(file)
        _check_expansion(archive)
        records = [name for name in archive.namelist() if name.endswith("data.pkl")]
        contents = [look_through(io.BytesIO(archive.read(name))) for name in records]
        read = partial(_load_zip, archive, min(records, key=len))
    elif is_legacy(file):
        # Pickles of the magic number, the protocol, the machine, and the object.
        contents = [look_through(file) for _ in range(4)]
        read = partial(_load_legacy, file)
    else:
        look_through(file)
        file.seek(0)
        return _Unpickler(file).load()
    file.seek(0)
    try:
        return _load_by_torch(file, contents)
    except Exception:  # torch's unpickler takes less than Python's
        file.seek(0)
        return read()


def _load_by_torch(file: IO[bytes], contents: Sequence[Contents]) -> object:
    names = set().union(*(each.names for each in contents))
    if not all(each.is_plain for each in contents) or len(names) > _MOST_NAMES_FOR_TORCH:
        raise pickle.UnpicklingError("torch would take too long")
    if "_codecs.encode" in names:  # torch calls that, and it imports the codec that the file names
        raise pickle.UnpicklingError("a codec")
    # Of the names that torch admits by itself it takes its own.
    admitted: Any = [
        (_PlainDict if name in _DICTS else _stand_in(name), name) for name in sorted(names)
    ]
    with torch.serialization.safe_globals(admitted), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True)


class _Unpickler(pickle.Unpickler):
    """Python's unpickler; every name is a stand-in, and persistent ids name storages and classes."""

    def __init__(self, file: IO[bytes], storages: "_Storages | None" = None) -> None:
        super().__init__(file)
        self._storages = storages
        self._classes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        name = f"{module}.{name}"
        if name in ("_codecs.encode", "builtins.bytes"):
            return type("Bytes", (_Bytes,), {})
        if name in _DICTS:
            return type("Dict", (_Dict,), {})
        if name not in self._classes:
            if len(self._classes) == _MOST_NAMES:
                raise pickle.UnpicklingError("too many names")
            self._classes[name] = _stand_in(name)
        return self._classes[name]

    def persistent_load(self, pid: Any) -> Any:
        words = [word.decode() if isinstance(word, bytes) else word for word in pid]
        if self._storages is None or not isinstance(pid, tuple) or not _is_stand_in(words[1]):
            raise pickle.UnpicklingError("a persistent id")
        if words[0] == "module":  # a class, with the text of its file, which is passed over
            return words[1]
        kind: Any
        word, kind, key, _, _, *view = words
        if word != "storage" or not isinstance(key, str) or any(view):
            raise pickle.UnpicklingError("a persistent id")
        return self._storages(kind.name.rpartition(".")[2], key)


def _check_expansion(archive: zipfile.ZipFile) -> None:
    sizes = [(info.file_size, info.compress_size) for info in archive.infolist()]
    if sum(size for size, _ in sizes) > 10**6 + _MOST_EXPANSION * sum(packed for _, packed in sizes):
        raise pickle.UnpicklingError("an archive that expands too much")


def _load_zip(archive: zipfile.ZipFile, record: str) -> object:
    root, storages = record.removesuffix("data.pkl"), _Storages()
    if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") == b"big":
        raise pickle.UnpicklingError("a file of a machine with another order of bytes")
    with archive.open(record) as file:
        value = _Unpickler(file, storages).load()
    for key, data in storages.data.items():
        data += archive.read(f"{root}data/{key}")
    return value


def _load_legacy(file: IO[bytes]) -> object:
    storages = _Storages()
    *_, value = [_Unpickler(file, storages).load() for _ in range(4)]
    place = file.tell()
    look_through(file)
    file.seek(place)
    for key in _Unpickler(file).load():  # the numbers follow in this order
        numel = int.from_bytes(file.read(8), "little")
        storages.data[key] += file.read(numel * storages.itemsizes[key])
    return value


class _Storages:
    """The storages that a file refers to, by their keys; their bytes are read later."""

    def __init__(self) -> None:
        self.data: dict[str, bytearray] = {}
        self.itemsizes: dict[str, int] = {}

    def __call__(self, kind: str, key: str) -> Storage:
        self.itemsizes.setdefault(key, DTYPES[kind].itemsize)
        return Storage(kind, self.data.setdefault(key, bytearray()))


DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
