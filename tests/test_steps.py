"""Unrolled.steps: the tensors of every step, on the path of the gradients; and copies of Unrolled."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_map

from manual_lstm import ManualLSTM, Unrolled, plain_loop
from manual_lstm.cell import Step
from manual_lstm.testing.cases import Case, cases
from tests.helpers.equations import split
from tests.helpers.grids import quick_sample
from tests.helpers.layers import DEEP, FIELDS, fields, make_layer, randn

exactly = partial(torch.testing.assert_close, rtol=0, atol=0)
closely = partial(torch.testing.assert_close, rtol=0, atol=1e-13)


@given(case=cases(dtypes=(torch.float64, torch.bfloat16)))
def test_steps_are_the_fields_step_by_step(case: Case) -> None:
    assume(case.lengths)
    layer = case.layer(ManualLSTM)
    assert isinstance(layer, ManualLSTM)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            unrolled = layer.unroll(case.input(), case.hx())
        for k, steps in enumerate(unrolled.steps):
            rows: dict[tuple[str, int], list[Tensor]] = {}  # of a field and a sequence
            assert len(steps) == max(case.lengths)
            for t, step in enumerate(steps):
                b = sum(length > t for length in case.lengths)
                for name, part in step._asdict().items():
                    assert part.size(0) == b
                    assert part.dtype is (torch.float32 if case.dtype is torch.bfloat16 else case.dtype)
                    for row, sample in zip(part, unrolled.sample_of.tolist()):
                        rows.setdefault((name, sample), []).append(row)
            for name in FIELDS:
                for sample, expected in enumerate(split(getattr(unrolled, name)[k], case)):
                    exactly(torch.stack(rows[name, sample]).to(expected.dtype), expected)


def test_dense_steps_stack_to_the_fields() -> None:
    unrolled = make_layer(**DEEP).unroll(randn(5, 2, 3))
    for k, steps in enumerate(unrolled.steps):
        exactly(torch.stack([step.h for step in steps]), unrolled.h[k])
    (step,) = make_layer().unroll(randn(1, 3)).steps[0]
    assert step.c.shape == (1, 4)
    assert make_layer().unroll(randn(0, 2, 3)).steps == ([],)


def test_the_derivative_through_time() -> None:
    """Beside a loop of LSTMCell, whose states lie on the path."""
    layer, x = make_layer(), randn(7, 2, 3)
    cell = nn.LSTMCell(3, 4, dtype=torch.float64)
    cell.load_state_dict(
        {name.removesuffix("_l0"): value for name, value in layer.state_dict().items()}
    )
    h = c = x.new_zeros(2, 4)
    hs, cs = [], []
    for x_t in x:
        h, c = cell(x_t, (h, c))
        hs.append(h)
        cs.append(c)
    expected = torch.autograd.grad(h.square().sum(), [*hs, *cs])
    unrolled = layer.unroll(x)
    steps = unrolled.steps[0]
    loss = unrolled.output[-1].square().sum()
    wanted = [*(s.h for s in steps), *(s.c for s in steps)]
    closely(torch.autograd.grad(loss, wanted, retain_graph=True), expected)
    seen: list[Tensor] = []
    for step in steps:
        step.h.retain_grad()
        step.c.register_hook(seen.append)  # type: ignore[no-untyped-call]
    loss.backward()
    closely([step.h.grad for step in steps], list(expected[:7]))
    closely(seen, list(expected[7:])[::-1])
    assert all(float(step.h.grad.norm()) > 0 for step in steps if step.h.grad is not None)


@pytest.mark.parametrize("form", ["dense", "packed", "nested"])
def test_the_derivative_through_layers_and_directions(form: str) -> None:
    """Steps of the first layer move the last one's answer: against small changes of the states."""
    layer = make_layer(**DEEP)
    sequences = [randn(n, 3) for n in (2, 4, 3)]
    x: Any = torch.stack([sequence[:2] for sequence in sequences], 1)
    if form == "packed":
        x = pack_sequence(sequences, enforce_sorted=False)
    if form == "nested":
        x = torch.nested.nested_tensor(sequences, layout=torch.jagged)
    unrolled = layer.unroll(x)
    loss = unrolled.states[1].square().sum()
    eps = 1e-6
    for k, t in ((0, 0), (1, 1), (2, 1), (3, 0)):
        c = unrolled.steps[k][t].c
        (gradient,) = torch.autograd.grad(loss, c, retain_graph=True)
        for r, unit in ((0, 1), (c.size(0) - 1, 3)):
            losses = []
            for sign in (1, -1):
                moved = c.detach().clone()
                moved[r, unit] += sign * eps
                losses.append(_with_state(layer, x, k, t, moved))
            by_change = (losses[0] - losses[1]) / (2 * eps)
            torch.testing.assert_close(gradient[r, unit], by_change, rtol=1e-6, atol=1e-8)


def _with_state(layer: ManualLSTM, x: Any, k: int, t: int, c: Tensor) -> Tensor:
    """The loss if layer and direction k had another cell state after step t."""
    calls = {"n": -1}
    T = len(layer.unroll(x).steps[0])
    order = range(T) if k % 2 == 0 else range(T - 1, -1, -1)
    target = k * T + list(order).index(t)

    class Changed(ManualLSTM):
        def cell(self, x_t: Tensor, h: Tensor, c_before: Tensor, w: Any) -> Step:
            calls["n"] += 1
            step = super().cell(x_t, h, c_before, w)
            if calls["n"] != target:
                return step
            m = step.o * torch.tanh(c)
            return step._replace(c=c, m=m, h=m @ w.weight_hr.t())

    changed = Changed(3, 4, dtype=torch.float64, **DEEP)
    changed.load_state_dict(layer.state_dict())
    return changed(x)[1][1].square().sum().detach()  # type: ignore[no-any-return]


def test_in_plain_loop_and_with_a_changed_cell() -> None:
    class Same(ManualLSTM):
        def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: Any) -> Step:
            return super().cell(x_t, h, c, w)

    same, x = Same(3, 4, dtype=torch.float64), randn(5, 2, 3)
    with plain_loop(), torch.no_grad():
        exactly(make_layer().unroll(x).steps[0][2].c, make_layer().unroll(x).c[0][2])
    unrolled = same.unroll(x)
    gradients = torch.autograd.grad(unrolled.output[-1].sum(), [step.c for step in unrolled.steps[0]])
    assert all(gradient.abs().max() > 0 for gradient in gradients)


# Transforms and compiled functions: the steps are there inside of them, and not after them


def _sensitivity(layer: ManualLSTM, x: Tensor) -> Tensor:
    """The gradient of the loss by c of the first step."""
    unrolled = layer.unroll(x)
    loss = unrolled.output[-1].square().sum()
    return torch.autograd.grad(loss, unrolled.steps[0][0].c)[0]


def _norms(layer: ManualLSTM, x: Tensor) -> Tensor:
    unrolled = layer.unroll(x)
    return torch.stack([step.c.square().sum() for steps in unrolled.steps for step in steps])


def test_inside_transforms() -> None:
    layer, xs = make_layer(num_layers=2), randn(3, 5, 2, 3)
    norms = torch.stack([_norms(layer, x) for x in xs])
    closely(vmap(partial(_norms, layer))(xs), norms)
    p: dict[str, Tensor] = {k: v.detach() for k, v in layer.named_parameters()}

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return _norms(self.layer, x).sum()

    norm = Norm()
    named = {f"layer.{k}": v for k, v in p.items()}
    actual = grad(lambda p: functional_call(norm, p, (xs[0],)))(named)
    expected = torch.autograd.grad(norm(xs[0]), list(layer.parameters()))
    closely(list(actual.values()), list(expected))
    value, tangent, *_ = jvp(partial(_norms, layer), (xs[0],), (xs[1],))
    closely(value, norms[0])
    assert tangent.abs().max() > 0


@pytest.mark.parametrize("gradients", [True, False])
def test_inside_a_compiled_function(gradients: bool) -> None:
    torch.compiler.reset()
    layer, x = make_layer(bidirectional=True), randn(3, 2, 3)

    @partial(torch.compile, backend="aot_eager", fullgraph=True)
    def run(x: Tensor) -> tuple[Tensor, Tensor, Unrolled]:
        unrolled = layer.unroll(x)
        return _norms(layer, x), unrolled.sample_of, unrolled

    with torch.set_grad_enabled(gradients):
        norms, sample_of, unrolled = run(x)
        closely(norms, _norms(layer, x))
    assert sample_of.tolist() == [0, 1]
    assert isinstance(unrolled, Unrolled)
    with pytest.raises(RuntimeError, match="a compiled function returned this Unrolled"):
        unrolled.steps  # noqa: B018


def test_packed_in_a_compiled_function() -> None:
    torch.compiler.reset()
    layer, x = make_layer(), pack_sequence([randn(1, 3), randn(2, 3)], enforce_sorted=False)
    unrolled = torch.compile(layer.unroll, backend="eager")(x)
    with pytest.raises(RuntimeError, match="compiled function"):
        unrolled.steps  # noqa: B018


def _exported(layer: ManualLSTM) -> Unrolled:
    class Opened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Unrolled:
            return self.layer.unroll(x)

    torch.compiler.reset()
    program = torch.export.export(Opened(), (randn(2, 2, 3),), strict=False)
    found: Unrolled = program.module()(randn(2, 2, 3))
    return found


COPIES: dict[str, Callable[[ManualLSTM, Tensor], Unrolled]] = {
    "tree_map": lambda layer, x: tree_map(lambda t: t.contiguous(), layer.unroll(x)),
    "vmap": lambda layer, x: tree_map(lambda t: t[0], vmap(layer.unroll)(x.unsqueeze(0))),
    "grad": lambda layer, x: grad(lambda x: (layer.unroll(x)[0].sum(), layer.unroll(x)), has_aux=True)(
        x
    )[1],
    "pickle": lambda layer, x: pickle.loads(pickle.dumps(layer.unroll(x))),
    "copy": lambda layer, x: copy.copy(layer.unroll(x)),
    "export": lambda layer, x: _exported(layer),
    "compile": lambda layer, x: torch.compile(layer.unroll, backend="eager")(x),
    "compile of vmap": lambda layer, x: tree_map(
        lambda t: t[0], torch.compile(vmap(layer.unroll), backend="eager")(x.unsqueeze(0))
    ),
}


@pytest.mark.parametrize(
    ("kind", "batch_first"),
    quick_sample(
        product(COPIES, [False, True]),
        [*product(["tree_map", "vmap", "grad", "pickle", "copy"], [False, True]), ("export", True)],
    ),
)
def test_a_copy_keeps_the_layout_and_says_why_it_has_no_steps(kind: str, batch_first: bool) -> None:
    torch.compiler.reset()
    layer, x = make_layer(batch_first=batch_first), randn(2, 2, 3)  # T is B
    unrolled = COPIES[kind](layer, x)
    assert isinstance(unrolled, Unrolled)
    assert len(unrolled) == 9
    if kind != "export":
        closely(fields(unrolled), fields(layer.unroll(x)))
        closely(unrolled.after(0), layer.unroll(x).after(0))
    assert unrolled.after(-1)[0].shape == (1, 2, 4)
    closely(unrolled.after(-1), unrolled.states)
    reason = "compiled function" if kind == "compile" else "is a copy|scan"
    for name in ("steps", "sample_of"):
        with pytest.raises(RuntimeError, match=reason):
            getattr(unrolled, name)


# Going on


def test_a_contiguous_copy_knows_its_layout() -> None:
    """T is B, and the strides of a copy are those of the other layout."""
    layer, x = make_layer(batch_first=True), randn(3, 3, 3)
    unrolled = tree_map(lambda t: t.contiguous(), layer.unroll(x))
    output, _ = layer(x[:, 2:], unrolled.after(1))
    closely(output, unrolled.output[:, 2:])


def test_after_a_vmap() -> None:
    layer, xs = make_layer(num_layers=2), randn(3, 5, 2, 3)
    together = vmap(layer.unroll)(xs).after(2)
    alone = [layer.unroll(x).after(2) for x in xs]
    closely(together, tuple(torch.stack(states) for states in zip(*alone)))
    with pytest.raises(RuntimeError, match="out_dims=0"):
        vmap(layer.unroll, out_dims=1)(xs).after(2)


@pytest.mark.parametrize("batch_first", [False, True])
def test_after_a_backward_direction_there_is_nothing_to_go_on_from(batch_first: bool) -> None:
    unrolled = make_layer(bidirectional=True, batch_first=batch_first).unroll(randn(5, 2, 3))
    for copied in (unrolled, tree_map(torch.clone, unrolled), pickle.loads(pickle.dumps(unrolled))):
        with pytest.raises(TypeError, match="bidirectional"):
            copied.after(2)


def test_its_text_is_short() -> None:
    assert repr(make_layer(**DEEP).unroll(randn(5, 2, 3))) == (
        "Unrolled(output=[5, 2, 6], dense, L * D = 4)"
    )
    packed = make_layer().unroll(pack_sequence([randn(2, 3)]))
    assert repr(packed) == "Unrolled(output=[2, 4], packed, L * D = 1)"


# The norm of the gradients over time


@pytest.fixture
def matplotlib() -> Any:
    return pytest.importorskip("matplotlib")


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize("form", ["dense", "batch_first", "packed", "unbatched"])
def test_plot_gradients_draws_the_norms(form: str) -> None:
    layer = make_layer(num_layers=2, batch_first=form == "batch_first")
    x: Any = {
        "dense": randn(9, 2, 3),
        "batch_first": randn(2, 9, 3),
        "packed": pack_sequence([randn(4, 3), randn(9, 3)], enforce_sorted=False),
        "unbatched": randn(9, 3),
    }[form]
    unrolled = layer.unroll(x)
    loss = unrolled.states[0].square().sum()
    figure = unrolled.plot_gradients(loss)
    (axis,) = figure.axes
    assert axis.get_yscale() == "log"
    for line, steps in zip(axis.lines, unrolled.steps, strict=True):
        gradients = torch.autograd.grad(loss, [step.h for step in steps], retain_graph=True)
        assert line.get_ydata() == pytest.approx([float(g.norm()) for g in gradients])
        assert np.asarray(line.get_xdata()).tolist() == list(range(9))
    assert all(p.grad is None for p in layer.parameters())
    loss.backward()  # type: ignore[no-untyped-call]  # the graph is there


@pytest.mark.usefixtures("matplotlib")
def test_plot_gradients_of_some_directions_and_steps() -> None:
    unrolled = make_layer(**DEEP).unroll(randn(5, 2, 3))
    figure = unrolled.plot_gradients(unrolled.output[2].sum(), directions=[2, -1], labels="abcde")
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["layer 1, forward", "layer 1, backward"]
    first, second = (np.asarray(line.get_ydata()) for line in figure.axes[0].lines)
    assert (first > 0).tolist() == [True] * 3 + [False] * 2  # none comes there: nan
    assert (second[2:] > 0).all()
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == list("abcde")


@pytest.mark.usefixtures("matplotlib")
def test_plot_gradients_says_what_is_wrong() -> None:
    layer, x = make_layer(), randn(5, 2, 3)
    unrolled = layer.unroll(x)
    loss = unrolled.output.sum()
    wrong: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (ValueError, "one number with a gradient", unrolled.output, {}),
        (ValueError, "one number with a gradient", loss.detach(), {}),
        (TypeError, "a tensor, but got float", 3.0, {}),
        (ValueError, "computed from what this unroll returned", layer(x)[0].sum(), {}),
        (IndexError, "directions should be one of the 1 layers", loss, {"directions": [1]}),
        (ValueError, "a label for each of the 5 steps, but got 2", loss, {"labels": "ab"}),
    ]
    for error, text, given_loss, options in wrong:
        with pytest.raises(error, match=text):
            unrolled.plot_gradients(given_loss, **options)
    with torch.no_grad():
        silent = layer.unroll(x)
    with pytest.raises(ValueError, match="gradient"):
        silent.plot_gradients(layer(x)[0].sum())
    with pytest.raises(RuntimeError, match="is a copy"):
        tree_map(torch.clone, unrolled).plot_gradients(loss)
    with pytest.raises(ValueError, match="no step"):
        layer.unroll(randn(0, 2, 3)).plot_gradients(loss)


def test_the_norms_fall_where_gradients_vanish() -> None:
    layer = make_layer()
    with torch.no_grad():
        layer.get_parameter("bias_ih_l0")[4:8] = -4  # the forget gate is shut
    unrolled = layer.unroll(randn(9, 2, 3))
    loss = unrolled.output[-1].sum()
    gradients = torch.autograd.grad(loss, [step.c for step in unrolled.steps[0]])
    norms = [float(gradient.norm()) for gradient in gradients]
    assert all(a < b for a, b in pairwise(norms))
    assert norms[0] < 1e-4 * norms[-1]
