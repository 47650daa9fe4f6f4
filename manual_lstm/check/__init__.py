"""Compare ManualLSTM with nn.LSTM: option by option, and on the LSTMs of a checkpoint."""
