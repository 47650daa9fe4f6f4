"""Packed input: sorted, unsorted, made by hand; its numbers, its form, and its errors."""

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    unpack_sequence,
)

from manual_lstm import ManualLSTM
from manual_lstm.check.parity import forward_and_backward, twins
from manual_lstm.testing import Case, assert_same_layer, cases
from manual_lstm.testing.comparing import assert_close
from manual_lstm.testing.mistakes import CALLS, UNSORTED
from tests.helpers.errors import check_mistake
from tests.helpers.layers import DEEP, randn
from tests.helpers.loops import arguments, fused_direction, plain_direction, run_direction

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


# The numbers


@given(case=cases(without={"dense", "unbatched"}))
def test_drawn_packed_cases_equal_nn_lstm(case: Case) -> None:
    reference, layer = case.pair(ManualLSTM)
    assert_same_layer(layer, reference, case)


@pytest.mark.parametrize("lengths", [[5, 3, 1], [1, 5, 3], [2, 2, 2], [3]], ids=str)
def test_each_sequence_gives_what_it_gives_alone(lengths: list[int]) -> None:
    """In the order of the caller, states too: whatever the order of the lengths."""
    _, layer = twins(3, 4, dtype=torch.float64, **DEEP)
    sequences = [randn(n, 3) for n in lengths]
    h_0, c_0 = randn(4, len(lengths), 3), randn(4, len(lengths), 4)
    packed = pack_sequence(sequences, enforce_sorted=False)
    output, (h_n, c_n) = layer(packed, (h_0, c_0))
    for k, (sequence, result) in enumerate(zip(sequences, unpack_sequence(output), strict=True)):
        alone, (h, c) = layer(sequence, (h_0[:, k], c_0[:, k]))
        torch.testing.assert_close(result, alone, rtol=0, atol=1e-14)
        torch.testing.assert_close((h_n[:, k], c_n[:, k]), (h, c), rtol=0, atol=1e-14)


def test_sorted_and_made_by_hand_are_one_and_the_same() -> None:
    """Without indices the rows are in the order of the lengths, and so are the states."""
    _, layer = twins(3, 4, dtype=torch.float64, **DEEP)
    lengths = [5, 3, 1]
    packed = pack_sequence([randn(n, 3) for n in lengths])
    hx = randn(4, 3, 3), randn(4, 3, 4)
    by_hand = PackedSequence(packed.data, packed.batch_sizes)
    results = [layer(x, hx) for x in (packed, by_hand)]
    assert all(output.sorted_indices is None for output, _ in results)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    padded, kept = pad_packed_sequence(results[0][0])
    assert kept.tolist() == lengths
    assert not padded[3:, 1].any()


@pytest.mark.parametrize("batch_first", [False, True])
def test_batch_first_means_nothing_to_packed_input(batch_first: bool) -> None:
    reference, layer = twins(3, 4, batch_first=batch_first, dtype=torch.float64)
    x: Tensor = randn(5, 3, 3)
    packed = pack_padded_sequence(x, [2, 5, 1], enforce_sorted=False)
    assert_close(
        forward_and_backward(layer, packed, None), forward_and_backward(reference, packed, None), 1e-12
    )


@pytest.mark.parametrize("sizes", [[2], [2, 1], [2, 2, 1]], ids=str)
def test_packed_data_with_rows_that_no_step_takes(sizes: list[int]) -> None:
    reference, layer = twins(3, 4, 2, dtype=torch.float64)
    input = PackedSequence(torch.randn(8, 3, dtype=torch.float64), torch.tensor(sizes))
    assert_close(
        forward_and_backward(layer, input, None), forward_and_backward(reference, input, None), 1e-12
    )


def test_more_data_than_steps_is_an_error() -> None:
    direction_args = list(arguments([2, 1], packed=True))
    direction_args[0] = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"3 rows.*got 5"):
        fused_direction(*direction_args)


@pytest.mark.parametrize("sizes", [[1, 1, 0, 0], [1, 0], [3, 2, 0, 0], [0, 0]], ids=str)
@pytest.mark.parametrize("H", [3, 4])
@pytest.mark.parametrize("reverse", [False, True])
def test_steps_of_no_sequence_at_the_end(sizes: list[int], H: int, reverse: bool) -> None:
    direction_args = arguments(sizes, packed=True, H=H, reverse=reverse)
    expected = run_direction(plain_direction, direction_args, [True] * 3)
    assert_close(run_direction(fused_direction, direction_args, [True] * 3), expected, 1e-12)


# Errors

# What the message shows for each of the calls.
MESSAGES = {
    "packed, float64": "torch.float64",
    "packed, features": "3, but got 4",
    "packed, 3-D": "2 dimensions, but got 3",
    "packed, growing": r"\[1, 2\]",
    "packed, too few rows": "3 steps.* got 2",
    "packed, negative": r"\[3, 1, -1\]",
    "packed, int32 sizes": "int64, but got .* torch.int32",
    "packed, float sizes": "float32",
    "packed, on meta": "cpu, but got input of meta",
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
    assert MESSAGES.keys() == {name for name in CALLS if name.startswith("packed")}


@pytest.mark.parametrize("mistake", MESSAGES)
def test_a_mistake_has_nn_lstms_exception_and_our_message(mistake: str) -> None:
    check_mistake(CALLS[mistake], MESSAGES[mistake])


def test_more_states_than_sequences_are_refused_where_nn_lstm_takes_the_first() -> None:
    states = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
    nn.LSTM(3, 4)(UNSORTED, states)
    with pytest.raises(RuntimeError, match=r"got \[1, 3, 4\]"):
        ManualLSTM(3, 4)(UNSORTED, states)
