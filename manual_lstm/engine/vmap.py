"""The operator of ``fused.py`` under torch.func's vmap and grad: gradients for every sample.

Under ``vmap(grad(loss))`` each sample has a gradient of its own for every weight. The plain loop would
add to every one of them at every step. Here the samples become rows of one batch, which the operator
runs, and each weight's gradients are one batched product over all steps at the end.

torch.func does not look at an operator's autograd formula; it does at an autograd.Function's. Both
functions here are differentiated, in turn, by way of the plain loop.
"""

from typing import Any

import torch
from torch import Tensor

from manual_lstm.engine.context import batches_only, unwrap_if_dead
from manual_lstm.engine.fused import direction, direction_backward
from manual_lstm.loop import plain_direction

# The arguments of a direction, in order; of these two no gradient is asked.
_BATCH_SIZES, _REVERSE = 1, 8
_ALL, STATES = [True] * 7, [True] * 3 + [False] * 4  # the gradients of x, h_0, c_0; and the weights'


class _Direction(torch.autograd.Function):
    """One direction. Takes what plain_direction takes; returns the gates and cell states too."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return direction(*arguments, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.reverse = inputs
        ctx.save_for_backward(*tensors, *output[3:])
        ctx.mark_non_differentiable(*output[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, gates, cells = (t if t is None else unwrap_if_dead(t) for t in ctx.saved_tensors)
        arguments = (*grads[:3], *tensors, ctx.reverse)
        if batches_only():
            found = _apply(_Backward, None, *arguments, gates, cells)
        else:  # a jvp, for one, of a vjp's function
            found = _plain_backward(None, *arguments)
        every = [found[0], None, *found[1:]]
        return (*(None if t is None else g for t, g in zip(tensors, every)), None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        v = info.batch_size
        results = _apply(_Direction, *_fold_arguments(arguments, in_dims, v))
        return tuple(_unfold(result, v) for result in results), (-2,) * 5


class _Backward(torch.autograd.Function):
    """The gradients of x, h_0, c_0, and the four weights, of one batch or for each of v samples.

    ``v`` is ``None``, or the number of samples that every row of ``x``, the states and the gradients
    is made of, as :func:`_fold` does; the weights' gradients then are ``[v, ...]``.
    """

    @staticmethod
    def forward(v: int | None, *arguments: Any) -> Any:
        if v is None:
            return tuple(direction_backward(*arguments, _ALL)[:7])
        *states, _, _, _, _, da, h, d_h = direction_backward(*arguments, STATES, True)
        x, weight_hr, gates, cells = arguments[3], arguments[10], *arguments[-2:]
        d_ih = sample_sums(da, x.reshape(-1, x.size(-1)), v)
        d_hr = da.new_empty(v, 0)
        if weight_hr is not None:
            d_hr = sample_sums(d_h, gates[3] * torch.tanh(cells), v)
        d_bias = _unfold(da, v).sum(0)
        return *states, d_ih, sample_sums(da, h, v), d_bias, d_hr

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.v, *tensors, ctx.reverse, _, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = [t if t is None else unwrap_if_dead(t) for t in ctx.saved_tensors]
        known = [k for k, t in enumerate(tensors) if t is None or k == 3 + _BATCH_SIZES]
        given = [t for k, t in enumerate(tensors) if k not in known]

        def gradients(*primals: Tensor) -> tuple[Tensor, ...]:
            each = iter(primals)
            inputs = [t if k in known else next(each) for k, t in enumerate(tensors)]
            return tuple(g for g in _plain_backward(ctx.v, *inputs, ctx.reverse) if g is not None)

        pull: Any = torch.func.vjp(gradients, *given)[1]
        weights = zip(grads[3:], tensors[7:])
        found = iter(pull((*grads[:3], *(g for g, weight in weights if weight is not None))))
        every = [None if k in known else next(found) for k in range(len(tensors))]
        return (None, *every, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], v: int | None, *arguments: Any) -> Any:
        if v is not None:  # vmap of vmap
            found = torch.vmap(lambda *inner: _present(_plain_backward(v, *inner)), in_dims[1:-2])(
                *arguments[:-2]
            )
            return found, (0,) * 7
        v = info.batch_size
        dims = in_dims[1:]
        grads = [_fold(g, d, v) for g, d in zip(arguments[:3], dims)]
        inputs = _fold_arguments(arguments[3:-2], dims[3:-2], v)
        kept = [_fold(t, d, v) for t, d in zip(arguments[-2:], dims[-2:])]
        found = _apply(_Backward, v, *grads, *inputs, *kept)
        return (*(_unfold(g, v) for g in found[:3]), *found[3:]), (-2,) * 3 + (0,) * 4


def _plain_backward(v: int | None, *arguments: Any) -> tuple[Tensor | None, ...]:
    """What :class:`_Backward` returns, by the plain loop; None for a weight that is not there."""
    grads, inputs = arguments[:3], arguments[3:]
    if v is not None:
        x, sizes, h_0, c_0, *weights, reverse = inputs
        each = (*grads, x, h_0, c_0)

        def one(*each: Tensor) -> tuple[Tensor, ...]:
            grads, (x, h_0, c_0) = each[:3], each[3:]
            own = None if sizes is None else sizes // v
            return _present(_plain_backward(None, *grads, x, own, h_0, c_0, *weights, reverse))

        found = torch.vmap(one, -2, (-2,) * 3 + (0,) * 4)(*(_unfold(t, v) for t in each))
        states = tuple(g.flatten(-3, -2) for g in found[:3])
        return *states, *(None if w is None else g for w, g in zip(weights, found[3:]))

    known = [k for k, t in enumerate(inputs) if t is None or k in (_BATCH_SIZES, _REVERSE)]
    given = [t for k, t in enumerate(inputs) if k not in known]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        each = iter(given)
        every: list[Any] = [t if k in known else next(each) for k, t in enumerate(inputs)]
        return plain_direction(*every)

    each_gradient = iter(torch.func.vjp(run, *given)[1](grads))
    every = [None if k in known else next(each_gradient) for k in range(_REVERSE)]
    return every[0], *every[2:]


def _present(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Something empty in place of None, which vmap does not return."""
    first = gradients[0]
    assert first is not None
    return tuple(first.new_empty(0) if g is None else g for g in gradients)


def _fold_arguments(arguments: Any, in_dims: Any, v: int) -> list[Any]:
    """Make the v samples of a direction rows of one batch; the weights are one for all."""
    x, sizes, h_0, c_0, *rest = arguments
    x, h_0, c_0 = (_fold(t, d, v) for t, d in zip((x, h_0, c_0), (in_dims[0], *in_dims[2:4])))
    return [x, None if sizes is None else sizes * v, h_0, c_0, *rest]


def _fold(tensor: Tensor, dim: int | None, v: int) -> Tensor:
    """``[..., b, features]`` with v samples along ``dim`` to ``[..., b * v, features]``."""
    if dim is None:
        tensor = tensor.unsqueeze(-2).expand(*tensor.shape[:-1], v, tensor.size(-1))
    else:
        tensor = tensor.movedim(dim, -2)
    return tensor.flatten(-3, -2)


def _unfold(tensor: Tensor, v: int) -> Tensor:
    """``[..., b * v, features]`` to ``[..., b, v, features]``."""
    *before, rows, features = tensor.shape
    return tensor.reshape(*before, rows // v, v, features)


def sample_sums(left: Tensor, right: Tensor, v: int) -> Tensor:
    """Each sample's sum of its rows' outer products: ``[N * v, a], [N * v, b]`` to ``[v, a, b]``."""
    return torch.bmm(_unfold(left, v).permute(1, 2, 0), _unfold(right.conj(), v).transpose(0, 1))


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def sample_direction(
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
    """Run one direction under vmap and grad; as :func:`manual_lstm.loop.plain_direction`."""
    weights = weight_ih, weight_hh, bias, weight_hr
    output, h_n, c_n, *_ = _apply(_Direction, x, batch_sizes, h_0, c_0, *weights, reverse)
    return output, h_n, c_n
