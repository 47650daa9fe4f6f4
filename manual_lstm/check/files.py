"""What ``check`` finds in a file: one line for each layer, for people or as JSON."""

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from manual_lstm.check.checkpoint import (
    CheckpointError,
    FoundLSTM,
    OtherLayer,
    compare_with_official,
    find_lstms,
    load_checkpoint,
)

# From here on, a difference in the checkpoint's dtype is shown beside nn.LSTM's own.
_LARGE = 1e-5

Line = dict[str, Any]


def check_file(path: str) -> Iterator[Line]:
    """Compare both layers on each LSTM of a file.

    Returns:
        For each layer a dict: ``file``, ``status`` ("ok", "differs", "error", "not compared" or
        "passed over") and ``message``; of an LSTM also ``name``, ``layer``, ``difference``,
        ``own_difference`` (nn.LSTM's own, from float64), ``difference_in_float64``, ``tolerance`` and
        ``notes``.
    """
    foreign: Counter[str] = Counter()
    lstms: list[FoundLSTM | CheckpointError]
    try:
        lstms = find_lstms(load_checkpoint(path), foreign)
        if all(isinstance(lstm, OtherLayer) for lstm in lstms):
            others = "; ".join(map(str, lstms)) or _passed_over(foreign)
            raise CheckpointError(
                "no LSTM in it: no weight_ih_l0 and weight_hh_l0 of one" + (others and f"; {others}")
            )
    except CheckpointError as error:
        lstms, foreign = [error], Counter()
    except Exception as error:  # the containers of a hostile file may raise anything
        lstms = [CheckpointError(f"cannot be read ({type(error).__name__})")]
    for lstm in lstms:
        yield {"file": path, **_line(lstm)}
    if foreign:
        yield {"file": path, "status": "passed over", "message": _passed_over(foreign)}


def _line(lstm: FoundLSTM | CheckpointError) -> Line:
    try:
        if isinstance(lstm, CheckpointError):
            raise lstm
        gap, own_gap, wide_gap, tolerance = compare_with_official(lstm)
    except OtherLayer as other:
        return {"status": "not compared", "message": str(other)}
    except CheckpointError as error:
        return {"status": "error", "message": str(error)}
    within = wide_gap <= tolerance
    own = f" (nn.LSTM's own from float64 {own_gap:.1e})" if gap > _LARGE else ""
    notes = list(lstm.notes)
    if not all(bool(weight.isfinite().all()) for weight in lstm.weights.values()):
        notes.append("not all weights are finite")
    shown = "".join(f"  ({note})" for note in notes)
    return {
        "name": lstm.name,
        "status": "ok" if within else "differs",
        "layer": str(lstm),
        "difference": gap,
        "own_difference": own_gap,
        "difference_in_float64": wide_gap,
        "tolerance": tolerance,
        "notes": notes,
        "message": f"{lstm.name or '(top level)'}: {lstm}  largest difference {gap:.1e}{own}, "
        f"in float64 {wide_gap:.1e}  {'ok' if within else 'DIFFERS'} (at most {tolerance:.0e}){shown}",
    }


def _passed_over(foreign: Counter[str]) -> str:
    if not foreign:
        return ""
    names = ", ".join(name if n == 1 else f"{name} ({n})" for name, n in foreign.most_common(3))
    more = ", ..." if len(foreign) > 3 else ""
    objects = "1 foreign object" if foreign.total() == 1 else f"{foreign.total()} foreign objects"
    return f"passed over {objects}: {names}{more}"


def print_line(line: Line, named: bool) -> None:
    """Print what was found, an error to stderr.

    Args:
        line: by :func:`check_file`.
        named: whether each line begins with the file; an error always does.
    """
    failed = line["status"] == "error"
    prefix = f"{line['file']}: " if named or failed else ""
    print(_printable(prefix + line["message"]), file=sys.stderr if failed else sys.stdout)


def _printable(text: str) -> str:
    """Put text from a file on one line, with the characters escaped that could control a terminal."""
    escaped = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    encoding = sys.stdout.encoding or "utf-8"
    return escaped.encode(encoding, "backslashreplace").decode(encoding)
