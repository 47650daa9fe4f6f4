"""The report's rows as tests."""

import pytest

from manual_lstm.report.row import Missing, Row, Setting


def run_row(row: Row, setting: Setting) -> None:
    """Run a row's check, or skip where the machine lacks what it needs."""
    if row.missing():
        pytest.skip(f"needs {', '.join(row.missing())}")
    try:
        row.run(setting)
    except Missing as error:
        pytest.skip(f"needs {error}")
