"""Hypothesis settings beside the profiles of conftest.py."""

from hypothesis import HealthCheck, Phase, settings

# For tests which expect that a search finds something.
SEARCH = settings(
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def share(part: float) -> settings:
    """A part of the profile's examples, for a property whose cases take long."""
    return settings(max_examples=max(1, int(part * settings().max_examples)))
