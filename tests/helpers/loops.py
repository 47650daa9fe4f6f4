"""One direction run by a chosen loop, and which loop a layer runs.

The other tests know the loops by these functions, so that a change of the engine changes this file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

from manual_lstm import ManualLSTM
from manual_lstm.engine import dispatch, fused, stack
from manual_lstm.engine.direction import Direction, Gradients
from manual_lstm.engine.dispatch import Loop
from manual_lstm.loop import run_plain
from manual_lstm.testing.comparing import assert_close

# The arguments of one direction, in Direction's order; and which of them have a gradient.
Arguments = tuple[Any, ...]
DIFFERENTIABLE = tuple(Direction._fields.index(name) for name in Gradients._fields)


def plain_direction(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction by the plain loop."""
    output, h_n, c_n, _ = run_plain(Direction(*arguments))
    return output, h_n, c_n


def fused_direction(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction by the operator."""
    output, h_n, c_n, _ = fused.run_fused(Direction(*arguments))
    return output, h_n, c_n


@contextmanager
def patched(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes for a while: for hypothesis, whose cases share one monkeypatch."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def plainly() -> Any:
    """The plain loop where otherwise the operator would run."""
    return patched(dispatch, _operator_takes=lambda *_: False)


def always_plainly() -> Any:
    """The plain loop, whatever the choice would be."""
    return patched(stack, choose=lambda *_, **__: Loop.PLAIN)


@contextmanager
def loops_chosen() -> Iterator[set[str]]:
    """The names of the loops that are chosen, also where a compiler only looks."""
    chosen: set[str] = set()
    original = dispatch.choose

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def note(name: str) -> None:
        chosen.add(name)

    def spy(*arguments: Any, **options: Any) -> Any:
        loop = original(*arguments, **options)
        note(loop.name)
        return loop

    with patched(stack, choose=spy):
        yield chosen


def arguments(
    sizes: list[int],
    packed: bool,
    I: int = 3,
    H: int = 4,
    P: int = 0,
    bias: bool = True,
    reverse: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    cut: float = 0.0,
    lengths: list[int] | None = None,
) -> Arguments:
    """Arguments of one direction, all of which require gradients.

    ``cut`` is the probability with which a step begins anew. Padded sequences have ``lengths``.
    """
    torch.manual_seed(seed)
    B = max(sizes, default=2)

    def randn(*shape: int) -> Tensor:
        # Complex ones are small: sigmoid and tanh have poles on the imaginary axis.
        return torch.randn(*shape, dtype=dtype).mul(0.1 if dtype.is_complex else 0.5).requires_grad_()

    return (
        randn(sum(sizes), I) if packed else randn(len(sizes), B, I),
        torch.tensor(sizes, dtype=torch.int64) if packed else None,
        None if lengths is None else torch.tensor(lengths, dtype=torch.int64),
        torch.rand([sum(sizes)] if packed else [len(sizes), B]) < cut if cut else None,
        randn(B, P or H),
        randn(B, H),
        randn(4 * H, I),
        randn(4 * H, P or H),
        randn(4 * H) if bias else None,
        randn(P, H) if P else None,
        reverse,
    )


@st.composite
def drawn_arguments(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> Arguments:
    packed = draw(st.booleans())
    if packed:
        sizes = sorted(draw(st.lists(st.integers(1, 6), min_size=1, max_size=9)), reverse=True)
    else:
        sizes = [draw(st.integers(0, 5))] * draw(st.integers(0, 9))
    H = draw(st.integers(1, 20))
    B, T = max(sizes, default=2), len(sizes)
    padded = not packed and draw(st.booleans())
    return arguments(
        sizes,
        packed,
        I=draw(st.integers(1, 20)),
        H=H,
        P=draw(st.integers(1, H - 1)) if H > 1 and draw(st.booleans()) else 0,
        bias=draw(st.booleans()),
        reverse=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**16)),
        cut=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        lengths=draw(st.lists(st.integers(0, T), min_size=B, max_size=B)) if padded else None,
    )


def run_direction(function: Any, direction_args: Arguments, wanted: list[bool]) -> dict[str, Tensor]:
    """The results, and all gradients of those of the three results that are wanted."""
    outputs = function(*direction_args)
    names = ("output", "h_n", "c_n")
    found = {name: part.detach() for name, part in zip(names, outputs)}
    loss = sum((part * torch.linspace(0.5, 1.5, part.numel()).reshape(part.shape)).sum().abs()
               for part, want in zip(outputs, wanted) if want)  # fmt: skip
    inputs = [direction_args[k] for k in DIFFERENTIABLE if direction_args[k] is not None]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    for k, (tensor, gradient) in enumerate(zip(inputs, gradients)):
        found[f"gradient {k}"] = torch.zeros_like(tensor) if gradient is None else gradient
    return found


def assert_the_operator_is_the_plain_loop(direction_args: Arguments, wanted: list[bool]) -> None:
    """Results and gradients, with and without what the backward needs."""
    expected = run_direction(plain_direction, direction_args, wanted)
    actual = run_direction(fused_direction, direction_args, wanted)
    with torch.no_grad():
        unsaved = fused_direction(*direction_args)
    assert_close(actual, expected, 1e-12)
    names = ("output", "h_n", "c_n")
    assert_close(dict(zip(names, unsaved)), {name: actual[name] for name in names}, 1e-12)
    assert all(part.is_contiguous() for part in unsaved)


@contextmanager
def counted() -> Iterator[list[int]]:
    """How often the stack ran the fused direction."""
    calls: list[int] = []
    original = fused.run_fused

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    with patched(stack, run_fused=spy):
        yield calls


def runs_fused(layer: ManualLSTM) -> bool:
    """Whether a call of ordinary input runs the fused direction."""
    with counted() as calls:
        layer(torch.randn(5, 2, 3))
    return bool(calls)
