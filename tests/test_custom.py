"""Layers with another cell: the README's, against the equations of their papers, in every context."""

import copy
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from manual_lstm import CellWeights, ManualLSTM, Step
from manual_lstm.check.parity import data_of
from manual_lstm.testing import Case, cases
from tests.helpers import equations
from tests.helpers.changed import every_recipe, make_recipe, stir
from tests.helpers.equations import Made, gradients, parts, run_case, split
from tests.helpers.layers import DEEP, randn
from tests.helpers.loops import runs_fused
from tests.helpers.recipes import EQUATIONS, RECIPES
from tests.helpers.search import share

RANDOM = ["ZoneoutLSTM", "VariationalLSTM"]


# The equations


@every_recipe
@given(case=cases(large=False, without={"dropout"}))
@share(1 / 3)  # of six cells
def test_the_equations_of_the_paper(name: str, case: Case) -> None:
    assume(case.lengths)
    reference, _ = case.pair(ManualLSTM)
    reference.dropout = 0.0
    cls: Any = RECIPES[name]
    drawn: list[dict[str, Tensor]] = []

    class Recording(cls):  # type: ignore[misc]
        def per_sequence(self, h_0: Tensor, c_0: Tensor) -> dict[str, Tensor]:
            drawn.append(super().per_sequence(h_0, c_0))
            return drawn[-1]

    layer = Recording.from_lstm(reference)
    if name == "ZoneoutLSTM":
        layer.eval()  # training has a test of its own
    stir(layer)
    input, hx = case.input(), case.hx()
    x = data_of(input).clone().requires_grad_()
    input = input._replace(data=x) if isinstance(input, PackedSequence) else x
    if hx is not None:
        hx = hx[0].requires_grad_(), hx[1].requires_grad_()
    wanted = [x, *(hx or ()), *layer.parameters()]

    torch.manual_seed(case.seed)
    output, states = layer(input, hx)
    actual = [*split(output, case), *states]
    expected, steps = run_case(layer, EQUATIONS[name], case, input, hx, drawn)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        gradients(actual, wanted), gradients(expected, wanted), rtol=1e-10, atol=1e-11
    )

    torch.manual_seed(case.seed)
    unrolled = layer.unroll(input, hx)
    torch.testing.assert_close((unrolled.output, unrolled.states), (output, states), rtol=0, atol=0)
    for part in Made._fields:
        for seen, by_hand in zip(getattr(unrolled, part), parts(steps, part)):
            torch.testing.assert_close(split(seen, case), by_hand, rtol=0, atol=1e-12)


# Training changes nothing in a cell that draws nothing.
DERIVATIVES = [(name, False) for name in RECIPES] + [(name, True) for name in RANDOM]


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "training"), DERIVATIVES)
def test_derivatives_against_finite_differences(name: str, training: bool, fast: bool) -> None:
    layer = RECIPES[name](2, 3, bidirectional=True, proj_size=2, dtype=torch.float64).train(training)
    stir(layer)
    names, parameters = zip(*layer.named_parameters())

    def results(x: Tensor, h_0: Tensor, c_0: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)  # the same masks
        output, states = functional_call(layer, dict(zip(names, parameters)), (x, (h_0, c_0)))
        return output, *states

    inputs = [randn(2, 2, 2), randn(2, 2, 2), randn(2, 2, 3), *(p.detach().clone() for p in parameters)]
    inputs = [each.requires_grad_() for each in inputs]
    batched = not training
    assert gradcheck(results, inputs, check_forward_ad=True, check_batched_grad=batched, fast_mode=fast)
    assert gradgradcheck(results, inputs, fast_mode=fast)


@every_recipe
@pytest.mark.parametrize("shape", [(0, 2, 3), (4, 0, 3)])
def test_no_steps_and_no_sequences(name: str, shape: tuple[int, int, int]) -> None:
    layer = make_recipe(name, training=True, **DEEP)
    hx = randn(4, shape[1], 3), randn(4, shape[1], 4)
    output, states = layer(randn(*shape), hx)
    assert output.shape == (*shape[:2], 6)
    torch.testing.assert_close(states, hx, rtol=0, atol=0)  # either way
    assert [data_of(part).shape for part in layer.unroll(randn(*shape), hx).c] == 4 * [(*shape[:2], 4)]


# Random cells


def test_in_training_zoneout_keeps_some_units_and_renews_the_others() -> None:
    layer = make_recipe("ZoneoutLSTM", training=True, num_layers=2, bidirectional=True)
    x = pack_sequence([randn(n, 3) for n in (30, 90, 60)], enforce_sorted=False)
    torch.manual_seed(1)
    seen = layer.unroll(x)
    kept: dict[str, list[Tensor]] = {"c": [], "h": []}
    inputs = unpack_sequence(x)
    for k in range(4):
        suffix = "_reverse" if k % 2 else ""
        p = equations.Weights(layer, f"_l{k // 2}{suffix}", {})
        if k == 2:
            both = zip(unpack_sequence(seen.h[0]), unpack_sequence(seen.h[1]))
            inputs = [torch.cat(pair, dim=1) for pair in both]
        hs, cs = unpack_sequence(seen.h[k]), unpack_sequence(seen.c[k])
        for x_b, h_b, c_b in zip(inputs, hs, cs):
            h = c = torch.zeros(4, dtype=torch.float64)
            for t in reversed(range(len(x_b))) if suffix else range(len(x_b)):
                new = equations.lstm(x_b[t], h, c, p)
                for part, now, old, fresh in (("c", c_b[t], c, new.c), ("h", h_b[t], h, new.h)):
                    stays = (now - old).abs() < 1e-14
                    kept[part].append(stays)
                    torch.testing.assert_close(now, torch.where(stays, old, fresh), rtol=0, atol=1e-14)
                h, c = h_b[t], c_b[t]
    # 2880 draws: five standard deviations
    share = {part: torch.stack(stays).double().mean().item() for part, stays in kept.items()}
    assert share["c"] == pytest.approx(0.5, abs=0.047)
    assert share["h"] == pytest.approx(0.05, abs=0.021)
    # each draw by itself: no unit, and no sequence, as another
    first = torch.stack(kept["c"])
    assert (first.double().mean(0) - 0.5).abs().max() < 0.1


def test_the_probability_of_one_layer() -> None:
    layer: Any = make_recipe("ZoneoutLSTM", training=True)
    layer.zoneout_c = layer.zoneout_h = 1.0
    hx = randn(1, 2, 4), randn(1, 2, 4)
    for training in (True, False):
        _, states = layer.train(training)(randn(5, 2, 3), hx)
        torch.testing.assert_close(states, hx, rtol=0, atol=0)
    layer.zoneout_c = layer.zoneout_h = 0.0
    plain = ManualLSTM(3, 4, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    x = randn(5, 2, 3)
    torch.testing.assert_close(layer.train()(x), plain(x), rtol=0, atol=1e-14)


def test_one_mask_for_each_sequence_layer_and_direction() -> None:
    drawn: list[Tensor] = []
    layer = make_recipe("VariationalLSTM", training=True, num_layers=2, bidirectional=True)
    draw = type(layer).per_sequence

    def recording(self: ManualLSTM, h_0: Tensor, c_0: Tensor) -> dict[str, Tensor]:
        masks = draw(self, h_0, c_0)
        drawn.append(masks["hidden_mask"])
        return masks

    with mock.patch.object(type(layer), "per_sequence", recording):
        layer(randn(5, 500, 3))
    masks = torch.stack(drawn)
    assert masks.shape == (4, 500, 4)
    assert set(masks.flatten().tolist()) == {0.0, 1 / 0.75}
    assert (masks == 0).double().mean().item() == pytest.approx(0.25, abs=0.025)  # five deviations
    zeros = (masks == 0).double()
    for k in range(4):  # drawn anew for each
        for other in range(k):
            both = (zeros[k] * zeros[other]).mean().item()
            assert both == pytest.approx(0.0625, abs=0.028)


@pytest.mark.parametrize("name", RANDOM)
def test_the_seed_decides(name: str) -> None:
    layer = make_recipe(name, training=True, **DEEP)
    x = randn(5, 2, 3)

    def results(seed: int) -> Tensor:
        torch.manual_seed(seed)
        output: Tensor = layer(x)[0]
        return output

    assert torch.equal(results(1), results(1))
    assert not torch.equal(results(1), results(2))
    layer.eval()
    assert torch.equal(results(1), results(2))


@pytest.mark.parametrize("name", RANDOM)
def test_vmap_draws_the_same_for_all_or_another_for_each(name: str) -> None:
    layer = make_recipe(name, training=True)
    xs = randn(5, 2, 3).expand(3, 5, 2, 3)
    same = vmap(lambda x: layer(x)[0], randomness="same")(xs)
    assert torch.equal(same[0], same[1])
    different = vmap(lambda x: layer(x)[0], randomness="different")(xs)
    assert not torch.equal(different[0], different[1])


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_recipe
def test_half_precision_is_float32_rounded_once(name: str, dtype: torch.dtype) -> None:
    layer = make_recipe(name, **DEEP).to(dtype)
    assert all(p.dtype == dtype for p in layer.parameters())
    wide = copy.deepcopy(layer).float()
    for x in (randn(5, 2, 3), pack_sequence([randn(n, 3) for n in (2, 5, 1)], enforce_sorted=False)):
        low: Any = x.to(dtype)
        output, states = layer(low)
        expected, wide_states = wide(low.to(torch.float32))
        torch.testing.assert_close(
            (output, states), _to((expected, wide_states), dtype), rtol=0, atol=0
        )


def _to(results: Any, dtype: torch.dtype) -> Any:
    output, states = results
    return output.to(dtype), tuple(state.to(dtype) for state in states)


@every_recipe
def test_autocast(name: str) -> None:
    layer = make_recipe(name, dtype=torch.float32, num_layers=2, bidirectional=True)
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output, (h_n, c_n) = layer(x)
    low = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close((output, (h_n, c_n)), low, rtol=0, atol=0, check_dtype=False)
    output.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


# Transforms


@every_recipe
def test_vmap(name: str) -> None:
    layer = make_recipe(name, **DEEP)
    xs, hs, cs = randn(3, 5, 2, 3), randn(3, 4, 2, 3), randn(3, 4, 2, 4)
    actual = vmap(lambda x, h, c: layer(x, (h, c)))(xs, hs, cs)
    alone = [layer(x, (h, c)) for x, h, c in zip(xs, hs, cs)]
    expected = (
        torch.stack([output for output, _ in alone]),
        tuple(torch.stack(parts) for parts in zip(*(states for _, states in alone))),
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)

    ensemble = [make_recipe(name, **DEEP) for _ in range(3)]
    for member in ensemble[1:]:
        stir(member)
        nn.init.normal_(member.weight_hh_l0)  # type: ignore[arg-type]
    stacked, _ = torch.func.stack_module_state(ensemble)
    together = vmap(lambda p: functional_call(layer, p, (xs[0],))[0])(stacked)
    expected_output = torch.stack([member(xs[0])[0] for member in ensemble])
    torch.testing.assert_close(together, expected_output, rtol=0, atol=1e-13)


@every_recipe
def test_gradients_of_each_sample(name: str) -> None:
    layer = make_recipe(name, **DEEP)
    parameters: dict[str, Tensor] = dict(layer.named_parameters())
    xs = randn(3, 5, 2, 3)

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        output, (_, c_n) = functional_call(layer, p, (x,))
        total: Tensor = output.square().sum() + c_n.sin().sum()
        return total

    together = vmap(grad(loss), (None, 0))(parameters, xs)
    for k, x in enumerate(xs):
        alone = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
        for key, expected in zip(parameters, alone):
            torch.testing.assert_close(together[key][k], expected, rtol=1e-11, atol=1e-11)


@every_recipe
def test_jvp(name: str) -> None:
    layer = make_recipe(name, **DEEP)
    x, v = randn(5, 2, 3), randn(5, 2, 3)
    tangent = jvp(lambda x: layer(x)[0], (x,), (v,))[1]
    eps = 1e-6
    difference = (layer(x + eps * v)[0] - layer(x - eps * v)[0]) / (2 * eps)
    torch.testing.assert_close(tangent, difference, rtol=0, atol=1e-8)


# Compilers


@pytest.mark.parametrize(("name", "packed"), list(product(RECIPES, [False, True])))
@pytest.mark.slow
def test_compile(name: str, packed: bool) -> None:
    torch.compiler.reset()
    layer = make_recipe(name, bidirectional=True, proj_size=3)
    x: Any = randn(3, 2, 3)
    if packed:
        x = pack_sequence([randn(2, 3), randn(3, 3)], enforce_sorted=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    output, states = compiled(x)
    expected, expected_states = layer(x)
    actual = [output.data if packed else output, *states]
    wanted = [expected.data if packed else expected, *expected_states]
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-13)
    parameters: list[Tensor] = list(layer.parameters())
    torch.testing.assert_close(
        gradients(actual, parameters), gradients(wanted, parameters), rtol=0, atol=1e-12
    )


def doubled(self: ManualLSTM, x_t: Tensor, h: Tensor, c: Tensor, w: CellWeights) -> Step:
    step = ManualLSTM.cell(self, x_t, h, c, w)
    return step._replace(h=2 * step.h)


def test_a_cell_set_on_the_object_or_the_class_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = ManualLSTM(3, 4), torch.randn(1, 2, 3)
    before, _ = layer(x)
    layer.cell = doubled.__get__(layer)  # type: ignore[method-assign]
    assert torch.equal(layer(x)[0], 2 * before)
    del layer.cell
    assert torch.equal(layer(x)[0], before)
    monkeypatch.setattr(ManualLSTM, "cell", lambda *args: _twice(*args))
    assert torch.equal(layer(x)[0], 2 * before)
    monkeypatch.undo()
    assert torch.equal(layer(x)[0], before)
    assert runs_fused(layer)


_cell = ManualLSTM.cell


def _twice(self: ManualLSTM, x_t: Tensor, h: Tensor, c: Tensor, w: CellWeights) -> Step:
    step = _cell(self, x_t, h, c, w)
    return step._replace(h=2 * step.h)


def test_what_a_cell_is_given() -> None:
    seen: list[tuple[Any, ...]] = []

    class Looking(ManualLSTM):
        def cell_parameters(self) -> dict[str, Tensor]:
            return {"scale": torch.full((self.hidden_size,), 2.0)}

        def per_sequence(self, h_0: Tensor, c_0: Tensor) -> dict[str, Tensor]:
            return {"number": torch.arange(float(len(h_0))).unsqueeze(1)}

        def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: CellWeights) -> Step:
            numbers = w.number.flatten().tolist()
            seen.append((x_t.shape, h.shape, c.shape, numbers, w.weight_hh, w.weight_hr, w.scale))
            assert w.weight_ih is self.weight_ih_l0
            assert w.bias is not None
            torch.testing.assert_close(w.bias, self.bias_ih_l0 + self.bias_hh_l0)  # type: ignore[operator]
            return super().cell(x_t, h, c, w)

    layer: Any = Looking(3, 4, proj_size=2)
    layer(pack_sequence([torch.randn(n, 3) for n in (1, 3)], enforce_sorted=False))
    assert [(tuple(x), tuple(h), tuple(c), n) for x, h, c, n, *_ in seen] == [
        ((2, 16), (2, 2), (2, 4), [0.0, 1.0]),
        ((1, 16), (1, 2), (1, 4), [0.0]),
        ((1, 16), (1, 2), (1, 4), [0.0]),
    ]
    for *_, weight_hh, weight_hr, scale in seen:
        assert weight_hh is layer.weight_hh_l0
        assert weight_hr is layer.weight_hr_l0
        assert scale is layer.scale_l0


def test_trace_keeps_the_examples_length() -> None:
    layer = make_recipe("PeepholeLSTM", **DEEP)
    traced = torch.jit.trace(layer, randn(5, 2, 3))  # type: ignore[no-untyped-call]
    x = randn(5, 3, 3)
    torch.testing.assert_close(traced(x), layer(x), rtol=0, atol=1e-13)
