"""Weights that a file keeps as what they are computed from: weight_norm, spectral_norm, pruning."""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

_KIND = r"(?:weight_ih|weight_hh|bias_ih|bias_hh|weight_hr)(?:_l\d+(?:_reverse)?)?"
_OLD = re.compile(rf"((?:.*\.)?{_KIND})_(g|v|orig|mask|u)", re.DOTALL)
_NEW = re.compile(rf"((?:.*\.)?)parametrizations\.({_KIND})\.(.+)", re.DOTALL)


def with_derived(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Compute the weights that are kept in parts.

    Args:
        tensors: those of a file, by path.

    Returns:
        All weights by path, and for each that was computed, or cannot be, of what it was made.
    """
    whole: dict[str, Tensor] = {}
    parts: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for path, tensor in tensors.items():
        if old := _OLD.fullmatch(path):
            parts.setdefault(old[1], {})[old[2]] = path, tensor
        elif new := _NEW.fullmatch(path):
            parts.setdefault(new[1] + new[2], {})[new[3]] = path, tensor
        else:
            whole[path] = tensor
    how: dict[str, str] = {}
    for path, of_weight in parts.items():
        keys = ", ".join(key for key, _ in of_weight.values())
        values = {name: tensor for name, (_, tensor) in of_weight.items()}
        kind, weight = _compute(values)
        how[path] = f"{kind} of {keys}"
        if weight is not None:
            whole[path] = weight
        elif path in whole:  # a hook that keeps the weight beside its parts
            how.pop(path)
    return whole, how


def _compute(values: Mapping[str, Tensor]) -> tuple[str, Tensor | None]:
    """What made a weight of these parts, and the weight, ``None`` where there is no formula."""
    names = set(values)
    try:
        for g, v in (("g", "v"), ("original0", "original1")):
            if names == {g, v} and _is_norm(values[g], values[v]):
                return "weight_norm", _weight_norm(values[g], values[v])
        if names == {"orig", "mask"}:
            return "pruning", values["orig"] * values["mask"].to(values["orig"].dtype)
        for weight, u, v in (("orig", "u", "v"), ("original", "0._u", "0._v")):
            if names == {weight, u, v}:
                return "spectral_norm", _spectral_norm(values[weight], values[u], values[v])
        if names == {"orig", "u"}:
            return "spectral_norm", None
    except RuntimeError:  # misshapen parts
        pass
    return "made by a parametrization that is not known,", None


def _is_norm(g: Tensor, v: Tensor) -> bool:
    """Whether g may be the norm of v: in all dimensions but one, or in all, it has one element.

    The two of a vector may be anything.
    """
    kept = [size for size, of_v in zip(g.shape, v.shape) if size == of_v != 1]
    return g.dim() == 0 or (g.dim() == v.dim() > 1 and math.prod(g.shape) == math.prod(kept[:1]))


def _spectral_norm(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The weight over its largest singular value; u and v are the vectors of that, as torch keeps them.

    Its argument ``dim`` decides which of the two belongs to the rows. A square matrix does not tell:
    there the larger value is that of the vectors as they belong.
    """
    fitting = [m for m in (weight, weight.t()) if m.shape == (u.numel(), v.numel())]
    return weight / torch.stack([torch.dot(u, torch.mv(m, v)) for m in fitting]).max()


def _weight_norm(g: Tensor, v: Tensor) -> Tensor:
    """g v / |v|, the norm over the dimensions in which g has one element."""
    dims = [dim for dim, size in enumerate(g.shape) if size == 1 and v.size(dim) > 1]
    if g.dim() == 0:
        dims = list(range(v.dim()))
    return (
        v * (g / torch.linalg.vector_norm(v, dim=dims, keepdim=g.dim() > 0))
        if dims
        else v * g / v.abs()
    )
