"""The gate loop as torch's scan operator, so that an exported program keeps it a loop over any T.

torch.export records what it sees: unrolled steps would be as many as its example has. Under
``torch.ops.higher_order.scan`` they stay one step, and how many there are is an input's size. The
operator is not public yet; where it is missing, exported programs have a fixed length.
"""

from typing import Any

import torch
from torch import Tensor

from manual_lstm.cell import Step, lstm_cell
from manual_lstm.engine.context import is_exporting
from manual_lstm.loop import Loop, project

try:
    from torch._higher_order_ops.scan import scan as _scan
except ImportError:
    _scan = None  # type: ignore[assignment]


def may_scan() -> bool:
    """Whether the loop has to be a scan, and can."""
    return _scan is not None and is_exporting()


def scan_loop(cell: Any) -> Loop:
    """Make the loop of a :data:`manual_lstm.loop.Cell`, as :func:`manual_lstm.loop.gate_loop` does.

    With ``keep``, it returns one Step that holds all of them, ``[T, B, features]`` or packed.
    """

    def loop(
        x: Tensor,
        batch_sizes: Tensor | None,
        h: Tensor,
        c: Tensor,
        weight_hh: Tensor,
        weight_hr: Tensor | None,
        reverse: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, list[Step]]:
        rows = None if batch_sizes is None else _Rows(x, batch_sizes.to(x.device), h.size(0))
        present = [] if rows is None else [rows.present]  # [T, B, 1]
        B = h.size(0)

        def one(state: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            h, c = state
            if rows is None:  # AOTInductor sizes its results by what the step takes: B has to be there
                h = h.expand(B, -1)
            step = cell(inputs[0], h, c, weight_hh, weight_hr)
            h_t, c_t = step.h, step.c
            if len(inputs) > 1:  # a sequence that is not under way waits
                h_t, c_t = torch.where(inputs[1], h_t, h), torch.where(inputs[1], c_t, c)
            # scan takes no result twice, nor a view of one
            return [h_t.clone(), c_t.clone()], [part.clone() for part in (step if keep else [step.h])]

        x_steps = x if rows is None else rows.pad(x)  # [T, B, 4H]
        state = [h.clone(), c.clone()]
        scan = _scan if may_scan() else _unrolled_scan
        (h_n, c_n), stacked = scan(one, state, [x_steps, *present], reverse=reverse)
        stacked = stacked if rows is None else [rows.pack(part) for part in stacked]
        if not keep:
            return stacked[0], h_n, c_n, []
        return stacked[-1], h_n, c_n, [Step(*stacked)]

    return loop


def _unrolled_scan(
    one: Any, state: list[Tensor], inputs: list[Tensor], reverse: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """What scan does, step by step: where the length is known, but not how many go on at each step."""
    made: list[list[Tensor]] = []
    steps = [list(step) for step in zip(*(tensor.unbind(0) for tensor in inputs))]
    for step in reversed(steps) if reverse else steps:
        state, results = one(state, step)
        made.append(results)
    if reverse:
        made.reverse()
    return state, [torch.stack(parts) for parts in zip(*made)]


class _Rows:
    """Where the rows of packed data lie in a padded batch, by operators alone: sizes stay unknown."""

    def __init__(self, data: Tensor, batch_sizes: Tensor, B: int) -> None:
        ends = batch_sizes.cumsum(0)  # [T]
        starts = ends - batch_sizes
        sequence = torch.arange(B, device=data.device)
        self.present = (sequence < batch_sizes.unsqueeze(1)).unsqueeze(2)  # [T, B, 1]
        self._row = (starts.unsqueeze(1) + sequence).clamp(max=data.size(0) - 1)  # [T, B]
        row = torch.arange(data.size(0), device=data.device)
        step = torch.searchsorted(ends, row, right=True)  # [N]
        self._place = step * B + row - starts[step]  # [N]

    def pad(self, data: Tensor) -> Tensor:
        """``[N, features]`` to ``[T, B, features]``; what is not there repeats another row."""
        return data[self._row]

    def pack(self, padded: Tensor) -> Tensor:
        """``[T, B, features]`` to ``[N, features]``."""
        return padded.flatten(0, 1)[self._place]


_lstm_scan = scan_loop(lstm_cell)


def scan_direction(
    x: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    weight_hr: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction by scan; as :func:`manual_lstm.loop.plain_direction`."""
    x_proj = project(x, weight_ih, bias)  # [T, B, 4H] or [N, 4H]
    return _lstm_scan(x_proj, batch_sizes, h_0, c_0, weight_hh, weight_hr, reverse, False)[:3]
