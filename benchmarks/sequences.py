"""Padded batches, and many sequences in a row: nn.LSTM by hand, and ManualLSTM by an argument."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.cases import Case
from benchmarks.contenders import Answer, check_answer
from benchmarks.table import Column, Table, format_number, format_ratio
from benchmarks.timing import Effort, Runner, interleave, median_ratio
from benchmarks.workload import INFERENCE, MODES, Settings, Workload
from manual_lstm import ManualLSTM

CASES = (
    Case(128, 8, 64, 256),
    Case(100, 32, 256, 256),
    Case(50, 64, 28, 64),
    Case(50, 16, 128, 256, 2, True),
)
SHARES = (0.02, 0.3)  # of the steps that begin a sequence
NN, PACKED, PLAIN, OURS = "nn.LSTM", "packed", "without", "ours"

Run = Callable[[], Tensor]


def _in_mode(output: Run, parameters: list[nn.Parameter], mode: str) -> Callable[[], Any]:
    """A call that takes a step of inference, or of training."""

    def infer() -> Tensor:
        with torch.no_grad():
            return output()

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output().sum(), parameters)

    return infer if mode == INFERENCE else train


def padded_ways(w: Workload) -> dict[str, Run]:
    """A padded batch: nn.LSTM and ManualLSTM packed by hand, and ManualLSTM with ``lengths``."""
    x, lstm, layer = w.x, w.lstm, ManualLSTM.from_lstm(w.lstm)
    assert isinstance(x, Tensor)
    lengths = torch.randint(1, w.case.T + 1, (w.case.B,))

    def packed(layer: nn.Module) -> Tensor:
        rows, _ = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(rows, total_length=w.case.T)[0]

    def ours() -> Tensor:
        output: Tensor = layer(x, lengths=lengths)[0]
        return output

    return {NN: lambda: packed(lstm), PACKED: lambda: packed(layer), OURS: ours}


def reset_ways(w: Workload, share: float) -> dict[str, Run]:
    """Many sequences in a row: nn.LSTM one step at a time, ManualLSTM without and with ``resets``."""
    x, lstm, layer = w.x, w.lstm, ManualLSTM.from_lstm(w.lstm)
    assert isinstance(x, Tensor)
    T, B, H = w.case.T, w.case.B, w.case.H
    resets = torch.rand(T, B, device=x.device) < share
    keep = (~resets).to(x.dtype).view(T, 1, B, 1)

    def by_step() -> Tensor:
        h = c = x.new_zeros(w.case.layers, B, H)
        outputs = []
        for x_t, keep_t in zip(torch.split(x, 1), keep):
            output, (h, c) = lstm(x_t, (h * keep_t, c * keep_t))
            outputs.append(output)
        return torch.cat(outputs)

    def without() -> Tensor:
        output: Tensor = layer(x)[0]
        return output

    def ours() -> Tensor:
        output: Tensor = layer(x, resets=resets)[0]
        return output

    ways: dict[str, Run] = {PLAIN: without, OURS: ours}
    return ways if w.case.bidirectional else {NN: by_step, **ways}


def print_sequences_table(
    cases: tuple[Case, ...], effort: Effort, settings: Settings
) -> Iterator[dict[str, object]]:
    """Print the table; yields what was measured, row by row."""
    print("lengths: a padded batch, of lengths uniform in 1..T. nn.LSTM packs by hand.")
    print("resets: the share of steps that begin a sequence. nn.LSTM runs one step at a time, which it")
    print(
        "cannot backwards. Times are multiples of nn.LSTM's; /same: of ManualLSTM's own time, packed by"
    )
    print("hand, or without resets.\n")
    table = Table(
        [
            Column("", "T,B,I,H", 16),
            Column("", "what", 14),
            Column("", "mode", 11),
            Column("nn.LSTM", "ms", 9),
            Column("", "ours", 7),
            Column("", "/same", 7),
        ]
    )
    for case in cases:
        w = Workload(case, settings)
        ways = {"lengths": (padded_ways(w), PACKED)}
        ways |= {f"resets {share:.0%}": (reset_ways(w, share), PLAIN) for share in SHARES}
        for what, (runs, same) in ways.items():
            if NN in runs:
                with torch.no_grad():
                    check_answer(Answer(runs[OURS](), 1.0, 0.0), Answer(runs[NN](), 1.0, 0.0))
            for mode in MODES:
                parameters = list(w.lstm.parameters())
                runners = {n: Runner(_in_mode(run, parameters, mode)) for n, run in runs.items()}
                seconds = interleave(runners, effort, settings.threads, settings.device)
                official = sorted(seconds[NN])[len(seconds[NN]) // 2] if NN in runs else None
                ratio = median_ratio(seconds, OURS, NN) if NN in runs else None
                own = median_ratio(seconds, OURS, same)
                milliseconds = None if official is None else 1000 * official
                cells = [format_number(milliseconds), format_ratio(ratio), format_ratio(own)]
                table.row([str(case.shape), what, mode, *cells])
                yield {
                    "case": str(case),
                    "what": what,
                    "mode": mode,
                    "seconds": seconds,
                    "ratio": ratio,
                    "own_ratio": own,
                }
