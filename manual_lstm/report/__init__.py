"""The report: features of PyTorch, one row each, tried live on nn.LSTM and on ManualLSTM."""
