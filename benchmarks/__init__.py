"""Benchmarks of ManualLSTM against nn.LSTM and other open LSTMs: ``python -m benchmarks -h``.

They belong to the repository, not to the package that is installed: run them from its root.
"""
