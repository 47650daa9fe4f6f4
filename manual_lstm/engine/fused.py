"""The gate loop of one direction as one operator, with a derivative of its own.

``manual_lstm::direction`` computes what :func:`manual_lstm.loop.run_plain` computes, faster: autograd
does not watch its steps, so they write into buffers made once, and what belongs to many steps is one
call for all of them. The mathematics of a step, forwards and backwards, is in ``cell.py``, the loops
are in ``forward.py`` and ``backward.py``. This file tells torch what the operators are.
"""

import logging
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from manual_lstm.cell import Step, output_again
from manual_lstm.engine import cuda
from manual_lstm.engine.backward import run_backward
from manual_lstm.engine.context import (
    autocast_dtype,
    below_autograd,
    is_grad_enabled,
    nobody_watches,
    profiled,
)
from manual_lstm.engine.differentiate import plain_gradients
from manual_lstm.engine.direction import Direction, Gradients, Result
from manual_lstm.engine.dispatch import Loop, choose_backward
from manual_lstm.engine.forward import Kept, run_forward
from manual_lstm.engine.padding import run_backward_packed, run_forward_packed
from manual_lstm.engine.steps import split_gates, steps_of

# The arguments of Direction, with their names.
_DIRECTION = (
    "Tensor x, Tensor? batch_sizes, Tensor? lengths, Tensor? cuts, Tensor h_0, Tensor c_0, "
    "Tensor weight_ih, Tensor weight_hh, Tensor? bias, Tensor? weight_hr, bool reverse"
)
# torch.library.custom_op would do the same, but imports torch._dynamo at its first call.
_library: Any = Library("manual_lstm", "DEF")  # type: ignore[no-untyped-call]
# torch.compile keeps programs on disk, where it finds them by the names of their operators. Give the
# overloads another name whenever the shape or the layout of what they take or return changes: otherwise
# programs that an earlier version of this package has left there run with this one.
_SCHEMAS = {
    "direction": f"({_DIRECTION}, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "direction_backward": f"({_DIRECTION}, Tensor gates, Tensor cells, Tensor? grad_output, "
    "Tensor? grad_h_n, Tensor? grad_c_n, bool[] needs, bool by_row) -> "
    f"({', '.join(['Tensor'] * 10)})",
}
# With lengths the operators look at them, which a CUDA graph cannot: torch.compile cuts it there.
_TAGS = {"cut": (), "padded": (torch.Tag.cudagraph_unsafe,)}
for _name, _schema in _SCHEMAS.items():
    for _overload, _tags in _TAGS.items():
        _library.define(f"{_name}.{_overload}{_schema}", tags=(torch.Tag.pt2_compliant_tag, *_tags))
direction = torch.ops.manual_lstm.direction.cut
direction_backward = torch.ops.manual_lstm.direction_backward.cut
_direction_padded = torch.ops.manual_lstm.direction.padded
_direction_backward_padded = torch.ops.manual_lstm.direction_backward.padded


def run_fused(d: Direction, keep: bool = False) -> Result:
    """Take all steps of one direction by the operator.

    Args:
        d: the direction.
        keep: whether to return the steps. They have no gradients.
    """
    needs_grad = is_grad_enabled() and any(t is not None and t.requires_grad for t in Gradients.of(d))
    if not nobody_watches(d.x):
        operator = direction if d.lengths is None else _direction_padded
        output, h_n, c_n, gates, cells = operator(*d, needs_grad or keep)
    elif needs_grad:
        return Result(*_DirectionFunction.apply(*d, True))  # type: ignore[no-untyped-call]
    else:
        with profiled("manual_lstm::direction"), below_autograd():
            output, h_n, c_n, gates, cells = _forward(d, keep)
    if not keep:
        return Result(output, h_n, c_n)
    i, f, g, o = split_gates(d, gates)
    c, m = cells.view(i.shape), output
    if d.weight_hr is not None:
        m = output_again(o, c, None)[1]
    return Result(output, h_n, c_n, steps_of(d).all(Step(i, f, g, o, c, m, output)))


def _forward(d: Direction, save: bool) -> Kept:
    """Take the steps, by the loop for this device."""
    if d.lengths is not None:
        return run_forward_packed(d, save, _forward)
    shape, d = d.x.shape, _as_dense(d)
    kept = cuda.run_forward_on_cuda(d, save) if cuda.fits(d) else run_forward(d, save)
    kept.output.resize_(*shape[:-1], kept.output.size(-1))  # autograd lets nobody write to a view
    return kept


def _take_back(d: Direction, *arguments: Any) -> tuple[Tensor, ...]:
    """Go back through the steps, by the loop for this device."""
    if d.lengths is not None:
        return run_backward_packed(d, arguments, _take_back)
    shape, d = d.x.shape, _as_dense(d)
    run = cuda.run_backward_on_cuda if cuda.fits(d) else run_backward
    d_x, *rest = run(d, *arguments)
    return d_x.view(shape) if d_x.dim() == 3 else d_x, *rest


def _as_dense(d: Direction) -> Direction:
    """Take packed sequences of one length for what they are, which the loops are faster with."""
    if d.batch_sizes is None:
        return d
    (N, I), T, B = d.x.shape, d.batch_sizes.size(0), d.h_0.size(0)
    if T == 0 or N != T * B or int(d.batch_sizes[-1]) != B:
        return d
    cuts = None if d.cuts is None else d.cuts.reshape(T, B)
    return d._replace(x=d.x.reshape(T, B, I), batch_sizes=None, cuts=cuts)


def _direction(*arguments: Any) -> tuple[Tensor, ...]:
    d, (save,) = Direction.split(arguments)
    with below_autograd():
        return tuple(_forward(d, save))


def _direction_fake(*arguments: Any) -> tuple[Tensor, ...]:
    d, (save,) = Direction.split(arguments)
    H = d.c_0.size(1)
    output = d.x.new_empty(*d.x.shape[:-1], d.h_0.size(1))
    h_n, c_n = d.x.new_empty(d.h_0.shape), d.x.new_empty(d.c_0.shape)
    if not save:
        return output, h_n, c_n, d.x.new_empty(0, H), d.x.new_empty(0, H)
    N = d.x.size(0) * d.x.size(1) if d.batch_sizes is None else d.x.size(0)
    return output, h_n, c_n, d.x.new_empty(4 * N, H), d.x.new_empty(N, H)


def _direction_backward(*arguments: Any) -> tuple[Tensor, ...]:
    d, (gates, cells, *grads, needs, by_row) = Direction.split(arguments)
    with below_autograd():
        return _take_back(d, gates, cells, tuple(grads), Gradients(*needs), by_row)


def _direction_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    d, (_, cells, *_, needs, by_row) = Direction.split(arguments)
    # The gradients of the states are working memory of the operator, so they are always there.
    need = Gradients(*needs)._replace(h_0=True, c_0=True)
    shapes = (t.shape if t is not None and n else (0,) for t, n in zip(Gradients.of(d), need))
    N, (four_H, P) = cells.size(0) if by_row else 0, d.weight_hh.shape
    rows = (N, four_H), (N, P), (N if d.weight_hr is not None else 0, P)
    return tuple(d.x.new_empty(shape) for shape in (*shapes, *rows))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    d, _ = Direction.split(inputs)
    _, _, _, gates, cells = output
    *tensors, ctx.reverse = d
    # Only tensors: programs that draw the graph look into what its nodes have saved.
    ctx.present = [tensor is not None for tensor in tensors]
    ctx.save_for_backward(*(t for t in tensors if t is not None), gates, cells)
    ctx.set_materialize_grads(False)  # otherwise autograd makes zeros for gates and cells


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of all arguments of ``direction``."""
    *saved, gates, cells = ctx.saved_tensors
    tensors = iter(saved)
    d = Direction._make([*(next(tensors) if there else None for there in ctx.present), ctx.reverse])
    need = Gradients.of(Direction.split(ctx.needs_input_grad)[0])
    grad_output, grad_h_n, grad_c_n, *_ = grads
    grad_results = grad_output, grad_h_n, grad_c_n
    # Under autocast too the products are those of the forward's dtype, as in nn.LSTM's backward.
    kind, cast_to = gates.device.type, autocast_dtype(gates.device)
    with torch.autocast(kind, enabled=False) if cast_to else nullcontext():
        if choose_backward(Loop.FUSED) is Loop.PLAIN:
            gradients = plain_gradients(d, grad_results, need)
        else:
            if nobody_watches(gates, *grad_results):
                with profiled("manual_lstm::direction_backward"), below_autograd():
                    values = _take_back(d, gates, cells, grad_results, need, False)
            else:
                operator = direction_backward if d.lengths is None else _direction_backward_padded
                values = operator(*d, gates, cells, *grad_results, list(need), False)
            gradients = Gradients(*(v if n else None for v, n in zip(values, need)))
    return *gradients.by_argument(), None


class _DirectionFunction(torch.autograd.Function):
    """The operator without torch's dispatcher, which takes its time over so many arguments."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        with profiled("manual_lstm::direction"), below_autograd():
            kept = _forward(Direction.split(arguments)[0], True)
        _save(ctx, arguments, kept)
        return kept.output, kept.h_n, kept.c_n

    backward = staticmethod(_backward)


for _operator in (direction, _direction_padded):
    _library.impl(_operator, _direction, "CompositeExplicitAutograd")
    torch.library.register_fake(_operator, _direction_fake, lib=_library)
    torch.library.register_autograd(_operator, _backward, setup_context=_save, lib=_library)
for _operator in (direction_backward, _direction_backward_padded):
    _library.impl(_operator, _direction_backward, "CompositeExplicitAutograd")
    torch.library.register_fake(_operator, _direction_backward_fake, lib=_library)


# FlopCounterMode copies the registry of formulas when it is made, so they are registered now. A CUDA
# build without triton logs a warning at this import, which nobody has asked for.
_log = logging.getLogger("torch.utils.flop_counter")
_was_disabled, _log.disabled = _log.disabled, True
try:
    from torch.utils.flop_counter import register_flop_formula
finally:
    _log.disabled = _was_disabled


# Shapes, without batch_sizes, come from torch.utils.flop_counter: two flops for a multiply and add.
@register_flop_formula(torch.ops.manual_lstm.direction)
def _(*shapes: Any, **kwargs: Any) -> int:
    d, _ = Direction.split(shapes)
    return 2 * prod(d.x[:-1]) * sum(prod(w) for w in (d.weight_ih, d.weight_hh, d.weight_hr) if w)


@register_flop_formula(torch.ops.manual_lstm.direction_backward)
def _(*shapes: Any, **kwargs: Any) -> int:
    d, (*_, needs, _) = Direction.split(shapes)
    need = Gradients(*needs)
    products = (need.x + need.weight_ih) * prod(d.weight_ih) + (1 + need.weight_hh) * prod(d.weight_hh)
    if d.weight_hr:
        products += (1 + need.weight_hr) * prod(d.weight_hr)
    return int(2 * prod(d.x[:-1]) * products)
