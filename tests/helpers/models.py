"""Models with LSTMs in them, ways in which weights change, and what an nn.LSTM has to keep."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manual_lstm import ManualLSTM


class Halving(ManualLSTM):
    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        output, states = super().forward(input, hx, **options)
        return output / 2, states


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.LSTM(3, 4), nn.Identity())
        self.rnn = self.encoder[0]
        self.blocks = nn.ModuleList([nn.LSTM(4, 4), self.encoder])
        self.table = nn.ModuleDict({"a": nn.LSTM(4, 3, 2), "none": nn.GRU(1, 1)})
        self.plain = [self.rnn]

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain[0](x)[0]
        for layer in (self.blocks[0], self.table["a"]):
            x = layer(x)[0]
        return x


def check_private(lstm: nn.LSTM) -> None:
    """What nn.LSTM keeps for itself is what it would have made itself."""
    fresh = nn.LSTM(
        lstm.input_size,
        lstm.hidden_size,
        lstm.num_layers,
        bias=lstm.bias,
        bidirectional=lstm.bidirectional,
        proj_size=lstm.proj_size,
    )
    assert vars(fresh).keys() <= vars(lstm).keys()
    for key in ("_flat_weights_names", "_all_weights"):
        assert getattr(lstm, key) == getattr(fresh, key)
    weights = [getattr(lstm, name) for name in lstm._flat_weights_names]
    for weight, kept, reference in zip(
        weights, lstm._flat_weights, lstm._flat_weight_refs, strict=True
    ):
        assert kept is weight
        assert reference is not None
        assert reference() is weight


def old_weight_norm(layer: nn.Module, name: str) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer, name)


def untrained(layer: nn.Module) -> None:
    del layer.bias_hh_l0
    layer.bias_hh_l0 = torch.ones(16, dtype=torch.float64)
