"""The LSTM you can open: a drop-in replacement for torch.nn.LSTM, written as a gate loop."""

from manual_lstm.functional import lstm_forward
from manual_lstm.module import ManualLSTM

__all__ = ["ManualLSTM", "lstm_forward"]
__version__ = "0.1.0"
