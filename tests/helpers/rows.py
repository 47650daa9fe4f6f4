"""The report's rows as tests."""

from collections.abc import Container, Iterable, Mapping
from typing import Any

import pytest

from manual_lstm.report.row import MissingRequirement, ReportRow, Setting


def run_row(row: ReportRow, setting: Setting) -> None:
    """Run a row's check, or skip where the machine lacks what it needs."""
    if row.missing():
        pytest.skip(f"needs {', '.join(row.missing())}")
    try:
        row.run(setting)
    except MissingRequirement as error:
        pytest.skip(f"needs {error}")


def row_grid(
    rows: Iterable[ReportRow],
    settings: Mapping[str, dict[str, Any]],
    slow_rows: Container[str] = (),
) -> list[Any]:
    """A test's parameters: a row, options, and whether the input is packed; all but a sample slow.

    The quick run takes the first of the settings with dense input, and the last, which has the most
    options, with packed input where the row has it. Of rows that are slow themselves, the quick run
    takes the first of the settings with dense input, and the slow run the last besides.
    Of ``slow_rows`` it takes nothing.
    """
    first, *_, last = settings
    parameters = []
    for row in rows:
        for name in (first, last) if row.slow else settings:
            for packed in (False, True) if row.packed else (False,):
                if row.slow:
                    quick = (name, packed) == (first, False)
                else:
                    quick = (name, packed) in ((first, False), (last, row.packed))
                quick = quick and row.label not in slow_rows
                marks = [] if quick else [pytest.mark.slow]
                marks += [pytest.mark.optional] if row.needs else []
                label = f"{row.label}-{name}{'-packed' * packed}"
                parameters.append(pytest.param(row, settings[name], packed, id=label, marks=marks))
    return parameters
