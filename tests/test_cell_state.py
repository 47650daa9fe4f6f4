"""Cells that keep more state and know more of each step, against loops over one sequence at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.nn.utils.rnn import pack_sequence

from manual_lstm import ManualLSTM
from manual_lstm.cell import Step
from tests.helpers.cells import (
    FORMS,
    SLSTM,
    OneStep,
    TimeAware,
    in_form,
    out_of_form,
    run_alone,
    slstm_step,
    time_aware_step,
)
from tests.helpers.equations import gradients
from tests.helpers.layers import randn

CELLS: dict[str, tuple[type[ManualLSTM], OneStep, int]] = {
    "sLSTM": (SLSTM, slstm_step, 3),
    "time-aware": (TimeAware, time_aware_step, 1),
}


def draw(lengths: tuple[int, ...]) -> list[Tensor]:
    """Sequences whose last feature is a time, above zero."""
    sequences = [randn(n, 3) for n in lengths]
    for sequence in sequences:
        sequence[:, -1] = sequence[:, -1].abs() + 0.1
    return sequences


def make(name: str, **options: Any) -> ManualLSTM:
    torch.manual_seed(0)
    return CELLS[name][0](3, 4, dtype=torch.float64, **options)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 2}])
def test_values_and_gradients(name: str, form: str, options: dict[str, Any]) -> None:
    layer = make(name, batch_first=form == "batch_first", **options)
    sequences = draw((4, 2, 5) if form in ("packed", "nested") else (4, 4, 4))
    used = sequences[:1] if form == "unbatched" else sequences
    for sequence in sequences:
        sequence.requires_grad_()
    output, (h_n, c_n) = layer(in_form(form, sequences))
    _, step, state = CELLS[name]
    expected, h_expected, c_expected = run_alone(layer, step, used, state)
    if form == "unbatched":
        h_expected, c_expected = h_expected[:, 0], c_expected[:, 0]
    actual = out_of_form(form, output)
    close(actual, expected)
    close((h_n, c_n), (h_expected, c_expected))
    wanted = [*used, *layer.parameters()]
    close(
        gradients([*actual, h_n, c_n], wanted), gradients([*expected, h_expected, c_expected], wanted)
    )


@pytest.mark.parametrize("form", FORMS)
def test_states_of_that_size(form: str) -> None:
    layer = make("sLSTM", num_layers=2, batch_first=form == "batch_first")
    x = in_form(form, draw((4, 2, 4)))
    _, states = layer(x)
    zeros = tuple(torch.zeros_like(state) for state in states)
    assert [state.size(-1) for state in zeros] == [4, 12]
    torch.testing.assert_close(layer(x, zeros)[1], states, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"Expected c_0 of size .*12"):
        layer(x, (zeros[0], zeros[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype: torch.dtype) -> None:
    layer, x = make("sLSTM").float(), torch.randn(5, 2, 3)
    with torch.autocast("cpu", dtype):
        output, (h_n, c_n) = layer(x)
    assert (output.dtype, h_n.dtype, c_n.shape) == (dtype, dtype, (1, 2, 12))
    expected = layer.to(dtype)(x.to(dtype))
    torch.testing.assert_close((output, h_n), (expected[0], expected[1][0]), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 2, 3), (4, 0, 3), (1, 2, 3)])
@pytest.mark.parametrize("name", CELLS)
def test_no_steps_no_sequences_and_one_step(name: str, shape: tuple[int, ...]) -> None:
    layer, x = make(name), randn(*shape).abs() + 0.1
    output, (_, c_n) = layer(x)
    assert output.shape == (*shape[:2], 4)
    assert c_n.shape == (1, shape[1], 4 * CELLS[name][2])
    torch.testing.assert_close(layer.unroll(x).output, output, rtol=0, atol=0)


@pytest.mark.parametrize("name", CELLS)
def test_transforms(name: str) -> None:
    layer, xs = make(name, bidirectional=True), randn(3, 4, 2, 3).abs() + 0.1
    close(vmap(layer)(xs)[0], torch.stack([layer(x)[0] for x in xs]))
    eps = 1e-6
    tangent = jvp(lambda x: layer(x)[0], (xs[0],), (xs[1],))[1]
    change = (layer(xs[0] + eps * xs[1])[0] - layer(xs[0] - eps * xs[1])[0]) / (2 * eps)
    torch.testing.assert_close(tangent, change, rtol=1e-5, atol=1e-8)


class Index(ManualLSTM):
    """Puts out the index of each step."""

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: Any) -> Step:
        assert w.t.dtype is torch.int64
        assert w.t.shape == x_t.shape[:1]
        step = super().cell(x_t, h, c, w)
        return step._replace(h=0 * step.h + w.t.unsqueeze(1))


@pytest.mark.parametrize("form", FORMS)
def test_the_index_is_that_of_the_input(form: str) -> None:
    layer = Index(3, 1, bidirectional=True, num_layers=2, batch_first=form == "batch_first")
    sequences = [sequence.float() for sequence in draw((4, 2, 5))]
    for output in out_of_form(form, layer(in_form(form, sequences))[0]):
        assert output.tolist() == [[t, t] for t in range(len(output))]


def test_per_step_is_asked_once_a_call_with_the_input() -> None:
    seen: list[Tensor] = []

    class Asked(ManualLSTM):
        def per_step(self, x: Tensor) -> dict[str, Tensor]:
            seen.append(x)
            return {"first": x[..., 0], "matrix": x.unsqueeze(-1) @ x.unsqueeze(-2)}

        def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: Any) -> Step:
            assert w.first.shape == (len(x_t),)
            assert w.matrix.shape == (len(x_t), 3, 3)
            return super().cell(x_t, h, c, w)

    layer, x = Asked(3, 4, num_layers=3, bidirectional=True, batch_first=True), torch.randn(2, 5, 3)
    layer(x)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], x.transpose(0, 1), rtol=0, atol=0)
    packed = pack_sequence([torch.randn(2, 3), torch.randn(4, 3)], enforce_sorted=False)
    layer(packed)
    assert seen[1] is packed.data
    layer.bfloat16()(x.bfloat16())
    assert seen[2].dtype is torch.float32


# Mistakes


def _changed(**methods: Any) -> ManualLSTM:
    cls: type[ManualLSTM] = type("Changed", (ManualLSTM,), methods)
    return cls(3, 4, num_layers=2)


def _tensors(**values: Any) -> Any:
    return lambda self, *_: values


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no such name": (
        {"cell": lambda self, x_t, h, c, w: w.peephole},
        AttributeError,
        "one of weight_ih, weight_hh|weight_hh, .*bias, t, but got peephole",
    ),
    "per_sequence, no tensor": (
        {"per_sequence": _tensors(mask=3.0)},
        TypeError,
        "per_sequence should return tensors, but got float for mask",
    ),
    "per_sequence, no dict": (
        {"per_sequence": lambda self, h, c: [h]},
        TypeError,
        "per_sequence should return a dict of tensors, but got list",
    ),
    "per_sequence, taken": (
        {"per_sequence": _tensors(bias=torch.ones(2))},
        ValueError,
        "per_sequence should return new names, but 'bias' is taken",
    ),
    "per_sequence, taken by a parameter": (
        {
            "cell_parameters": _tensors(gain=torch.ones(4)),
            "per_sequence": _tensors(gain=torch.ones(2)),
        },
        ValueError,
        "per_sequence should return new names, but 'gain' is taken",
    ),
    "per_sequence, taken by per_step": (
        {"per_step": lambda self, x: {"gap": x}, "per_sequence": _tensors(gap=torch.ones(2))},
        ValueError,
        "per_sequence should return new names, but 'gap' is taken",
    ),
    "per_sequence, sizes": (
        {"per_sequence": _tensors(mask=torch.ones(7, 4))},
        ValueError,
        r"sizes begin with \[2\], but got \[7, 4\] for mask",
    ),
    "per_step, no tensor": (
        {"per_step": _tensors(gap=None)},
        TypeError,
        "per_step should return tensors, but got NoneType for gap",
    ),
    "per_step, taken": (
        {"per_step": lambda self, x: {"t": x}},
        ValueError,
        "per_step should return new names, but 't' is taken",
    ),
    "per_step, taken by a parameter": (
        {"cell_parameters": _tensors(gain=torch.ones(4)), "per_step": lambda self, x: {"gain": x}},
        ValueError,
        "per_step should return new names, but 'gain' is taken",
    ),
    "per_step, sizes": (
        {"per_step": lambda self, x: {"gap": x.transpose(0, 1)}},
        ValueError,
        r"per_step should return tensors whose sizes begin with \[5, 2\], but got \[2, 5, 3\] for gap",
    ),
    "project, sizes": (
        {"project": lambda self, x, w: x.flatten(0, 1)},
        ValueError,
        r"project should return .* \[5, 2\], but got \[10, 3\]",
    ),
    "project, no tensor": (
        {"project": lambda self, x, w: (x, x)},
        TypeError,
        "project should return .*, but got tuple",
    ),
    "cell, c": (
        {
            "cell": lambda self, x_t, h, c, w: ManualLSTM.cell(self, x_t, h, c, w)._replace(
                c=torch.cat([c, c], 1)
            )
        },
        ValueError,
        r"a c of the size of the one that it got, \[2, 4\], but got \[2, 8\]",
    ),
    "cell, h": (
        {
            "cell": lambda self, x_t, h, c, w: ManualLSTM.cell(self, x_t, h, c, w)._replace(
                h=h.unsqueeze(0)
            )
        },
        ValueError,
        r"a h of the size of the one that it got, \[2, 4\], but got \[1, 2, 4\]",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str) -> None:
    methods, error, text = MISTAKES[mistake]
    with pytest.raises(error, match=text):
        _changed(**methods)(torch.randn(5, 2, 3))


def test_the_names_of_a_cells_parameters() -> None:
    with pytest.raises(ValueError, match="new names, but got 't'"):
        _changed(cell_parameters=_tensors(t=torch.ones(4)))


def test_a_projection_of_another_size() -> None:
    """What project returns last is the cell's own affair."""

    class Wide(ManualLSTM):
        def project(self, x: Tensor, w: Any) -> Tensor:
            return torch.cat([super().project(x, w), x], -1)

        def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: Any) -> Step:
            return super().cell(x_t[:, : 4 * self.hidden_size], h, c, w)

    wide, official = Wide(3, 4), nn.LSTM(3, 4)
    wide.load_state_dict(official.state_dict())
    for x in (torch.randn(5, 2, 3), torch.randn(0, 2, 3)):
        output, _ = wide(x)
        if len(x):
            torch.testing.assert_close(output, official(x)[0])


# Compiled and exported


SMALL: dict[str, Any] = {}
LARGE: dict[str, Any] = {"num_layers": 2, "bidirectional": True}


@pytest.mark.parametrize(
    ("name", "packed", "options"),
    [
        pytest.param(name, packed, options, marks=pytest.mark.slow)
        for name in CELLS
        for packed in (False, True)
        for options in (SMALL, LARGE)
    ],
)
def test_compiled_with_other_sizes(name: str, packed: bool, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    layer = make(name, **options)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for lengths in ((3, 5, 2), (4, 1, 6, 6), (7, 2, 2)):
        form = "packed" if packed else "dense"
        x = in_form(form, draw(lengths if packed else (lengths[0],) * len(lengths)))
        actual, expected = compiled(x), layer(x)
        close(out_of_form(form, actual[0]), out_of_form(form, expected[0]))
        close(actual[1], expected[1])
        wanted: list[Tensor] = list(layer.parameters())
        found = [gradients([*out_of_form(form, a[0]), *a[1]], wanted) for a in (actual, expected)]
        close(*found)
        assert all(bool(gradient.isfinite().all()) for gradient in found[0])


class _OfPacked(nn.Module):
    def __init__(self, layer: ManualLSTM) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, data: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = torch.nn.utils.rnn.PackedSequence(data, batch_sizes)
        output, (h_n, c_n) = self.layer(packed)
        return output.data, h_n, c_n


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, marks=pytest.mark.slow)
        for name in CELLS
        for options in (SMALL, LARGE)
    ],
)
def test_exported_with_other_sizes(name: str, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    layer = make(name, **options)
    dim = torch.export.Dim.DYNAMIC
    example = (randn(5, 3, 3).abs() + 0.1,)
    program = torch.export.export(
        layer, example, dynamic_shapes=({0: dim, 1: dim},), strict=False
    ).module()
    for T, B in ((5, 3), (9, 2), (2, 7)):
        x = randn(T, B, 3).abs() + 0.1
        close(program(x), layer(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_packed_exported_with_other_sizes(name: str) -> None:
    torch.compiler.reset()
    module, dim = _OfPacked(make(name)), torch.export.Dim.DYNAMIC
    x = pack_sequence(draw((4, 3, 3, 1)))
    program = torch.export.export(
        module, (x.data, x.batch_sizes), dynamic_shapes=({0: dim}, {0: dim}), strict=False
    ).module()
    for lengths in ((4, 3, 3, 1), (6, 6, 2, 1, 1)):
        x = pack_sequence(draw(lengths))
        close(program(x.data, x.batch_sizes), module(x.data, x.batch_sizes))
