"""Malformed arguments and inputs: nn.LSTM's exception classes, our messages, nothing half-built."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from manual_lstm import ManualLSTM, lstm_forward
from manual_lstm.testing import mistakes
from manual_lstm.testing.mistakes import UNSORTED, zeros

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

# What the message shows for each of mistakes.ARGUMENTS, in their order.
ARGUMENTS_SHOWN = [
    "'yes'",
    "bias .* 1",
    "batch_first .* None",
    "input_size .* 3.0",
    "hidden_size .* 4.5",
    "input_size .* None",
    "input_size .* 0",
    "input_size .* -1",
    "hidden_size .* 0",
    "hidden_size .* -4",
    "num_layers .* 0",
    "num_layers .* -1",
    "num_layers .* 1.5",
    "num_layers .* '2'",
    "num_layers .* None",
    "proj_size .* -1",
    "proj_size .* smaller than hidden_size, 4, but got 4",
    "proj_size .* 9",
    "proj_size .* 1.5",
    "proj_size .* '1'",
    "proj_size .* None",
    "dropout .* '0.5'",
    "dropout .* 'much'",
    "dropout .* None",
    "dropout .* True",
    "dropout .* -0.1",
    "dropout .* 1.1",
    "dropout .* nan",
    "dropout .* 1j",
    "dropout .* tensor",
    r"dropout .* \[0.5\]",
    "dropout .* 1000",
    "dropout .* 2",
    "nowhere",
    "float",
    "floating point",
    "str",
    "hidden_size",
    "width",
]


@pytest.mark.parametrize(
    ("mistake", "shown"), list(zip(mistakes.ARGUMENTS, ARGUMENTS_SHOWN, strict=True)), ids=str
)
def test_constructor(mistake: tuple[tuple[Any, ...], dict[str, Any]], shown: str) -> None:
    args, kwargs = mistake
    with pytest.raises(Exception, match=f"(?s){shown}") as actual:
        ManualLSTM(*args, **kwargs)
    if mistakes.unchecked_by_older_torch(args, kwargs):
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


# These need a package that nobody needs to test a layer.
ARRAYS: dict[str, Callable[[nn.Module], Any]] = {
    "an array": lambda m: m(np.zeros((5, 2, 3))),
    "hx of arrays": lambda m: m(zeros(5, 2, 3), (np.zeros((1, 2, 4)),) * 2),
}
CALLS = {**mistakes.CALLS, **ARRAYS}
# What the message shows for each of the calls.
CALLS_SHOWN = {
    "a list": "list",
    "an array": "ndarray",
    "None": "NoneType",
    "1-D": r"1-D: \[3\]",
    "4-D": "4-D",
    "features": "3, but got 4",
    "unbatched, features": "3, but got 7",
    "int64": "float32, but got torch.int64",
    "bool": "torch.bool",
    "float64": "float32, but got torch.float64",
    "complex": "torch.complex64",
    "on meta": "cpu, but got input of meta",
    "packed, float64": "torch.float64",
    "packed, features": "3, but got 4",
    "packed, 3-D": "2 dimensions, but got 3",
    "packed, growing": r"\[1, 2\]",
    "packed, too few rows": "3 steps.* got 2",
    "packed, negative": r"\[3, 1, -1\]",
    "packed, int32 sizes": "int64, but got .* torch.int32",
    "packed, float sizes": "float32",
    "packed, on meta": "cpu, but got input of meta",
    "hx a tensor": "one tensor",
    "hx only h_0": "one tensor",
    "hx of one": "1 elements",
    "hx of three": "3 elements",
    "hx empty": "0 elements",
    "hx of None": "NoneType, NoneType",
    "hx without c_0": "Tensor, NoneType",
    "hx a number": "int",
    "hx of arrays": "ndarray",
    "hx 2-D": "2-D and 2-D",
    "unbatched, hx 3-D": "3-D and 3-D",
    "h_0 2-D": "2-D and 3-D",
    "hx batch": r"\(1, 2, 4\), got \[1, 3, 4\]",
    "hx features": r"got \[1, 2, 5\]",
    "hx layers": r"got \[2, 2, 4\]",
    "c_0 features": r"c_0 .* got \[1, 2, 5\]",
    "hx float64": "h_0 of torch.float64",
    "h_0 float64": "h_0 of torch.float64",
    "c_0 float64": "c_0 of torch.float64",
    "hx int64": "h_0 of torch.int64",
    "hx on meta": "h_0 of meta",
    "packed, hx batch": r"got \[1, 3, 4\]",
    "packed, hx batch of 1": r"got \[1, 1, 4\]",
    "packed, hx features": r"got \[1, 2, 5\]",
    "packed, hx layers": r"got \[2, 2, 4\]",
    "packed, hx 2-D": "2-D and 2-D",
    "packed, hx float64": "h_0 of torch.float64",
    "packed, hx a tensor": "Tensor",
    "packed, hx of one": "1 elements",
    "packed, hx of three": "3 elements",
    "packed, hx of None": "NoneType",
    "packed unsorted, hx batch of 1": r"got \[1, 1, 4\]",
    "packed unsorted, hx of one": "1 elements",
}


def test_every_call_has_its_message() -> None:
    assert CALLS_SHOWN.keys() == CALLS.keys()


@pytest.mark.parametrize("mistake", CALLS)
def test_forward(mistake: str) -> None:
    call, shown = CALLS[mistake], CALLS_SHOWN[mistake]
    layer = ManualLSTM(3, 4)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(Exception) as expected:  # noqa: PT011
        call(nn.LSTM(3, 4))
    with pytest.raises(Exception, match=f"(?s){shown}") as actual:
        call(layer)
    assert actual.type is expected.type
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    layer(zeros(5, 2, 3))  # still works


def test_on_purpose_stricter_than_nn_lstm() -> None:
    wide = torch.float64
    layer = ManualLSTM(3, 4, dtype=wide)
    with pytest.raises(RuntimeError, match=r"c_0 of torch.float32"):  # nn.LSTM: only for some dtypes
        layer(zeros(5, 2, 3, dtype=wide), (zeros(1, 2, 4, dtype=wide), zeros(1, 2, 4)))
    with pytest.raises(RuntimeError, match=r"got \[1, 3, 4\]"):  # nn.LSTM takes the first two rows
        ManualLSTM(3, 4)(UNSORTED, (zeros(1, 3, 4), zeros(1, 3, 4)))


def test_the_notebooks_function() -> None:
    good = [
        zeros(2, 5, 3),
        (zeros(2, 4), zeros(2, 4)),
        zeros(16, 3),
        zeros(16, 4),
        zeros(16),
        zeros(16),
    ]
    lstm_forward(*good)  # type: ignore[arg-type]
    bad = [
        (0, zeros(2, 3)),
        (1, (zeros(2, 5), zeros(2, 4))),
        (1, (zeros(2, 4), zeros(3, 4))),
        (2, zeros(16, 5)),
        (3, zeros(15, 4)),
    ]
    for position, tensor in [*bad, (4, zeros(4)), (5, zeros(4))]:
        arguments: list[Any] = list(good)
        arguments[position] = tensor
        with pytest.raises(ValueError, match="should be"):
            lstm_forward(*arguments)
