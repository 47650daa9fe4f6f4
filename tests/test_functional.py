"""The notebook this grew from: its function, its numbers, and its comparison."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manual_lstm import lstm_forward
from manual_lstm.testing.mistakes import zeros


@pytest.mark.parametrize(
    "sizes", [(100, 1, 6, 32), (3, 50, 7, 11), (2, 0, 3, 4), (1, 4, 1, 1)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_lstm_forward_is_nn_lstm(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    B, T, I, H = sizes
    layer = nn.LSTM(I, H, batch_first=True, dtype=dtype)
    x, h_0, c_0 = (torch.randn(*s, dtype=dtype) for s in ((B, T, I), (B, H), (B, H)))
    leaves = [x.requires_grad_(), h_0.requires_grad_(), c_0.requires_grad_(), *layer.parameters()]
    output, (h_n, c_n) = lstm_forward(x, (h_0, c_0), *layer.parameters())
    assert output.is_contiguous()
    assert (output.shape, h_n.shape, c_n.shape) == ((B, T, H), (1, B, H), (1, B, H))
    if T == 0:
        assert torch.equal(h_n[0], h_0)
        return
    expected = layer(x, (h_0.unsqueeze(0), c_0.unsqueeze(0)))
    tolerance = 8 * torch.finfo(dtype).eps if dtype == torch.float32 else 1e-12
    torch.testing.assert_close((output, (h_n, c_n)), expected, rtol=0, atol=tolerance)

    def gradients(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output.abs().square().mean(), leaves)

    torch.testing.assert_close(gradients(output), gradients(expected[0]), rtol=0, atol=tolerance)


def test_lstm_forward_without_biases_keeps_dtype_and_device() -> None:
    layer = nn.LSTM(3, 4, batch_first=True, bias=False, dtype=torch.float64)
    x, zeros = torch.randn(2, 5, 3, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    output, _ = lstm_forward(x, (zeros, zeros), *layer.parameters())
    torch.testing.assert_close(output, layer(x)[0], rtol=0, atol=1e-14)
    meta = [tensor.to("meta") for tensor in (x, zeros, *layer.parameters())]
    output, (h_n, _) = lstm_forward(meta[0], (meta[1], meta[1]), *meta[2:])
    assert output.device == h_n.device == torch.device("meta")
    assert output.dtype == torch.float64


@pytest.mark.parametrize("T", [1, 5])
def test_lstm_forward_under_autocast(T: int) -> None:
    layer, x, zeros = nn.LSTM(3, 4, batch_first=True), torch.randn(2, T, 3), torch.zeros(2, 4)
    expected, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        for input in (x, x.bfloat16()):
            output, (h_n, c_n) = lstm_forward(input, (zeros, zeros), *layer.parameters())
            assert output.dtype == h_n.dtype == c_n.dtype == torch.float32
            torch.testing.assert_close(output, expected, rtol=0, atol=0.05)
    output.sum().backward()  # type: ignore[no-untyped-call]
    assert layer.weight_hh_l0.grad is not None


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


@pytest.mark.parametrize(
    ("states", "got"),
    [
        (None, "None"),
        (torch.zeros(2, 4), r"one tensor of shape \[2, 4\]"),
        ((torch.zeros(2, 4), None), r"\(Tensor, NoneType\)"),
        ((torch.zeros(2, 4),), r"\(Tensor\)"),
    ],
)
def test_states_that_are_no_pair(states: Any, got: str) -> None:
    layer = nn.LSTM(3, 4, batch_first=True)
    with pytest.raises(TypeError, match=f"initial_states should be the pair .* got {got}"):
        lstm_forward(torch.randn(2, 5, 3), states, *layer.parameters())
