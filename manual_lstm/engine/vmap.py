"""The operator of ``fused.py`` under torch.func's vmap and grad: gradients for every sample.

Under ``vmap(grad(loss))`` each sample has a gradient of its own for every weight. The plain loop would
add to every one of them at every step. Here the samples become rows of one batch, which the operator
runs, and each weight's gradients are one batched product over all steps at the end.

torch.func ignores an operator's autograd formula, but follows an autograd.Function's. Both functions
here are differentiated, in turn, by way of the plain loop.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manual_lstm.engine.context import unwrap_if_dead
from manual_lstm.engine.differentiate import plain_vjp
from manual_lstm.engine.direction import Direction, Gradients, Result
from manual_lstm.engine.dispatch import Loop, choose_backward
from manual_lstm.engine.fused import direction
from manual_lstm.engine.sample_gradients import batch_gradients, by_sample, sample_gradients

# Dimensions of the samples in the gradients: in rows before the features, in weights the first.
_GRADIENT_DIMS = Gradients(x=-2, h_0=-2, c_0=-2, weight_ih=0, weight_hh=0, bias=0, weight_hr=0)


def run_vmap(d: Direction) -> Result:
    """Take all steps of one direction by the operator, under vmap and grad."""
    output, h_n, c_n, *_ = _apply(_Forward, *d)
    return Result(output, h_n, c_n)


class _Forward(torch.autograd.Function):
    """One direction. Returns the gates and cell states too."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return direction(*arguments, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.reverse = inputs
        _, _, _, gates, cells = output
        ctx.save_for_backward(*tensors, gates, cells)
        ctx.mark_non_differentiable(gates, cells)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, gates, cells = _saved(ctx)
        d = Direction._make([*tensors, ctx.reverse])
        grad_output, grad_h_n, grad_c_n, *_ = grads
        if choose_backward(Loop.VMAP) is Loop.VMAP:
            values = _apply(_Backward, None, *d, gates, cells, grad_output, grad_h_n, grad_c_n)
        else:  # a jvp, for one, of a vjp's function
            values = plain_vjp(d, (grad_output, grad_h_n, grad_c_n))
        present = Gradients.of(d)
        return Gradients(*(None if t is None else v for t, v in zip(present, values))).by_argument()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        v = info.batch_size
        d = _samples_to_rows(Direction(*arguments), Direction(*in_dims), v)  # type: ignore[arg-type]
        results = tuple(by_sample(result, v) for result in _apply(_Forward, *d))
        return results, tuple(result.dim() - 2 for result in results)


class _Backward(torch.autograd.Function):
    """The gradients of one direction, of one batch or with the weights' for each of v samples.

    ``v`` is ``None``, or the number of samples that every row of the input, the states and their
    gradients is made of, as :func:`_to_rows` does. Gradients of weights then are ``[v, ...]``.
    """

    @staticmethod
    def forward(v: int | None, *arguments: Any) -> Any:
        d, (gates, cells, *grads) = Direction.split(arguments)
        if v is None:
            return tuple(batch_gradients(d, gates, cells, grads))
        values = sample_gradients(d, gates, cells, grads, v)
        return tuple(d.x.new_empty(v, 0) if value is None else value for value in values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.v, *arguments = inputs
        d, (_, _, *grads) = Direction.split(arguments)
        *tensors, ctx.reverse = d
        ctx.save_for_backward(*tensors, *grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, grad_output, grad_h_n, grad_c_n = _saved(ctx)
        d = Direction._make([*tensors, ctx.reverse])
        present = {name: t for name, t in Gradients.of(d)._asdict().items() if t is not None}

        def gradients(first: tuple[Tensor, ...], tensors: dict[str, Any]) -> tuple[Tensor, ...]:
            values = _plain(ctx.v, d._replace(**tensors), first)
            return tuple(value for value in values if value is not None)

        pull: Any = torch.func.vjp(gradients, (grad_output, grad_h_n, grad_c_n), present)[1]
        of_first, of_tensors = pull(
            tuple(grad for grad, t in zip(grads, Gradients.of(d)) if t is not None)
        )
        values = Gradients(**{name: of_tensors.get(name) for name in Gradients._fields})
        return None, *values.by_argument(), None, None, *of_first

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], v: int | None, *arguments: Any) -> Any:
        d, (gates, cells, *grads) = Direction.split(arguments)
        d_dims, (gates_dim, cells_dim, *grad_dims) = Direction.split(in_dims[1:])
        if v is not None:  # vmap of vmap

            def plain(d: Direction, grads: list[Tensor]) -> tuple[Tensor, ...]:
                return _without_none(_plain(v, d, grads))

            values = torch.vmap(plain, (d_dims, grad_dims))(d, grads)
            return values, (0,) * len(Gradients._fields)
        v = info.batch_size
        d = _samples_to_rows(d, d_dims, v)
        rows = [
            _to_rows(t, dim, v)
            for t, dim in zip((gates, cells, *grads), (gates_dim, cells_dim, *grad_dims))
        ]
        d_x, d_h, d_c, *weights = _apply(_Backward, v, *d, *rows)
        values = (*(by_sample(t, v) for t in (d_x, d_h, d_c)), *weights)
        # torch 2.10 and before takes no negative dimensions here.
        return values, tuple(dim % value.dim() for dim, value in zip(_GRADIENT_DIMS, values))


def _plain(v: int | None, d: Direction, grads: Sequence[Tensor]) -> Gradients:
    """What :class:`_Backward` returns, by the plain loop; ``None`` for a weight that is not there."""
    if v is None:
        return plain_vjp(d, grads)
    sizes = None if d.batch_sizes is None else d.batch_sizes // v

    cuts = d.x.new_zeros(*d.x.shape[:-1], 1).bool() if d.cuts is None else d.cuts.unsqueeze(-1)

    def of_sample(
        x: Tensor, cuts: Tensor, h_0: Tensor, c_0: Tensor, *grads: Tensor
    ) -> tuple[Tensor, ...]:
        of_steps = None if d.cuts is None else cuts.squeeze(-1)
        sample = d._replace(x=x, batch_sizes=sizes, cuts=of_steps, h_0=h_0, c_0=c_0)
        return _without_none(plain_vjp(sample, grads))

    rows = (by_sample(t, v) for t in (d.x, cuts, d.h_0, d.c_0, *grads))
    values = torch.vmap(of_sample, -2, tuple(_GRADIENT_DIMS))(*rows)
    of_samples = Gradients(*(None if t is None else g for t, g in zip(Gradients.of(d), values)))
    return of_samples._replace(
        x=of_samples.x.flatten(-3, -2),
        h_0=of_samples.h_0.flatten(-3, -2),
        c_0=of_samples.c_0.flatten(-3, -2),
    )


def _without_none(gradients: Gradients) -> tuple[Tensor, ...]:
    """Replace None, which vmap does not return, by an empty tensor."""
    return tuple(gradients.x.new_empty(0) if value is None else value for value in gradients)


def _samples_to_rows(d: Direction, dims: Direction, v: int) -> Direction:
    """Make the v samples of a direction rows of one batch; the weights are one for all."""
    cuts = d.cuts
    if cuts is not None:
        cuts = _to_rows(cuts.unsqueeze(-1), dims.cuts, v).squeeze(-1)  # type: ignore[arg-type]
    return d._replace(
        x=_to_rows(d.x, dims.x, v),  # type: ignore[arg-type]
        batch_sizes=None if d.batch_sizes is None else d.batch_sizes * v,
        cuts=cuts,
        h_0=_to_rows(d.h_0, dims.h_0, v),  # type: ignore[arg-type]
        c_0=_to_rows(d.c_0, dims.c_0, v),  # type: ignore[arg-type]
    )


def _to_rows(tensor: Tensor, dim: int | None, v: int) -> Tensor:
    """``[..., b, features]`` with v samples along ``dim`` to ``[..., b * v, features]``."""
    if dim is None:
        tensor = tensor.unsqueeze(-2).expand(*tensor.shape[:-1], v, tensor.size(-1))
    else:
        tensor = tensor.movedim(dim, -2)
    return tensor.flatten(-3, -2)


def _saved(ctx: Any) -> list[Any]:
    return [t if t is None else unwrap_if_dead(t) for t in ctx.saved_tensors]


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)  # type: ignore[no-untyped-call]
