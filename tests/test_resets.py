"""``resets``: many sequences in one row, against nn.LSTM on each of them alone."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from manual_lstm import ManualLSTM, plain_loop
from manual_lstm.cells import VariationalLSTM
from manual_lstm.check.parity import twins
from manual_lstm.testing import Case, assert_same_layer, cases
from manual_lstm.testing.cases import KEYWORDS
from manual_lstm.testing.pieces import run_in_pieces
from tests.helpers.layers import randn
from tests.helpers.loops import loops_chosen, plainly
from tests.helpers.search import share

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"proj_size": 2, "bidirectional": True, "bias": False},
]
SLOW_OPTIONS = [pytest.param(options, marks=pytest.mark.slow) for options in OPTIONS[1:]]


def example(layer: Any, T: int = 7, B: int = 3) -> tuple[Tensor, Tensor]:
    """An input, and its resets: some, none and everywhere."""
    x = torch.randn(T, B, layer.input_size, dtype=layer.weight_ih_l0.dtype)
    resets = torch.rand(T, B) < torch.linspace(0, 1, B)
    if layer.batch_first:
        return x.transpose(0, 1).contiguous(), resets.t().contiguous()
    return x, resets


def assert_near(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@share(0.5)  # nn.LSTM runs once for each piece
@given(case=cases(beyond=KEYWORDS))
def test_resets_equal_every_piece_alone(case: Case) -> None:
    reference, layer = case.pair(ManualLSTM)
    assert_same_layer(layer, reference, case)


@given(case=cases(beyond=KEYWORDS, large=False))
def test_resets_equal_every_piece_alone_in_the_plain_loop(case: Case) -> None:
    reference, layer = case.pair(ManualLSTM)
    with plainly():
        assert_same_layer(layer, reference, case)


@given(case=cases(dtypes=[torch.float32, torch.bfloat16], beyond=KEYWORDS, large=False))
def test_resets_in_low_precision(case: Case) -> None:
    reference, layer = case.pair(ManualLSTM)
    assert_same_layer(layer, reference, case)


def test_by_hand() -> None:
    """One row of two sequences, in both directions, said without any helper."""
    reference, layer = twins(3, 4, bidirectional=True, dtype=torch.float64)
    first, second = randn(2, 1, 3), randn(3, 1, 3)
    h_0, c_0 = randn(2, 1, 4), randn(2, 1, 4)
    resets = torch.tensor([[False], [False], [True], [False], [False]])
    output, (h_n, c_n) = layer(torch.cat([first, second]), (h_0, c_0), resets=resets)
    forwards, backwards = torch.tensor([1.0, 0.0]).view(2, 1, 1), torch.tensor([0.0, 1.0]).view(2, 1, 1)
    of_first, (h_first, c_first) = reference(first, (h_0 * forwards, c_0 * forwards))
    of_second, (h_second, c_second) = reference(second, (h_0 * backwards, c_0 * backwards))
    assert_near(output, torch.cat([of_first, of_second]))
    assert_near(h_n, torch.stack([h_second[0], h_first[1]]))
    assert_near(c_n, torch.stack([c_second[0], c_first[1]]))


def test_a_reset_at_the_first_step_drops_hx_forwards_only() -> None:
    layer = ManualLSTM(3, 4, bidirectional=True, dtype=torch.float64)
    x, hx = randn(5, 2, 3), (randn(2, 2, 4), randn(2, 2, 4))
    resets = torch.zeros(5, 2, dtype=torch.bool)
    resets[0] = True
    output, _ = layer(x, hx, resets=resets)
    assert_near(output[..., :4], layer(x)[0][..., :4])
    assert_near(output[..., 4:], layer(x, hx)[0][..., 4:])


def test_resets_in_the_padding_do_not_count() -> None:
    layer = ManualLSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    x, lengths = randn(6, 3, 3), [4, 0, 6]
    hx = randn(4, 3, 4), randn(4, 3, 4)
    resets = torch.zeros(6, 3, dtype=torch.bool)
    resets[4:, 0] = resets[:, 1] = True  # also at t = length
    expected = layer(x, hx, lengths=lengths)
    assert_near(layer(x, hx, lengths=lengths, resets=resets), expected)
    masked = torch.vmap(lambda x, n: layer(x, hx, lengths=n, resets=resets))
    output, (h_n, c_n) = masked(x[None], torch.tensor(lengths)[None])
    assert_near((output[0], (h_n[0], c_n[0])), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("plain", [False, True])
def test_nothing_leaks_through_a_cut(bad: float, plain: bool) -> None:
    layer = ManualLSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    x = randn(6, 1, 3)
    x[2] = bad
    resets = torch.zeros(6, 1, dtype=torch.bool)
    resets[2] = resets[3] = True
    x.requires_grad_()
    with plainly() if plain else plain_loop() if bad > 0 else torch.enable_grad():
        output, (h_n, _) = layer(x, resets=resets)
    clean = output[[0, 1, 3, 4, 5]]
    assert bool(clean.isfinite().all())
    (gradient,) = torch.autograd.grad(clean.square().sum() + h_n.sum(), x, retain_graph=True)
    assert bool(gradient[[0, 1, 3, 4, 5]].isfinite().all())
    # A gradient that is nan does not go from one to the other either.
    (gradient,) = torch.autograd.grad((output[4:] * bad).sum(), x)
    assert not gradient[:2].any()


def test_no_resets_change_nothing() -> None:
    layer = ManualLSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    x = randn(5, 2, 3)
    assert_near(layer(x, resets=torch.zeros(5, 2).bool()), layer(x), 0)


WRONG: dict[str, tuple[type[Exception], Any, str]] = {
    "time last": (ValueError, torch.zeros(2, 5).bool(), r"resets should be \[5, 2\], .* got \[2, 5\]"),
    "3-D": (ValueError, torch.zeros(5, 2, 1).bool(), r"resets .* got \[5, 2, 1\]"),
    "unbatched": (ValueError, torch.zeros(5).bool(), r"resets .* got \[5\]"),
    "floats": (TypeError, torch.zeros(5, 2), "resets .* torch.float32: pass resets.bool"),
    "bytes": (TypeError, torch.zeros(5, 2).byte(), "resets .* torch.uint8"),
    "sparse": (TypeError, torch.zeros(5, 2).bool().to_sparse(), "resets .*sparse"),
    "a list": (TypeError, [[False] * 2] * 5, "resets .* list"),
    "packed": (TypeError, pack_sequence([torch.zeros(5).bool()] * 2), "resets .* PackedSequence"),
    "elsewhere": (RuntimeError, torch.zeros(5, 2, device="meta").bool(), "resets .* cpu, but got meta"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_resets_raise(kind: str) -> None:
    error, resets, shown = WRONG[kind]
    with pytest.raises(error, match=shown):
        ManualLSTM(3, 4)(torch.randn(5, 2, 3), resets=resets)


def test_resets_have_the_form_of_the_input() -> None:
    layer = ManualLSTM(3, 4)
    x, resets = torch.randn(4, 2, 3), torch.rand(4, 2) < 0.5
    packed = pack_padded_sequence(x, [2, 4], enforce_sorted=False)
    fitting = pack_padded_sequence(resets, [2, 4], enforce_sorted=False)
    layer(packed, resets=fitting)
    with pytest.raises(TypeError, match=r"resets should be a PackedSequence like the input, .* Tensor"):
        layer(packed, resets=resets)
    others = [
        pack_padded_sequence(resets, [4, 2], enforce_sorted=False),
        pack_padded_sequence(resets, [3, 3], enforce_sorted=False),
        PackedSequence(fitting.data, fitting.batch_sizes),
    ]
    for other in others:
        with pytest.raises(
            ValueError, match=r"resets should be packed like the input.* \[2, 2, 1, 1\]"
        ):
            layer(packed, resets=other)
    with pytest.raises(TypeError, match=r"resets .* torch.float32"):
        layer(packed, resets=fitting._replace(data=fitting.data.float()))


def test_nested_input_has_nested_resets() -> None:
    reference, layer = twins(3, 4, 2, bidirectional=True, dtype=torch.float64)
    lengths = [3, 0, 5]
    sequences = [randn(n, 3) for n in lengths]
    resets = [torch.rand(n) < 0.5 for n in lengths]
    nested = torch.nested.nested_tensor(sequences, layout=torch.jagged)
    nested_resets = torch.nested.nested_tensor(resets, layout=torch.jagged)
    output, states = layer(nested, resets=nested_resets)
    padded = torch.zeros(5, 3, 3, dtype=torch.float64)
    padded_resets = torch.zeros(5, 3, dtype=torch.bool)
    for b, (x, begins) in enumerate(zip(sequences, resets)):
        padded[: len(x), b], padded_resets[: len(x), b] = x, begins
    expected, expected_states = run_in_pieces(reference, padded, None, lengths, padded_resets)
    for b, sequence in enumerate(output.unbind()):
        assert_near(sequence, expected[: lengths[b], b])
    assert_near(states, expected_states)
    others = torch.nested.nested_tensor(resets[::-1], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"resets should have the lengths .* \[3, 0, 5\]"):
        layer(nested, resets=others)
    with pytest.raises(TypeError, match=r"resets should be nested \[B, j\]"):
        layer(nested, resets=padded_resets)


# Every way of PyTorch to run the layer.


def results(function: Any, x: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output, (h_n, c_n) = function(x)
    loss = output.square().sum() + h_n.sum() + c_n.square().sum()
    return [output, h_n, c_n, *torch.autograd.grad(loss, [x, *parameters])]


def test_the_fused_loop_runs() -> None:
    layer = ManualLSTM(3, 4)
    x, resets = example(layer)
    with loops_chosen() as chosen:
        layer(x, resets=resets)
    assert chosen == {"FUSED"}


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_per_sample_gradients(options: dict[str, Any], batched: bool) -> None:
    layer = ManualLSTM(3, 4, **options, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    inputs = [example(layer) for _ in range(3)]
    x, resets = torch.stack([i[0] for i in inputs]), torch.stack([i[1] for i in inputs])

    def loss(parameters: Any, x: Tensor, resets: Tensor) -> Tensor:
        answer = torch.func.functional_call(layer, parameters, (x,), {"resets": resets})
        output, (h_n, c_n) = answer
        total: Tensor = output.square().sum() + h_n.sum() + c_n.square().sum()
        return total

    gradient = torch.func.grad(loss)
    dims = (None, 0, 0 if batched else None)
    with loops_chosen() as chosen:
        found = torch.vmap(gradient, dims)(parameters, x, resets if batched else resets[0])
    assert chosen == {"VMAP"}
    for k in range(3):
        expected = gradient(parameters, x[k], resets[k if batched else 0])
        assert_near({name: g[k] for name, g in found.items()}, expected)


@pytest.mark.optional
def test_opacus_has_the_gradients_of_every_row() -> None:
    grad_sample = pytest.importorskip("opacus.grad_sample")
    layer = ManualLSTM(3, 4, 2, bidirectional=True, batch_first=True)
    x, resets = example(layer)
    expected = []
    for row, begins in zip(x, resets):
        layer.zero_grad()
        layer(row[None], resets=begins[None])[0].square().sum().backward()
        expected.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    model = grad_sample.GradSampleModule(layer, batch_first=True, loss_reduction="sum")
    model(x, resets=resets)[0].square().sum().backward()
    parameters: list[Any] = list(layer.parameters())
    for parameter, of_rows in zip(parameters, zip(*expected)):
        torch.testing.assert_close(parameter.grad_sample, torch.stack(of_rows))


def test_derivatives_of_higher_order() -> None:
    layer = ManualLSTM(2, 3, 2, bidirectional=True, dtype=torch.float64)
    x, resets = example(layer, T=4)

    def run(x: Tensor) -> Tensor:
        output: Tensor = layer(x, resets=resets)[0]
        return output

    tangent, step = torch.randn_like(x), 1e-6
    found = torch.func.jvp(run, (x,), (tangent,))[1]
    expected = (run(x + step * tangent) - run(x - step * tangent)) / (2 * step)
    assert_near(found, expected, 1e-8)
    x.requires_grad_()
    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_compiled_function_serves_all_sizes(options: dict[str, Any], backend: str) -> None:
    torch.compiler.reset()
    layer = ManualLSTM(3, 4, **options, dtype=torch.float64)
    parameters = list(layer.parameters())

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(x: Tensor, resets: Tensor) -> Any:
        return layer(x, resets=resets)

    for T, B in ((5, 2), (7, 3), (4, 4)):
        x, resets = example(layer, T, B)
        expected = results(lambda x, resets=resets: layer(x, resets=resets), x, parameters)
        actual = results(lambda x, resets=resets: compiled(x, resets), x, parameters)
        assert_near(actual, expected, 1e-11)


class Model(nn.Module):
    """A layer that is called with resets."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, resets: Tensor) -> Any:
        return self.layer(x, resets=resets)


@pytest.mark.parametrize("options", [{}, *SLOW_OPTIONS], ids=str)
def test_an_exported_program_serves_all_sizes(options: dict[str, Any]) -> None:
    torch.compiler.reset()
    layer = ManualLSTM(3, 4, **options)
    first, second = torch.export.Dim("first"), torch.export.Dim("second")
    sizes = {0: first, 1: second}
    program = torch.export.export(Model(layer), example(layer), dynamic_shapes=(sizes, sizes)).module()
    for T, B in ((9, 4), (3, 2)):
        x, resets = example(layer, T, B)
        torch.testing.assert_close(program(x, resets), layer(x, resets=resets))


def test_a_trace_records_the_steps_and_says_so() -> None:
    layer = ManualLSTM(3, 4, 2, bidirectional=True)
    x, resets = example(layer)
    with pytest.warns(torch.jit.TracerWarning, match="resets are given.* records the 7 steps"):  # type: ignore[attr-defined]
        traced: Any = torch.jit.trace(Model(layer), (x, resets))  # type: ignore[no-untyped-call]
    x, resets = example(layer, B=2)
    torch.testing.assert_close(traced(x, resets), layer(x, resets=resets))


def test_unroll() -> None:
    layer = ManualLSTM(3, 4, 2, dtype=torch.float64)
    x, resets = example(layer)
    unrolled = layer.unroll(x, resets=resets)
    assert_near((unrolled.output, unrolled.states), layer(x, resets=resets))
    rest, states = layer(x[3:], unrolled.after(2), resets=resets[3:])
    assert_near(rest, unrolled.output[3:])
    assert_near(states, unrolled.states)
    with torch.no_grad():
        assert_near(layer.unroll(x, resets=resets).c, tuple(c.detach() for c in unrolled.c))


def test_a_cell_draws_once_a_row_and_counts_the_steps_of_the_input() -> None:
    calls: list[Tensor] = []

    class Watched(VariationalLSTM):
        def per_sequence(self, h_0: Tensor, c_0: Tensor) -> dict[str, Tensor]:
            calls.append(h_0)
            return super().per_sequence(h_0, c_0)

        def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: Any) -> Any:
            seen.append(int(w.t[0]))
            return super().cell(x_t, h, c, w)

    seen: list[int] = []
    layer = Watched(3, 4)
    x, resets = example(layer)
    layer(x, resets=resets)
    assert len(calls) == 1
    assert seen == list(range(7))


def test_one_step_at_a_time() -> None:
    layer = ManualLSTM(3, 4, 2, dtype=torch.float64)
    x, resets = example(layer)
    expected, _ = layer(x, resets=resets)
    hx, outputs = None, []
    for t in range(len(x)):
        output, hx = layer(x[t : t + 1], hx, resets=resets[t : t + 1])
        outputs.append(output)
    assert_near(torch.cat(outputs), expected)
