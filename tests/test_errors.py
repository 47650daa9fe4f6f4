"""Malformed arguments and inputs: nn.LSTM's exception classes, our messages, nothing half-built."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from manual_lstm import ManualLSTM, lstm_forward
from manual_lstm.parity import LSTM

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

# nn.LSTM has come to check more of its arguments; ManualLSTM checks what the newest does.
OLDER = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)

# Each: positional and keyword arguments, and what the message must show.
BAD_ARGUMENTS: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((3, 4), {"bias": "yes"}, "'yes'"),
    ((3, 4), {"bias": 1}, "bias .* 1"),
    ((3, 4), {"batch_first": None}, "batch_first .* None"),
    ((3.0, 4), {}, "input_size .* 3.0"),
    ((3, 4.5), {}, "hidden_size .* 4.5"),
    ((None, 4), {}, "input_size .* None"),
    ((0, 4), {}, "input_size .* 0"),
    ((-1, 4), {}, "input_size .* -1"),
    ((3, 0), {}, "hidden_size .* 0"),
    ((3, -4), {}, "hidden_size .* -4"),
    ((3, 4, 0), {}, "num_layers .* 0"),
    ((3, 4, -1), {}, "num_layers .* -1"),
    ((3, 4, 1.5), {}, "num_layers .* 1.5"),
    ((3, 4, "2"), {}, "num_layers .* '2'"),
    ((3, 4, None), {}, "num_layers .* None"),
    ((3, 4), {"proj_size": -1}, "proj_size .* -1"),
    ((3, 4), {"proj_size": 4}, "proj_size .* smaller than hidden_size, 4, but got 4"),
    ((3, 4), {"proj_size": 9}, "proj_size .* 9"),
    ((3, 4), {"proj_size": 1.5}, "proj_size .* 1.5"),
    ((3, 4), {"proj_size": "1"}, "proj_size .* '1'"),
    ((3, 4), {"proj_size": None}, "proj_size .* None"),
    ((3, 4), {"dropout": "0.5"}, "dropout .* '0.5'"),
    ((3, 4), {"dropout": "much"}, "dropout .* 'much'"),
    ((3, 4), {"dropout": None}, "dropout .* None"),
    ((3, 4), {"dropout": True}, "dropout .* True"),
    ((3, 4), {"dropout": -0.1}, "dropout .* -0.1"),
    ((3, 4), {"dropout": 1.1}, "dropout .* 1.1"),
    ((3, 4), {"dropout": float("nan")}, "dropout .* nan"),
    ((3, 4), {"dropout": 1j}, "dropout .* 1j"),
    ((3, 4), {"dropout": torch.tensor(0.5)}, "dropout .* tensor"),
    ((3, 4), {"dropout": [0.5]}, r"dropout .* \[0.5\]"),
    ((3, 4), {"dropout": 10**400}, "dropout .* 1000"),
    ((3, 4), {"bias": "yes", "dropout": 2}, "dropout .* 2"),
    ((3, 4), {"device": "nowhere"}, "nowhere"),
    ((3, 4), {"device": 1.5}, "float"),
    ((3, 4), {"dtype": torch.int64}, "floating point"),
    ((3, 4), {"dtype": "float32"}, "str"),
    ((3,), {}, "hidden_size"),
    ((3, 4), {"width": 1}, "width"),
]


@pytest.mark.parametrize(("args", "kwargs", "shown"), BAD_ARGUMENTS, ids=str)
def test_constructor(args: tuple[Any, ...], kwargs: dict[str, Any], shown: str) -> None:
    with pytest.raises(Exception, match=f"(?s){shown}") as actual:
        ManualLSTM(*args, **kwargs)
    if OLDER and ({*kwargs, args[0]} & {"bias", "batch_first", 0, -1}):
        assert actual.type in (TypeError, ValueError)  # nn.LSTM did not look yet
        return
    with pytest.raises(Exception) as expected:  # noqa: PT011
        nn.LSTM(*args, **kwargs)
    assert actual.type is expected.type


@pytest.mark.parametrize("bidirectional", ["no", 1, None])
def test_bidirectional_that_is_no_bool_is_refused_at_once(bidirectional: Any) -> None:
    with pytest.raises(TypeError):  # nn.LSTM builds it, and fails when called
        nn.LSTM(3, 4, bidirectional=bidirectional)(torch.zeros(1, 1, 3))
    with pytest.raises(TypeError, match="bidirectional should be a bool"):
        ManualLSTM(3, 4, bidirectional=bidirectional)


def test_dropout_with_one_layer_warns_at_the_callers_line() -> None:
    with pytest.warns(UserWarning, match="dropout=0.5 and num_layers=1") as caught:
        ManualLSTM(3, 4, dropout=0.5)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ManualLSTM(3, 4, 2, dropout=0.5)
        ManualLSTM(3, 4)


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def packed(data: torch.Tensor, *sizes: int) -> PackedSequence:
    return PackedSequence(data, torch.tensor(sizes))


PACKED = pack_padded_sequence(x(5, 2, 3), [5, 3])
UNSORTED = pack_padded_sequence(x(5, 2, 3), [3, 5], enforce_sorted=False)
H1 = x(1, 2, 4)

BAD_INPUTS: dict[str, tuple[Callable[[LSTM], Any], str]] = {
    "a list": (lambda m: m([[1.0, 2.0, 3.0]]), "list"),
    "an array": (lambda m: m(np.zeros((5, 2, 3))), "ndarray"),
    "None": (lambda m: m(None), "NoneType"),
    "1-D": (lambda m: m(x(3)), r"1-D: \[3\]"),
    "4-D": (lambda m: m(x(1, 5, 2, 3)), "4-D"),
    "features": (lambda m: m(x(5, 2, 4)), "3, but got 4"),
    "features, unbatched": (lambda m: m(x(5, 7)), "3, but got 7"),
    "int64": (lambda m: m(x(5, 2, 3, dtype=torch.int64)), "float32, but got torch.int64"),
    "bool": (lambda m: m(x(5, 2, 3, dtype=torch.bool)), "torch.bool"),
    "float64": (lambda m: m(x(5, 2, 3, dtype=torch.float64)), "float32, but got torch.float64"),
    "complex": (lambda m: m(x(5, 2, 3, dtype=torch.complex64)), "torch.complex64"),
    "on meta": (lambda m: m(x(5, 2, 3, device="meta")), "cpu, but got input of meta"),
    "packed, float64": (lambda m: m(PACKED.to(torch.float64)), "torch.float64"),
    "packed, features": (lambda m: m(packed(x(3, 4), 2, 1)), "3, but got 4"),
    "packed, 3-D": (lambda m: m(packed(x(3, 1, 3), 2, 1)), "2 dimensions, but got 3"),
    "packed, growing": (lambda m: m(packed(x(3, 3), 1, 2)), r"\[1, 2\]"),
    "packed, too few rows": (lambda m: m(packed(x(2, 3), 2, 1)), "3 steps.* got 2"),
    "packed, negative": (lambda m: m(packed(x(3, 3), 3, 1, -1)), r"\[3, 1, -1\]"),
    "packed, int32 sizes": (
        lambda m: m(PackedSequence(x(3, 3), torch.tensor([2, 1], dtype=torch.int32))),
        "int64, but got .* torch.int32",
    ),
    "packed, float sizes": (lambda m: m(PackedSequence(x(3, 3), torch.tensor([2.0, 1.0]))), "float32"),
    "packed, on meta": (
        lambda m: m(PackedSequence(x(8, 3, device="meta"), PACKED.batch_sizes)),
        "cpu, but got input of meta",
    ),
    "hx a tensor": (lambda m: m(x(5, 2, 3), x(2, 1, 2, 4)), "one tensor"),
    "hx only h_0": (lambda m: m(x(5, 2, 3), H1), "one tensor"),
    "hx of one": (lambda m: m(x(5, 2, 3), (H1,)), "1 elements"),
    "hx of three": (lambda m: m(x(5, 2, 3), (H1, H1, H1)), "3 elements"),
    "hx empty": (lambda m: m(x(5, 2, 3), ()), "0 elements"),
    "hx of None": (lambda m: m(x(5, 2, 3), (None, None)), "NoneType, NoneType"),
    "hx without c_0": (lambda m: m(x(5, 2, 3), (H1, None)), "Tensor, NoneType"),
    "hx a number": (lambda m: m(x(5, 2, 3), 3), "int"),
    "hx of arrays": (lambda m: m(x(5, 2, 3), (np.zeros((1, 2, 4)),) * 2), "ndarray"),
    "hx 2-D": (lambda m: m(x(5, 2, 3), (x(2, 4), x(2, 4))), "2-D and 2-D"),
    "hx 3-D, unbatched": (lambda m: m(x(5, 3), (x(1, 1, 4),) * 2), "3-D and 3-D"),
    "h_0 2-D": (lambda m: m(x(5, 2, 3), (x(2, 4), H1)), "2-D and 3-D"),
    "hx batch": (lambda m: m(x(5, 2, 3), (x(1, 3, 4),) * 2), r"\(1, 2, 4\), got \[1, 3, 4\]"),
    "hx features": (lambda m: m(x(5, 2, 3), (x(1, 2, 5),) * 2), r"got \[1, 2, 5\]"),
    "hx layers": (lambda m: m(x(5, 2, 3), (x(2, 2, 4),) * 2), r"got \[2, 2, 4\]"),
    "c_0 features": (lambda m: m(x(5, 2, 3), (H1, x(1, 2, 5))), r"c_0 .* got \[1, 2, 5\]"),
    "hx float64": (lambda m: m(x(5, 2, 3), (H1.double(), H1.double())), "h_0 of torch.float64"),
    "h_0 float64": (lambda m: m(x(5, 2, 3), (H1.double(), H1)), "h_0 of torch.float64"),
    "c_0 float64": (lambda m: m(x(5, 2, 3), (H1, H1.double())), "c_0 of torch.float64"),
    "hx int64": (lambda m: m(x(5, 2, 3), (H1.long(), H1.long())), "h_0 of torch.int64"),
    "hx on meta": (lambda m: m(x(5, 2, 3), (H1.to("meta"), H1)), "h_0 of meta"),
    "packed, hx batch": (lambda m: m(PACKED, (x(1, 3, 4),) * 2), r"got \[1, 3, 4\]"),
    "packed, hx batch of 1": (lambda m: m(PACKED, (x(1, 1, 4),) * 2), r"got \[1, 1, 4\]"),
    "packed, hx features": (lambda m: m(PACKED, (x(1, 2, 5),) * 2), r"got \[1, 2, 5\]"),
    "packed, hx layers": (lambda m: m(PACKED, (x(2, 2, 4),) * 2), r"got \[2, 2, 4\]"),
    "packed, hx 2-D": (lambda m: m(PACKED, (x(2, 4),) * 2), "2-D and 2-D"),
    "packed, hx float64": (lambda m: m(PACKED, (H1.double(),) * 2), "h_0 of torch.float64"),
    "packed, hx a tensor": (lambda m: m(PACKED, x(2, 1, 2, 4)), "Tensor"),
    "packed, hx of one": (lambda m: m(PACKED, (H1,)), "1 elements"),
    "packed, hx of three": (lambda m: m(PACKED, (H1,) * 3), "3 elements"),
    "packed, hx of None": (lambda m: m(PACKED, (None, None)), "NoneType"),
    "unsorted, hx batch of 1": (lambda m: m(UNSORTED, (x(1, 1, 4),) * 2), r"got \[1, 1, 4\]"),
    "unsorted, hx of one": (lambda m: m(UNSORTED, (H1,)), "1 elements"),
}


@pytest.mark.parametrize("mistake", BAD_INPUTS)
def test_forward(mistake: str) -> None:
    call, shown = BAD_INPUTS[mistake]
    layer = ManualLSTM(3, 4)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(Exception) as expected:  # noqa: PT011
        call(nn.LSTM(3, 4))
    with pytest.raises(Exception, match=f"(?s){shown}") as actual:
        call(layer)
    assert actual.type is expected.type
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    layer(x(5, 2, 3))  # still works


def test_on_purpose_stricter_than_nn_lstm() -> None:
    wide = torch.float64
    layer = ManualLSTM(3, 4, dtype=wide)
    with pytest.raises(RuntimeError, match=r"c_0 of torch.float32"):  # nn.LSTM: only for some dtypes
        layer(x(5, 2, 3, dtype=wide), (x(1, 2, 4, dtype=wide), x(1, 2, 4)))
    with pytest.raises(RuntimeError, match=r"got \[1, 3, 4\]"):  # nn.LSTM takes the first two rows
        ManualLSTM(3, 4)(UNSORTED, (x(1, 3, 4), x(1, 3, 4)))


def test_the_notebooks_function() -> None:
    good = [x(2, 5, 3), (x(2, 4), x(2, 4)), x(16, 3), x(16, 4), x(16), x(16)]
    lstm_forward(*good)  # type: ignore[arg-type]
    bad = [(0, x(2, 3)), (1, (x(2, 5), x(2, 4))), (1, (x(2, 4), x(3, 4))), (2, x(16, 5)), (3, x(15, 4))]
    for position, tensor in [*bad, (4, x(4)), (5, x(4))]:
        arguments: list[Any] = list(good)
        arguments[position] = tensor
        with pytest.raises(ValueError, match="should be"):
            lstm_forward(*arguments)
