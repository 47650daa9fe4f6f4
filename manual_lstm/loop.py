"""The unrolled gate loop: one direction over time.

Sequences arrive sorted by falling length, so that step ``t`` works on the first ``b`` rows of the
state, ``b`` being the number of sequences that have a step ``t``. The rows below wait: forwards
in time they have ended and keep their final state, backwards they have not begun and keep their
initial one. So one loop serves dense and packed input and both directions, and the final state is
the state itself.

Everything here is made of differentiable out-of-place operations.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manual_lstm.cell import Step, lstm_cell
from manual_lstm.engine.context import is_tracing

# What takes one step: x_t, h, c, weight_hh and weight_hr to a Step, as lstm_cell does.
Cell = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Step]
# What takes all of them: see gate_loop.
Loop = Callable[..., tuple[Tensor, Tensor, Tensor, list[Step]]]


def gate_loop(cell: Any) -> Loop:
    """Make the loop of a :data:`Cell`."""

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
        """Take all steps of one direction.

        Args:
            x: the projected input, ``[T, B, 4H]``, or packed ``[N, 4H]``.
            batch_sizes: ``None``, or for packed input the number of rows of each step, ``[T]``,
                int64.
            h: the initial hidden state, ``[B, H]``, or ``[B, P]`` with a projection.
            c: the initial cell state, ``[B, H]``.
            weight_hh: ``[4H, H]``, or ``[4H, P]`` with a projection.
            weight_hr: ``[P, H]``, or ``None``.
            reverse: go from the last step to the first. Outputs stay at their input's step.
            keep: whether to return the steps.

        Returns:
            The output, ``[T, B, P or H]`` or packed ``[N, P or H]``, the final h and c, and with
            ``keep`` the T steps.
        """
        if batch_sizes is None:
            inputs = x.unbind(0)  # T times [B, 4H]
        else:
            sizes: list[int] = batch_sizes.tolist()
            inputs = x.narrow(0, 0, sum(sizes)).split_with_sizes(sizes)  # T times [b, 4H]

        outputs: list[Tensor] = []
        steps: list[Step] = []
        B = h.size(0)
        T = len(inputs)
        w_hh = weight_hh
        for k in range(T):
            if T > 32 and k % 32 == 0:
                # Autograd adds up the gradient of each alias by itself, and the aliases' then: over
                # many steps two short sums round off less than one long one.
                w_hh = weight_hh.view_as(weight_hh)
            x_t = inputs[T - 1 - k if reverse else k]
            b = x_t.size(0)
            if b == B:
                step = cell(x_t, h, c, w_hh, weight_hr)
                h, c = step.h, step.c
            else:
                step = cell(x_t, h.narrow(0, 0, b), c.narrow(0, 0, b), w_hh, weight_hr)
                h = torch.cat([step.h, h.narrow(0, b, B - b)])
                c = torch.cat([step.c, c.narrow(0, b, B - b)])
            outputs.append(step.h)
            if keep:
                steps.append(step)

        if reverse:
            outputs.reverse()
            steps.reverse()
        if len(outputs) == 0:
            # No steps: nothing of x, but its place in the graph; and the states as they came, copied.
            return x.narrow(-1, 0, h.size(-1)), h.clone(), c.clone(), steps
        output = torch.stack(outputs) if batch_sizes is None else torch.cat(outputs)
        return output, h, c, steps

    return loop


# torch.jit.trace would record as many steps as its example has. Scripted, the loop stays a loop
# in the trace, which then serves every length and batch size, as nn.LSTM's does.
lstm_loop: Loop = torch.jit.script_if_tracing(gate_loop(lstm_cell))  # type: ignore[no-untyped-call]


def project(x: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """The input's part of the gates for all steps, one product: ``[..., I]`` to ``[..., 4H]``."""
    narrow = 16 - weight_ih.size(1)
    if (
        narrow > 0
        and x.dtype == torch.float32
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # which would note that the rows are so many
    ):
        rows = x.numel() // weight_ih.size(1)
        if rows > 512:
            # The gradient of weight_ih is a sum over all rows, which MKL adds up row by row where
            # it is narrower than 16 columns: columns of zeros make it use its better way.
            x, weight_ih = F.pad(x, (0, narrow)), F.pad(weight_ih, (0, narrow))
    return F.linear(x, weight_ih, bias)


def plain_direction(
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
    """Project the input of all steps, then run the gate loop: one direction, from its input.

    Args:
        x: the input, ``[T, B, I]``, or packed ``[N, I]``.
        batch_sizes: ``None``, or for packed input the number of rows of each step, ``[T]``, int64.
        h_0: the initial hidden state, ``[B, H]``, or ``[B, P]`` with a projection.
        c_0: the initial cell state, ``[B, H]``.
        weight_ih: ``[4H, I]``.
        weight_hh: ``[4H, H]``, or ``[4H, P]`` with a projection.
        bias: the sum of both biases, ``[4H]``, or ``None``.
        weight_hr: ``[P, H]``, or ``None``.
        reverse: go from the last step to the first. Outputs stay at their input's step.

    Returns:
        The output, ``[T, B, P or H]`` or packed ``[N, P or H]``, and the final h and c.
    """
    x_proj = project(x, weight_ih, bias)  # [T, B, 4H] or [N, 4H]
    if batch_sizes is None and len(x) == 1 and not is_tracing():
        step = lstm_cell(x_proj.squeeze(0), h_0, c_0, weight_hh, weight_hr)  # no loop
        return torch.stack([step.h]), step.h, step.c
    return lstm_loop(x_proj, batch_sizes, h_0, c_0, weight_hh, weight_hr, reverse, False)[:3]
