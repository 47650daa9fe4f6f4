"""Hypothesis settings beside the profiles of conftest.py."""

from hypothesis import settings

from manual_lstm.testing.probes.subject import search_settings

# For tests which expect that a search finds something.
SEARCH = search_settings(200)


def share(part: float) -> settings:
    """A part of the profile's examples, for a property whose cases take long."""
    return settings(max_examples=max(1, int(part * settings().max_examples)))
