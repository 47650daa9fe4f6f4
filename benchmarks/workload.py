"""The nn.LSTM and the input of a case, the same for all contenders."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from benchmarks.cases import Case

INFERENCE, TRAINING = "inference", "training"
MODES = (INFERENCE, TRAINING)
DTYPES = {str(d)[6:]: d for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """The settings of a run, which hold for everything measured in it."""

    threads: int
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU


class Workload:
    """The layer whose weights all contenders get, and the input.

    Attributes:
        case: the case.
        lstm: the nn.LSTM.
        x: the input, ``[T, B, I]``, or packed with data ``[N, I]``.
        sizes: for each step, how many sequences have it; the sum is N.
    """

    def __init__(self, case: Case, settings: Settings) -> None:
        torch.manual_seed(0)
        self.case = case
        self.settings = settings
        self.lstm = nn.LSTM(case.I, case.H, case.layers, bidirectional=case.bidirectional)
        self.lstm.to(settings.device, settings.dtype)
        x = torch.randn(case.T, case.B, case.I).to(settings.device, settings.dtype)
        self.x: Tensor | PackedSequence = x
        self.sizes = [case.B] * case.T
        if case.packed:
            lengths = torch.randint(1, case.T + 1, (case.B,))
            self.x = pack_padded_sequence(x, lengths, enforce_sorted=False)
            self.sizes = self.x.batch_sizes.tolist()
