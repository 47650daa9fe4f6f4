"""Tensors of the stand-ins that a file has in their place: pickled arrays of numpy, and torch's own."""

import io
import math
from typing import Any

import torch
from torch import Tensor

from manual_lstm.check.stand_ins import DTYPES, StandIn, load_with_stand_ins

MOST_REPEATED = 2**20  # numbers of an expanded tensor: a small file could ask for any memory
_NUMPY = {
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


class OutsideStorage(ValueError):
    """A tensor has numbers that the file does not hold."""


def as_tensor(stand_in: StandIn) -> Tensor | None:
    """The tensor that a stand-in has the place of, ``None`` for anything else.

    Raises:
        OutsideStorage: it has numbers that the file does not hold.
    """
    try:
        for _ in range(4):  # a parameter of a subclass's tensor
            if stand_in.name.startswith("torch._utils._rebuild_parameter"):
                stand_in = stand_in.arguments[0]
            elif stand_in.name == "torch._tensor._rebuild_from_type_v2":
                function, _, arguments = stand_in.arguments[:3]
                stand_in = function(*arguments)
        if stand_in.name.startswith("torch._utils._rebuild_tensor"):
            return _of_torch(*stand_in.arguments[:4], *stand_in.arguments[6:7])
        return _of_numpy(stand_in)
    except OutsideStorage:
        raise
    except Exception:  # a hostile file may have anything in it
        return None


def _of_torch(storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any = None) -> Tensor | None:
    values = _numbers(storage, dtype)
    shape, stride = _sizes(shape), _sizes(stride)
    (offset,) = _sizes([offset])
    if math.prod(shape) == 0:
        return values.new_empty(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if last >= len(values) or math.prod(shape) > len(values) + MOST_REPEATED:
        raise OutsideStorage
    return values.as_strided(shape, stride, offset)


def _numbers(storage: Any, dtype: Any) -> Tensor:
    """All numbers of a storage, ``[n]``; an untyped one is of the dtype that is given."""
    if isinstance(storage, StandIn) and storage.name == "torch.storage._load_from_bytes":
        storage = load_with_stand_ins(io.BytesIO(storage.arguments[0]))
    if isinstance(storage, torch.storage.TypedStorage):
        return torch.empty(0, dtype=storage.dtype).set_(storage)
    kind = DTYPES[storage.kind]
    if storage.kind == "UntypedStorage" and dtype is not None:
        kind = getattr(torch, dtype.name.removeprefix("torch."))
    if not storage.data:
        return torch.empty(0, dtype=kind)
    return torch.frombuffer(storage.data, dtype=kind)


def _sizes(values: Any) -> list[int]:
    sizes = values.arguments[0] if isinstance(values, StandIn) else values  # torch.Size
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError("these are no sizes")
    return list(sizes)


def _of_numpy(stand_in: StandIn) -> Tensor | None:
    name, arguments = stand_in.name, stand_in.arguments
    if name.endswith("multiarray._reconstruct"):
        _, shape, dtype, fortran, data = stand_in.state[-1]
    elif name.endswith("multiarray.scalar"):
        (dtype, data), shape, fortran = arguments, (), False
    elif name.endswith("numeric._frombuffer"):
        data, dtype, shape, order = arguments
        data, fortran = bytes(data), order == "F"
    else:
        return None
    code = dtype.arguments[0]
    code = code.decode() if isinstance(code, bytes) else code
    order = dtype.state[-1][1] if dtype.state else "|"
    if code not in _NUMPY or not isinstance(data, bytes):
        return None
    shape = _sizes(shape)
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=_NUMPY[code])
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if order in (">", b">"):
        values = (
            values.view(-1, _NUMPY[code].itemsize // (2 if code[0] == "c" else 1)).flip(1).flatten()
        )
    values = values.view(_NUMPY[code])
    if fortran:
        return values.reshape(shape[::-1]).permute(*reversed(range(len(shape))))
    return values.reshape(shape)
