"""Per-sample gradients: ManualLSTM with torch.func and under Opacus, beside Opacus' own DPLSTM."""

import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.cases import Case
from benchmarks.contenders import Contender
from benchmarks.memory import measure_peak
from benchmarks.table import Column, Table, format_megabytes, format_ratio
from benchmarks.timing import Effort, Runner, interleave, median_ratio
from benchmarks.workload import TRAINING, Settings, Workload
from manual_lstm import ManualLSTM

PEER, FUNC, OPACUS = "DPLSTM", "vmap(grad)", "ManualLSTM under Opacus"
CASES = (Case(50, 64, 64, 128), Case(100, 16, 256, 256))
TARGET = 1.0  # the most time and memory, as a multiple of DPLSTM's


class PerSample(Contender):
    """A contender that computes the gradients of every sample, ``[B, ...]`` for each parameter."""

    gradients: Callable[[], list[Tensor]]

    def training(self) -> Tensor:
        """Return all gradients as one tensor, to compare them."""
        return torch.cat([gradient.flatten() for gradient in self.gradients()])

    def step(self, mode: str) -> Callable[[], Any]:
        return self.gradients


def _by_func(w: Workload) -> PerSample:
    layer = ManualLSTM.from_lstm(w.lstm)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = w.x
    assert isinstance(x, Tensor)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        output: Tensor = functional_call(layer, parameters, (sample.unsqueeze(1),))[0]
        return output.sum()

    sample_gradients = vmap(grad(loss), in_dims=(None, 1))
    contender = PerSample(lambda x: x, x, list(parameters.values()))
    contender.gradients = lambda: list(sample_gradients(parameters, x).values())
    return contender


def _by_opacus(make: Callable[[Workload], Any]) -> Callable[[Workload], PerSample]:
    def build(w: Workload) -> PerSample:
        assert isinstance(w.x, Tensor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grad_sample = importlib.import_module("opacus.grad_sample")
            layer = make(w).to(w.settings.device, w.settings.dtype)
            model = grad_sample.GradSampleModule(layer, batch_first=False, loss_reduction="sum")
        # DPLSTM keeps its parameters in inner modules. Its state dict names them as nn.LSTM does.
        weights = layer.state_dict(keep_vars=True)
        parameters = [weights[name] for name, _ in w.lstm.named_parameters()]

        def gradients() -> list[Tensor]:
            for parameter in parameters:
                parameter.grad = parameter.grad_sample = None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns that the input needs no gradient
                model(w.x)[0].sum().backward()
            return [parameter.grad_sample for parameter in parameters]

        contender = PerSample(lambda x: x, w.x, parameters)
        contender.gradients = gradients
        return contender

    return build


def _dplstm(w: Workload) -> Any:
    layer = importlib.import_module("opacus.layers").DPLSTM(
        w.case.I, w.case.H, w.case.layers, bidirectional=w.case.bidirectional
    )
    layer.load_state_dict(w.lstm.state_dict())
    return layer


CONTENDERS: dict[str, Callable[[Workload], Contender]] = {
    PEER: _by_opacus(_dplstm),
    FUNC: _by_func,
    OPACUS: _by_opacus(lambda w: ManualLSTM.from_lstm(w.lstm)),
}


def print_per_sample_table(
    cases: tuple[Case, ...], effort: Effort, settings: Settings
) -> Iterator[dict[str, object]]:
    """Print the table; yields what was measured, row by row."""
    print("The gradients of output.sum() for every sample, of all parameters; gap: largest difference.")
    print("ratio: as a multiple of DPLSTM's, in Opacus' GradSampleModule, in the same run.\n")
    table = Table(
        [
            Column("", "T,B,I,H", 17),
            Column("", "who", 25),
            Column("", "ms", 8),
            Column("", "ratio", 7),
            Column("", "MB", 8),
            Column("", "ratio", 7),
            Column("", "gap", 9),
            Column("target", f"{TARGET}", 9),
        ]
    )
    for case in cases:
        contenders = {who: make(Workload(case, settings)) for who, make in CONTENDERS.items()}
        expected = contenders[PEER].training()
        seconds = interleave(
            {who: Runner(c.step(TRAINING)) for who, c in contenders.items()},
            effort,
            settings.threads,
            settings.device,
        )
        peaks = {who: measure_peak(case, TRAINING, who, settings) for who in CONTENDERS}
        for who, contender in contenders.items():
            time, memory = median_ratio(seconds, who, PEER), _quotient(peaks[who], peaks[PEER])
            gap = float((contender.training() - expected).abs().max() / expected.abs().max())
            milliseconds = f"{1000 * sorted(seconds[who])[len(seconds[who]) // 2]:.1f}"
            met = time <= TARGET and (memory is None or memory <= TARGET)
            verdict = "" if who == PEER else "met" if met else "MISSED"
            megabyte = format_megabytes(peaks[who])
            table.row(
                [
                    case.shape,
                    who,
                    milliseconds,
                    format_ratio(time),
                    megabyte,
                    format_ratio(memory),
                    f"{gap:.0e}",
                    verdict,
                ]
            )
            yield {
                "case": str(case),
                "who": who,
                "seconds": seconds[who],
                "ratio": time,
                "bytes": peaks[who],
                "memory_ratio": memory,
                "gap": gap,
            }


def _quotient(our: float | None, theirs: float | None) -> float | None:
    return our / theirs if our is not None and theirs else None
