"""Compare the LSTMs of checkpoints with nn.LSTM: `python -m manual_lstm check`."""
