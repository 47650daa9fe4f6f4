"""Opacus: per-sample gradients of a layer that its GradSampleModule or PrivacyEngine has taken.

Opacus hooks every module that has parameters. Its hooks see one input tensor and one output tensor, and
run the module anew for each sample: too little for ``hx``, packed input, a loss on h_n or c_n, dropout.
So the layer does not register these hooks, but keeps the object of Opacus that they belong to. While it
is there, the backward of the loop makes the gradients of every sample, and leaves them where Opacus
expects them. Opacus is not imported before.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from manual_lstm.engine.context import is_grad_enabled
from manual_lstm.engine.direction import Direction, Gradients, Result
from manual_lstm.engine.fused import direction
from manual_lstm.engine.sample_gradients import sample_gradients
from manual_lstm.engine.steps import join_gates
from manual_lstm.loop import run_plain


def opacus_owner(hook: Any) -> Any:
    """The object of Opacus that the hook is a method of, or ``None``."""
    owner = getattr(getattr(hook, "func", hook), "__self__", None)  # func: of a partial
    modules = (cls.__module__ for cls in type(owner).__mro__)
    return owner if any(name.split(".")[0] == "opacus" for name in modules) else None


def attach(layer: Any, owner: Any) -> RemovableHandle:
    """Note on the layer who wants gradients for every sample, until the handle is removed."""
    if layer._sample_hooks is None:
        layer._sample_hooks = OrderedDict()
    handle = RemovableHandle(layer._sample_hooks)
    layer._sample_hooks[handle.id] = owner
    return handle


def active_owner(layer: Any) -> Any:
    """Who wants the gradients of every sample from this call of the layer, or ``None``."""
    for owner in (layer._sample_hooks or {}).values():
        if owner.hooks_enabled and layer.training and is_grad_enabled():
            return owner
    return None


class OpacusCall:
    """One call of a layer, whose backward leaves every sample's gradients for Opacus.

    Args:
        owner: the object of Opacus that wants them.
        parameters: for each direction its parameters by kind; ``None`` for a weight that is none.
        sample_of: for each sequence of the loop which sample it is; ``None`` if they are in order.
        B: how many samples the batch has.
    """

    def __init__(
        self,
        owner: Any,
        parameters: Sequence[dict[str, Any]],
        sample_of: Tensor | None,
        B: int,
    ) -> None:
        self._owner, self._sample_of, self._B = owner, sample_of, B
        self._parameters = [
            {kind: p for kind, p in by_kind.items() if p is not None and p.requires_grad}
            for by_kind in parameters
        ]
        for by_kind in self._parameters:
            for parameter in by_kind.values():
                parameter._forward_counter += 1

    def run(self, d: Direction, k: int, plain: bool) -> Result:
        """Take all steps of the k-th direction.

        Args:
            plain: whether the forward goes through the plain loop.
        """
        forward = _plain_direction if plain else direction
        return Result(*_Recorded.apply(self, k, forward, *d))  # type: ignore[no-untyped-call]

    def record(self, k: int, gradients: Gradients) -> None:
        """Leave the gradients of the k-th direction's weights, ``[sequences, ...]``, for Opacus."""
        if not self._owner.hooks_enabled:  # the second backward pass of ghost clipping
            return
        from opacus.grad_sample.grad_sample_module import (
            create_or_accumulate_grad_sample,
            promote_current_grad_sample,
        )

        bias = gradients.bias
        by_kind = {**gradients._asdict(), "bias_ih": bias, "bias_hh": bias}
        for kind, parameter in self._parameters[k].items():
            gradient = by_kind[kind].to(parameter.dtype)
            if self._sample_of is not None:
                # An empty sequence of a nested batch is a sample too. Its gradient is zero.
                zeros = gradient.new_zeros(self._B, *gradient.shape[1:])
                gradient = zeros.index_copy(0, self._sample_of, gradient)
            if self._owner.loss_reduction == "mean":
                gradient = gradient * self._B
            create_or_accumulate_grad_sample(
                param=parameter, grad_sample=gradient, max_batch_len=self._B
            )
            parameter._forward_counter -= 1
            if parameter._forward_counter == 0:
                promote_current_grad_sample(parameter)
                self._finish(parameter)

    def _finish(self, parameter: Any) -> None:
        """Do what each of Opacus' ways does once a parameter's gradients are all there."""
        if hasattr(self._owner, "get_clipping_coef"):  # fast clipping keeps their norms alone
            parameter._norm_sample = parameter.grad_sample.flatten(1).norm(2, dim=-1)
            parameter.grad_sample = None
        elif isinstance(parameter.grad_sample, list) and not self._owner.grad_accumulation_allowed:
            raise ValueError(
                "Poisson sampling takes one backward pass for each optimizer.step(), but got "
                f"{len(parameter.grad_sample)}; see Opacus' BatchMemoryManager"
            )


class _Recorded(torch.autograd.Function):
    """One direction, whose backward passes every sample's gradients to an :class:`OpacusCall`."""

    @staticmethod
    def forward(ctx: Any, call: OpacusCall, k: int, forward: Any, *arguments: Any) -> Any:
        *tensors, ctx.reverse = arguments
        output, h_n, c_n, gates, cells = forward(*arguments, True)
        ctx.save_for_backward(*tensors, gates, cells)
        ctx.call, ctx.k = call, k
        return output, h_n, c_n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        *tensors, gates, cells = ctx.saved_tensors
        gradients = sample_gradients(
            Direction._make([*tensors, ctx.reverse]), gates, cells, grads, None
        )
        ctx.call.record(ctx.k, gradients)
        weights = {
            name: None if (of_samples := getattr(gradients, name)) is None else of_samples.sum(0)
            for name in ("weight_ih", "weight_hh", "bias", "weight_hr")
        }
        return None, None, None, *gradients._replace(**weights).by_argument()


def _plain_direction(*arguments: Any) -> tuple[Tensor, ...]:
    """What ``manual_lstm::direction`` returns with ``save``, by the plain loop."""
    d, _ = Direction.split(arguments)
    output, h_n, c_n, all_steps = run_plain(d, keep=True)
    assert all_steps is not None
    steps = all_steps.joined
    gates = join_gates(d, steps.i, steps.f, steps.g, steps.o)  # [4N, H]
    return output, h_n, c_n, gates, steps.c.flatten(0, -2)
