"""The gate loop as torch's scan operator, so that a program keeps it a loop over any T.

torch.export and torch.compile record what they see: unrolled steps would be as many as the example has,
and take as long to compile. Under ``torch.ops.higher_order.scan`` they stay one step, and how many
there are is an input's size. Exported layers run so, and changed cells under torch.compile. The
operator is not public yet; where it is missing, the steps are unrolled.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from manual_lstm.cell import Step
from manual_lstm.engine.context import is_exporting, no_donated_buffers, scan_operator
from manual_lstm.engine.direction import AllSteps, Direction, Result
from manual_lstm.engine.steps import PaddedSteps, begin_anew, steps_of
from manual_lstm.loop import Prepare, prepare_lstm

_NO_STEPS = "the loop ran as torch's scan, which keeps no single steps"


def run_scan(d: Direction, prepare: Prepare | None = None, keep: bool = False) -> Result:
    """Take all steps of one direction by scan; the arguments are those of ``run_plain``."""
    x, cell, of_steps = prepare_lstm(d) if prepare is None else prepare(d)  # [T, B, 4H] or [N, 4H]
    if not is_exporting():
        no_donated_buffers()
    packed, padded = d.batch_sizes is not None, d.lengths is not None
    steps = steps_of(d) if packed or padded else None
    assert steps is None or isinstance(steps, PaddedSteps)  # the rows of each step are not known
    B, n = d.h_0.size(0), 1 + len(of_steps)

    def take_step(state: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        h, c = state
        if not packed:  # AOTInductor sizes its results by what the step takes: B has to be there
            h = h.expand(B, -1)
        x_t, rows, more = inputs[0], inputs[1:n], inputs[n:]
        if packed:  # B is not known while compiling, and some operations ask
            torch._check(x_t.size(0) >= 1)  # type: ignore[no-untyped-call]
        present = None if steps is None else more[-1]  # [B, 1]
        before = h, c
        if d.cuts is not None:
            cut = more[0].unsqueeze(1)  # [B, 1]
            before = begin_anew(cut, h), begin_anew(cut, c)
        step = cell(x_t, *before, d.weight_hh, d.weight_hr, *rows)
        h_t, c_t = step.h, step.c
        if present is not None:  # a sequence that has no such step waits
            h_t, c_t = torch.where(present, h_t, h), torch.where(present, c_t, c)
        parts: Sequence[Tensor] = step if keep else [step.h]
        if padded:  # here, because AOTInductor does not compile this right after the scan
            assert present is not None
            parts = [torch.where(present, part, 0) for part in parts]
        # scan takes no result twice, nor a view of one
        return [h_t.clone(), c_t.clone()], [part.clone() for part in parts]

    assert scan_operator is not None
    inputs = [x, *of_steps, *([] if d.cuts is None else [d.cuts])]  # [T, B, ...]
    if steps is not None:
        inputs = [*map(steps.fill, inputs), steps.present]
    # Where the operator does not take a cell, torch's error shows the next line.
    (h_n, c_n), parts = scan_operator(  # no such cell: set compile_as_scan = False in its class
        take_step, [d.h_0.clone(), d.c_0.clone()], inputs, reverse=d.reverse
    )
    if packed:
        assert steps is not None
        parts = [steps.pack(part) for part in parts]
    return Result(parts[-1], h_n, c_n, AllSteps(Step(*parts), _NO_STEPS) if keep else None)
