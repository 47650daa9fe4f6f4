"""The ways to run a trained layer: eager, compiled, exported, as a shared library, in onnxruntime."""

import importlib.util
import io
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.table import Column, Table, format_number, format_ratio
from benchmarks.timing import Effort, Runner, interleave, median_ratio
from benchmarks.workload import Settings, Workload
from manual_lstm import ManualLSTM

CASES = (
    Case(28, 64, 28, 128),
    Case(50, 16, 512, 512),
    Case(300, 1, 128, 256),
    Case(2000, 1, 1, 24),
)
BASE = "nn.LSTM eager"
Call = Callable[[Tensor], Tensor]


class OutputModel(nn.Module):
    """A model whose output is the layer's, so that a program has one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0]
        return output


def _program(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,))


def _compiled(model: nn.Module, x: Tensor) -> Call:
    torch.compiler.reset()
    call: Call = torch.compile(model)
    return call


def _exported(model: nn.Module, x: Tensor) -> Call:
    call: Call = _program(model, x).module()
    return call


def _library(model: nn.Module, x: Tensor) -> Call:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "layer.pt2")
        torch._inductor.aoti_compile_and_package(_program(model, x), package_path=path)
        loaded: Call = torch._inductor.aoti_load_package(path)
    return loaded


def _onnx(model: nn.Module, x: Tensor) -> Call | None:
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        return None
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "layer.onnx")
        program: Any = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
        program.save(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


FORMS: dict[str, Callable[[nn.Module, Tensor], Call | None]] = {
    "eager": lambda model, x: model,
    "compiled": _compiled,
    "exported": _exported,
    "AOTI": _library,
    "ONNX": _onnx,
}


def print_deploy_table(
    cases: tuple[Case, ...], effort: Effort, settings: Settings
) -> Iterator[dict[str, object]]:
    """Print the table; yields what was measured, row by row."""
    print(
        "Inference, as a multiple of the time of an eager nn.LSTM; nn is nn.LSTM, ours is ManualLSTM."
    )
    print("  compiled    torch.compile")
    print("  exported    the program of torch.export, called as a module")
    print("  AOTI        that program compiled to a shared library by AOTInductor")
    print("  ONNX        the file of torch.onnx.export in onnxruntime")
    print("A dash: does not work here, for the reason printed below the row.\n")
    columns = [
        Column("", "T,B,I,H", 15),
        Column("nn.LSTM", "eager ms", 10),
        Column("eager:", "ours", 8),
    ]
    for form in list(FORMS)[1:]:
        columns += [Column(form + ":", "nn", 10), Column("", "ours", 6)]
    table = Table(columns)
    for case in cases:
        seconds, missing = _measure(case, effort, settings)
        cells = [case.shape, format_number(statistics.median(seconds[BASE]) * 1e3)]
        for form in FORMS:
            for who in ("nn.LSTM", "ManualLSTM"):
                name = f"{who} {form}"
                if name != BASE:
                    cells.append(
                        format_ratio(median_ratio(seconds, name, BASE) if name in seconds else None)
                    )
        table.row(cells)
        for name, reason in missing.items():
            print(f"    {name}: {reason}", flush=True)
        yield {"case": str(case), "seconds": seconds, "missing": missing}


def _measure(
    case: Case, effort: Effort, settings: Settings
) -> tuple[dict[str, list[float]], dict[str, str]]:
    w = Workload(case, settings)
    assert isinstance(w.x, Tensor)
    x, calls = w.x, dict[str, Call]()
    missing: dict[str, str] = {}
    expected = w.lstm(x)[0].detach()
    for form, make in FORMS.items():
        for who in ("nn.LSTM", "ManualLSTM"):
            layer = w.lstm if who == "nn.LSTM" else ManualLSTM.from_lstm(w.lstm)
            try:
                with torch.no_grad(), _quietly():
                    call = make(OutputModel(layer).eval(), x)
                    if call is None:
                        missing[f"{who} {form}"] = "pip install onnx onnxscript onnxruntime"
                        continue
                    torch.testing.assert_close(call(x), expected, rtol=1e-3, atol=1e-4)
            except Exception as error:  # whatever a compiler or an exporter raises
                reason = str(error).strip().splitlines()[:1] or [""]
                missing[f"{who} {form}"] = f"{type(error).__name__}: {reason[0]}"[:90]
            else:
                calls[f"{who} {form}"] = call
    runners = {name: Runner(partial(call, x), torch.no_grad) for name, call in calls.items()}
    return interleave(runners, effort, settings.threads, settings.device), missing


@contextmanager
def _quietly() -> Iterator[None]:
    """Do not show what compilers and exporters print and warn of."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
