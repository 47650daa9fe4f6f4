"""How every command of this package behaves: interrupted, into a closed pipe, and while it works."""

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Collection

from manual_lstm.check.interrupt import INTERRUPTED, interruptible

STATUSES = "2 for wrong usage, 130 after Ctrl-C."
CLOSED_PIPE = 141  # the status of a shell: 128 and the number of the signal


def run_command(main: Callable[[], int]) -> int:
    """Run a command; an interruption is one line, a closed pipe is none, and neither a traceback.

    Returns:
        The exit status: that of ``main``, 130 after Ctrl-C, or 141 where nobody reads the output.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell has closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        with interruptible():
            status = main()
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _forget_output()
        return CLOSED_PIPE
    except OSError as error:  # a full disk, for one
        _forget_output()
        print(error, file=sys.stderr)
        return 1


def _forget_output() -> None:
    """Let Python not fail again when it ends, and writes what is left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """Put text on one line, with the characters escaped that could control a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class Progress:
    """One line on stderr that says where long work is, anew every second. Only a terminal shows it."""

    def __init__(self, unit: str = "row") -> None:
        self._unit = unit  # of what the work is made
        self._shown = sys.stderr.isatty()
        self._start = time.perf_counter()
        self._now = "", ""
        self._end: threading.Event | None = None  # of the thread that shows the seconds

    def __call__(self, number: int, count: int, label: str) -> None:
        """Say that the row, or another unit, with this number of ``count`` begins."""
        self.say(f"{self._unit} {number} of {count}", label)

    def say(self, where: str, label: str) -> None:
        """Say what goes on."""
        self._now = where, printable(label)
        self.show()
        if self._shown and self._end is None:
            self._end = threading.Event()
            threading.Thread(target=self._tick, args=(self._end,), daemon=True).start()

    def show(self) -> None:
        """Write the line."""
        if self._shown:
            where, label = self._now
            text = f"{where}, {time.perf_counter() - self._start:.0f} s: {label}"
            print(f"\r\x1b[K{text[:79]}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Take the line away."""
        if self._end is not None:
            self._end.set()
            self._end = None
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _tick(self, end: threading.Event) -> None:
        while not end.wait(1):
            self.show()


def positive_number(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a positive whole number is wanted, but got {text!r}")
    return int(text)


def choose_rows(names: Collection[str], rows: Collection[str]) -> list[str]:
    """The rows that some names mean: a row's name, or a part of it, in upper or lower case.

    Raises:
        ValueError: a name means no row; the message lists the rows.
    """
    chosen: set[str] = set()
    for name in names:
        exact = [row for row in rows if row.lower() == name.lower()]
        meant = exact or [row for row in rows if name.lower() in row.lower()]
        if not meant:
            listed = "; ".join(rows)  # a name may contain commas
            raise ValueError(f"no row is named {name!r}; there are: {listed}")
        chosen.update(meant)
    return [row for row in rows if row in chosen]
