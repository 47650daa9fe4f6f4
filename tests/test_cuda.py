"""The loop for CUDA, with a stand-in for torch's kernel; where there is CUDA, with the kernel too."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from manual_lstm import ManualLSTM
from manual_lstm.cell import lstm_cell
from manual_lstm.check.parity import forward_and_backward, twins
from manual_lstm.engine import cuda
from manual_lstm.testing import Case, assert_same_layer, cases
from manual_lstm.testing.comparing import assert_close
from tests.helpers.loops import (
    Arguments,
    assert_the_operator_is_the_plain_loop,
    drawn_arguments,
    patched,
)

has_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda on this machine")


def _cell(a: Tensor, recurrent: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nothing = a.new_zeros(a.size(0), 1), c, a.new_zeros(a.size(1), 1)
    step = lstm_cell(a + recurrent, *nothing, None)
    return step.h, step.c, torch.cat(step[:4], 1)


def _cell_backward(
    d_h: Tensor, d_c: Tensor, c: Tensor, c_out: Tensor, gates: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, None]:
    i, f, g, o = gates.chunk(4, 1)
    tanh_c = c_out.tanh()
    d_c = d_c + d_h * o * (1 - tanh_c * tanh_c)
    parts = (
        d_c * g * i * (1 - i),
        d_c * c * f * (1 - f),
        d_c * i * (1 - g * g),
        d_h * tanh_c * o * (1 - o),
    )
    return torch.cat(parts, 1), d_c * f, None


@contextmanager
def on_cpu(cell: Any = _cell, backward: Any = _cell_backward) -> Iterator[None]:
    """This loop for all directions without a projection, with another kernel than CUDA's."""

    def fits(d: Any) -> bool:
        return d.weight_hr is None and not d.x.is_complex() and d.x.numel() > 0

    with patched(cuda, _cell=cell, _cell_backward=backward, fits=fits):
        yield


@given(
    direction_args=drawn_arguments(dtypes=(torch.float64,)),
    wanted=st.lists(st.booleans(), min_size=3, max_size=3).filter(any),
)
def test_its_steps_equal_the_plain_loops(direction_args: Arguments, wanted: list[bool]) -> None:
    with on_cpu():
        assert_the_operator_is_the_plain_loop(direction_args, wanted)


@given(case=cases(dtypes=(torch.float32, torch.float64), devices=("cpu",)))
def test_a_layer_with_it_is_nn_lstm(case: Case) -> None:
    reference, layer = case.pair(ManualLSTM)
    with on_cpu():
        assert_same_layer(layer, reference, case)


def test_a_kernel_is_trusted_only_with_the_numbers_of_the_cell() -> None:
    def other_order(a: Tensor, recurrent: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, c_out, gates = _cell(a, recurrent, c)
        i, f, g, o = gates.chunk(4, 1)
        return h, c_out, torch.cat([i, f, o, g], 1)

    def no_derivative(*arguments: Any) -> tuple[Tensor, Tensor, None]:
        d_a, d_c, _ = _cell_backward(*arguments)
        return d_a, 2 * d_c, None

    def refuses(*_: Any) -> Any:
        raise RuntimeError("not compiled with this kernel")

    cpu = torch.device("cpu")
    for cell, backward, trusted in (
        (_cell, _cell_backward, True),
        (other_order, _cell_backward, False),
        (_cell, no_derivative, False),
        (refuses, _cell_backward, False),
        (None, None, False),
    ):
        with on_cpu(cell, backward), patched(cuda, _trusted={}):
            for dtype in (torch.float32, torch.float64):
                assert cuda.is_trusted(cpu, dtype) is trusted
            with patched(cuda, _cell=None):  # the kernel is tried once
                assert cuda.is_trusted(cpu, dtype) is trusted


@has_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_kernel_is_trusted(dtype: torch.dtype) -> None:
    assert cuda.is_trusted(torch.device("cuda", 0), dtype)


@has_cuda
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 3}])
def test_on_cuda_with_and_without_the_kernel(options: dict[str, Any]) -> None:
    reference, layer = twins(4, 5, dtype=torch.float64, device="cuda", **options)
    x = torch.randn(7, 3, 4, dtype=torch.float64, device="cuda")
    expected = forward_and_backward(reference, x, None)
    assert_close(forward_and_backward(layer, x, None), expected, 1e-12)
    with patched(cuda, fits=lambda d: False):
        assert_close(forward_and_backward(layer, x, None), expected, 1e-12)
