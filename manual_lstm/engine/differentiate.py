"""Gradients of a direction by way of the plain loop, for second derivatives."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manual_lstm.engine.context import is_grad_enabled
from manual_lstm.engine.direction import Direction, Gradients
from manual_lstm.loop import run_plain


def plain_gradients(d: Direction, grads: Sequence[Tensor | None], needs: Gradients) -> Gradients:
    """Differentiate the plain loop, by autograd.

    Args:
        d: the direction.
        grads: the gradients of output, h_n and c_n.
        needs: which gradients are wanted, by name.

    Returns:
        The gradients; ``None`` where not wanted, or where nothing depends on the argument.
    """
    names = [name for name, need in needs._asdict().items() if need]
    create_graph = is_grad_enabled()
    with torch.enable_grad():
        # Views, so that h_0 and c_0 may be one tensor and each have a gradient.
        inputs = {name: (t := getattr(d, name)).view_as(t) for name in names}
        output, h_n, c_n, _ = run_plain(d._replace(**inputs))
        # Without a step, the states depend on no weight.
        pairs = [
            (result, grad)
            for result, grad in zip((output, h_n, c_n), grads)
            if grad is not None and result.requires_grad
        ]
        values = torch.autograd.grad(
            [result for result, _ in pairs],
            list(inputs.values()),
            [grad for _, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    return Gradients(**{name: None for name in Gradients._fields} | dict(zip(names, values)))


def plain_vjp(d: Direction, grads: Sequence[Tensor]) -> Gradients:
    """The same by torch.func, for use inside its transforms: all gradients, ``None`` for no tensor."""
    tensors = {name: t for name, t in Gradients.of(d)._asdict().items() if t is not None}

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        these: dict[str, Any] = dict(zip(tensors, values))
        output, h_n, c_n, _ = run_plain(d._replace(**these))
        return output, h_n, c_n

    values = torch.func.vjp(run, *tensors.values())[1](tuple(grads))
    return Gradients(**{name: None for name in Gradients._fields} | dict(zip(tensors, values)))
