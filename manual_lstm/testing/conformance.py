"""``check_lstm``: what nn.LSTM does for its callers, tried on any class that claims to do it."""

import traceback
import unittest
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import nn

from manual_lstm.testing.cases import FEATURES, Factory, Load, load_state_dict
from manual_lstm.testing.probes import BEYOND, IMPLIED, PROBES, Subject

OK = "ok"
LACKS = "lacks"  # declared: the class does not have it
DIFFERS = "differs"  # declared: the class does it in another way
AS_OFFICIAL = "as nn.LSTM"  # the class does not go beyond nn.LSTM here
FAILS = "FAILS"

_SEPARABLE = {*FEATURES, "float64", "parameters"}


@dataclass(frozen=True)
class Outcome:
    """What came of one check."""

    name: str
    status: str
    note: str = ""
    error: Exception | None = None


@dataclass(frozen=True)
class Check:
    """One row of the table; called, it is a test."""

    name: str
    subject: Subject
    lacks: bool = False
    accepted: str | None = None  # why the class may differ here

    def __str__(self) -> str:
        return self.name

    def __call__(self) -> None:
        """Raise what the check raised.

        Raises:
            unittest.SkipTest: the class lacks this, differs here, as declared, or does not go beyond
                nn.LSTM. pytest shows the reason.
        """
        outcome = self.run()
        if outcome.status == FAILS and outcome.error is not None:
            raise outcome.error
        if outcome.status != OK:
            raise unittest.SkipTest(f"{outcome.status}: {outcome.note}")

    def run(self) -> Outcome:
        """Run the check; random numbers drawn elsewhere are not touched."""
        if self.lacks:
            return Outcome(self.name, LACKS, "declared")
        error = _run_probe(self.name, self.subject)
        if error is None:
            stale = "" if self.accepted is None else "declared to differ, and does not"
            return Outcome(self.name, OK, stale)
        if self.accepted is not None:
            return Outcome(self.name, DIFFERS, self.accepted, error)
        # An answer is a promise: a wrong one is no better for nn.LSTM's having none.
        if self.name in BEYOND and type(error) is type(_run_probe(self.name, Subject(nn.LSTM))):
            return Outcome(self.name, AS_OFFICIAL, _first_line(error), error)
        return Outcome(self.name, FAILS, _first_line(error), error)


def _run_probe(name: str, subject: Subject) -> Exception | None:
    """Run a probe and return what it raised."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            PROBES[name](subject)
        except Exception as error:
            return error
    return None


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class Conformance:
    """What came of every check; printed, it is a table."""

    label: str
    outcomes: list[Outcome]

    @property
    def failures(self) -> list[Outcome]:
        """The checks that failed and were not declared."""
        return [outcome for outcome in self.outcomes if outcome.status == FAILS]

    @property
    def passed(self) -> bool:
        """Whether all that was not declared holds."""
        return not self.failures

    def raise_for_failures(self) -> None:
        """Do nothing if all that was not declared holds.

        Raises:
            AssertionError: with the table, and below it each failure in full.
        """
        if not self.passed:
            whole = [
                f"{each.name}: {''.join(traceback.format_exception_only(each.error)).strip()}"
                for each in self.failures
            ]
            raise AssertionError("\n\n".join([str(self), *whole])) from self.failures[0].error

    def __str__(self) -> str:
        counts = Counter(outcome.status for outcome in self.outcomes)
        lines = [f"{self.label}: " + ", ".join(f"{n} {status}" for status, n in counts.items())]
        for outcome in self.outcomes:
            note = outcome.note if len(outcome.note) <= 90 else outcome.note[:87] + "..."
            lines.append(f"  {outcome.name:<24}{outcome.status:<12}{note}".rstrip())
        failed = [each.name for each in self.failures if each.name in _SEPARABLE]
        if failed:
            lines.append(f"  (left out of the rows below its own: {', '.join(failed)})")
        return "\n".join(lines)


def lstm_checks(
    factory: Factory,
    *,
    load: Load = load_state_dict,
    lacks: Collection[str] = (),
    accepts: Mapping[str, str] | None = None,
    max_examples: int = 30,
) -> list[Check]:
    """The checks of :func:`check_lstm`, one by one, for a parametrized test.

    Example:
        >>> import pytest
        >>> @pytest.mark.parametrize("check", lstm_checks(nn.LSTM), ids=str)
        ... def test_my_lstm(check):
        ...     check()
    """
    accepts = accepts or {}
    unknown = {*lacks, *accepts} - set(PROBES)
    if unknown:
        raise ValueError(
            f"lacks and accepts should name checks, {', '.join(PROBES)}; but got {sorted(unknown)}"
        )
    lacks = {*lacks, *chain.from_iterable(IMPLIED.get(name, ()) for name in lacks)}
    subject = Subject(factory, load, frozenset(lacks), max_examples)
    return [
        Check(name, subject.but(*_separable(name, accepts)), name in lacks, accepts.get(name))
        for name in PROBES
    ]


def _separable(row: str, names: Collection[str]) -> list[str]:
    """Which of these options and forms the row can do without: not what it is about."""
    return [
        name
        for name in names
        if name in _SEPARABLE and name != row and row not in IMPLIED.get(name, ())
    ]


def check_lstm(
    factory: Factory,
    *,
    load: Load = load_state_dict,
    lacks: Collection[str] = (),
    accepts: Mapping[str, str] | None = None,
    max_examples: int = 30,
    label: str | None = None,
) -> Conformance:
    """Try on a class everything that nn.LSTM does for its callers.

    Each check is one row of the table that comes back: the options one by one and all together,
    every form of input, dtypes, strides, dropout, the exceptions, parameters and checkpoints, the
    manners of a Module. Values and gradients are held against nn.LSTM's by
    :func:`assert_same_layer` on cases drawn by hypothesis, always the same ones.

    What the class does not have is declared, and then shown. It is left out of all other rows too,
    as is an option or a form of input that has failed in its own.

    Args:
        factory: the class, or a function with nn.LSTM's arguments that makes the layer.
        load: gives the layer the weights of an nn.LSTM. Without it they are loaded as a state dict.
        lacks: rows that are not run, because the class lacks what they try. ``"dtype"`` and
            ``"device"``, as arguments, are then replaced by ``.to()``; without ``"float64"`` all is
            compared in float32, and without ``"parameters"`` no gradient of a parameter.
        accepts: rows that may fail, and the reason why.
        max_examples: how many cases a row draws; that of all options together, four times as many.
        label: what to call the class in the table.

    Returns:
        The outcomes. ``print`` shows them, ``.passed`` sums them up, ``.raise_for_failures()`` makes
        a test of them.

    Raises:
        ValueError: ``lacks`` or ``accepts`` names no row; the message has them all.

    Example:
        >>> report = check_lstm(nn.LSTM, max_examples=1)
        >>> report.passed
        True
        >>> print(report)  # doctest: +ELLIPSIS
        LSTM: ...
          parameters              ok
          float64                 ok
        ...
    """
    checks = lstm_checks(factory, load=load, lacks=lacks, accepts=accepts, max_examples=max_examples)
    name = label or str(getattr(factory, "__name__", factory))
    outcomes: list[Outcome] = []
    for check in checks:
        # What has failed by itself fails no other row.
        failed = [each.name for each in outcomes if each.status == FAILS]
        subject = check.subject.but(*_separable(check.name, failed))
        outcomes.append(replace(check, subject=subject).run())
    return Conformance(name, outcomes)
