"""Look through a pickle before anything reads it: what it refers to, and whether reading it ends."""

import pickle
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from typing import IO, Any, NamedTuple

import torch

_DEEPEST = 1000  # of tuples in tuples: Python's hash of one goes as deep, and ends the process
_MOST_HASHED = 100_000_000  # parts of keys; about a second
# What an object is: no container, a name, a tuple of those, or another one.
_ATOM, _NAME, _ATOMS, _OTHER = range(4)


class _Object(NamedTuple):
    """An object on a pickle's stack."""

    kind: int = _ATOM
    depth: int = 0  # of tuples in it
    parts: int = 1  # which a hash of it visits, of shared ones each time


_MARK = _Object(-1)


class Contents(NamedTuple):
    """What a pickle has in it.

    Attributes:
        names: those that it refers to in protocols up to 2.
        is_plain: whether it calls names only, and its persistent ids are tuples without containers in
            them. Otherwise torch's unpickler shows the object in a message, which may take for ever.
    """

    names: set[str]
    is_plain: bool


def look_through(file: IO[bytes]) -> Contents:
    """Look through one pickle.

    Raises:
        ValueError: it is no pickle.
        pickle.UnpicklingError: tuples nest deeper, or hold more, than Python can hash, or it refers to
            what is not in the file.
    """
    names, is_plain, hashed = set(), True, 0
    stack: list[_Object] = []
    memo: dict[Any, _Object] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if name.startswith("EXT"):  # the registry of this process, not the file, names these
            raise pickle.UnpicklingError("the opcode EXT")
        if name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo.get(argument, _Object(_OTHER)))
            continue
        if name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            if int(argument or 0) > count:
                raise pickle.UnpicklingError("a memo beyond the end")
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1] if stack else _Object(_OTHER)
            continue
        if name == "DUP":
            stack += stack[-1:]
            continue
        parts = _take(stack, opcode)
        if name in ("SETITEM", "SETITEMS", "DICT", "ADDITEMS", "FROZENSET"):
            hashed += sum(part.parts for part in parts)
            if hashed > _MOST_HASHED:
                raise pickle.UnpicklingError("keys that take too long to hash")
        if name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            is_plain &= bool(parts) and parts[-1].kind == _NAME
        if name == "BINPERSID":
            is_plain &= bool(parts) and parts[0].kind in (_ATOM, _ATOMS)
        made = _Object(
            _ATOM if not opcode.stack_before else _OTHER, max((p.depth for p in parts), default=0)
        )
        if name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            made = _Object(_OTHER)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            made = _Object(_NAME)
            if name == "GLOBAL":
                names.add(_name_in_python_3(*str(argument).split(" ", 1)))
        elif "TUPLE" in name or name == "FROZENSET":
            only_atoms = all(part.kind in (_ATOM, _NAME) for part in parts)
            size = 1 + sum(part.parts for part in parts)
            made = _Object(_ATOMS if only_atoms else _OTHER, made.depth + 1, size)
            if made.depth > _DEEPEST or size > 100_000 + 10 * count:
                raise pickle.UnpicklingError("tuples that take too long to hash")
        stack += [_MARK if name == "MARK" else made] * len(opcode.stack_after)
    return Contents(names, is_plain)


def _take(stack: list[_Object], opcode: pickletools.OpcodeInfo) -> list[_Object]:
    """Take from a stack what an opcode takes, the last first."""
    taken: list[_Object] = []
    rest = len(opcode.stack_before)
    if pickletools.stackslice in opcode.stack_before or opcode.name in ("POP_MARK", "STOP"):
        while stack and (top := stack.pop()) is not _MARK:
            taken.append(top)
        rest = 0 if opcode.name == "STOP" else opcode.stack_before.index(pickletools.markobject)
    while rest and stack:
        taken.append(stack.pop())
        rest -= 1
    return taken


def _name_in_python_3(module: str, name: str) -> str:
    module, name = NAME_MAPPING.get((module, name), (module, name))
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"


def is_pickle(file: IO[bytes]) -> bool:
    """Whether a file begins with a pickle, as far as its head says, or otherwise its opcodes."""
    head = file.read(2)
    file.seek(0)
    if len(head) == 2 and head[0] == 0x80 and head[1] <= pickle.HIGHEST_PROTOCOL:
        return True
    try:  # without a head: it is one if it can be looked through
        look_through(file)
    except Exception:  # pickletools may raise anything for what is none
        return False
    finally:
        file.seek(0)
    return True


def is_legacy(file: IO[bytes]) -> bool:
    """Whether a file begins with the pickle that torch.save's old format begins with."""
    opcodes = pickletools.genops(file)
    try:
        first = next(
            argument for opcode, argument, _ in opcodes if opcode.name not in ("PROTO", "FRAME")
        )
    finally:
        file.seek(0)
    return bool(first == torch.serialization.MAGIC_NUMBER)
