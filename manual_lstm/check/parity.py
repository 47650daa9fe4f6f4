"""ManualLSTM beside nn.LSTM: the same weights, the same input, and how far apart they come out."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from manual_lstm.functional import lstm_forward
from manual_lstm.module import ManualLSTM

LSTM = nn.LSTM | ManualLSTM
PARTS = ("output", "h_n", "c_n", "gradient")


def run(
    layer: nn.Module, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None
) -> dict[str, Tensor]:
    """Run ``layer`` forwards and backwards.

    Returns:
        The output (a packed one's data), h_n and c_n, and under ``grad of`` each one's name the
        gradients of the input, h_0, c_0 and every parameter.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    data = data.detach().requires_grad_()  # strided as it was
    wanted: dict[str, Tensor] = {"input": data}
    if hx is not None:
        hx = (hx[0].detach().requires_grad_(), hx[1].detach().requires_grad_())
        wanted |= {"h_0": hx[0], "c_0": hx[1]}
    wanted |= dict(layer.named_parameters())

    output, (h_n, c_n) = layer(
        input._replace(data=data) if isinstance(input, PackedSequence) else data, hx
    )
    results = {
        "output": output.data if isinstance(output, PackedSequence) else output,
        "h_n": h_n,
        "c_n": c_n,
    }
    # Every element with a weight of its own, so that no mistake can cancel out.
    # Smooth: an absolute value of a sum near zero would turn gradients round in low precision.
    parts = [part * _ramp(part) for part in results.values()]
    loss = sum((part.real + part.imag if part.is_complex() else part).sum() for part in parts)
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    for name, tensor, gradient in zip(wanted, wanted.values(), gradients):
        results[f"grad of {name}"] = torch.zeros_like(tensor) if gradient is None else gradient
    return {name: result.detach() for name, result in results.items()}


def _ramp(like: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, like.numel()).reshape(like.shape).to(like)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors' elements, measured by ``a``'s largest if above one.

    Infinite where the two cannot be compared; equal infinities and NaNs do not differ.
    """
    a, b = a.detach(), b.detach()
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    wide = torch.complex128 if a.is_complex() else torch.float64
    gap = (a.to(wide) - b.to(wide)).abs()
    same = (a == b) | (a.isnan() & b.isnan())
    largest = float(gap.masked_fill(same, 0.0).nan_to_num(nan=float("inf")).max())
    scale = float(a.to(wide).abs().nan_to_num(nan=0.0, posinf=0.0).max())
    return largest / max(1.0, scale)


def compare(
    reference: LSTM,
    layer: LSTM,
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Run both layers on the same input, and return the largest difference of each part."""
    torch.manual_seed(seed)  # for dropout
    expected = run(reference, input, hx)
    torch.manual_seed(seed)
    actual = run(layer, input, hx)
    gaps = {part: 0.0 for part in PARTS}
    for name in expected:
        part = "gradient" if name.startswith("grad of ") else name
        gaps[part] = max(gaps[part], difference(expected[name], actual[name]))
    return gaps


def twins(*args: Any, **kwargs: Any) -> tuple[nn.LSTM, ManualLSTM]:
    """An nn.LSTM and a ManualLSTM with its weights."""
    reference, layer = nn.LSTM(*args, **kwargs), ManualLSTM(*args, **kwargs)
    layer.load_state_dict(reference.state_dict())
    return reference, layer


@dataclass
class Row:
    """One line of the table: a configuration and an input for it."""

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    input: Callable[[torch.dtype], Tensor | PackedSequence] = lambda dtype: torch.randn(
        12, 5, 10, dtype=dtype
    )
    with_hx: bool = False
    dtype: torch.dtype = torch.float64
    autocast: torch.dtype | None = None


def _packed(*lengths: int, enforce_sorted: bool) -> Callable[[torch.dtype], PackedSequence]:
    return lambda dtype: pack_sequence(
        [torch.randn(n, 10, dtype=dtype) for n in lengths], enforce_sorted=enforce_sorted
    )


_EVERYTHING: dict[str, Any] = {
    "num_layers": 3,
    "bidirectional": True,
    "proj_size": 7,
    "batch_first": True,
    "dropout": 0.3,
}
ROWS = [
    Row("defaults"),
    Row("hx given", with_hx=True),
    Row("bias=False", {"bias": False}),
    Row("num_layers=3", {"num_layers": 3}),
    Row("bidirectional=True", {"bidirectional": True}, with_hx=True),
    Row("proj_size=7", {"proj_size": 7}, with_hx=True),
    Row("batch_first=True", {"batch_first": True}),
    Row("dropout=0.5, training", {"num_layers": 2, "dropout": 0.5}),
    Row("unbatched", input=lambda dtype: torch.randn(12, 10, dtype=dtype), with_hx=True),
    Row("packed, sorted", input=_packed(9, 6, 6, 1, enforce_sorted=True)),
    Row("packed, unsorted", input=_packed(3, 9, 1, 6, enforce_sorted=False), with_hx=True),
    Row("one step", input=lambda dtype: torch.randn(1, 5, 10, dtype=dtype)),
    Row("batch of 0", input=lambda dtype: torch.randn(12, 0, 10, dtype=dtype)),
    Row("everything", _EVERYTHING, with_hx=True),
    Row("everything, packed", _EVERYTHING, _packed(3, 9, 1, 6, enforce_sorted=False), True),
    Row("float32", dtype=torch.float32),
    Row("bfloat16", dtype=torch.bfloat16),
    Row("float16", dtype=torch.float16),
    Row("complex128", dtype=torch.complex128),
    Row("autocast to bfloat16", dtype=torch.float32, autocast=torch.bfloat16),
]


def tolerance(dtype: torch.dtype) -> float:
    """How far two right answers of this dtype may lie apart in the table's sizes."""
    if dtype in (torch.float64, torch.complex128):
        return 1e-12
    return 8 * torch.finfo(dtype).eps


def table() -> Iterator[tuple[str, dict[str, float], float]]:
    """Compare the layers for each row; yields its label, the differences and the tolerance."""
    for row in ROWS:
        torch.manual_seed(0)
        reference, layer = twins(10, 16, dtype=row.dtype, **row.options)
        input, hx = row.input(row.dtype), None
        if row.with_hx:
            with torch.no_grad():
                h_n, c_n = layer(input)[1]
                hx = (torch.randn_like(h_n), torch.randn_like(c_n))
        low = row.autocast or row.dtype
        context: AbstractContextManager[object] = nullcontext()
        if row.autocast:
            context = torch.autocast("cpu", row.autocast)
        with context:
            yield row.label, compare(reference, layer, input, hx), tolerance(low)


def show() -> bool:
    """Print what the notebook showed, and the table; return whether all is within tolerance."""
    torch.manual_seed(0)
    B, T, I, H = 100, 1, 6, 32
    reference, layer = twins(I, H, batch_first=True)
    input, h_0, c_0 = torch.randn(B, T, I), torch.randn(B, H), torch.randn(B, H)

    print(f"The notebook's layer: nn.LSTM({I}, {H}, batch_first=True), batch {B}, {T} step\n")
    for name, parameter in layer.named_parameters():
        print(f"  {name:<14}{list(parameter.shape)}")
    with torch.no_grad():
        output, _ = reference(input, (h_0.unsqueeze(0), c_0.unsqueeze(0)))
        ours, _ = layer(input, (h_0.unsqueeze(0), c_0.unsqueeze(0)))
        function, _ = lstm_forward(input, (h_0, c_0), *layer.parameters())
    print()
    for label, tensor in (("nn.LSTM", output), ("ManualLSTM", ours), ("lstm_forward", function)):
        values = "  ".join(f"{value:+.4f}" for value in tensor.flatten()[:6].tolist())
        print(f"  {label:<13}output {list(tensor.shape)}: {values} ...")
    gap = max(difference(output, ours), difference(output, function))
    good = gap <= tolerance(torch.float32)
    print(f"\n  largest difference {gap:.1e}\n")

    print("Largest difference of ManualLSTM(10, 16, ...) from nn.LSTM(10, 16, ...), in float64\n")
    print(f"  {'':<24}" + "".join(f"{part:<11}" for part in PARTS) + "tolerance")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        for label, gaps, allowed in table():
            within = all(gap <= allowed for gap in gaps.values())
            cells = "".join(f"{gaps[part]:<11.1e}" for part in PARTS)
            print(f"  {label:<24}{cells}{allowed:.1e}  {'ok' if within else 'DIFFERS'}")
            good = good and within
    print("\n" + ("All within tolerance." if good else "Not all within tolerance."))
    return good
