"""Test your own LSTM against nn.LSTM, with what this package tests itself with."""
