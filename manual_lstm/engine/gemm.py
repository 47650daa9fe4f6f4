"""The fastest matrix products that torch has on CPU, and sums over rows that round off little.

The recurrent product takes the same weight at every step. MKL is faster with a weight that is laid out
``[K, N]`` than with a transposed view of ``[N, K]``, so the loop copies it once. For the largest
products oneDNN is faster still, if it may pack the weight. torch has private operators for that, which
Inductor uses and which have existed since 2.0. They are looked up here. Where they are missing, or
oneDNN is switched off by torch's own switch::

    with torch.backends.mkldnn.flags(enabled=False):
        layer(x)

every product is one of public torch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from manual_lstm.engine.context import (
    is_compiling,
    is_grad_enabled,
    is_onednn_enabled,
    is_tracing,
)


def find_onednn(name: str, overload: str) -> Callable[..., Tensor] | None:
    """Look up an operator of ``torch.ops.mkldnn``, ``None`` where it does not exist."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    return getattr(getattr(torch.ops.mkldnn, name, None), overload, None)


_linear = find_onednn("_linear_pointwise", "default")
_linear_add = find_onednn("_linear_pointwise", "binary")
_pack = find_onednn("_reorder_linear_weight", "default")

# The number of multiplications from which oneDNN's product is faster: of many rows with weight_ih, and
# of a step with weight_hh forwards and backwards.
_FEWEST_OF_ROWS, _FEWEST_FORWARDS, _FEWEST_BACKWARDS = 1 << 27, 1 << 25, 1 << 24


def _prefers_onednn(weight: Tensor, rows: int, fewest: int) -> bool:
    """Whether oneDNN is there, may be used, and is the faster for ``[rows, K]`` by ``[K, N]``."""
    return (
        weight.numel() * rows >= fewest
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and None not in (_linear, _linear_add, _pack)
        and is_onednn_enabled()
    )


# Adds the product of a widened state with weight_hh to the input's part of the gates, in place.
AddProduct = Callable[[Tensor, Tensor], Any]


def ifog(weight: Tensor) -> Tensor:
    """Copy a weight or a bias, ``[4H, ...]``, with the gates in the order i, f, o, g."""
    H = weight.size(0) // 4
    i_f, g, o = weight.split_with_sizes([2 * H, H, H])
    return torch.cat([i_f, o, g])


def by_gate(weight: Tensor) -> Tensor:
    """Lay out a weight ``[4H, K]`` gate by gate, ``[4, K, H]``, in the order i, f, o, g."""
    four_H, K = weight.shape
    H = four_H // 4
    if K == 1 or weight.numel() < 1 << 14 or weight.device.type != "cpu":
        return ifog(weight).view(4, H, K).transpose(1, 2).contiguous()
    laid_out = weight.new_empty(4, K, H)
    i, f, g, o = weight.view(4, H, K).transpose(1, 2)
    for to, gate in zip(laid_out, (i, f, o, g)):
        to.copy_(gate)  # torch is fast at transposing two dimensions, not three
    return laid_out


def gate_product(weight_hh: Tensor, rows: int, times: int, by_halves: bool) -> AddProduct:
    """Return the function ``add(a, h)`` for one weight_hh and many steps.

    It takes the input's part of a step's gates, a contiguous ``[4, b, H]`` in the order i, f, o, g, and
    the state ``[b, P or H]`` widened to ``[4, b, P or H]``, and adds to ``a`` in place.

    One batched product with a gate in each batch is a little faster than one wide product, keeps
    more threads busy, and leaves every gate's elements side by side, which is how the activations are
    fastest. A single row has them side by side anyway. There, with ``by_halves``, two gates make a
    batch: it takes ``[2, 1, 2H]`` and ``[2, 1, P or H]``, and the weight needs not be transposed.

    Args:
        weight_hh: ``[4H, P or H]``.
        rows: how many rows a step has, on average.
        times: the number of steps.
        by_halves: see above.
    """
    if by_halves:
        halves = ifog(weight_hh).view(2, -1, weight_hh.size(1)).transpose(1, 2)  # [2, P or H, 2H]
        return lambda a, h: a.baddbmm_(h, halves)
    if times >= 8 and _prefers_onednn(weight_hh, rows, _FEWEST_FORWARDS):
        assert _linear is not None
        assert _pack is not None
        linear, packed = _linear, _pack(ifog(weight_hh), rows)

        def add_onednn(a: Tensor, h: Tensor) -> None:
            a += linear(h[0], packed, None, "none", [], "").view(a.size(1), 4, -1).transpose(0, 1)

        return add_onednn
    # On CPU, transposing costs about as much as four steps of many rows lose without it. Elsewhere it
    # costs little, and each operation of a step much.
    if weight_hh.device.type != "cpu" or times >= 12 or (times >= 4 and rows >= 8):
        weight = by_gate(weight_hh)
    else:
        weight = ifog(weight_hh).view(4, -1, weight_hh.size(1)).transpose(1, 2)  # [4, P or H, H]
    return lambda a, h: a.baddbmm_(h, weight)


def row_product(
    weight: Tensor, bias: Tensor | None, rows: int
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return ``product(x, out)``, ``x @ weight.t() + bias``, for one weight and many x.

    It takes rows ``[n, K]``, and writes rows ``[n, N]`` to ``out``. Without ``out`` it returns them,
    and the next call may write over them.

    Args:
        weight: ``[N, K]``.
        bias: ``[N]``, or ``None``.
        rows: how many rows x has at most.
    """
    if _linear is not None and _prefers_onednn(weight, rows, _FEWEST_OF_ROWS):
        linear = _linear

        def product(x: Tensor, out: Tensor | None) -> Tensor:
            rows = linear(x, weight, bias, "none", [], "")
            return rows if out is None else out.copy_(rows)

        return product
    weight_t = weight.t()
    buffer: list[Tensor] = []

    def product_into(x: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            if not buffer:
                buffer.append(weight.new_empty(rows, weight.size(0)))
            out = buffer[0][: x.size(0)]
        return (
            torch.mm(x, weight_t, out=out) if bias is None else torch.addmm(bias, x, weight_t, out=out)
        )

    return product_into


_FEW_COLUMNS = 16  # MKL adds up row by row below this many columns


def missing_columns(weight: Tensor, multiple: int = 1) -> int:
    """How many columns of zeros ``[M, N]`` should get before its gradient is computed.

    The gradient is a sum over rows. MKL adds up row by row where N is below 16, at ten times the error
    of its better way, and is a third slower where N is not a multiple of 8. Columns of zeros make it
    use its better way.

    Args:
        multiple: of what the number of columns should be a multiple.
    """
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return 0
    N = weight.size(1)
    return max(_FEW_COLUMNS, -(-N // multiple) * multiple) - N


def with_columns_of_zeros(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors of ``x @ weight.t()``, widened where autograd would sum over many rows inexactly.

    Args:
        x: ``[..., N]``.
        weight: ``[M, N]``.
    """
    # A trace or a compiled program would take the number of rows for a constant.
    if not is_grad_enabled() or is_tracing() or is_compiling():
        return x, weight
    N = weight.size(1)
    if N >= _FEW_COLUMNS or x.dtype != weight.dtype or x.numel() // N <= 512:
        return x, weight
    columns = missing_columns(weight)
    return pad(x, (0, columns)), pad(weight, (0, columns))


class OuterSum:
    """The gradient of a weight: the sum of outer products, ``a.t() @ b``, over the rows of all blocks.

    Args:
        weight: ``[M, N]``.
        piece: how many rows to sum at a time. A long sum rounds off more, a short one takes longer.
    """

    def __init__(self, weight: Tensor, piece: int) -> None:
        M, self.N = weight.shape
        self.piece = piece
        self.columns = missing_columns(weight, multiple=8)
        self.total = weight.new_zeros(M, self.N + self.columns)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add rows ``[n, M]`` and ``[n, N]``."""
        if self.columns:
            b = pad(b, (0, self.columns))
        if len(a) <= self.piece:
            self.total.addmm_(a.t(), b)
            return
        block = torch.mm(a[: self.piece].t(), b[: self.piece])
        for start in range(self.piece, len(a), self.piece):
            rows = slice(start, start + self.piece)
            block.addmm_(a[rows].t(), b[rows])
        self.total += block  # two short sums, of pieces and of blocks, round off less than one long

    def result(self) -> Tensor:
        """The sum, ``[M, N]``."""
        return self.total[:, : self.N].contiguous()


def state_product(weight_hh: Tensor, rows: int, times: int, by_halves: bool) -> AddProduct:
    """Return the function ``add(d_h, da)`` for one weight_hh and many steps back in time.

    It adds to the gradient of a state, a contiguous ``[b, P or H]``, in place, what the gradient of
    the next step's gates, ``[b, 4H]``, passes back. With ``by_halves`` it takes ``[2, b, N]``, the two
    halves of the columns, and ``[2, b, 4H]``, twice the same.

    Args:
        weight_hh: ``[4H, P or H]``.
        rows: how many rows a step has at most.
        times: the number of steps.
        by_halves: see above.
    """
    K, N = weight_hh.shape
    if by_halves:
        halves = weight_hh.view(K, 2, N // 2).transpose(0, 1)  # [2, K, N / 2]
        return lambda d_h, da: d_h.baddbmm_(da, halves)
    if _linear_add is not None and _prefers_onednn(weight_hh, rows, _FEWEST_BACKWARDS):
        linear_add, weight_t = _linear_add, weight_hh.t()
        if times >= 16 and _pack is not None:  # many steps pay for laying out a transposed weight
            weight_t = _pack(weight_t.contiguous(), rows)

        return lambda d_h, da: d_h.copy_(linear_add(da, d_h, weight_t, None, "add"))
    return lambda d_h, da: d_h.addmm_(da, weight_hh)
