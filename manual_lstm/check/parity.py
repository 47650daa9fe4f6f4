"""Compare ManualLSTM with nn.LSTM: the same weights and input, and how far the results differ."""

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

EitherLSTM = nn.LSTM | ManualLSTM
PARTS = ("output", "h_n", "c_n", "gradient")


def data_of(x: Tensor | PackedSequence) -> Tensor:
    """Return a tensor as it is, or the data of a packed sequence."""
    return x.data if isinstance(x, PackedSequence) else x


def ramp(like: Tensor) -> Tensor:
    """Return numbers that rise from 0.5 to 1.5, in the shape, dtype and device of ``like``."""
    return torch.linspace(0.5, 1.5, like.numel()).reshape(like.shape).to(like)


def forward_and_backward(
    layer: nn.Module,
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    call: Callable[..., Any] | None = None,
) -> dict[str, Tensor]:
    """Run ``layer`` forwards and backwards.

    Args:
        layer: the layer.
        input, hx: what it is called with.
        call: what to call instead of the layer.

    Returns:
        The output (of packed output, the data), h_n and c_n by these names, and the gradients of the
        input, h_0, c_0 and every parameter by ``"grad of "`` and the tensor's name.
    """
    # detach() keeps the strides, which a layer must accept as they are.
    data = data_of(input).detach().requires_grad_()
    sources: dict[str, Tensor] = {"input": data}
    if hx is not None:
        hx = (hx[0].detach().requires_grad_(), hx[1].detach().requires_grad_())
        sources |= {"h_0": hx[0], "c_0": hx[1]}
    sources |= dict(layer.named_parameters())

    output, (h_n, c_n) = (call or layer)(
        input._replace(data=data) if isinstance(input, PackedSequence) else data, hx
    )
    results = {"output": data_of(output), "h_n": h_n, "c_n": c_n}
    # Each element has its own weight in the loss, so that two mistakes cannot cancel each other.
    # The loss is smooth: with an absolute value, a sum near zero could change its sign in low
    # precision, and with it every gradient.
    parts = [part * ramp(part) for part in results.values()]
    loss = sum((part.real + part.imag if part.is_complex() else part).sum() for part in parts)
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, list(sources.values()), allow_unused=True)
    for name, tensor, gradient in zip(sources, sources.values(), gradients):
        results[f"grad of {name}"] = torch.zeros_like(tensor) if gradient is None else gradient
    return {name: result.detach() for name, result in results.items()}


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference between elements, divided by the largest of ``a`` if above one.

    The difference is infinite where shapes or dtypes differ. Equal infinities and two NaNs count as
    equal.
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


def autocast_fails(dtype: torch.dtype) -> bool:
    """Whether nn.LSTM fails under autocast on this CPU: its oneDNN may have no LSTM in this dtype."""
    try:
        with torch.enable_grad(), torch.autocast("cpu", dtype):  # some CPUs have only an inference
            nn.LSTM(1, 1)(torch.zeros(1, 1, 1))
    except RuntimeError:
        return True
    return False


def official_under_autocast(lstm: nn.LSTM, dtype: torch.dtype) -> nn.LSTM:
    """Make nn.LSTM answer under autocast.

    Where its kernel fails on this CPU, it computes in the dtype of its weights, and casts what it
    returns. Packed and projected input does not use that kernel.
    """
    if lstm.proj_size or not autocast_fails(dtype):
        return lstm
    forward = lstm.forward

    def cast(*args: Any) -> Any:
        if isinstance(args[0], PackedSequence):
            return forward(*args)
        with torch.autocast("cpu", enabled=False):
            output, (h_n, c_n) = forward(*args)
        return output.to(dtype), (h_n.to(dtype), c_n.to(dtype))

    lstm.forward = cast  # type: ignore[method-assign, assignment]
    return lstm


def compare_layers(
    reference: EitherLSTM,
    layer: EitherLSTM,
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Run both layers on the same input, and return the largest difference of each of ``PARTS``."""
    torch.manual_seed(seed)  # for dropout
    expected = forward_and_backward(reference, input, hx)
    torch.manual_seed(seed)
    actual = forward_and_backward(layer, input, hx)
    gaps = {part: 0.0 for part in PARTS}
    for name in expected:
        part = "gradient" if name.startswith("grad of ") else name
        gaps[part] = max(gaps[part], largest_difference(expected[name], actual[name]))
    return gaps


def twins(*args: Any, **kwargs: Any) -> tuple[nn.LSTM, ManualLSTM]:
    """Make an nn.LSTM, and a ManualLSTM with the same arguments and weights."""
    reference, layer = nn.LSTM(*args, **kwargs), ManualLSTM(*args, **kwargs)
    layer.load_state_dict(reference.state_dict())
    return reference, layer


@dataclass
class Configuration:
    """What one line of the table compares: the layers' options, and an input for them."""

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


_EVERY_OPTION: dict[str, Any] = {
    "num_layers": 3,
    "bidirectional": True,
    "proj_size": 7,
    "batch_first": True,
    "dropout": 0.3,
}
CONFIGURATIONS = [
    Configuration("defaults"),
    Configuration("hx given", with_hx=True),
    Configuration("bias=False", {"bias": False}),
    Configuration("num_layers=3", {"num_layers": 3}),
    Configuration("bidirectional=True", {"bidirectional": True}, with_hx=True),
    Configuration("proj_size=7", {"proj_size": 7}, with_hx=True),
    Configuration("batch_first=True", {"batch_first": True}),
    Configuration("dropout=0.5, training", {"num_layers": 2, "dropout": 0.5}),
    Configuration("unbatched", input=lambda dtype: torch.randn(12, 10, dtype=dtype), with_hx=True),
    Configuration("packed, sorted", input=_packed(9, 6, 6, 1, enforce_sorted=True)),
    Configuration("packed, unsorted", input=_packed(3, 9, 1, 6, enforce_sorted=False), with_hx=True),
    Configuration("one step", input=lambda dtype: torch.randn(1, 5, 10, dtype=dtype)),
    Configuration("batch of 0", input=lambda dtype: torch.randn(12, 0, 10, dtype=dtype)),
    Configuration("everything", _EVERY_OPTION, with_hx=True),
    Configuration("everything, packed", _EVERY_OPTION, _packed(3, 9, 1, 6, enforce_sorted=False), True),
    Configuration("float32", dtype=torch.float32),
    Configuration("bfloat16", dtype=torch.bfloat16),
    Configuration("float16", dtype=torch.float16),
    Configuration("complex128", dtype=torch.complex128),
    Configuration("autocast to bfloat16", dtype=torch.float32, autocast=torch.bfloat16),
]


def tolerance(dtype: torch.dtype) -> float:
    """Return how far two correct results of this dtype may differ, at the sizes of the table."""
    if dtype in (torch.float64, torch.complex128):
        return 1e-12
    return 8 * torch.finfo(dtype).eps


def compare_configurations() -> Iterator[tuple[str, dict[str, float], float]]:
    """Compare the layers in each configuration; yield its label, the differences and the tolerance."""
    for configuration in CONFIGURATIONS:
        torch.manual_seed(0)
        dtype = configuration.dtype
        reference, layer = twins(10, 16, dtype=dtype, **configuration.options)
        input, hx = configuration.input(dtype), None
        if configuration.with_hx:
            with torch.no_grad():
                h_n, c_n = layer(input)[1]
                hx = (torch.randn_like(h_n), torch.randn_like(c_n))
        context: AbstractContextManager[object] = nullcontext()
        if configuration.autocast:
            context = torch.autocast("cpu", configuration.autocast)
            reference = official_under_autocast(reference, configuration.autocast)
        with context:
            gaps = compare_layers(reference, layer, input, hx)
        yield configuration.label, gaps, tolerance(configuration.autocast or dtype)


def print_comparison() -> bool:
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
    gap = max(largest_difference(output, ours), largest_difference(output, function))
    all_within = gap <= tolerance(torch.float32)
    print(f"\n  largest difference {gap:.1e}\n")

    print(
        "Largest difference of ManualLSTM(10, 16, ...) from nn.LSTM(10, 16, ...), in float64 but where"
    )
    print("a row names another dtype\n")
    print(f"  {'':<24}" + "".join(f"{part:<11}" for part in PARTS) + "tolerance")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        for label, gaps, allowed in compare_configurations():
            within = all(gap <= allowed for gap in gaps.values())
            cells = "".join(f"{gaps[part]:<11.1e}" for part in PARTS)
            print(f"  {label:<24}{cells}{allowed:.1e}  {'ok' if within else 'DIFFERS'}")
            all_within = all_within and within
    print("\n" + ("All within tolerance." if all_within else "Not all within tolerance."))
    return all_within
