"""Low precision, mixed precision, and how exact the numbers are in them."""

import copy
import warnings
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn

from manual_lstm import ManualLSTM, cell
from manual_lstm.check.parity import autocast_fails, data_of, forward_and_backward, twins
from manual_lstm.engine import dtypes
from manual_lstm.testing import Case, assert_same_layer, cases
from manual_lstm.testing.comparing import oracle, relative_errors
from tests.helpers.grids import quick_sample
from tests.helpers.layers import OPTIONS
from tests.helpers.search import share

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


NARROW = (torch.float32, torch.bfloat16, torch.float16)


def _errors_of_both(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """The distance from a float64 oracle of our results, and of nn.LSTM's."""
    reference, layer = case.pair(ManualLSTM)
    exact = oracle(reference, case)
    return relative_errors(layer, case, exact), relative_errors(reference, case, exact)


@share(0.5)
@given(case=cases(dtypes=NARROW, devices=("cpu",)))
def test_no_drawn_case_is_far_less_exact_than_nn_lstm(case: Case) -> None:
    # A single small case is a draw of the lot for both layers; the averages below are the measure.
    reference, layer = case.pair(ManualLSTM)
    assert_same_layer(layer, reference, case)
    ours, theirs = _errors_of_both(case)
    for name, error in ours.items():
        assert error <= 2 * theirs[name] + 16 * torch.finfo(case.dtype).eps, (name, error, theirs[name])


# T, B, I and H, and how many cases of them are averaged.
AVERAGED = [((7, 3, 4, 5), 20), ((34, 1, 1, 14), 20), ((60, 40, 70, 70), 3), ((800, 8, 8, 16), 2)]
FORMS = ["dense", "packed"]
# Three layers in both directions take long: the quick run has them for the smallest sizes.
QUICK = [
    *product(NARROW, FORMS, AVERAGED[:2], [False]),
    *product(NARROW, ["dense"], AVERAGED[2:], [False]),
    *product(NARROW, FORMS, AVERAGED[:1], [True]),
    (torch.float32, "dense", AVERAGED[2], True),
]


@pytest.mark.parametrize(
    ("dtype", "form", "sizes_and_runs", "deep"),
    quick_sample(product(NARROW, FORMS, AVERAGED, [False, True]), QUICK),
    ids=str,
)
def test_as_exact_as_nn_lstm_on_average(
    dtype: torch.dtype, form: str, sizes_and_runs: tuple[tuple[int, ...], int], deep: bool
) -> None:
    (T, B, I, H), runs = sizes_and_runs
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
            assert autocast_fails(autocast)  # nn.LSTM fails, we work
            if not packed:
                assert data_of(output).dtype == h_n.dtype == autocast
                assert c_n.dtype == autocast or "proj_size" in options
            return
    assert (data_of(output).dtype, h_n.dtype, c_n.dtype) == (data_of(expected).dtype, h.dtype, c.dtype)
    tolerance = 1e-12 if weights == torch.float64 else 4 * torch.finfo(autocast).eps
    torch.testing.assert_close(data_of(output), data_of(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{"num_layers": 2, "bidirectional": True}, {"proj_size": 9}], ids=str
)
def test_one_step_multiplies_in_the_weights_dtype_and_is_as_exact_as_nn_lstm(
    dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = nn.LSTM(40, 64, dtype=dtype, **options)
    layer = ManualLSTM.from_lstm(reference)
    exact = copy.deepcopy(reference).double()
    seen: list[torch.dtype] = []

    def product(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(weight.dtype)
        return cell_product(h, weight)

    cell_product = cell.product
    monkeypatch.setattr(cell, "product", product)
    errors = {"ours": 0.0, "theirs": 0.0}
    for _ in range(20):
        x = torch.randn(1, 2, 40).to(dtype).requires_grad_()
        expected = forward_and_backward(exact, x.detach().double(), None)
        for name, lstm in (("ours", layer), ("theirs", reference)):
            results = forward_and_backward(lstm, x.detach(), None)
            errors[name] += sum(
                float((results[k].double() - t).norm() / t.norm().clamp_min(1e-3))
                for k, t in expected.items()
            )
    assert set(seen) == {dtype}
    assert errors["ours"] <= 1.5 * errors["theirs"], errors


def test_the_dtypes_under_autocast_with_and_without_kernels_for_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, c_0 = torch.zeros(2, 1, 3, dtype=torch.bfloat16), torch.zeros(1, 1, 3)
    for there, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(dtypes, "_has_bfloat16", lambda there=there: there)
        found = dtypes.answer_dtypes(x, c_0, x, torch.bfloat16, packed=False, projected=False)
        assert found == (expected, expected)
