"""Swap the nn.LSTMs of a model for ManualLSTMs, and back."""

from manual_lstm.swap.replace import SwapCandidate, find_lstm, replace_lstm, restore_lstm

__all__ = ["SwapCandidate", "find_lstm", "replace_lstm", "restore_lstm"]
