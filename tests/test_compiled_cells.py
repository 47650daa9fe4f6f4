"""A changed cell under torch.compile: its loop is a scan, whose compile time does not grow with T."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.nn.functional import dropout
from torch.nn.utils.rnn import pack_sequence

from manual_lstm import ManualLSTM, gates, output_step, plain_loop
from manual_lstm.cell import Step
from manual_lstm.check.parity import data_of
from manual_lstm.engine import context, dispatch
from tests.helpers.equations import gradients
from tests.helpers.layers import randn
from tests.helpers.versions import compiles_scan

MANY: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "proj_size": 3}


class Peephole(ManualLSTM):
    def cell_parameters(self) -> dict[str, Tensor]:
        return {"peephole": torch.full((3, self.hidden_size), 0.3)}

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: Any) -> Step:
        i, f, g, o = (x_t + h @ w.weight_hh.t()).chunk(4, -1)
        p_i, p_f, p_o = w.peephole
        i, f, g = torch.sigmoid(i + p_i * c), torch.sigmoid(f + p_f * c), torch.tanh(g)
        c = f * c + i * g
        return output_step(i, f, g, torch.sigmoid(o + p_o * c), c, w.weight_hr)


class Independent(ManualLSTM):
    """A cell that does not use weight_hh, and uses its own vector in the projection too."""

    def cell_parameters(self) -> dict[str, Tensor]:
        return {"u": torch.full((4 * self.hidden_size,), 0.5)}

    def project(self, x: Tensor, w: Any) -> Tensor:
        u: Tensor = w.u
        return super().project(x, w) + 0.1 * u

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: Any) -> Step:
        i, f, g, o = gates(x_t + w.u * (h[:, :1] + c).repeat(1, 4))
        return output_step(i, f, g, o, f * c + i * g, w.weight_hr)


class Detached(ManualLSTM):
    """A parameter from which the step has no gradient, but the projection has."""

    def cell_parameters(self) -> dict[str, Tensor]:
        return {"gain": torch.full((self.hidden_size,), 1.1)}

    def project(self, x: Tensor, w: Any) -> Tensor:
        gain: Tensor = w.gain
        return super().project(x, w) + gain.repeat(4)

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: Any) -> Step:
        step = super().cell(x_t, h, c, w)
        return step._replace(c=step.c * w.gain.detach())


class WithModules(ManualLSTM):
    """Tensors that the cell closes over: a module's, a buffer, a parameter of all layers."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.linear = nn.Linear(self.proj_size or self.hidden_size, 4 * self.hidden_size).double()
        self.register_buffer("scale", torch.tensor(0.5, dtype=torch.float64))
        self.shift = nn.Parameter(torch.ones(4 * self.hidden_size, dtype=torch.float64))

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: Any) -> Step:
        i, f, g, o = gates(x_t + self.linear(h) * self.scale + self.shift)
        return output_step(i, f, g, o, f * c + i * g, w.weight_hr)


CELLS: dict[str, type[ManualLSTM]] = {
    cls.__name__: cls for cls in (Peephole, Independent, Detached, WithModules)
}


def make(name: str, **options: Any) -> ManualLSTM:
    torch.manual_seed(0)
    return CELLS[name](3, 4, **{"dtype": torch.float64, **options})


def compiled(layer: Any, backend: Any = "aot_eager", **options: Any) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(layer, **{"backend": backend, "fullgraph": True, **options})


def check(layer: ManualLSTM, run: Callable[..., Any], x: Any) -> None:
    results = []
    for call in (run, layer):
        output, states = call(x)
        tensors = [data_of(output), *states]
        loss = [tensor * torch.linspace(1, 2, tensor.numel()).view_as(tensor) for tensor in tensors]
        results.append([*tensors, *gradients(loss, list(layer.parameters()))])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "backend", "options", "packed"),
    [
        pytest.param("Peephole", "aot_eager", {}, False),
        *(
            pytest.param(*point, marks=pytest.mark.slow)
            for point in (
                ("Peephole", "aot_eager", {"bidirectional": True, "proj_size": 3}, True),
                ("Independent", "aot_eager", {"num_layers": 2, "proj_size": 3}, False),
                ("Detached", "aot_eager", {}, True),
                ("WithModules", "aot_eager", {"num_layers": 2}, False),
                # Inductor compiles for a minute
                ("Peephole", "inductor", {}, True),
                ("Detached", "inductor", {"num_layers": 2}, False),
            )
        ),
    ],
)
def test_values_and_gradients(name: str, backend: str, options: Any, packed: bool) -> None:
    layer = make(name, **options)
    run = compiled(layer, backend)
    for lengths in ((4, 3), (6, 2, 2)):
        x: Any = randn(lengths[0], len(lengths), 3)
        if packed:
            x = pack_sequence([randn(n, 3) for n in lengths], enforce_sorted=False)
        check(layer, run, x)


@pytest.mark.slow
def test_two_layers_by_inductor() -> None:
    """Gradients of one size in two layers: Inductor 2.13 confuses them if it may donate buffers."""
    layer = make("WithModules", num_layers=2)
    check(layer, compiled(layer, "inductor"), randn(5, 2, 3))
    assert torch._functorch.config.donated_buffer  # as it was


class Counter:
    """A backend that counts its calls and the nodes that it gets."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(len(graph.graph.nodes))
        return graph


@compiles_scan
def test_ten_lengths_compile_twice_at_most_and_the_graph_does_not_grow() -> None:
    layer, counter = make("Peephole"), Counter()
    run = compiled(layer, counter)
    with torch.no_grad():
        for T in (10, 100, 3, 50, 17, 20, 2, 31, 9, 40):
            x = randn(T, 2, 3)
            torch.testing.assert_close(run(x), layer(x), rtol=0, atol=1e-12)
    assert len(counter.graphs) <= 2
    sizes = []
    for T in (10, 1000):
        counter = Counter()
        with torch.no_grad():
            compiled(layer, counter)(randn(T, 2, 3))
        sizes.append(counter.graphs)
    assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_special_lengths() -> None:
    layer = make("Peephole", bidirectional=True)
    run = compiled(layer, "eager")
    for shape in ((1, 2, 3), (0, 2, 3), (4, 0, 3), (4, 1, 3), (4, 3)):
        x = randn(*shape)
        torch.testing.assert_close(run(x), layer(x), rtol=0, atol=1e-13)


# Random numbers


class Random(ManualLSTM):
    """Puts out a mask of its own for each step, times a parameter."""

    def cell_parameters(self) -> dict[str, Tensor]:
        return {"gain": torch.full((self.hidden_size,), 2.0)}

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: Any) -> Step:
        step = super().cell(x_t, h, c * torch.rand_like(c), w)
        mask = dropout(torch.ones_like(c), 0.5, self.training)
        return step._replace(h=w.gain * mask + 0 * step.h)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_random_numbers_are_drawn_anew_in_each_step(backend: str) -> None:
    layer, x, weights = Random(3, 4), torch.randn(10, 2, 3), torch.randn(10, 2, 4)
    run, outputs = compiled(layer, backend), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        output, _ = run(x)
        outputs.append(output.detach())
        (gradient,) = torch.autograd.grad([(output * weights).sum()], [layer.get_parameter("gain_l0")])
        masks = output.detach() / 2  # as the forward has drawn them
        torch.testing.assert_close(gradient, (weights * masks).sum((0, 1)))
        assert len({tuple(step.flatten().tolist()) for step in masks}) > 5
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.slow
def test_dropout_between_layers() -> None:
    layer = make("Peephole", num_layers=2, dropout=0.5)
    run, x = compiled(layer, "aot_eager"), randn(5, 2, 3)
    assert not torch.equal(run(x)[0], run(x)[0])
    layer.eval()
    torch.testing.assert_close(run(x), layer(x), rtol=0, atol=1e-13)


# What stays unrolled


def test_under_transforms_inside_of_the_compiled_function() -> None:
    layer, xs = make("Peephole"), randn(3, 4, 2, 3)

    def output(x: Tensor) -> Any:
        return layer(x)[0]

    def derive(x: Tensor, v: Tensor) -> Any:
        return jvp(output, (x,), (v,))[1]

    mapped = compiled(vmap(output), "eager")
    torch.testing.assert_close(mapped(xs), torch.stack([layer(x)[0] for x in xs]), rtol=0, atol=1e-13)
    derivative = compiled(derive, "eager")
    expected = jvp(output, (xs[0],), (xs[1],))[1]
    torch.testing.assert_close(derivative(xs[0], xs[1]), expected, rtol=0, atol=1e-13)

    def total(x: Tensor) -> Any:
        return output(x).sum()

    slope = compiled(torch.func.grad(total), "eager")
    expected = torch.func.grad(total)(xs[0])
    torch.testing.assert_close(slope(xs[0]), expected, rtol=0, atol=1e-13)


def _scans(run: Any) -> bool:
    """Whether the compiled function has a scan in it."""
    found: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(any("scan" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled(run, backend)(randn(4, 2, 3))
    return found == [True]


@compiles_scan
@pytest.mark.slow
def test_which_loop_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make("Peephole")
    assert _scans(layer)
    assert not _scans(ManualLSTM(3, 4, dtype=torch.float64))

    def plainly(x: Tensor) -> Any:
        with plain_loop():
            return layer(x)

    assert not _scans(plainly)
    layer.compile_as_scan = False
    assert not _scans(layer)
    del layer.compile_as_scan
    assert _scans(layer)
    monkeypatch.setattr(context, "scan_operator", None)
    monkeypatch.setattr(dispatch, "scan_operator", None)
    assert not _scans(layer)


@compiles_scan
def test_unroll_says_that_a_scan_has_no_steps() -> None:
    layer, x = make("Peephole"), randn(4, 2, 3)

    def twice(x: Tensor) -> Any:
        return layer.unroll(x)[:], layer.unroll(2 * x)

    (first, second), expected = compiled(twice, "eager")(x), layer.unroll(2 * x)
    torch.testing.assert_close(second.c[0], expected.c[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(first[6][0], layer.unroll(x).c[0], rtol=0, atol=1e-13)
    with pytest.raises(RuntimeError, match="compiled function"):
        second.steps  # noqa: B018
    assert type(layer(x)) is tuple


# What scan does not take


class Counting(ManualLSTM):
    """Writes to a buffer."""

    count: Tensor

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register_buffer("count", torch.zeros(()))

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: Any) -> Step:
        self.count = self.count + 1
        return super().cell(x_t, h, c, w)


class Remembering(ManualLSTM):
    """Writes to a list."""

    seen: list[Tensor] = []  # noqa: RUF012

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: Any) -> Step:
        self.seen.append(x_t)
        return super().cell(x_t, h, c, w)


class Branching(ManualLSTM):
    """Looks at a number."""

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: Any) -> Step:
        return super().cell(x_t, h if h.sum() > 0 else 2 * h, c, w)


@compiles_scan
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("cls", [Counting, Remembering, Branching])
def test_the_error_names_the_attribute(cls: type[ManualLSTM], fullgraph: bool) -> None:
    with pytest.raises(Exception, match="compile_as_scan = False"):
        compiled(cls(3, 4), "eager", fullgraph=fullgraph)(torch.randn(4, 2, 3))


@pytest.mark.parametrize(
    "cls",
    [
        Counting,
        Remembering,
        pytest.param(
            Branching,
            marks=pytest.mark.skipif(
                torch.__version__ < "2.12",
                reason="torch 2.11 loses a list at a graph break",
            ),
        ),
    ],
)
def test_such_a_cell_is_unrolled(cls: type[ManualLSTM]) -> None:
    class Unrolled(cls):  # type: ignore[misc, valid-type]
        compile_as_scan = False

    layer, x = Unrolled(3, 4), torch.randn(4, 2, 3)
    expected = layer(x)
    actual = compiled(layer, "eager", fullgraph=cls is not Branching)(x)
    torch.testing.assert_close(actual, expected)
    if isinstance(layer, Counting):
        assert layer.count == 8


@compiles_scan
def test_the_errors_of_cells_are_shown() -> None:
    class Asking(ManualLSTM):
        def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: Any) -> Step:
            return super().cell(x_t, h, c * w.nope, w)

    with pytest.raises(Exception, match=r"w should be asked for one of .*, but got nope"):
        compiled(Asking(3, 4), "eager")(torch.randn(4, 2, 3))
