"""ManualLSTM against nn.LSTM, on drawn cases: values, gradients, shapes, strides, precision."""

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from manual_lstm import ManualLSTM
from manual_lstm.check.parity import data_of, forward_and_backward, twins
from manual_lstm.testing import Case, assert_same_layer, cases
from manual_lstm.testing.comparing import assert_close, oracle, relative_errors

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@given(case=cases())
def test_same_results_and_gradients_in_float64(case: Case) -> None:
    reference, layer = case.pair(ManualLSTM)
    assert_same_layer(layer, reference, case)


@given(case=cases(dtypes=(torch.complex128,), devices=("cpu",), large=False, without={"dropout"}))
def test_same_results_and_gradients_in_complex128(case: Case) -> None:
    reference, layer = case.pair(ManualLSTM)
    assert_same_layer(layer, reference, case)


NARROW = (torch.float32, torch.bfloat16, torch.float16)


def _errors_of_both(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """The distance from a float64 oracle of our results, and of nn.LSTM's."""
    reference, layer = case.pair(ManualLSTM)
    exact = oracle(reference, case)
    return relative_errors(layer, case, exact), relative_errors(reference, case, exact)


@given(case=cases(dtypes=NARROW, devices=("cpu",)))
def test_no_drawn_case_is_far_less_exact_than_nn_lstm(case: Case) -> None:
    # A single small case is a draw of the lot for both layers; the averages below are the measure.
    reference, layer = case.pair(ManualLSTM)
    assert_same_layer(layer, reference, case)
    ours, theirs = _errors_of_both(case)
    for name, error in ours.items():
        assert error <= 2 * theirs[name] + 16 * torch.finfo(case.dtype).eps, (name, error, theirs[name])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize(
    ("sizes", "runs"),
    [((7, 3, 4, 5), 20), ((34, 1, 1, 14), 20), ((60, 40, 70, 70), 3), ((800, 8, 8, 16), 2)],
)
@pytest.mark.parametrize("deep", [False, True])
def test_as_exact_as_nn_lstm_on_average(
    dtype: torch.dtype, form: str, sizes: tuple[int, ...], runs: int, deep: bool
) -> None:
    T, B, I, H = sizes
    ours, theirs = dict[str, float](), dict[str, float]()
    for seed in range(runs):
        options: dict[str, Any] = {
            "input_size": I,
            "hidden_size": H,
            "num_layers": 3 if deep else 1,
            "bias": True,
        }
        options |= {"batch_first": False, "dropout": 0.0, "bidirectional": deep, "proj_size": 0}
        case = Case(options, form, [T] * B, "contiguous", True, True, dtype, "cpu", seed)
        for total, errors_ in zip((ours, theirs), _errors_of_both(case)):
            for name, error in errors_.items():
                total[name] = total.get(name, 0.0) + error
    for name in ours:
        assert ours[name] <= 1.5 * theirs[name], (name, ours[name] / runs, theirs[name] / runs)


@pytest.mark.parametrize("form", ["dense", "packed", "projected"])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("sizes", [(10, 64, 16, 512), (12, 32, 300, 260)])
def test_large_layers_have_at_most_twice_nn_lstms_error(
    form: str, scale: float, sizes: tuple[int, ...]
) -> None:
    T, B, I, H = sizes  # products of oneDNN's sizes; nn.LSTM leaves oneDNN where input is packed
    torch.manual_seed(0)
    reference, layer = twins(I, H, proj_size=H // 2 if form == "projected" else 0)
    x = torch.randn(T, B, I) * scale
    lengths = [T, *torch.randint(1, T + 1, (B - 1,)).tolist()]
    input = (
        nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False) if form == "packed" else x
    )
    oracle = forward_and_backward(copy.deepcopy(reference).double(), input.to(torch.float64), None)
    theirs, ours = (
        forward_and_backward(reference, input, None),
        forward_and_backward(layer, input, None),
    )
    for name, exact in oracle.items():
        far = [float((found[name].double() - exact).norm()) for found in (ours, theirs)]
        assert far[0] <= 2 * far[1], (name, far)


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


OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"num_layers": 2},
    {"bidirectional": True},
    {"proj_size": 2},
    {"batch_first": True},
    {"num_layers": 2, "bidirectional": True, "proj_size": 1},
]


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


def test_dropout_draws_the_same_numbers_in_every_dtype_and_form() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for batch_first in (False, True):
            options: dict[str, Any] = {"dropout": 0.5, "batch_first": batch_first, "dtype": dtype}
            reference, layer = nn.LSTM(4, 5, 3, **options), ManualLSTM(4, 5, 3, **options)
            layer.load_state_dict(reference.state_dict())
            x = torch.randn(6, 3, 4, dtype=dtype)
            packed = nn.utils.rnn.pack_padded_sequence(
                x, [3, 1, 2, 2, 3, 3] if batch_first else [4, 6, 2], batch_first, enforce_sorted=False
            )
            for input in (x, packed):
                torch.manual_seed(7)
                expected = data_of(reference(input)[0])
                after = torch.rand(1)
                torch.manual_seed(7)
                actual = data_of(layer(input)[0])
                assert torch.equal(torch.rand(1), after)  # as many numbers drawn
                tolerance = 4 * torch.finfo(dtype).eps
                torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_autocast(
    options: dict[str, Any], packed: bool, weights: torch.dtype, autocast: torch.dtype
) -> None:
    reference = nn.LSTM(4, 5, **options, dtype=weights)
    layer = ManualLSTM(4, 5, **options, dtype=weights)
    layer.load_state_dict(reference.state_dict())
    x = torch.randn(3, 3, 4, dtype=weights)
    input = nn.utils.rnn.pack_padded_sequence(x, [3, 2, 1]) if packed else x
    with torch.autocast("cpu", dtype=autocast), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output, (h_n, c_n) = layer(input)
        data_of(output).float().sum().backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None and p.grad.dtype == weights for p in layer.parameters())
        try:
            expected, (h, c) = reference(input)
        except RuntimeError:
            assert autocast == torch.float16  # nn.LSTM fails, we work
            if not packed:
                assert data_of(output).dtype == h_n.dtype == torch.float16
                assert c_n.dtype == torch.float16 or "proj_size" in options
            return
    assert (data_of(output).dtype, h_n.dtype, c_n.dtype) == (data_of(expected).dtype, h.dtype, c.dtype)
    tolerance = 1e-12 if weights == torch.float64 else 4 * torch.finfo(autocast).eps
    torch.testing.assert_close(data_of(output), data_of(expected), rtol=0, atol=tolerance)


def _pair(num_layers: int = 1, **options: Any) -> tuple[nn.LSTM, ManualLSTM]:
    reference = nn.LSTM(4, 5, num_layers, dtype=torch.float64, **options)
    layer = ManualLSTM(4, 5, num_layers, dtype=torch.float64, **options)
    layer.load_state_dict(reference.state_dict())
    return reference, layer


@pytest.mark.parametrize("sizes", [[2], [2, 1], [2, 2, 1]], ids=str)
def test_packed_data_with_rows_that_no_step_takes(sizes: list[int]) -> None:
    reference, layer = twins(3, 4, 2, dtype=torch.float64)
    input = PackedSequence(torch.randn(8, 3, dtype=torch.float64), torch.tensor(sizes))
    assert_close(
        forward_and_backward(layer, input, None), forward_and_backward(reference, input, None), 1e-12
    )
