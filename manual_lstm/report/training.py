"""Rows on training: in low precision, with less memory, and deterministic."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from manual_lstm.report.function import FLOATS, LayerFunction, Results, loss
from manual_lstm.report.row import ReportRow, Setting


def check_autocast(dtype: torch.dtype) -> Callable[[Setting], None]:
    """Make the check of training in float32 under autocast to ``dtype``."""

    def check(setting: Setting) -> None:
        function = LayerFunction(setting)

        def call(step: Any, *tensors: Tensor) -> Any:
            with torch.autocast(setting.device, dtype):
                return step(*tensors)

        results = function.train(call)
        assert_near(results, function.trained(), dtype)
        # nn.LSTM returns float32 where it has no fused kernel, so ManualLSTM may do so there.
        fused = not setting.packed and not setting.options.get("proj_size")
        for name in ("output", "h_n", "c_n"):
            actual = results[name].dtype
            assert actual == dtype or (actual == torch.float32 and not fused), f"{name} is {actual}"

    return check


def assert_near(actual: Results, expected: Results, dtype: torch.dtype) -> None:
    """Assert that results computed in low precision are close, by norms."""
    for name, tensor in expected.items():
        gap = float((actual[name].double() - tensor).norm() / tensor.norm().clamp_min(1))
        assert gap <= 3 * torch.finfo(dtype).eps, f"{name} is off by {gap:.1e}"


def check_grad_scaler(setting: Setting) -> None:
    """The scaler's gradients are right after unscaling, and it skips a step that overflowed."""
    function = LayerFunction(setting)
    optimizer = torch.optim.SGD(function.layer.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(setting.device, init_scale=1024.0)
    before = {name: t.detach().clone() for name, t in function.layer.named_parameters()}
    expected = function.gradients(function.point, before)
    for factor in (1.0, float("inf")):
        optimizer.zero_grad()
        torch.manual_seed(0)
        with torch.autocast(setting.device, torch.float16):
            value = loss(dict(zip("abc", function.step(*function.leaves().values()))))
        scaler.scale(value * factor).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        after = dict(function.layer.named_parameters())
        assert_near(
            {name: before[name] - after[name].detach() for name in before}, expected, torch.float16
        )
    assert scaler.get_scale() == 512.0, "the overflow was not seen"


def bytes_held(function: LayerFunction, call: Callable[..., Any]) -> int:
    """Return how many bytes stay allocated after the forward, for the backward."""
    leaves = function.leaves()
    call(function.step, *leaves.values())  # a layer may keep buffers for its next call
    with profile(profile_memory=True) as profiled:
        results = call(function.step, *leaves.values())
    del results
    events = profiled.key_averages()
    return sum(event.self_cpu_memory_usage + event.self_device_memory_usage for event in events)


def check_saving(call: Callable[..., Any], falls: bool = True) -> Callable[[Setting], None]:
    """Make the check of a way to call a layer: same results and gradients, less memory held.

    ``falls`` says whether the memory held between forward and backward must fall by half.
    """

    def check(setting: Setting) -> None:
        function = LayerFunction(setting)
        function.assert_close(function.train(call), function.trained())
        if falls:
            large = LayerFunction(setting.with_changes(H=16), T=24, B=4)
            before = bytes_held(large, lambda step, *tensors: step(*tensors))
            after = bytes_held(large, call)
            assert after < before / 2, f"holds {after} bytes, and {before} in a plain call"

    return check


def with_checkpoint(use_reentrant: bool) -> Callable[..., Any]:
    return lambda step, *tensors: checkpoint(step, *tensors, use_reentrant=use_reentrant)


def with_tensors_on_disk(step: Any, *tensors: Tensor) -> Any:
    """Call with all tensors for the backward stored in files until then."""
    folder = tempfile.TemporaryDirectory()

    def pack(tensor: Tensor) -> tuple[Path, Any]:
        path = Path(folder.name, str(len(list(Path(folder.name).iterdir()))))
        torch.save(tensor, path)
        return path, folder  # the graph keeps this tuple, and so the folder exists as long as it

    def unpack(packed: tuple[Path, Any]) -> Tensor:
        tensor: Tensor = torch.load(packed[0], weights_only=True)
        return tensor

    with saved_tensors_hooks(pack, unpack):
        return step(*tensors)


def with_tensors_on_cpu(step: Any, *tensors: Tensor) -> Any:
    with save_on_cpu():
        return step(*tensors)


def check_save_on_cpu(setting: Setting) -> None:
    """On CPU save_on_cpu saves no memory, so only results and gradients are compared."""
    check_saving(with_tensors_on_cpu, falls=setting.device != "cpu")(setting)


def check_deterministic(setting: Setting) -> None:
    """Two runs give the same bits, and the right results."""
    function = LayerFunction(setting)
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = function.train(), function.train()
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs"
    function.assert_close(first, function.trained())


FLOAT32 = (torch.float32,)
ROWS = [
    ReportRow("autocast to bfloat16", check_autocast(torch.bfloat16), packed=True, dtypes=FLOAT32),
    ReportRow("autocast to float16", check_autocast(torch.float16), packed=True, dtypes=FLOAT32),
    ReportRow("GradScaler, float16", check_grad_scaler, packed=True, dtypes=FLOAT32),
    ReportRow(
        "activation checkpointing",
        check_saving(with_checkpoint(False)),
        packed=True,
        dtypes=FLOATS,
        slow=True,
    ),
    ReportRow(
        "activation checkpointing, reentrant",
        check_saving(with_checkpoint(True)),
        packed=True,
        dtypes=FLOATS,
        slow=True,
    ),
    ReportRow(
        "saved_tensors_hooks, to disk",
        check_saving(with_tensors_on_disk),
        packed=True,
        dtypes=FLOATS,
        slow=True,
    ),
    ReportRow("save_on_cpu", check_save_on_cpu, packed=True, dtypes=FLOATS),
    ReportRow("use_deterministic_algorithms", check_deterministic, packed=True, dtypes=FLOATS),
]
