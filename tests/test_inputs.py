"""Every form of input: the form of the output, sequences of no steps, and the errors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from manual_lstm import ManualLSTM
from manual_lstm.check.parity import data_of
from manual_lstm.testing import Case, cases, mistakes
from manual_lstm.testing.mistakes import zeros
from tests.helpers.errors import check_mistake
from tests.helpers.layers import OPTIONS

# These need a package that nobody needs to test a layer.
ARRAYS: dict[str, Callable[[nn.Module], Any]] = {
    "an array": lambda m: m(np.zeros((5, 2, 3))),
    "hx of arrays": lambda m: m(zeros(5, 2, 3), (np.zeros((1, 2, 4)),) * 2),
}


CALLS = {**mistakes.CALLS, **ARRAYS}
# What the message shows for each of the calls. Those with packed input are in test_packed.py.
MESSAGES = {
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
}


def test_every_call_has_its_message() -> None:
    assert MESSAGES.keys() == {name for name in CALLS if not name.startswith("packed")}


@pytest.mark.parametrize("mistake", MESSAGES)
def test_a_mistake_has_nn_lstms_exception_and_our_message(mistake: str) -> None:
    check_mistake(CALLS[mistake], MESSAGES[mistake])


def test_states_of_another_dtype_are_refused_where_nn_lstm_may_take_them() -> None:
    wide = torch.float64
    layer = ManualLSTM(3, 4, dtype=wide)
    with pytest.raises(RuntimeError, match=r"c_0 of torch.float32"):  # nn.LSTM: only for some dtypes
        layer(zeros(5, 2, 3, dtype=wide), (zeros(1, 2, 4, dtype=wide), zeros(1, 2, 4)))


@given(case=cases(dtypes=(torch.float32, torch.float64, torch.bfloat16), large=False))
def test_same_form_of_the_output(case: Case) -> None:
    reference, layer = case.pair(ManualLSTM)
    expected, expected_states = reference(case.input(), case.hx())
    actual, actual_states = layer(case.input(), case.hx())
    assert type(actual) is type(expected)
    pairs = zip([data_of(actual), *actual_states], [data_of(expected), *expected_states])
    for ours, theirs in pairs:
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
        assert ours.is_contiguous() or not theirs.is_contiguous()
        if theirs.numel():
            strides = zip(theirs.shape, ours.stride(), theirs.stride())
            assert all(a == b for size, a, b in strides if size > 1)
        assert ours.requires_grad == theirs.requires_grad
    if isinstance(expected, PackedSequence):
        for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            ours, theirs = getattr(actual, field), getattr(expected, field)
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 2, 4), (0, 4), (0, 0, 4)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_sequence_of_no_steps(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    if options.get("batch_first") and len(shape) == 3:
        shape = (shape[1], 0, 4)
    layer = ManualLSTM(4, 5, **options)
    x = torch.randn(shape)
    output, (h_n, c_n) = layer(x)
    assert output.numel() == 0
    assert output.shape[:-1] == x.shape[:-1]
    assert not h_n.any()
    hx = (torch.randn_like(h_n), torch.randn_like(c_n))
    output, (h_n, c_n) = layer(x, hx)
    assert torch.equal(h_n, hx[0])
    assert torch.equal(c_n, hx[1])
    assert hx[0].numel() == 0 or h_n.data_ptr() != hx[0].data_ptr()
    (output.sum() + h_n.sum()).backward()  # a training loop may meet one
    with pytest.raises(RuntimeError):
        nn.LSTM(4, 5, **options)(x)  # where we go beyond
