"""Training with less memory, in narrow dtypes, and repeatably."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from manual_lstm.report.function import BOTH, Function, Results, loss
from manual_lstm.report.row import Row, Setting


def autocast(dtype: torch.dtype) -> Callable[[Setting], None]:
    """The check of training in float32 under autocast to ``dtype``."""

    def check(setting: Setting) -> None:
        function = Function(setting)

        def call(step: Any, *tensors: Tensor) -> Any:
            with torch.autocast(setting.device, dtype):
                return step(*tensors)

        results = function.train(call)
        near(results, function.trained(), dtype)
        # nn.LSTM answers in float32 where it leaves its fused kernels.
        fused = not setting.packed and not setting.options.get("proj_size")
        for name in ("output", "h_n", "c_n"):
            found = results[name].dtype
            assert found == dtype or (found == torch.float32 and not fused), f"{name} is of {found}"

    return check


def near(actual: Results, expected: Results, dtype: torch.dtype) -> None:
    """Compare what was computed in a narrow dtype, by norms."""
    for name, tensor in expected.items():
        gap = float((actual[name].double() - tensor).norm() / tensor.norm().clamp_min(1))
        assert gap <= 3 * torch.finfo(dtype).eps, f"{name} is off by {gap:.1e}"


def grad_scaler(setting: Setting) -> None:
    """Scaled gradients are right once unscaled, and a step that overflowed is left out."""
    function = Function(setting)
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
        near({name: before[name] - after[name].detach() for name in before}, expected, torch.float16)
    assert scaler.get_scale() == 512.0, "the overflow was not seen"


def held(function: Function, call: Callable[..., Any]) -> int:
    """How many bytes of memory the forward of a call leaves allocated."""
    leaves = function.leaves()
    with profile(profile_memory=True) as seen:
        results = call(function.step, *leaves.values())
    del results
    events = seen.key_averages()
    return sum(event.self_cpu_memory_usage + event.self_device_memory_usage for event in events)


def saving(call: Callable[..., Any], falls: bool = True) -> Callable[[Setting], None]:
    """The check of a way to call a layer that gives the same and holds less memory until backward."""

    def check(setting: Setting) -> None:
        function = Function(setting)
        function.same(function.train(call), function.trained())
        if falls:
            large = Function(setting.but(H=16), T=24, B=4)
            without, with_it = held(large, lambda step, *tensors: step(*tensors)), held(large, call)
            assert with_it < without / 2, f"holds {with_it} bytes, and {without} without"

    return check


def checkpointed(use_reentrant: bool) -> Callable[..., Any]:
    return lambda step, *tensors: checkpoint(step, *tensors, use_reentrant=use_reentrant)


def saved_to_disk(step: Any, *tensors: Tensor) -> Any:
    """With all that the backward needs in files until then."""
    folder = tempfile.TemporaryDirectory()

    def pack(tensor: Tensor) -> tuple[Path, Any]:
        path = Path(folder.name, str(len(list(Path(folder.name).iterdir()))))
        torch.save(tensor, path)
        return path, folder  # which stays as long as the graph does

    def unpack(packed: tuple[Path, Any]) -> Tensor:
        tensor: Tensor = torch.load(packed[0], weights_only=True)
        return tensor

    with saved_tensors_hooks(pack, unpack):
        return step(*tensors)


def saved_on_cpu(step: Any, *tensors: Tensor) -> Any:
    with save_on_cpu():
        return step(*tensors)


def save_on_cpu_check(setting: Setting) -> None:
    """On CPU nothing is to be saved by it."""
    saving(saved_on_cpu, falls=setting.device != "cpu")(setting)


def deterministic(setting: Setting) -> None:
    """The same bits, twice, and the right ones."""
    function = Function(setting)
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = function.train(), function.train()
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs"
    function.same(first, function.trained())


FLOAT32 = (torch.float32,)
ROWS = [
    Row("autocast to bfloat16", autocast(torch.bfloat16), packed=True, dtypes=FLOAT32),
    Row("autocast to float16", autocast(torch.float16), packed=True, dtypes=FLOAT32),
    Row("GradScaler, float16", grad_scaler, packed=True, dtypes=FLOAT32),
    Row("activation checkpointing", saving(checkpointed(False)), packed=True, dtypes=BOTH),
    Row("activation checkpointing, reentrant", saving(checkpointed(True)), packed=True, dtypes=BOTH),
    Row("saved_tensors_hooks, to disk", saving(saved_to_disk), packed=True, dtypes=BOTH),
    Row("save_on_cpu", save_on_cpu_check, packed=True, dtypes=BOTH),
    Row("use_deterministic_algorithms", deterministic, packed=True, dtypes=BOTH),
]
