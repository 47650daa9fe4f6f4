"""In which dtype the loop computes, and in which it answers."""

import torch
from torch import Tensor

# The fused kernels behind nn.LSTM add up in float32 where the weights are narrower. So does the
# loop: it runs in float32 and rounds what it returns. Rounding after every step instead costs
# 2.5 times nn.LSTM's error in a bfloat16 output, and 8 times in the gradient of weight_hh.
_COMPUTE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a layer of ``dtype`` computes."""
    return _COMPUTE.get(dtype, dtype)


def autocast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Cast as autocast does: real floating-point tensors, but never float64."""
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def answer_dtypes(
    x: Tensor, c_0: Tensor, weight: Tensor, cast_to: torch.dtype | None, packed: bool, projected: bool
) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of output and h_n, and of c_n, which under autocast are nn.LSTM's.

    Its fused kernels answer in the autocast dtype. On CPU it leaves them for packed, projected,
    empty and float16 input. Its own loop there keeps the states in the dtype they came in, but for
    a projected h, which is a product's result and so of the autocast dtype.

    Args:
        x: the input, as given.
        c_0: the initial cell state, as given.
        weight: any of the weights, as autocast casts it.
        cast_to: the dtype of autocast, or ``None``.
        packed: whether the input is packed.
        projected: whether there is a projection.
    """
    looped = packed or projected or x.numel() == 0 or x.dtype == torch.float16
    if cast_to is None or x.device.type != "cpu" or not looped:
        return weight.dtype, weight.dtype
    state = torch.promote_types(weight.dtype, c_0.dtype)
    return weight.dtype if projected else state, state
