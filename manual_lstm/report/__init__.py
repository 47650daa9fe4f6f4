"""What PyTorch can do with a layer: one row a feature, tried live on nn.LSTM and ManualLSTM."""
