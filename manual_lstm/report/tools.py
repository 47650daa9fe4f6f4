"""Rows on tools that inspect a model: flop counter, profiler, summary."""

from typing import Any

import torch
from torch import nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from manual_lstm.check.parity import data_of
from manual_lstm.report.function import FLOATS, LayerFunction
from manual_lstm.report.row import ReportRow, Setting


def check_flops(setting: Setting) -> None:
    """Each multiply-add of the matrix products counts two flops; the backward has twice as many."""
    function = LayerFunction(setting)
    rows = function.point["input"].numel() // setting.I
    matrices = sum(t.numel() for name, t in function.point.items() if name.startswith("weight"))
    forward = 2 * rows * matrices
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function.step(*function.leaves().values())
    counted = counter.get_total_flops()
    assert counted == forward, f"{counted} flops counted in the forward, not {forward}"
    with FlopCounterMode(display=False) as counter:
        function.train()
    counted = counter.get_total_flops()
    assert counted == 3 * forward, f"{counted} flops counted in training, not {3 * forward}"


def check_profiler(setting: Setting) -> None:
    """The profile shows the LSTM as one operator, and the time it took."""
    function = LayerFunction(setting)
    with profile() as profiled:
        function.step(*function.leaves().values())
    times = {event.key: event.cpu_time_total for event in profiled.key_averages()}
    lstm_times = {name: time for name, time in times.items() if "lstm" in name}
    assert lstm_times, f"no LSTM among {sorted(times)}"
    assert min(lstm_times.values()) > 0, f"times are {lstm_times}"


def check_torchinfo(setting: Setting) -> None:
    """torchinfo.summary counts parameters, shapes and multiply-adds."""
    from torchinfo import summary

    function = LayerFunction(setting)
    counts = []
    for layer in (function.layer, function.official):
        dtype = next(layer.parameters()).dtype
        input = function.input.to(dtype)
        hx = tuple(function.point[name].to(dtype) for name in ("h_0", "c_0"))
        info = summary(layer, input_data=(input, hx), verbose=0)
        counts.append((info.total_params, info.trainable_params, info.total_mult_adds))
    assert counts[0] == counts[1], f"{counts[0]} for parameters and multiply-adds, not {counts[1]}"
    expected = sum(parameter.numel() for parameter in function.layer.parameters())
    assert counts[0][0] == expected, f"{counts[0][0]} parameters, not {expected}"


def check_torchao(setting: Setting) -> str:
    """torchao's int8 weights: dense or packed input, one step, and unroll where the layer has it.

    Returns:
        The largest differences from float32, weight-only and with dynamic activations.
    """
    from torchao.quantization import (
        FqnToConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    setting = setting.with_changes(I=32, H=64, dtype=torch.float32)
    input, one_step = setting.input(), setting.dense()[:1]
    errors = []
    for config in (Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()):
        model = nn.Sequential(setting.layer()).eval()
        layer: Any = model[0]
        with torch.no_grad():
            expected = data_of(layer(input)[0]), layer(one_step)[0]
            quantize_(model, FqnToConfig({r"re:.*weight_.*": config}), filter_fn=None)
            actual = data_of(layer(input)[0]), layer(one_step)[0]
            error = max(float((a - b).abs().max()) for a, b in zip(actual, expected))
            assert 0 < error < 0.02, f"the output differs by {error:.1e} from that in float32"
            errors.append(f"{error:.0e}")
            if hasattr(layer, "unroll"):
                unrolled = data_of(layer.unroll(input).output)
                assert torch.allclose(unrolled, actual[0], atol=1e-5), "unroll differs from the call"
    return f"error {errors[0]}, dynamic {errors[1]}"


ROWS = [
    ReportRow("flop_counter", check_flops, packed=True, dtypes=FLOATS),
    ReportRow("torch.profiler", check_profiler, packed=True, dtypes=FLOATS),
    ReportRow("torchinfo", check_torchinfo, needs=("torchinfo",)),
    ReportRow("torchao, int8 weights", check_torchao, packed=True, needs=("torchao",)),
]
