"""Rows on tools that inspect a model: flop counter, profiler, summary."""

import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

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


ROWS = [
    ReportRow("flop_counter", check_flops, packed=True, dtypes=FLOATS),
    ReportRow("torch.profiler", check_profiler, packed=True, dtypes=FLOATS),
    ReportRow("torchinfo", check_torchinfo, needs=("torchinfo",)),
]
