"""The stack of layers and directions."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manual_lstm.engine.context import is_compiling, is_tracing
from manual_lstm.engine.cuts import cuts_of
from manual_lstm.engine.direction import AllSteps, Direction, Result
from manual_lstm.engine.dispatch import Loop, choose
from manual_lstm.engine.fused import run_fused
from manual_lstm.engine.opacus import OpacusCall
from manual_lstm.engine.padding import run_masked, without_padding
from manual_lstm.engine.scan import run_scan
from manual_lstm.engine.traced import run_traced, warn_of_recorded_steps
from manual_lstm.engine.vmap import run_vmap
from manual_lstm.loop import Prepare, run_plain

# The weights of one direction by kind: weight_ih, weight_hh, and where there are, bias_ih, bias_hh,
# weight_hr, and a cell's own parameters. See Direction for the shapes.
Weights = Mapping[str, Tensor]


class CallOptions(NamedTuple):
    """The options of one call.

    Attributes:
        cells: for each direction what prepares a cell of the user's; ``None`` for nn.LSTM's cell.
        as_scan: whether these may be compiled as torch's scan.
        keep: whether to return the steps.
        opacus: the call on which Opacus' gradients are recorded, or ``None``.
        lengths: of padded input the number of steps of each sequence, ``[B]``, int64.
        resets: at which steps of the input sequences begin anew, ``[T, B]`` or packed ``[N]``, bool.
    """

    cells: Sequence[Prepare] | None = None
    as_scan: bool = True
    keep: bool = False
    opacus: OpacusCall | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None


class Answer(NamedTuple):
    """What the stack returns."""

    output: Tensor  # [T, B, D * (P or H)], or packed [N, D * (P or H)]
    h_n: Tensor  # [L * D, B, P or H]
    c_n: Tensor  # [L * D, B, H]
    steps: Sequence[AllSteps] = ()  # where kept, of each direction


DEFAULT_OPTIONS = CallOptions()


def run_stack(
    x: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Weights],
    D: int,
    dropout: float = 0.0,
    options: CallOptions = DEFAULT_OPTIONS,
) -> Answer:
    """Run all layers and directions.

    Args:
        x: the input, ``[T, B, I]``, or packed ``[N, I]``.
        batch_sizes: ``None``, or for packed input the number of rows of each step, ``[T]``, int64.
        h_0: the initial hidden states, ``[L * D, B, P or H]``.
        c_0: the initial cell states, ``[L * D, B, H]``.
        weights: of each direction, the layers in turn.
        D: the number of directions of a layer, 1 or 2.
        dropout: the probability with which an element between two layers is zeroed.
        options: see :class:`CallOptions`.
    """
    loop = choose(
        x,
        batch_sizes,
        h_0,
        c_0,
        weights,
        changed=options.cells is not None,
        as_scan=options.as_scan,
        keep=options.keep,
        opacus=options.opacus is not None,
        lengths=options.lengths,
        resets=options.resets,
    )
    lengths, resets = options.lengths, options.resets
    if loop is Loop.TRACED:
        return Answer(*run_traced(x, batch_sizes, lengths, h_0, c_0, weights, D, dropout))
    if is_tracing() and (options.cells is not None or resets is not None):
        what = "resets are given" if options.cells is None else "the cell is changed"
        warn_of_recorded_steps(what, (x if batch_sizes is None else batch_sizes).size(0))
    if lengths is not None:
        resets = None if resets is None else without_padding(resets, lengths)
    cuts = [None if resets is None else cuts_of(resets, batch_sizes, k == 1) for k in range(D)]

    h_first = _rows(h_0)  # L * D times [B, P or H]
    c_first = h_first if c_0 is h_0 else _rows(c_0)  # L * D times [B, H]
    h_last: list[Tensor] = []
    c_last: list[Tensor] = []
    steps: list[AllSteps] = []
    outputs: list[Tensor] = []  # of the directions of one layer
    for k, w in enumerate(weights):
        if dropout != 0 and k > 0 and k % D == 0:  # another layer begins
            x = torch.dropout(x, dropout, train=True)
        bias = w["bias_ih"] + w["bias_hh"] if "bias_ih" in w else None
        d = Direction(
            x,
            batch_sizes,
            lengths,
            cuts[k % D],
            h_first[k],
            c_first[k],
            w["weight_ih"],
            w["weight_hh"],
            bias,
            w.get("weight_hr"),
            k % D == 1,
        )
        result = _run(loop, d, k, options)
        outputs.append(result.output)
        h_last.append(result.h_n)
        c_last.append(result.c_n)
        if result.steps is not None:
            steps.append(result.steps)
        if len(outputs) == D:
            x = outputs[0] if D == 1 else torch.cat(outputs, dim=-1)
            outputs = []
    if len(h_last) == 1:  # for one step of one layer, two copies are time worth saving
        return Answer(x, h_last[0].unsqueeze(0), c_last[0].unsqueeze(0), steps)
    return Answer(x, torch.stack(h_last), torch.stack(c_last), steps)


def _run(loop: Loop, d: Direction, k: int, options: CallOptions) -> Result:
    """Run the k-th direction by the loop that was chosen."""
    if loop is Loop.FUSED:
        return run_fused(d, options.keep)
    if loop is Loop.VMAP:
        return run_vmap(d)
    if loop in (Loop.OPACUS, Loop.OPACUS_PLAIN):
        assert options.opacus is not None
        return options.opacus.run(d, k, plain=loop is Loop.OPACUS_PLAIN)
    prepare = None if options.cells is None else options.cells[k]
    run = run_scan if loop is Loop.SCAN else run_plain
    if d.lengths is not None:
        return run_masked(d, lambda filled: run(filled, prepare, options.keep))
    return run(d, prepare, options.keep)


def _rows(states: Tensor) -> Sequence[Tensor]:
    """The states of each layer and direction."""
    if not is_compiling():
        return states.unbind(0)
    # AOTAutograd saves both what unbind returns and the states for the backward. Inductor takes them
    # for separate tensors, and may overwrite one before it has read the other.
    return tuple(states.select(0, k) for k in range(states.size(0)))
