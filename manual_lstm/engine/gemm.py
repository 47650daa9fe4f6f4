"""The fastest matrix products that torch has on CPU.

nn.LSTM multiplies with oneDNN, torch.addmm with MKL. For large float32 products oneDNN is faster, and
faster again if it may lay out a weight once for many of them. torch has private operators for both,
which Inductor uses and which have existed since 2.0. They are looked up here. Where they are missing,
or oneDNN is switched off by torch's own switch::

    with torch.backends.mkldnn.flags(enabled=False):
        layer(x)

every product is one of public torch. The thresholds were measured on two cores of an AMD EPYC (Zen 4);
they do not depend on the number of threads.
"""

from collections.abc import Callable, Sequence

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


def _prefers_onednn(weight: Tensor, rows: int) -> bool:
    """Whether oneDNN is there, may be used, and is the faster for ``[rows, K]`` by ``[K, N]``."""
    size = weight.numel()
    return (
        size * rows >= 1 << 23
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and None not in (_linear, _linear_add, _pack)
        and is_onednn_enabled()
    )


class GateProducts:
    """The products of a direction's forward: all steps' input with weight_ih, each h with weight_hh.

    One batched product with a gate in each batch is a little faster than one wide product, keeps
    more threads busy, and leaves every gate's elements side by side, ``[4, b, H]``, which is how
    the activations are fastest.

    Args:
        weight_ih: ``[4H, I]``.
        weight_hh: ``[4H, P or H]``.
        bias: ``[4H]``, or ``None``.
    """

    def __init__(self, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None) -> None:
        H = weight_hh.size(0) // 4
        self.weight_ih = weight_ih.view(4, H, weight_ih.size(1)).transpose(1, 2)  # [4, I, H]
        self.weight_hh = weight_hh.view(4, H, weight_hh.size(1)).transpose(1, 2)  # [4, P or H, H]
        self.bias = None if bias is None else bias.view(4, 1, H)

    def project(self, x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
        """The input's part of the gates for rows ``[n, I]``: a piece for each step."""
        x = self.widen(x)
        if self.bias is None:
            a = torch.bmm(x, self.weight_ih)  # [4, n, H]
        else:
            a = torch.baddbmm(self.bias, x, self.weight_ih)
        return a.split_with_sizes(sizes, 1)

    def widen(self, h: Tensor) -> Tensor:
        """A view of states ``[n, P or H]``, as :meth:`add` takes them: rows are in dimension 1."""
        return h.expand(4, *h.shape)

    def add(self, a: Tensor, h: Tensor, out: Tensor) -> None:
        """Add the part of the widened state to a step's piece; writes to ``out``, ``[4, b, H]``."""
        torch.baddbmm(a, h, self.weight_hh, out=out)


class OneDNNGateProducts(GateProducts):
    """The same with oneDNN, which packs weight_hh once.

    Args:
        rows: how many rows a step has, on average.
        times: the number of steps.
    """

    def __init__(
        self, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, rows: int, times: int
    ) -> None:
        assert _linear is not None
        assert _pack is not None
        self._linear = _linear
        self.weight_ih, self.bias = weight_ih, bias
        self.weight_hh = _pack(weight_hh.contiguous(), rows) if times >= 8 else weight_hh

    def project(self, x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
        a = self._linear(x, self.weight_ih, self.bias, "none", [], "")  # [n, 4H]
        return _by_gate(a).split_with_sizes(sizes, 1)

    def widen(self, h: Tensor) -> Tensor:
        return h.unsqueeze(0)

    def add(self, a: Tensor, h: Tensor, out: Tensor) -> None:
        # oneDNN could add a itself. Adding here also puts each gate's elements side by side.
        torch.add(a, _by_gate(self._linear(h[0], self.weight_hh, None, "none", [], "")), out=out)


def _by_gate(a: Tensor) -> Tensor:
    """A view of ``[n, 4H]`` as ``[4, n, H]``."""
    return a.view(a.size(0), 4, a.size(1) // 4).transpose(0, 1)


def gate_products(
    weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, rows: int, steps: int
) -> GateProducts:
    """The faster of the two for this many rows in this many steps."""
    average = rows // max(steps, 1)
    if _prefers_onednn(weight_hh, average):
        return OneDNNGateProducts(weight_ih, weight_hh, bias, average, steps)
    return GateProducts(weight_ih, weight_hh, bias)


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


def repeated_product(weight: Tensor, rows: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function ``add(a, x) = a + x @ weight``, for one weight ``[K, N]`` and many products.

    Args:
        weight: ``[K, N]``.
        rows: how many rows x will have at most.
    """
    K, N = weight.shape
    if _linear_add is not None and _prefers_onednn(weight, rows):
        # Not packed: laying out a transposed weight costs more than it gives.
        onednn, weight_t = _linear_add, weight.t()
        return lambda a, x: onednn(x, a, weight_t, None, "add")
    if rows == 1 and N % 2 == 0:
        # MKL gives a single row to a single thread; the two halves of the columns occupy two.
        # A step may also have no row: batch_sizes may end in zeros.
        halves = weight.view(K, 2, N // 2).transpose(0, 1)  # [2, K, N / 2]
        return lambda a, x: torch.baddbmm(
            a.reshape(2, len(a), N // 2), x.expand(2, len(x), K), halves
        ).view(len(a), N)
    return lambda a, x: torch.addmm(a, x, weight)
