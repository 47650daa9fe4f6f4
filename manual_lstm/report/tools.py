"""What looks at a model: flops, profiles, summaries."""

import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from manual_lstm.report.function import BOTH, Function
from manual_lstm.report.row import Row, Setting


def flops(setting: Setting) -> None:
    """Two for each multiply and add of the matrix products; twice as many again in the backward."""
    function = Function(setting)
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


def profiler(setting: Setting) -> None:
    """The LSTM is an operator of its own in the profile, with the time it took."""
    function = Function(setting)
    with profile() as seen:
        function.step(*function.leaves().values())
    times = {event.key: event.cpu_time_total for event in seen.key_averages()}
    found = {name: time for name, time in times.items() if "lstm" in name}
    assert found, f"no LSTM among {sorted(times)}"
    assert min(found.values()) > 0, f"times are {found}"


def torchinfo(setting: Setting) -> None:
    """torchinfo.summary counts parameters, shapes and multiply-adds."""
    from torchinfo import summary

    function = Function(setting)
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
    Row("flop_counter", flops, packed=True, dtypes=BOTH),
    Row("torch.profiler", profiler, packed=True, dtypes=BOTH),
    Row("torchinfo", torchinfo, needs=("torchinfo",)),
]
