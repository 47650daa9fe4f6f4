"""The layer's numbers against nn.LSTM's, on drawn cases: values and gradients."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from manual_lstm import ManualLSTM
from manual_lstm.check.parity import data_of
from manual_lstm.testing import Case, assert_same_layer, cases
from manual_lstm.testing.comparing import run_case
from tests.helpers.layers import OPTIONS

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@given(case=cases())
def test_same_results_and_gradients_in_float64(case: Case) -> None:
    reference, layer = case.pair(ManualLSTM)
    assert_same_layer(layer, reference, case)


@given(case=cases(dtypes=(torch.complex128,), devices=("cpu",), large=False, without={"dropout"}))
def test_same_results_and_gradients_in_complex128(case: Case) -> None:
    reference, layer = case.pair(ManualLSTM)
    # Near a pole of the complex tanh both layers' errors grow without bound.
    assume(all(float(t.abs().max()) < 1e4 for t in run_case(reference, case).values() if t.numel()))
    assert_same_layer(layer, reference, case)


@given(case=cases(large=False, without={"dropout"}))
def test_gradients_from_each_result_alone_and_with_frozen_parameters(case: Case) -> None:
    reference, layer = case.pair(ManualLSTM)
    frozen = [k % 3 == case.seed % 3 for k, _ in enumerate(reference.parameters())]
    for lstm in (reference, layer):
        for parameter, freeze in zip(lstm.parameters(), frozen):
            parameter.requires_grad_(not freeze)
    for part in range(3):
        for lstm in (reference, layer):
            lstm.zero_grad(set_to_none=True)
            output, (h_n, c_n) = lstm(case.input(), case.hx())
            result = (data_of(output), h_n, c_n)[part]
            if not result.requires_grad:
                continue
            loss = result.square().sum()
            loss.backward(retain_graph=True)
            loss.backward()  # twice: the gradients add up
        for (name, theirs), ours in zip(reference.named_parameters(), layer.parameters()):
            zero = torch.zeros_like(theirs)
            got, expected = (zero if p.grad is None else p.grad for p in (ours, theirs))
            torch.testing.assert_close(
                got, expected, rtol=0, atol=1e-12 * (1 + float(expected.abs().max()))
            )
            assert ours.grad is None or ours.requires_grad, name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    reference, layer = _pair(2, bidirectional=True)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    with mode():
        expected, actual = reference(x), layer(x)
    assert not actual[0].requires_grad
    assert actual[0].is_inference() == expected[0].is_inference()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_and_gradgradcheck(options: dict[str, Any], packed: bool) -> None:
    torch.manual_seed(0)
    layer = ManualLSTM(2, 3, **options, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters())
    rows = len(layer.all_weights)
    x = torch.randn(*((4, 2) if packed else (2, 2, 2)), dtype=torch.float64, requires_grad=True)
    h_0 = torch.randn(rows, 2, layer.proj_size or 3, dtype=torch.float64, requires_grad=True)
    c_0 = torch.randn(rows, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, h_0: Tensor, c_0: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        input = PackedSequence(x, torch.tensor([2, 1, 1])) if packed else x
        weights = dict(zip(names, parameters))
        output, states = torch.func.functional_call(layer, weights, (input, (h_0, c_0)))
        return (data_of(output), *states)

    arguments = (x, h_0, c_0, *parameters)
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


def _pair(num_layers: int = 1, **options: Any) -> tuple[nn.LSTM, ManualLSTM]:
    reference = nn.LSTM(4, 5, num_layers, dtype=torch.float64, **options)
    layer = ManualLSTM(4, 5, num_layers, dtype=torch.float64, **options)
    layer.load_state_dict(reference.state_dict())
    return reference, layer
