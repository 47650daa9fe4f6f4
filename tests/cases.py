"""Whole cases, drawn: a constructor, an input, a state, a dtype, a device, a mode."""

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from manual_lstm import ManualLSTM
from manual_lstm.parity import twins

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append("cuda")
if torch.backends.mps.is_available():
    DEVICES.append("mps")

Input = Tensor | PackedSequence
State = tuple[Tensor, Tensor]


@dataclass
class Case:
    """One drawn case. Tensors are made from ``seed``, so a failing case prints short."""

    options: dict[str, Any]
    form: str  # "dense", "unbatched", "packed", "packed unsorted" or "packed by hand"
    lengths: list[int]  # of a packed batch; a dense one's T, B times
    layout: str  # "contiguous", "transposed", "expanded" or "sliced"
    with_hx: bool
    training: bool
    dtype: torch.dtype
    device: str
    seed: int

    def layers(self) -> tuple[nn.LSTM, ManualLSTM]:
        """nn.LSTM and ManualLSTM with the same weights."""
        torch.manual_seed(self.seed)
        reference, layer = twins(**self.options, dtype=self.dtype, device=self.device)
        return reference.train(self.training), layer.train(self.training)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype=self.dtype, device=self.device)

    def input(self) -> Input:
        torch.manual_seed(self.seed + 1)
        features = self.options["input_size"]
        if self.form == "dense":
            T, B = self.lengths[0] if self.lengths else 3, len(self.lengths)
            first, second = (B, T) if self.options["batch_first"] else (T, B)
            if self.layout == "transposed":
                return self.randn(second, first, features).transpose(0, 1)
            if self.layout == "expanded":
                return self.randn(1, second, features).expand(first, second, features)
            if self.layout == "sliced":
                return self.randn(first, second, 2 * features)[..., ::2]
            return self.randn(first, second, features)
        if self.form == "unbatched":
            return self.randn(self.lengths[0], features)
        sequences = [self.randn(n, features) for n in self.lengths]
        if self.form == "packed unsorted":
            return pack_sequence(sequences, enforce_sorted=False)
        sequences.sort(key=len, reverse=True)
        packed = pack_sequence(sequences)
        if self.form == "packed by hand":
            return PackedSequence(packed.data, packed.batch_sizes)
        return packed

    def hx(self) -> State | None:
        if not self.with_hx:
            return None
        torch.manual_seed(self.seed + 2)
        rows = self.options["num_layers"] * (2 if self.options["bidirectional"] else 1)
        batch = [] if self.form == "unbatched" else [len(self.lengths)]
        H, P = self.options["hidden_size"], self.options["proj_size"]
        return self.randn(rows, *batch, P or H), self.randn(rows, *batch, H)


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    large: bool = True,
    dropout: bool = True,
) -> Case:
    """Draw a case. Small sizes are likelier, but H reaches 70, B 40 and T 60 where ``large``."""
    size = st.integers(1, 6)
    H = draw(size | st.integers(1, 70) if large else size)
    num_layers = draw(st.integers(1, 4))
    options = {
        "input_size": draw(size | st.integers(1, 70) if large else size),
        "hidden_size": H,
        "num_layers": num_layers,
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.3, 1.0])) if dropout and num_layers > 1 else 0.0,
        "bidirectional": draw(st.booleans()),
        "proj_size": draw(st.integers(1, H - 1)) if H > 1 and draw(st.booleans()) else 0,
    }
    T = st.integers(1, 7) | st.integers(1, 60) if large else st.integers(1, 5)
    B = draw(st.integers(1, 5) | st.integers(1, 40) if large else st.integers(1, 3))
    form = draw(st.sampled_from(["dense", "unbatched", "packed", "packed unsorted", "packed by hand"]))
    if form == "dense":
        lengths = [draw(T)] * draw(st.sampled_from([B, B, B, B, 0]))
    elif form == "unbatched":
        lengths = [draw(T)]
    else:
        lengths = draw(st.lists(T, min_size=B, max_size=B))
    return Case(
        options=options,
        form=form,
        lengths=lengths,
        layout=draw(st.sampled_from(["contiguous", "transposed", "expanded", "sliced"])),
        with_hx=draw(st.booleans()),
        training=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        device=draw(st.sampled_from(DEVICES)),
        seed=draw(st.integers(0, 2**16)),
    )
