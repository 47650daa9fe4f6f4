"""Opacus: per-sample gradients of a layer that its GradSampleModule or PrivacyEngine has taken.

Opacus hooks every module that has parameters. Its hooks see one input tensor and one output tensor, and
run the module anew for each sample: too little for ``hx``, packed input, a loss on h_n or c_n, dropout.
So the layer takes these hooks for what they ask: while they are there, its loop's backward makes the
gradients of every sample, and leaves them where Opacus expects them. Opacus is not imported before.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from manual_lstm.engine.fused import direction, direction_backward
from manual_lstm.engine.vmap import STATES, sample_sums


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
        if owner.hooks_enabled and layer.training and torch.is_grad_enabled():
            return owner
    return None


class SampleLoop:
    """Runs the directions of one call, in nn.LSTM's order, as plain_direction does.

    Args:
        layer: the layer.
        owner: Opacus' hooks.
        B: how many samples the batch has.
        order: for each sequence that the loop sees, which sample it is; ``None`` if as they come.
    """

    def __init__(self, layer: Any, owner: Any, B: int, order: Tensor | None) -> None:
        self._layer, self._owner, self._B, self._order = layer, owner, B, order
        self._k = 0
        for names in layer._weight_names:
            for parameter in map(layer._parameters.get, names):
                if parameter is not None and parameter.requires_grad:
                    parameter._forward_counter += 1

    def __call__(self, *arguments: Any, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        k, self._k = self._k, self._k + 1
        results = _Recorded.apply((self, k), *arguments, reverse)  # type: ignore[no-untyped-call]
        output, h_n, c_n = results
        return output, h_n, c_n

    def record(self, k: int, gradients: dict[str, Tensor]) -> None:
        """Leave the gradients of the k-th direction's weights, ``[sequences, ...]``, for Opacus."""
        if not self._owner.hooks_enabled:  # the second backward pass of ghost clipping
            return
        from opacus.grad_sample.grad_sample_module import (
            create_or_accumulate_grad_sample,
            promote_current_grad_sample,
        )

        for name in self._layer._weight_names[k]:
            parameter = self._layer._parameters.get(name)
            if parameter is None or not parameter.requires_grad:
                continue
            gradient = gradients[name.split("_l")[0]].to(parameter.dtype)
            if self._order is not None:
                every = gradient.new_zeros(self._B, *gradient.shape[1:])
                gradient = every.index_copy(0, self._order, gradient)
            if self._owner.loss_reduction == "mean":
                gradient = gradient * self._B
            create_or_accumulate_grad_sample(
                param=parameter, grad_sample=gradient, max_batch_len=self._B
            )
            parameter._forward_counter -= 1
            if parameter._forward_counter == 0:
                promote_current_grad_sample(parameter)
                self._after(parameter)

    def _after(self, parameter: Any) -> None:
        """What each of Opacus' ways does once a parameter's gradients are all there."""
        if hasattr(self._owner, "get_clipping_coef"):  # fast clipping keeps their norms alone
            parameter._norm_sample = parameter.grad_sample.flatten(1).norm(2, dim=-1)
            parameter.grad_sample = None
        elif isinstance(parameter.grad_sample, list) and not self._owner.grad_accumulation_allowed:
            raise ValueError(
                "Poisson sampling takes one backward pass for each optimizer.step(), but got "
                f"{len(parameter.grad_sample)}; see Opacus' BatchMemoryManager"
            )


class _Recorded(torch.autograd.Function):
    """One direction, whose backward tells the gradients of every sample."""

    @staticmethod
    def forward(ctx: Any, told: Any, *arguments: Any) -> Any:
        *tensors, ctx.reverse = arguments
        output, h_n, c_n, *kept = direction(*arguments, True)
        ctx.save_for_backward(*tensors, *kept)
        ctx.told = told
        return output, h_n, c_n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        *tensors, gates, cells = ctx.saved_tensors
        x, batch_sizes, h_0, *_, bias, weight_hr = tensors
        d_x, d_h, d_c, *_, da, h, d_h_rows = direction_backward(
            *grads, *tensors, ctx.reverse, gates, cells, STATES, True
        )
        B = h_0.size(0)

        def sums(left: Tensor, right: Tensor) -> Tensor:
            return sample_sums(_pad(left, batch_sizes, B), _pad(right, batch_sizes, B), B)

        d_ih, d_hh = sums(da, x.reshape(-1, x.size(-1))), sums(da, h)
        every = {"weight_ih": d_ih, "weight_hh": d_hh}
        d_bias = d_hr = None
        if bias is not None:
            d_bias = _pad(da, batch_sizes, B).view(-1, B, da.size(1)).sum(0)
            every |= {"bias_ih": d_bias, "bias_hh": d_bias}
        if weight_hr is not None:
            d_hr = every["weight_hr"] = sums(d_h_rows, gates[3] * torch.tanh(cells))
        loop, k = ctx.told
        loop.record(k, every)
        weights = (None if d is None else d.sum(0) for d in (d_ih, d_hh, d_bias, d_hr))
        return None, d_x, None, d_h, d_c, *weights, None


def _pad(rows: Tensor, batch_sizes: Tensor | None, B: int) -> Tensor:
    """Packed ``[N, features]`` to ``[T * B, features]``, with zeros where a sequence has no step."""
    if batch_sizes is None:
        return rows
    sizes = batch_sizes.tolist()
    place = torch.cat([torch.arange(b) + t * B for t, b in enumerate(sizes)]).to(rows.device)
    return rows.new_zeros(len(sizes) * B, rows.size(1)).index_copy(0, place, rows)
