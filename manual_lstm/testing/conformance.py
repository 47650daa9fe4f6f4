"""``check_lstm``: try on any class what nn.LSTM does for its callers."""

import re
import traceback
import unittest
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import nn

from manual_lstm.testing.cases import FEATURES, KEYWORDS, Factory, Load, load_state_dict
from manual_lstm.testing.probes import BEYOND, IMPLIED, PROBES, Subject

OK = "ok"
LACKS = "lacks"  # the caller declared that the class lacks it
DIFFERS = "differs"  # the caller declared that the class does it in another way
AS_OFFICIAL = "as nn.LSTM"  # the class fails here as nn.LSTM does
FOLDED = "as float64"  # it fails as the row "float64" does, which has no option
NOT_OFFERED = "not offered"  # an argument that nn.LSTM does not have either
FAILS = "FAILS"

# The rows whose feature the other rows can leave out, when the class lacks it or fails at it.
_SEPARABLE = {*FEATURES, "float64", "parameters"}


@dataclass(frozen=True)
class Outcome:
    """The result of one check."""

    name: str
    status: str
    note: str = ""
    error: Exception | None = None


@dataclass(frozen=True)
class Check:
    """One row of the table. Calling it runs it as a test."""

    name: str
    subject: Subject
    lacks: bool = False
    accepted: str | None = None  # the reason why the class may differ here

    def __str__(self) -> str:
        return self.name

    def __call__(self) -> None:
        """Run the check, and raise what it raised.

        Raises:
            unittest.SkipTest: the class lacks this or differs here, as declared, or does not offer
                what nn.LSTM has not, or fails as nn.LSTM does. pytest shows the reason.
        """
        outcome = self.run()
        if outcome.status == FAILS and outcome.error is not None:
            raise outcome.error
        if outcome.status != OK:
            raise unittest.SkipTest(f"{outcome.status}: {outcome.note}")

    def run(self) -> Outcome:
        """Run the check, and leave the state of the random number generators as it was."""
        if self.lacks:
            return Outcome(self.name, LACKS, "declared")
        if self.name in KEYWORDS and not self.subject.offers(self.name):
            return Outcome(self.name, NOT_OFFERED, f"forward has no argument {self.name}")
        error = _run_probe(self.name, self.subject)
        if error is None:
            stale = "" if self.accepted is None else "declared to differ, and does not"
            return Outcome(self.name, OK, stale)
        if self.accepted is not None:
            return Outcome(self.name, DIFFERS, self.accepted, error)
        # Only the same exception is excused. A wrong result is a failure even where nn.LSTM raises.
        if self.name in BEYOND and type(error) is type(_run_probe(self.name, Subject(nn.LSTM))):
            ordinary = _run_probe("float64", replace(self.subject, max_examples=1))
            if type(ordinary) is not type(error):  # but for a class that always raises this
                return Outcome(self.name, AS_OFFICIAL, _first_line(error), error)
        return Outcome(self.name, FAILS, _first_line(error), error)


def _run_probe(name: str, subject: Subject) -> Exception | None:
    """Run a probe, and return the exception that it raised, or None."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            PROBES[name](subject)
        except Exception as error:
            return error
    return None


_NO_ANSWER = "the layer should return"  # begins what is said of an answer of another form


def _is_same_failure(outcome: Outcome, base: Outcome) -> bool:
    """Whether a row fails as the row without options does.

    Without an answer of the right form nothing can be compared, and where its numbers differ they
    differ in each row. An exception is another failure unless it is the same.
    """
    if base.note.startswith(_NO_ANSWER) or (" differs" in base.note and " differs" in outcome.note):
        return True
    kind = base.note.split(":")[0]
    return f": {kind} instead of" in outcome.note or _without_numbers(outcome) == _without_numbers(base)


def _without_numbers(outcome: Outcome) -> str:
    return re.sub(r"[\d.e+-]+", "", outcome.note)


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class Conformance:
    """The results of all checks. ``str`` makes a table of them."""

    label: str
    outcomes: list[Outcome]

    @property
    def failures(self) -> list[Outcome]:
        """The outcomes of the checks that failed without being declared."""
        return [outcome for outcome in self.outcomes if outcome.status == FAILS]

    @property
    def passed(self) -> bool:
        """Whether no check failed without being declared."""
        return not self.failures

    def raise_for_failures(self) -> None:
        """Raise if a check failed without being declared.

        Raises:
            AssertionError: the message holds the table, and below it each failure in full.
        """
        if not self.passed:
            details = [
                f"{failure.name}: {''.join(traceback.format_exception_only(failure.error)).strip()}"
                for failure in self.failures
            ]
            raise AssertionError("\n\n".join([str(self), *details])) from self.failures[0].error

    def __str__(self) -> str:
        counts = Counter(outcome.status for outcome in self.outcomes)
        lines = [f"{self.label}: " + ", ".join(f"{n} {status}" for status, n in counts.items())]
        for outcome in self.outcomes:
            note = outcome.note if len(outcome.note) <= 90 else outcome.note[:87] + "..."
            lines.append(f"  {outcome.name:<24}{outcome.status:<12}{note}".rstrip())
        failed = [failure.name for failure in self.failures if failure.name in _SEPARABLE]
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
    """Return the checks of :func:`check_lstm` as a list, for a parametrized test.

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
        Check(name, subject.lacking(*_can_leave_out(name, accepts)), name in lacks, accepts.get(name))
        for name in PROBES
    ]


def _can_leave_out(row: str, names: Collection[str]) -> list[str]:
    """Return those of the names that a row can leave out because it is not about them."""
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
    rows: Collection[str] | None = None,
    progress: Callable[[int, int, str], object] | None = None,
) -> Conformance:
    """Try on a class everything that nn.LSTM does for its callers.

    Each check is one row of the returned table: each option alone and all together, every form of
    input, dtypes, strides, dropout, the exceptions, parameters and checkpoints, and what every Module
    can do. Values and gradients are compared with nn.LSTM's by :func:`assert_same_layer`, on cases
    that hypothesis draws. The cases are the same in every run.

    Two rows are about arguments that nn.LSTM does not have, ``lengths`` and ``resets``: they run where
    ``forward`` has an argument of this name.

    Declare in ``lacks`` what the class does not have. The table shows it, and all other rows leave it
    out. An option or a form of input that failed in its own row is left out of the others too.

    Args:
        factory: the class, or a function with nn.LSTM's arguments that makes the layer.
        load: gives the layer the weights of an nn.LSTM. By default they are loaded as a state dict.
        lacks: rows that are not run, because the class lacks what they try. If it contains
            ``"dtype"`` or ``"device"``, these arguments are replaced by ``.to()``. If it contains
            ``"float64"``, everything is compared in float32. If it contains ``"parameters"``, no
            gradient of a parameter is compared.
        accepts: rows that may fail, and the reason why.
        max_examples: how many cases a row draws. The row of all options together draws four times as
            many.
        label: the name of the class in the table.
        rows: the names of the rows to run; ``None`` for all.
        progress: called before each row, with its number, how many there are, and its name.

    Returns:
        The outcomes. ``print`` shows them, ``.passed`` says whether all is well, and
        ``.raise_for_failures()`` makes a test of them.

    Raises:
        ValueError: ``lacks``, ``accepts`` or ``rows`` contains a name that is not a row; the message
            lists the rows.

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
    if rows is not None:
        if unknown := set(rows) - set(PROBES):
            raise ValueError(f"rows should name checks, {', '.join(PROBES)}; but got {sorted(unknown)}")
        checks = [check for check in checks if check.name in rows]
    outcomes: list[Outcome] = []
    for number, check in enumerate(checks, start=1):
        if progress is not None:
            progress(number, len(checks), check.name)
        # What failed in its own row is left out of the rows below, so that one fault fails one row.
        failed = [outcome.name for outcome in outcomes if outcome.status == FAILS]
        subject = check.subject.lacking(*_can_leave_out(check.name, failed))
        outcome = replace(check, subject=subject).run()
        base = next((o for o in outcomes if o.name == "float64" and o.status == FAILS), None)
        if base and outcome.status == FAILS and _is_same_failure(outcome, base):
            outcome = replace(outcome, status=FOLDED)
        outcomes.append(outcome)
    return Conformance(name, outcomes)
