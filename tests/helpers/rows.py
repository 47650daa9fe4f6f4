"""The report's rows as tests."""

from collections.abc import Iterable, Iterator, Mapping
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
    rows: Iterable[ReportRow], settings: Mapping[str, dict[str, Any]], few: tuple[str, str]
) -> Iterator[Any]:
    """A test's parameters: a row, options, and whether the input is packed; all but a sample slow.

    Args:
        settings: options by name. A slow row has those that ``few`` names.
        few: the settings of the quick run. A row with packed input takes the first of them dense
            and the second packed; another row takes both, and a slow one the second.
    """
    for row in rows:
        for name in few if row.slow else settings:
            for packed in (False, True) if row.packed else (False,):
                if row.packed:
                    quick = (name, packed) in ((few[0], False), (few[1], True))
                else:
                    quick = name == few[1] or (name == few[0] and not row.slow)
                optional = [pytest.mark.optional] if row.needs else []
                marks = optional if quick else [*optional, pytest.mark.slow]
                label = f"{row.label}-{name}{'-packed' * packed}"
                yield pytest.param(row, settings[name], packed, id=label, marks=marks)
