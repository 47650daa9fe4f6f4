"""What Ctrl-C does to a command: one line, the status 130, and no process that stays behind."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # the status of a shell: 128 and the number of the signal


def end_at_once(*_: Any) -> None:
    """End this process, and those that it has started. A handler of signals."""
    if "multiprocessing" in sys.modules:
        for process in sys.modules["multiprocessing"].active_children():
            process.kill()
    with suppress(Exception):
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def guard_imports(*packages: str) -> None:
    """Let Ctrl-C end the process at once if it is a command of one of these packages.

    Their imports take seconds. Call this before them; :func:`interruptible` ends it.

    Args:
        packages: those that ``python -m`` runs, beside this one in its folder.
    """
    words = sys.orig_argv
    module = words[words.index("-m") + 1 :][:1] if "-m" in words else []
    package = sys.modules.get(module[0].split(".")[0]) if module else None
    if package is None or package.__name__ not in packages or not package.__file__:
        return
    ours = Path(package.__file__).parents[1] == Path(__file__).parents[2]
    if ours and _has_handler(signal.default_int_handler):
        signal.signal(signal.SIGINT, end_at_once)


def _has_handler(handler: Any) -> bool:
    """Whether this is the handler, and this thread may change it."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    return on_main_thread and signal.getsignal(signal.SIGINT) is handler


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt within, so that what is open is closed.

    Raised within a callback of the garbage collector, for one, it would be printed and forgotten. Then
    the process ends at once.
    """
    guarded, hook = _has_handler(end_at_once), sys.unraisablehook

    def end_if_interrupted(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            end_at_once()
        hook(unraisable)

    sys.unraisablehook = end_if_interrupted
    if guarded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if guarded:  # what Python does when it ends
            signal.signal(signal.SIGINT, end_at_once)


@contextmanager
def left_alone() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach: this one ends them.

    A terminal sends the signal to all processes, and those that import torch would show a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
