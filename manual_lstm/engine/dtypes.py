"""In which dtype the loop computes, and in which it answers."""

from collections.abc import Callable

import torch
from torch import Tensor

from manual_lstm.engine.context import is_onednn_enabled

# The fused kernels behind nn.LSTM add up in float32 where the weights are narrower. So does the
# loop: it runs in float32 and rounds what it returns. Rounding after every step instead costs
# 2.5 times nn.LSTM's error in a bfloat16 output, and 8 times in the gradient of weight_hh.
_COMPUTE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
# Whether oneDNN has kernels in bfloat16 for this CPU. The name is torch's own.
_has_bfloat16: Callable[[], bool] = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)


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
    empty and float16 input, for bfloat16 on an older CPU, and where oneDNN is switched off. Its own
    loop there keeps the states in the dtype they came in, but for a projected h, which is a product's
    result and so of the autocast dtype.

    Args:
        x: the input, as given.
        c_0: the initial cell state, as given.
        weight: any of the weights, as autocast casts it.
        cast_to: the dtype of autocast, or ``None``.
        packed: whether the input is packed.
        projected: whether there is a projection.
    """
    if cast_to is None or x.device.type != "cpu":
        return weight.dtype, weight.dtype
    looped = packed or projected or x.numel() == 0 or x.dtype == torch.float16
    looped = looped or not is_onednn_enabled() or (x.dtype == torch.bfloat16 and not _has_bfloat16())
    if not looped:
        return weight.dtype, weight.dtype
    state = torch.promote_types(weight.dtype, c_0.dtype)
    return weight.dtype if projected else state, state
