"""Benchmarks of ManualLSTM against nn.LSTM and other open LSTMs: ``python -m benchmarks -h``.

They are part of the repository, not of the installed package. Run them from the repository's root.
"""

import manual_lstm  # noqa: F401  (before torch, so that Ctrl-C during the imports shows no traceback)
