"""What a constructor sets, read off its code: a swap does not run it."""

import dis
import inspect
import types
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

_REGISTER = {"register_buffer", "register_parameter", "register_module", "add_module"}
_SET = {"setattr", "__setattr__"}


def set_by_init(cls: type, base: type) -> list[str]:
    """The attributes that ``__init__`` of ``cls`` sets, and of the classes between it and ``base``.

    Nothing is run. Found are ``self.name = ...``, registered buffers, parameters and modules, and
    ``setattr(self, "name", ...)``, also in the methods of ``self`` that ``__init__`` calls.
    """
    between = cls.__mro__[: cls.__mro__.index(base)]
    names: list[str] = []
    seen: set[types.CodeType] = set()

    def visit(function: Any) -> None:
        function = inspect.unwrap(function) if callable(function) else function
        code = getattr(function, "__code__", None)
        if not isinstance(code, types.CodeType) or not code.co_argcount or code in seen:
            return
        seen.add(code)
        for kind, name in _uses_of_self(code):
            if kind == "set":
                names.append(name)
            else:
                for owner in between:
                    if name in vars(owner):
                        visit(vars(owner)[name])
                        break

    for owner in reversed(between):
        visit(vars(owner).get("__init__"))
    return list(dict.fromkeys(names))


def _uses_of_self(code: types.CodeType) -> Iterator[tuple[str, str]]:
    """The names that code sets on its first argument, and those that it reads from it."""
    first = code.co_varnames[0]
    called = ""  # the last name that was looked up
    for before, instruction in pairwise(dis.get_instructions(code)):
        name = instruction.argval
        # From Python 3.13 on, one instruction may load two variables; the last one counts.
        loaded = before.argval[-1:] if isinstance(before.argval, tuple) else (before.argval,)
        of_self = before.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and loaded == (first,)
        if not isinstance(name, str):
            continue
        if instruction.opname == "STORE_ATTR" and of_self:
            yield "set", name
        elif instruction.opname.startswith("LOAD_CONST"):
            if called in _REGISTER or (called in _SET and of_self):
                yield "set", name
                called = ""
        elif instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME")):
            called = name
            if of_self and name not in _REGISTER:
                yield "read", name
