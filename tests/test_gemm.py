"""The products: oneDNN where it is used, and its switch."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from manual_lstm import ManualLSTM
from manual_lstm.engine import gemm
from manual_lstm.engine.direction import Direction
from manual_lstm.testing import Case, assert_same_layer, cases
from manual_lstm.testing.comparing import assert_close
from tests.helpers.loops import (
    arguments,
    fused_direction,
    patched,
    run_direction,
)
from tests.helpers.search import share

# The products.


@contextmanager
def onednn_everywhere() -> Iterator[None]:
    """oneDNN for all float32 on CPU, whatever the size."""

    def prefers(weight: Tensor, rows: int, fewest: int) -> bool:
        return weight.dtype == torch.float32 and weight.device.type == "cpu" and rows > 0

    with patched(gemm, _prefers_onednn=prefers):
        yield


has_onednn = pytest.mark.skipif(
    None in (gemm._linear, gemm._linear_add, gemm._pack), reason="no oneDNN operators in this torch"
)


@has_onednn
@share(0.5)
@given(case=cases(dtypes=(torch.float32,), devices=("cpu",)))
def test_onednn_is_as_exact_as_nn_lstm(case: Case) -> None:
    reference, layer = case.pair(ManualLSTM)
    with onednn_everywhere():
        assert_same_layer(layer, reference, case)


@has_onednn
def test_large_products_take_onednn_and_its_switch_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    linear = gemm._linear

    def spy(*args: Any) -> Tensor:
        calls.append("onednn")
        assert linear is not None
        return linear(*args)

    monkeypatch.setattr(gemm, "_linear", spy)
    for name in ("_FEWEST_OF_ROWS", "_FEWEST_FORWARDS", "_FEWEST_BACKWARDS"):
        monkeypatch.setattr(gemm, name, 512 * 512 * 4 * 16)
    layer, x = ManualLSTM(8, 512), torch.randn(9, 16, 8)
    with torch.no_grad():
        with_onednn = layer(x)
        assert len(calls) == 9  # the recurrent product of every step
        with torch.backends.mkldnn.flags(enabled=False):
            without = layer(x)
        copy.deepcopy(layer).double()(x.double())  # which oneDNN does not know
        assert len(calls) == 9
        monkeypatch.setattr(gemm, "_linear_add", None)  # a torch that has lost the operator
        fallback = layer(x)
    assert len(calls) == 9
    torch.testing.assert_close(with_onednn, without)
    assert torch.equal(without[0], fallback[0])


@has_onednn
def test_onednn_takes_weights_and_states_that_lie_transposed() -> None:
    direction_args = arguments([3] * 10, packed=False, dtype=torch.float32)
    d = Direction(*direction_args)
    names = ("h_0", "c_0", "weight_ih", "weight_hh")
    strided = d._replace(**{name: getattr(d, name).t().contiguous().t() for name in names})
    found = []
    for these in (d, strided):
        with onednn_everywhere():
            found.append(run_direction(fused_direction, tuple(these), [True] * 3))
    assert_close(found[1], found[0], 1e-6)


def test_operators_that_do_not_exist_are_not_found() -> None:
    assert gemm.find_onednn("_no_such_operator", "default") is None
    assert gemm.find_onednn("_linear_pointwise", "no_such_overload") is None
