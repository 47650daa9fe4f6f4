"""Test your own LSTM against nn.LSTM, with the tools that test this package. Needs hypothesis."""

import importlib.util

if importlib.util.find_spec("hypothesis") is None:
    raise ModuleNotFoundError("manual_lstm.testing needs hypothesis: pip install hypothesis")

from manual_lstm.testing.cases import Case, cases, load_state_dict
from manual_lstm.testing.comparing import assert_same_layer
from manual_lstm.testing.conformance import Check, Conformance, check_lstm, lstm_checks

__all__ = [
    "Case",
    "cases",
    "load_state_dict",
    "assert_same_layer",
    "check_lstm",
    "lstm_checks",
    "Check",
    "Conformance",
]
