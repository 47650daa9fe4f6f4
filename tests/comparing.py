"""Comparing two layers: which tensor differs, and by how much."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from manual_lstm.parity import LSTM, run
from tests.cases import Case

Results = dict[str, Tensor]


def assert_close(actual: Results, expected: Results, tolerance: float) -> None:
    """Compare all results; the failure names the tensor."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(1.0, float(tensor.abs().max())) if tensor.numel() else 1.0
        try:
            torch.testing.assert_close(actual[name], tensor, rtol=0, atol=tolerance * scale)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def results(layer: LSTM, case: Case) -> Results:
    """Outputs, states and gradients of the case; the same dropout for every layer."""
    torch.manual_seed(case.seed + 3)
    return run(layer, case.input(), case.hx())


def errors(layer: nn.Module, case: Case, oracle: Results) -> dict[str, float]:
    """How far each result lies from the float64 oracle, relative to its norm if above one."""
    far = {}
    for name, tensor in results(layer, case).items():  # type: ignore[arg-type]
        exact = oracle[name]
        gap = (tensor.to(exact.dtype) - exact).norm() / exact.norm().clamp_min(1.0)
        far[name] = float(gap) if exact.numel() else 0.0
    return far


def data(x: Tensor | PackedSequence) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x
