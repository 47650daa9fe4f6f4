"""Nested tensors, against nn.LSTM on their sequences one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manual_lstm import ManualLSTM
from manual_lstm.check.parity import twins

OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"num_layers": 2, "bidirectional": True},
    {"proj_size": 3, "bidirectional": True},
]
LENGTHS = [[2, 5, 1, 5], [3, 0, 4], [0, 0], [1]]


def run_one_by_one(
    layer: nn.LSTM, sequences: list[Tensor], h_0: Tensor, c_0: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    outputs, h_n, c_n = [], [], []
    for k, sequence in enumerate(sequences):
        h, c = h_0[:, k], c_0[:, k]
        output = sequence.new_zeros(0, h.size(1) * (2 if layer.bidirectional else 1))
        if len(sequence):
            output, (h, c) = layer(sequence, (h, c))
        outputs.append(output)
        h_n.append(h)
        c_n.append(c)
    return outputs, torch.stack(h_n, 1), torch.stack(c_n, 1)


def sine_gradients(results: list[Tensor], inputs: list[Any]) -> list[Tensor]:
    loss = torch.stack([part.sin().sum() for part in results]).sum()
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_hx", [False, True])
def test_equal_to_the_sequences_one_by_one(
    options: dict[str, Any], lengths: list[int], with_hx: bool
) -> None:
    torch.manual_seed(0)
    reference, layer = twins(4, 5, dtype=torch.float64, **options)
    L, B = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1), len(lengths)
    P = options.get("proj_size", 5)
    make = torch.randn if with_hx else torch.zeros
    hx = [make(L, B, n, dtype=torch.float64, requires_grad=True) for n in (P, 5)]
    sequences = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in lengths]

    outputs, *states = run_one_by_one(reference, sequences, *hx)
    inputs = [*sequences, *hx]
    wanted = sine_gradients([*outputs, *states], [*inputs, *reference.parameters()])

    nested: Any = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
    output, (h_n, c_n) = layer(nested, tuple(hx) if with_hx else None)
    assert output.is_nested
    assert output.layout == torch.jagged
    assert output.offsets() is nested.offsets()
    assert output.shape[:2] == nested.shape[:2]
    for actual, expected in zip(output.unbind(), outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close([h_n, c_n], states, rtol=0, atol=1e-12)

    if not with_hx:
        inputs, wanted = sequences, wanted[:B] + wanted[B + 2 :]
    found = sine_gradients([output.values(), h_n, c_n], [*inputs, *layer.parameters()])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_gaps_are_left_out() -> None:
    torch.manual_seed(0)
    layer = ManualLSTM(3, 4)
    values = torch.randn(9, 3)
    offsets, lengths = torch.tensor([0, 4, 9]), torch.tensor([3, 2])
    nested = torch.nested.nested_tensor_from_jagged(values, offsets, lengths)
    output, _ = layer(nested)
    for start, n in ((0, 3), (4, 2)):
        expected = layer(values[start : start + n])[0]
        torch.testing.assert_close(output.values()[start : start + n], expected)
    assert torch.equal(output.lengths(), lengths)


def test_unrolled_alike() -> None:
    layer = ManualLSTM(3, 4, bidirectional=True)
    sequences = [torch.randn(n, 3) for n in (2, 5)]
    unrolled = layer.unroll(torch.nested.as_nested_tensor(sequences, layout=torch.jagged))
    for k in range(2):
        for gates, sequence in zip(unrolled.f[k].unbind(), sequences, strict=True):
            torch.testing.assert_close(gates, layer.unroll(sequence).f[k])


def test_dropout_and_low_precision_and_autocast() -> None:
    layer = ManualLSTM(3, 4, 2, dropout=0.5)
    nested = torch.nested.as_nested_tensor([torch.randn(n, 3) for n in (2, 5)], layout=torch.jagged)
    assert not torch.equal(layer(nested)[0].values(), layer(nested)[0].values())
    with torch.autocast("cpu", torch.bfloat16):
        output, (h_n, _) = layer.eval()(nested)
    torch.testing.assert_close(output.values().float(), layer(nested)[0].values(), rtol=0.02, atol=0.02)
    assert layer.bfloat16()(nested.bfloat16())[0].dtype == torch.bfloat16
    assert h_n.shape == (2, 2, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.nested.nested_tensor([torch.randn(2, 3)]), "torch.strided"),
        (
            lambda: torch.nested.as_nested_tensor([torch.randn(2, 7)], layout=torch.jagged),
            r"\[B, j, 3\] of layout torch.jagged, but got \[1, \w+, 7\]",
        ),
        (
            lambda: torch.nested.as_nested_tensor([torch.randn(2)], layout=torch.jagged),
            r"\[B, j, 3\] of layout torch.jagged",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_errors_say_what_was_given(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ManualLSTM(3, 4)(make())


def test_states_of_another_batch_are_an_error() -> None:
    nested = torch.nested.as_nested_tensor([torch.randn(2, 3)] * 2, layout=torch.jagged)
    with pytest.raises(RuntimeError, match=r"Expected h_0 of size \(1, 2, 4\), got \[1, 3, 4\]"):
        ManualLSTM(3, 4)(nested, (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)))
