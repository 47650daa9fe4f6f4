"""What ``check`` finds in a file: one line for each layer, for people or as JSON."""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from manual_lstm.check.checkpoint import FoundLSTM, OtherLayer, compare_with_official, find_lstms
from manual_lstm.check.command import printable
from manual_lstm.check.loading import CheckpointError, load_checkpoint
from manual_lstm.check.rebuilt import OutsideStorage

# From here on, a difference in the checkpoint's dtype is shown beside nn.LSTM's own.
_LARGE = 1e-5

Line = dict[str, Any]


def check_file(path: str) -> Iterator[Line]:
    """Compare both layers on each LSTM of a file.

    Returns:
        For each layer a dict: ``file``, ``status`` ("ok", "differs", "error", "not compared" or
        "passed over") and ``message``; of an LSTM also ``name``, ``layer``, ``difference``,
        ``own_difference`` (nn.LSTM's own, from float64), ``difference_in_float64``, ``tolerance`` and
        ``notes``. A difference that is no finite number is ``None``: JSON has none.
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
    except OutsideStorage:
        lstms = [CheckpointError("has a tensor with numbers that are not in it")]
    except Exception:  # the containers of a hostile file may raise anything
        lstms = [CheckpointError("holds objects that cannot be looked through")]
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
        "difference": _number(gap),
        "own_difference": _number(own_gap),
        "difference_in_float64": _number(wide_gap),
        "tolerance": tolerance,
        "notes": notes,
        "message": f"{lstm.name or '(top level)'}: {lstm}  largest difference {gap:.1e}{own}, "
        f"in float64 {wide_gap:.1e}  {'ok' if within else 'DIFFERS'} (at most {tolerance:.0e}){shown}",
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


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
    stream = sys.stderr if failed else sys.stdout
    encoding = stream.encoding or "utf-8"
    text = printable(prefix + line["message"]).encode(encoding, "backslashreplace").decode(encoding)
    print(text, file=stream)
