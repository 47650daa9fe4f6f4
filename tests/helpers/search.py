"""Hypothesis settings for tests which expect that a search finds something."""

from hypothesis import HealthCheck, Phase, settings

SEARCH = settings(
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
