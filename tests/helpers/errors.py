"""How a wrong call of a layer is checked: nn.LSTM's exception, our message, nothing half done."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from manual_lstm import ManualLSTM


def check_mistake(call: Callable[[nn.Module], Any], message: str) -> None:
    """``call`` fails as with nn.LSTM, with a message that matches; the layer stays as it was."""
    layer = ManualLSTM(3, 4)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(Exception) as expected:  # noqa: PT011
        call(nn.LSTM(3, 4))
    with pytest.raises(Exception, match=f"(?s){message}") as actual:
        call(layer)
    assert actual.type is expected.type
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    layer(torch.zeros(5, 2, 3))  # still works
