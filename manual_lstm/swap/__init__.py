"""Change the nn.LSTMs of a model into ManualLSTMs, and back."""

from manual_lstm.swap.replace import SwapCandidate, find_lstm, replace_lstm, restore_lstm

__all__ = ["SwapCandidate", "find_lstm", "replace_lstm", "restore_lstm"]
