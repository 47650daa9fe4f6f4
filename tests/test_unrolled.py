"""unroll: every gate and state, against one sequence, one step and one gate at a time."""

from contextlib import nullcontext
from itertools import product
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from manual_lstm import ManualLSTM, Unrolled
from manual_lstm.check.parity import data_of
from manual_lstm.testing.cases import Case, cases
from tests.helpers import equations
from tests.helpers.equations import gradients, parts, run_case, split
from tests.helpers.grids import quick_sample
from tests.helpers.layers import DEEP, FIELDS, fields, make_layer, randn
from tests.helpers.loops import plainly

# The numbers


def ours(case: Case) -> ManualLSTM:
    layer = case.layer(ManualLSTM)
    assert isinstance(layer, ManualLSTM)
    return layer


@given(case=cases(large=False, without={"dropout"}))
def test_the_equations_at_every_step(case: Case) -> None:
    assume(case.lengths)
    layer = ours(case)
    input, hx = case.input(), case.hx()
    x = data_of(input).clone().requires_grad_()
    input = input._replace(data=x) if isinstance(input, PackedSequence) else x
    unrolled = layer.unroll(input, hx)
    expected, steps = run_case(layer, equations.lstm, case, input, hx)
    actual = [*split(unrolled.output, case), *unrolled.states]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    for name in FIELDS:
        for seen, by_hand in zip(getattr(unrolled, name), parts(steps, name)):
            torch.testing.assert_close(split(seen, case), by_hand, rtol=0, atol=1e-12)
            actual += split(seen, case)
            expected += by_hand
    wanted = [x, *layer.parameters()]
    torch.testing.assert_close(
        gradients(actual, wanted), gradients(expected, wanted), rtol=1e-10, atol=1e-11
    )


@given(case=cases(dtypes=(torch.float64, torch.float32, torch.bfloat16)))
def test_the_same_numbers_as_forward(case: Case) -> None:
    layer = ours(case)
    input, hx = case.input(), case.hx()
    torch.manual_seed(case.seed)  # the same dropout
    unrolled = layer.unroll(input, hx)
    assert isinstance(unrolled.output, PackedSequence) == isinstance(input, PackedSequence)
    # The operator adds up in another order; how exact each is, other tests measure.
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[case.dtype]
    for fused, tolerance in ((False, 0.0), (True, rounding)):
        torch.manual_seed(case.seed)
        with nullcontext() if fused else plainly():
            output, states = layer(input, hx)
        actual, expected = (unrolled.output, unrolled.states), (output, states)
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
        for a, b in zip([data_of(unrolled.output), *unrolled.states], [data_of(output), *states]):
            assert a.stride() == b.stride()


@given(case=cases(large=False))
def test_layouts(case: Case) -> None:
    layer = ours(case)
    unrolled = layer.unroll(case.input(), case.hx())
    L, D = layer.num_layers, 1 + layer.bidirectional
    H, P = layer.hidden_size, layer.proj_size or layer.hidden_size
    h_n, c_n = unrolled.states
    for name in FIELDS:
        of_directions = getattr(unrolled, name)
        assert isinstance(of_directions, tuple)
        assert len(of_directions) == L * D
        for part in of_directions:
            assert data_of(part).shape == (
                *data_of(unrolled.output).shape[:-1],
                P if name == "h" else H,
            )
            assert isinstance(part, PackedSequence) == isinstance(unrolled.output, PackedSequence)
            if isinstance(part, PackedSequence) and isinstance(unrolled.output, PackedSequence):
                assert part[1:] == unrolled.output[1:]
    if not case.lengths:
        return
    for k in range(L * D):  # the last step of each direction is the final state
        ends = [-1 if k % D == 0 else 0] * len(case.lengths)
        h_ends = [h[end] for h, end in zip(split(unrolled.h[k], case), ends)]
        c_ends = [c[end] for c, end in zip(split(unrolled.c[k], case), ends)]
        torch.testing.assert_close(torch.stack(h_ends), h_n[k].view(-1, P), rtol=0, atol=0)
        torch.testing.assert_close(torch.stack(c_ends), c_n[k].view(-1, H), rtol=0, atol=0)
    of_last = [split(part, case) for part in unrolled.h[-D:]]
    output = [torch.cat(both, dim=-1) for both in zip(*of_last)]
    torch.testing.assert_close(split(unrolled.output, case), output, rtol=0, atol=0)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)])
def test_no_steps_and_no_sequences(shape: tuple[int, int], batch_first: bool) -> None:
    layer = make_layer(batch_first=batch_first, **DEEP)
    unrolled = layer.unroll(randn(*shape, 3))
    assert [data_of(part).shape for part in unrolled.m] == [(*shape, 4)] * 4
    assert [data_of(part).shape for part in unrolled.h] == [(*shape, 3)] * 4
    assert unrolled.states[0].shape == (4, shape[0] if batch_first else shape[1], 3)
    unbatched = layer.unroll(randn(0, 3))
    assert [data_of(part).shape for part in unbatched.c] == [(0, 4)] * 4


def test_m_is_projected_to_h() -> None:
    layer = make_layer(**DEEP)
    x = pack_sequence([randn(n, 3) for n in (2, 5, 1)], enforce_sorted=False)
    unrolled = layer.unroll(x)
    for k, suffix in enumerate(("l0", "l0_reverse", "l1", "l1_reverse")):
        projected = data_of(unrolled.m[k]) @ layer.get_parameter(f"weight_hr_{suffix}").t()
        torch.testing.assert_close(data_of(unrolled.h[k]), projected, rtol=0, atol=1e-15)
        by_hand = data_of(unrolled.o[k]) * data_of(unrolled.c[k]).tanh()
        torch.testing.assert_close(data_of(unrolled.m[k]), by_hand, rtol=0, atol=0)


def test_errors_are_those_of_forward() -> None:
    layer = make_layer()
    for wrong in (randn(5, 2, 7), randn(5, 2, 3).float(), randn(3), None):
        with pytest.raises((RuntimeError, ValueError, AttributeError)) as of_forward:
            layer(wrong)
        with pytest.raises(of_forward.type) as of_unroll:
            layer.unroll(wrong)
        assert str(of_unroll.value) == str(of_forward.value)


def test_nested_input_gives_nested_fields() -> None:
    layer = make_layer(**DEEP)
    sequences = [randn(n, 3) for n in (2, 5, 1)]
    nested = layer.unroll(torch.nested.nested_tensor(sequences, layout=torch.jagged))
    packed = layer.unroll(pack_sequence(sequences, enforce_sorted=False))
    for name in FIELDS:
        for actual, expected in zip(getattr(nested, name), getattr(packed, name)):
            torch.testing.assert_close(list(actual.unbind()), unpack_sequence(expected), rtol=0, atol=0)
    with pytest.raises(TypeError, match="packed, nested or padded"):
        nested.after(0)


# States to go on from


@pytest.mark.parametrize("T", [7, 3])  # and a batch of 3: as many as steps
@pytest.mark.parametrize("form", ["dense", "batch_first", "unbatched"])
@pytest.mark.parametrize("proj_size", [0, 2])
def test_going_on_after_each_step(T: int, form: str, proj_size: int) -> None:
    layer = make_layer(num_layers=2, proj_size=proj_size, batch_first=form == "batch_first")
    x = randn(T, 3) if form == "unbatched" else randn(T, 3, 3)
    dim = 1 if form == "batch_first" else 0
    x = x.transpose(0, dim)
    unrolled = layer.unroll(x)
    for t in range(T):
        hx = unrolled.after(t)
        again = unrolled.after(t - T)
        torch.testing.assert_close(hx, again, rtol=0, atol=0)
        assert [state.shape for state in hx] == [state.shape for state in unrolled.states]
        output, states = layer(x.narrow(dim, t + 1, T - t - 1), hx)
        expected = data_of(unrolled.output).narrow(dim, t + 1, T - t - 1)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-14)
        torch.testing.assert_close(states, unrolled.states, rtol=0, atol=1e-14)
    torch.testing.assert_close(unrolled.after(-1), unrolled.states, rtol=0, atol=0)


@pytest.mark.parametrize("batch_first", [False, True])
def test_as_many_sequences_as_steps(batch_first: bool) -> None:
    """Even where no state tells a step from a sequence, and under a transform."""
    layer = make_layer(batch_first=batch_first)
    nn.init.zeros_(layer.weight_ih_l0)  # type: ignore[arg-type]
    nn.init.zeros_(layer.weight_hh_l0)  # type: ignore[arg-type]
    states = randn(1, 3, 4), randn(1, 3, 4)
    h, c = layer.unroll(randn(3, 3, 3), states).after(0)
    step = randn(3, 1, 3) if batch_first else randn(1, 3, 3)
    torch.testing.assert_close((h, c), layer(step, states)[1], rtol=0, atol=1e-15)

    xs = randn(2, 3, 3, 3)
    layer = make_layer(batch_first=batch_first)
    together = vmap(lambda x: layer.unroll(x).after(1))(xs)
    alone = [layer.unroll(x).after(1) for x in xs]
    torch.testing.assert_close(together[0], torch.stack([h for h, _ in alone]), rtol=0, atol=1e-15)


def test_after_what_is_no_step() -> None:
    unrolled = make_layer().unroll(randn(5, 2, 3))
    for t in (5, -6):
        with pytest.raises(IndexError, match=f"a step of the 5 that there are, but got {t}"):
            unrolled.after(t)
    packed = make_layer().unroll(pack_sequence([randn(2, 3)]))
    with pytest.raises(TypeError, match="packed, nested or padded"):
        packed.after(0)


# Gradients


@pytest.mark.parametrize(
    ("name", "packed"),
    quick_sample(product(FIELDS, [False, True]), [*product(FIELDS, [False]), ("c", True), ("h", True)]),
)
def test_gradients_through_each_field(name: str, packed: bool) -> None:
    layer = ManualLSTM(2, 3, bidirectional=True, proj_size=2, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters())
    batch_sizes = torch.tensor([2, 1])

    class Opened(nn.Module):  # functional_call calls forward
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Any, hx: Any) -> tuple[Tensor, ...]:
            return tuple(data_of(part) for part in getattr(self.layer.unroll(x, hx), name))

    opened = Opened()

    def field(x: Tensor, h_0: Tensor, c_0: Tensor, *parameters: Tensor) -> Any:
        p = {f"layer.{name}": parameter for name, parameter in zip(names, parameters)}
        sequence = PackedSequence(x.flatten(0, 1)[:3], batch_sizes) if packed else x
        return functional_call(opened, p, (sequence, (h_0, c_0)))

    inputs = [randn(2, 2, 2), randn(2, 2, 2), randn(2, 2, 3), *(p.detach().clone() for p in parameters)]
    inputs = [each.requires_grad_() for each in inputs]
    assert gradcheck(field, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(field, inputs, fast_mode=True)


def test_a_penalty_on_a_gate_trains_the_layer() -> None:
    layer = make_layer(num_layers=2)
    x = randn(10, 8, 3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)

    def mean() -> Tensor:
        return torch.stack([data_of(f).mean() for f in layer.unroll(x).f]).mean()

    before = mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert 0.4 < before < 0.6
    assert mean().item() < 0.1


def test_integrated_gradients_of_one_gate_are_complete() -> None:
    """Sundararajan et al. 2017: the attributions of a gate's input add up to its change."""
    layer = make_layer(num_layers=2, bidirectional=True)
    x = 3 * randn(6, 3)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    along = (torch.from_numpy(nodes) + 1) / 2  # of the straight line from zero to x
    path = (x.unsqueeze(1) * along.view(1, -1, 1)).requires_grad_()  # [T, 60, 3]
    for layer_and_direction, t, unit in ((2, 3, 1), (3, 0, 2)):

        def gate(x: Tensor) -> Tensor:
            return data_of(layer.unroll(x).f[layer_and_direction])[t, ..., unit]  # noqa: B023

        (gradient,) = torch.autograd.grad(gate(path).sum(), path)
        attributions = x * (gradient * torch.from_numpy(weights / 2).view(1, -1, 1)).sum(1)
        change = gate(x) - gate(torch.zeros_like(x))
        assert change.abs() > 1e-2
        torch.testing.assert_close(attributions.sum(), change, rtol=0, atol=1e-10)


# Memory


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps a weak reference to every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(tensor, Tensor):
                self.made.append(ref(tensor))
        return results


def storages(tensors: list[Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize("proj_size", [0, 3])
def test_without_gradients_nothing_is_held_but_what_is_returned(proj_size: int) -> None:
    layer = make_layer(num_layers=2, proj_size=proj_size)
    T, B = 50, 2
    x = randn(T, B, 3)
    with Watch() as watch, torch.no_grad():
        unrolled = layer.unroll(x)
    held = [tensor for each in watch.made if (tensor := each()) is not None]
    returned = storages(fields(unrolled))
    assert set(storages(held)) <= set(returned)
    # i, f, g, o, c and h, and m where it is another; the output is the last layer's h
    features = 5 * 4 + 4 if not proj_size else 6 * 4 + 3
    assert sum(returned.values()) == 8 * (2 * T * B * features + 2 * B * (4 + (proj_size or 4)))


# Transforms


def test_vmap_and_gradients_of_each_sample() -> None:
    layer = make_layer(**DEEP)
    xs = randn(3, 5, 2, 3)
    together = vmap(layer.unroll)(xs)
    assert isinstance(together, Unrolled)
    alone = [fields(layer.unroll(x)) for x in xs]
    expected = [torch.stack(parts) for parts in zip(*alone)]
    torch.testing.assert_close(fields(together), expected, rtol=0, atol=1e-14)

    class Openness(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            squares = [data_of(f).square().sum() for f in self.layer.unroll(x).f]
            return torch.stack(squares).sum()

    openness = Openness()
    p: dict[str, Tensor] = dict(openness.named_parameters())
    each = vmap(grad(lambda p, x: functional_call(openness, p, (x,))), (None, 0))(p, xs)
    for k, x in enumerate(xs):
        of_one = torch.autograd.grad([openness(x)], list(p.values()), materialize_grads=True)
        for name, expected_gradient in zip(p, of_one):
            torch.testing.assert_close(each[name][k], expected_gradient, rtol=1e-11, atol=1e-12)


def test_jvp() -> None:
    layer = make_layer(**DEEP)
    x, v, eps = randn(5, 2, 3), randn(5, 2, 3), 1e-6
    tangents = jvp(lambda x: tuple(fields(layer.unroll(x))), (x,), (v,))[1]
    above, below = fields(layer.unroll(x + eps * v)), fields(layer.unroll(x - eps * v))
    for tangent, a, b in zip(tangents, above, below):
        torch.testing.assert_close(tangent, (a - b) / (2 * eps), rtol=0, atol=1e-8)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.slow
def test_compile(packed: bool) -> None:
    torch.compiler.reset()
    layer = make_layer(bidirectional=True, proj_size=3)
    x: Any = randn(2, 2, 3)
    if packed:
        x = pack_sequence([randn(1, 3), randn(2, 3)], enforce_sorted=False)
    actual = torch.compile(layer.unroll, fullgraph=True, backend="aot_eager")(x)
    expected = layer.unroll(x)
    torch.testing.assert_close(fields(actual), fields(expected), rtol=0, atol=1e-14)
    weights: list[Tensor] = list(layer.parameters())
    torch.testing.assert_close(
        gradients(fields(actual), weights), gradients(fields(expected), weights), rtol=0, atol=1e-12
    )


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(dtype: torch.dtype) -> None:
    layer = make_layer(**DEEP).to(dtype)
    x = randn(5, 2, 3).to(dtype)
    seen = fields(layer.unroll(x))
    expected = [part.to(dtype) for part in fields(layer.float().unroll(x.float()))]
    torch.testing.assert_close(seen, expected, rtol=0, atol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_autocast(packed: bool) -> None:
    layer = make_layer(dtype=torch.float32, **DEEP)
    x: Any = torch.randn(5, 2, 3)
    if packed:
        x = pack_sequence([torch.randn(2, 3), torch.randn(3, 3)], enforce_sorted=False)
    with torch.autocast("cpu", torch.bfloat16):
        unrolled = layer.unroll(x)
        output, (h_n, c_n) = layer(x)
    assert data_of(unrolled.output).dtype == data_of(output).dtype
    assert [state.dtype for state in unrolled.states] == [h_n.dtype, c_n.dtype]
    for name in FIELDS:
        dtype = c_n.dtype if name == "c" else data_of(output).dtype
        assert {data_of(part).dtype for part in getattr(unrolled, name)} == {dtype}
    low = layer.bfloat16().unroll(x.to(torch.bfloat16))
    torch.testing.assert_close(
        [part.bfloat16() for part in fields(unrolled)], fields(low), rtol=0, atol=0
    )
