"""Mistakes that callers make, for which nn.LSTM has an exception."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

# nn.LSTM has come to check more of its arguments; what its older ones do about some is no example.
OLDER = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)

# Arguments of the constructor.
ARGUMENTS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((3, 4), {"bias": "yes"}),
    ((3, 4), {"bias": 1}),
    ((3, 4), {"batch_first": None}),
    ((3.0, 4), {}),
    ((3, 4.5), {}),
    ((None, 4), {}),
    ((0, 4), {}),
    ((-1, 4), {}),
    ((3, 0), {}),
    ((3, -4), {}),
    ((3, 4, 0), {}),
    ((3, 4, -1), {}),
    ((3, 4, 1.5), {}),
    ((3, 4, "2"), {}),
    ((3, 4, None), {}),
    ((3, 4), {"proj_size": -1}),
    ((3, 4), {"proj_size": 4}),
    ((3, 4), {"proj_size": 9}),
    ((3, 4), {"proj_size": 1.5}),
    ((3, 4), {"proj_size": "1"}),
    ((3, 4), {"proj_size": None}),
    ((3, 4), {"dropout": "0.5"}),
    ((3, 4), {"dropout": "much"}),
    ((3, 4), {"dropout": None}),
    ((3, 4), {"dropout": True}),
    ((3, 4), {"dropout": -0.1}),
    ((3, 4), {"dropout": 1.1}),
    ((3, 4), {"dropout": float("nan")}),
    ((3, 4), {"dropout": 1j}),
    ((3, 4), {"dropout": torch.tensor(0.5)}),
    ((3, 4), {"dropout": [0.5]}),
    ((3, 4), {"dropout": 10**400}),
    ((3, 4), {"bias": "yes", "dropout": 2}),
    ((3, 4), {"device": "nowhere"}),
    ((3, 4), {"device": 1.5}),
    ((3, 4), {"dtype": torch.int64}),
    ((3, 4), {"dtype": "float32"}),
    ((3,), {}),
    ((3, 4), {"width": 1}),
]


def unsettled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the nn.LSTM of this torch does not look at this mistake yet."""
    return OLDER and bool({*kwargs, args[0]} & {"bias", "batch_first", 0, -1})


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def packed(data: Tensor, *sizes: int) -> PackedSequence:
    return PackedSequence(data, torch.tensor(sizes))


PACKED = pack_padded_sequence(x(5, 2, 3), [5, 3])
UNSORTED = pack_padded_sequence(x(5, 2, 3), [3, 5], enforce_sorted=False)
H1 = x(1, 2, 4)

# Calls of a layer made with (3, 4). Names begin with the form of the input, where it is not dense,
# and contain "hx", "h_0" or "c_0" where the state is the mistake.
CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "a list": lambda m: m([[1.0, 2.0, 3.0]]),
    "None": lambda m: m(None),
    "1-D": lambda m: m(x(3)),
    "4-D": lambda m: m(x(1, 5, 2, 3)),
    "features": lambda m: m(x(5, 2, 4)),
    "unbatched, features": lambda m: m(x(5, 7)),
    "int64": lambda m: m(x(5, 2, 3, dtype=torch.int64)),
    "bool": lambda m: m(x(5, 2, 3, dtype=torch.bool)),
    "float64": lambda m: m(x(5, 2, 3, dtype=torch.float64)),
    "complex": lambda m: m(x(5, 2, 3, dtype=torch.complex64)),
    "on meta": lambda m: m(x(5, 2, 3, device="meta")),
    "packed, float64": lambda m: m(PACKED.to(torch.float64)),
    "packed, features": lambda m: m(packed(x(3, 4), 2, 1)),
    "packed, 3-D": lambda m: m(packed(x(3, 1, 3), 2, 1)),
    "packed, growing": lambda m: m(packed(x(3, 3), 1, 2)),
    "packed, too few rows": lambda m: m(packed(x(2, 3), 2, 1)),
    "packed, negative": lambda m: m(packed(x(3, 3), 3, 1, -1)),
    "packed, int32 sizes": lambda m: m(
        PackedSequence(x(3, 3), torch.tensor([2, 1], dtype=torch.int32))
    ),
    "packed, float sizes": lambda m: m(PackedSequence(x(3, 3), torch.tensor([2.0, 1.0]))),
    "packed, on meta": lambda m: m(PackedSequence(x(8, 3, device="meta"), PACKED.batch_sizes)),
    "hx a tensor": lambda m: m(x(5, 2, 3), x(2, 1, 2, 4)),
    "hx only h_0": lambda m: m(x(5, 2, 3), H1),
    "hx of one": lambda m: m(x(5, 2, 3), (H1,)),
    "hx of three": lambda m: m(x(5, 2, 3), (H1, H1, H1)),
    "hx empty": lambda m: m(x(5, 2, 3), ()),
    "hx of None": lambda m: m(x(5, 2, 3), (None, None)),
    "hx without c_0": lambda m: m(x(5, 2, 3), (H1, None)),
    "hx a number": lambda m: m(x(5, 2, 3), 3),
    "hx 2-D": lambda m: m(x(5, 2, 3), (x(2, 4), x(2, 4))),
    "unbatched, hx 3-D": lambda m: m(x(5, 3), (x(1, 1, 4),) * 2),
    "h_0 2-D": lambda m: m(x(5, 2, 3), (x(2, 4), H1)),
    "hx batch": lambda m: m(x(5, 2, 3), (x(1, 3, 4),) * 2),
    "hx features": lambda m: m(x(5, 2, 3), (x(1, 2, 5),) * 2),
    "hx layers": lambda m: m(x(5, 2, 3), (x(2, 2, 4),) * 2),
    "c_0 features": lambda m: m(x(5, 2, 3), (H1, x(1, 2, 5))),
    "hx float64": lambda m: m(x(5, 2, 3), (H1.double(), H1.double())),
    "h_0 float64": lambda m: m(x(5, 2, 3), (H1.double(), H1)),
    "c_0 float64": lambda m: m(x(5, 2, 3), (H1, H1.double())),
    "hx int64": lambda m: m(x(5, 2, 3), (H1.long(), H1.long())),
    "hx on meta": lambda m: m(x(5, 2, 3), (H1.to("meta"), H1)),
    "packed, hx batch": lambda m: m(PACKED, (x(1, 3, 4),) * 2),
    "packed, hx batch of 1": lambda m: m(PACKED, (x(1, 1, 4),) * 2),
    "packed, hx features": lambda m: m(PACKED, (x(1, 2, 5),) * 2),
    "packed, hx layers": lambda m: m(PACKED, (x(2, 2, 4),) * 2),
    "packed, hx 2-D": lambda m: m(PACKED, (x(2, 4),) * 2),
    "packed, hx float64": lambda m: m(PACKED, (H1.double(),) * 2),
    "packed, hx a tensor": lambda m: m(PACKED, x(2, 1, 2, 4)),
    "packed, hx of one": lambda m: m(PACKED, (H1,)),
    "packed, hx of three": lambda m: m(PACKED, (H1,) * 3),
    "packed, hx of None": lambda m: m(PACKED, (None, None)),
    "packed unsorted, hx batch of 1": lambda m: m(UNSORTED, (x(1, 1, 4),) * 2),
    "packed unsorted, hx of one": lambda m: m(UNSORTED, (H1,)),
}
