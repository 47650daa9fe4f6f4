"""Mistakes that callers make, for each of which nn.LSTM raises an exception."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

# Newer versions of nn.LSTM check more of their arguments. ManualLSTM follows the newer ones.
OLDER_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)

# Wrong arguments of the constructor, by position and by name.
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


def unchecked_by_older_torch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether this torch is too old for its nn.LSTM to check for this mistake."""
    return OLDER_TORCH and bool({*kwargs, args[0]} & {"bias", "batch_first", 0, -1})


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def make_packed(data: Tensor, *sizes: int) -> PackedSequence:
    return PackedSequence(data, torch.tensor(sizes))


PACKED = pack_padded_sequence(zeros(5, 2, 3), [5, 3])
UNSORTED = pack_padded_sequence(zeros(5, 2, 3), [3, 5], enforce_sorted=False)
STATE = zeros(1, 2, 4)

# Wrong calls of a layer made with (3, 4). A name begins with the form of the input if it is not dense,
# and contains "hx", "h_0" or "c_0" if the mistake is in the states.
CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "a list": lambda m: m([[1.0, 2.0, 3.0]]),
    "None": lambda m: m(None),
    "1-D": lambda m: m(zeros(3)),
    "4-D": lambda m: m(zeros(1, 5, 2, 3)),
    "features": lambda m: m(zeros(5, 2, 4)),
    "unbatched, features": lambda m: m(zeros(5, 7)),
    "int64": lambda m: m(zeros(5, 2, 3, dtype=torch.int64)),
    "bool": lambda m: m(zeros(5, 2, 3, dtype=torch.bool)),
    "float64": lambda m: m(zeros(5, 2, 3, dtype=torch.float64)),
    "complex": lambda m: m(zeros(5, 2, 3, dtype=torch.complex64)),
    "on meta": lambda m: m(zeros(5, 2, 3, device="meta")),
    "packed, float64": lambda m: m(PACKED.to(torch.float64)),
    "packed, features": lambda m: m(make_packed(zeros(3, 4), 2, 1)),
    "packed, 3-D": lambda m: m(make_packed(zeros(3, 1, 3), 2, 1)),
    "packed, growing": lambda m: m(make_packed(zeros(3, 3), 1, 2)),
    "packed, too few rows": lambda m: m(make_packed(zeros(2, 3), 2, 1)),
    "packed, negative": lambda m: m(make_packed(zeros(3, 3), 3, 1, -1)),
    "packed, int32 sizes": lambda m: m(
        PackedSequence(zeros(3, 3), torch.tensor([2, 1], dtype=torch.int32))
    ),
    "packed, float sizes": lambda m: m(PackedSequence(zeros(3, 3), torch.tensor([2.0, 1.0]))),
    "packed, on meta": lambda m: m(PackedSequence(zeros(8, 3, device="meta"), PACKED.batch_sizes)),
    "hx a tensor": lambda m: m(zeros(5, 2, 3), zeros(2, 1, 2, 4)),
    "hx only h_0": lambda m: m(zeros(5, 2, 3), STATE),
    "hx of one": lambda m: m(zeros(5, 2, 3), (STATE,)),
    "hx of three": lambda m: m(zeros(5, 2, 3), (STATE, STATE, STATE)),
    "hx empty": lambda m: m(zeros(5, 2, 3), ()),
    "hx of None": lambda m: m(zeros(5, 2, 3), (None, None)),
    "hx without c_0": lambda m: m(zeros(5, 2, 3), (STATE, None)),
    "hx a number": lambda m: m(zeros(5, 2, 3), 3),
    "hx 2-D": lambda m: m(zeros(5, 2, 3), (zeros(2, 4), zeros(2, 4))),
    "unbatched, hx 3-D": lambda m: m(zeros(5, 3), (zeros(1, 1, 4),) * 2),
    "h_0 2-D": lambda m: m(zeros(5, 2, 3), (zeros(2, 4), STATE)),
    "hx batch": lambda m: m(zeros(5, 2, 3), (zeros(1, 3, 4),) * 2),
    "hx features": lambda m: m(zeros(5, 2, 3), (zeros(1, 2, 5),) * 2),
    "hx layers": lambda m: m(zeros(5, 2, 3), (zeros(2, 2, 4),) * 2),
    "c_0 features": lambda m: m(zeros(5, 2, 3), (STATE, zeros(1, 2, 5))),
    "hx float64": lambda m: m(zeros(5, 2, 3), (STATE.double(), STATE.double())),
    "h_0 float64": lambda m: m(zeros(5, 2, 3), (STATE.double(), STATE)),
    "c_0 float64": lambda m: m(zeros(5, 2, 3), (STATE, STATE.double())),
    "hx int64": lambda m: m(zeros(5, 2, 3), (STATE.long(), STATE.long())),
    "hx on meta": lambda m: m(zeros(5, 2, 3), (STATE.to("meta"), STATE)),
    "packed, hx batch": lambda m: m(PACKED, (zeros(1, 3, 4),) * 2),
    "packed, hx batch of 1": lambda m: m(PACKED, (zeros(1, 1, 4),) * 2),
    "packed, hx features": lambda m: m(PACKED, (zeros(1, 2, 5),) * 2),
    "packed, hx layers": lambda m: m(PACKED, (zeros(2, 2, 4),) * 2),
    "packed, hx 2-D": lambda m: m(PACKED, (zeros(2, 4),) * 2),
    "packed, hx float64": lambda m: m(PACKED, (STATE.double(),) * 2),
    "packed, hx a tensor": lambda m: m(PACKED, zeros(2, 1, 2, 4)),
    "packed, hx of one": lambda m: m(PACKED, (STATE,)),
    "packed, hx of three": lambda m: m(PACKED, (STATE,) * 3),
    "packed, hx of None": lambda m: m(PACKED, (None, None)),
    "packed unsorted, hx batch of 1": lambda m: m(UNSORTED, (zeros(1, 1, 4),) * 2),
    "packed unsorted, hx of one": lambda m: m(UNSORTED, (STATE,)),
}
