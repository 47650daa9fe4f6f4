"""``lengths``: padded batches without packing, against packing by hand."""

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from manual_lstm import CellWeights, ManualLSTM, Step, plain_loop, replace_lstm, restore_lstm
from manual_lstm.cells import PeepholeLSTM, VariationalLSTM
from manual_lstm.check.parity import twins
from manual_lstm.testing import Case, assert_same_layer, cases
from manual_lstm.testing.pieces import run_in_pieces
from tests.helpers.loops import always_plainly, loops_chosen, plainly
from tests.helpers.versions import compiles_scan

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"proj_size": 2, "bidirectional": True, "bias": False},
]
SLOW_OPTIONS = [pytest.param(options, marks=pytest.mark.slow) for options in OPTIONS[1:]]


def example(layer: Any, T: int = 6, lengths: Sequence[int] = (4, 0, 6, 2)) -> tuple[Tensor, Tensor]:
    """An input whose padding is nan, and its lengths."""
    x = torch.randn(T, len(lengths), layer.input_size, dtype=layer.weight_ih_l0.dtype)
    for b, n in enumerate(lengths):
        x[n:, b] = float("nan")
    return x.transpose(0, 1).contiguous() if layer.batch_first else x, torch.tensor(lengths)


def results(function: Any, x: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The answer, and the gradients of a loss on all of it."""
    x = x.clone().requires_grad_()
    output, (h_n, c_n) = function(x)
    loss = output.square().sum() + h_n.sum() + c_n.square().sum()
    return [output, h_n, c_n, *torch.autograd.grad(loss, [x, *parameters])]


def assert_near(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@given(case=cases(beyond={"lengths"}, without={"dense", "unbatched", "packed"}))
def test_lengths_equal_packing(case: Case) -> None:
    reference, layer = case.pair(ManualLSTM)
    assert_same_layer(layer, reference, case)


@given(case=cases(beyond={"lengths"}, without={"dense", "unbatched", "packed"}, large=False))
def test_lengths_equal_packing_in_the_plain_loop(case: Case) -> None:
    reference, layer = case.pair(ManualLSTM)
    with plainly():
        assert_same_layer(layer, reference, case)


@given(
    case=cases(
        dtypes=[torch.float32, torch.bfloat16],
        beyond={"lengths"},
        without={"dense", "unbatched", "packed", "dropout"},
        large=False,
    )
)
def test_lengths_in_low_precision(case: Case) -> None:
    reference, layer = case.pair(ManualLSTM)
    assert_same_layer(layer, reference, case)


def test_dropout_draws_as_the_packed_call_does() -> None:
    reference, layer = twins(3, 4, 3, dropout=0.5, dtype=torch.float64)
    lengths = torch.randint(1, 4, (50,))  # many ties, which packing does not sort stably
    x = torch.randn(4, 50, 3, dtype=torch.float64)
    torch.manual_seed(1)
    output, (h_n, c_n) = reference(pack_padded_sequence(x, lengths, enforce_sorted=False))
    expected = pad_packed_sequence(output, total_length=4)[0], (h_n, c_n)
    after = torch.rand(())
    torch.manual_seed(1)
    assert_near(layer(x, lengths=lengths), expected)
    assert torch.equal(torch.rand(()), after)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_stands_in_the_padding_does_not_matter(options: dict[str, Any]) -> None:
    layer = ManualLSTM(3, 4, **options, dtype=torch.float64)
    x, lengths = example(layer)
    parameters = list(layer.parameters())
    clean = results(lambda x: layer(x, lengths=lengths), x.nan_to_num(7.0), parameters)
    with_nan = results(lambda x: layer(x, lengths=lengths), x, parameters)
    assert_near(with_nan, clean)
    assert all(bool(part.isfinite().all()) for part in with_nan)


def test_an_empty_sequence_returns_its_states() -> None:
    layer = ManualLSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    x, lengths = example(layer)
    hx = torch.randn(4, 4, 4, dtype=torch.float64), torch.randn(4, 4, 4, dtype=torch.float64)
    output, states = layer(x, hx, lengths=lengths)
    assert not output[:, 1].any()
    for state, given_state in zip(states, hx):
        assert torch.equal(state[:, 1], given_state[:, 1])
    output, states = layer(x, hx, lengths=[0, 0, 0, 0])
    assert not output.any()
    assert torch.equal(states[0], hx[0])
    assert torch.equal(states[1], hx[1])
    output, _ = layer(x[:, :0], lengths=[])
    assert output.shape == (6, 0, 8)
    output, _ = layer(x[:0], lengths=[0] * 4)
    assert output.shape == (0, 4, 8)


class Index:
    """What Python takes for an index, and torch does not."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __index__(self) -> int:
        return self.number


def _many_lengths() -> dict[str, Any]:
    made: dict[str, Any] = {
        "list": [5, 0, 3],
        "tuple": (5, 0, 3),
        "deque": deque([5, 0, 3]),
        "indices": [Index(5), Index(0), Index(3)],
        "int32": torch.tensor([5, 0, 3], dtype=torch.int32),
        "uint8": torch.tensor([5, 0, 3], dtype=torch.uint8),
        "uint16": torch.tensor([5, 0, 3], dtype=torch.uint16),
        "list of tensors": list(torch.tensor([5, 0, 3])),
        "tensors and ints": [5, torch.tensor(0, dtype=torch.uint8), 3],
    }
    with suppress(ModuleNotFoundError):
        import numpy

        for kind in ("int64", "uint64", "uint8", ">i4"):
            made[f"numpy {kind}"] = numpy.array([5, 0, 3], dtype=kind)
        made["numpy integers"] = [numpy.int64(5), numpy.int32(0), numpy.uint8(3)]
        made["numpy unsigned integers"] = [numpy.uint64(n) for n in (5, 0, 3)]
    return made


MANY_LENGTHS = _many_lengths()
_NOT_DYNAMOS = ("deque", "indices", "numpy >i4", "numpy unsigned integers")
COMPILED_LENGTHS = [kind for kind in MANY_LENGTHS if kind not in _NOT_DYNAMOS]


@pytest.mark.parametrize("kind", MANY_LENGTHS)
def test_many_things_are_lengths(kind: str) -> None:
    layer, x = ManualLSTM(3, 4), torch.randn(5, 3, 3)
    expected = layer(x, lengths=torch.tensor([5, 0, 3]))
    torch.testing.assert_close(layer(x, lengths=MANY_LENGTHS[kind]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", COMPILED_LENGTHS)
def test_many_things_are_lengths_of_a_compiled_layer(kind: str) -> None:
    layer, x = ManualLSTM(3, 4), torch.randn(5, 3, 3)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    expected = layer(x, lengths=torch.tensor([5, 0, 3]))
    torch.testing.assert_close(compiled(x, lengths=MANY_LENGTHS[kind]), expected)


def test_a_list_of_tensors_is_recorded() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = ManualLSTM(3, 4)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            output: Tensor = self.layer(x, lengths=list(lengths.unbind()))[0]
            return output

    model, x = Listed(), torch.randn(5, 2, 3)
    traced: Any = torch.jit.trace(model, (x, torch.tensor([5, 2])))  # type: ignore[no-untyped-call]
    other = torch.tensor([3, 4])
    torch.testing.assert_close(traced(x, other), model(x, other))
    torch.testing.assert_close(torch.vmap(model, (None, 0))(x, other[None])[0], model(x, other))


WRONG: dict[str, tuple[type[Exception], Any, str]] = {
    "too few": (ValueError, [5, 3], r"lengths should be \[3\], .* got \[2\]"),
    "too many": (ValueError, torch.tensor([5, 3, 1, 1]), r"lengths .* got \[4\]"),
    "negative": (ValueError, [5, -1, 3], r"lengths .* between 0 and the 5 steps .* -1 for sequence 1"),
    "too long": (ValueError, torch.tensor([6, 1, 3]), r"lengths .* 6 for sequence 0"),
    "2-D": (ValueError, torch.ones(3, 1, dtype=torch.int64), r"lengths .* got \[3, 1\]"),
    "floats": (TypeError, [5.0, 3.0, 1.0], r"lengths should be integers, but got 5.0 \(float\)"),
    "float tensor": (TypeError, torch.ones(3), "lengths .* torch.float32"),
    "bools": (TypeError, [True, True, False], "lengths .* True"),
    "bool tensor": (TypeError, torch.ones(3).bool(), "lengths .* torch.bool"),
    "a number": (TypeError, 5, "lengths .* got 5"),
    "text": (TypeError, "531", "lengths .* '531'"),
    "a set": (TypeError, {5, 3, 1}, r"lengths .*\(set\)"),
    "a generator": (TypeError, (n for n in (5, 3, 1)), r"lengths .*\(generator\)"),
    "nested": (TypeError, [[5], [3], [1]], r"lengths .* \[5\]"),
    "a bool in a tensor": (TypeError, [torch.tensor(True), 3, 1], r"lengths .*\(True\)"),
    "packed": (TypeError, pack_sequence([torch.ones(3)]), "lengths .* PackedSequence"),
    "sparse": (TypeError, torch.tensor([5, 3, 1]).to_sparse(), "lengths .*sparse"),
    "without numbers": (
        RuntimeError,
        torch.ones(3, dtype=torch.int64, device="meta"),
        "lengths .* meta",
    ),
    "one without": (RuntimeError, [torch.tensor(5, device="meta"), 3, 1], "lengths .* meta"),
    "beyond int64": (ValueError, [2**70, 3, 1], "lengths .* 1180591620717411303424 for sequence 0"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_lengths_raise(kind: str) -> None:
    error, lengths, shown = WRONG[kind]
    with pytest.raises(error, match=shown):
        ManualLSTM(3, 4)(torch.randn(5, 3, 3), lengths=lengths)


def test_lengths_belong_to_padded_input() -> None:
    layer = ManualLSTM(3, 4)
    packed = pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    nested = torch.nested.nested_tensor([torch.randn(3, 3), torch.randn(2, 3)], layout=torch.jagged)
    for input, kind in ((packed, "packed"), (nested, "nested"), (torch.randn(5, 3), "unbatched")):
        with pytest.raises(ValueError, match=f"lengths should come with a batch of padded .* {kind}"):
            layer(input, lengths=[3, 2])


# A layer whose padding is masked: where lengths are not known.


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", [ManualLSTM, PeepholeLSTM])
def test_vmap_over_batches_of_lengths(cls: type[ManualLSTM], options: dict[str, Any]) -> None:
    layer = cls(3, 4, **options, dtype=torch.float64)
    inputs = [example(layer, lengths=lengths) for lengths in ((4, 0, 6), (6, 1, 2), (0, 0, 0))]
    x, lengths = torch.stack([i[0] for i in inputs]), torch.stack([i[1] for i in inputs])
    parameters = dict(layer.named_parameters())

    def loss(parameters: Any, x: Tensor, lengths: Tensor) -> tuple[Tensor, Any]:
        answer = torch.func.functional_call(layer, parameters, (x,), {"lengths": lengths})
        output, (h_n, c_n) = answer
        return output.square().sum() + h_n.sum() + c_n.square().sum(), answer

    gradient = torch.func.grad(loss, has_aux=True)
    gradients, answers = torch.vmap(gradient, (None, 0, 0))(parameters, x, lengths)
    for k, (one, of_one) in enumerate(inputs):
        expected, answer = gradient(parameters, one, of_one)
        assert_near({name: g[k] for name, g in gradients.items()}, expected)
        output, (h_n, c_n) = answers
        assert_near((output[k], (h_n[k], c_n[k])), answer)


class GapLSTM(ManualLSTM):
    """A cell that divides by its input, which is never zero where there is a step."""

    def per_step(self, x: Tensor) -> dict[str, Tensor]:
        return {"gap": x[..., -1:]}

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: CellWeights) -> Step:
        return super().cell(x_t, h, c / w.gap, w)


@pytest.mark.parametrize("cls", [ManualLSTM, GapLSTM])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("lengths", [(0, 4, 2), (0, 0, 0)], ids=str)
def test_an_empty_sequence_has_no_part_in_a_masked_loop(
    cls: type[ManualLSTM], num_layers: int, lengths: tuple[int, ...]
) -> None:
    layer = cls(3, 4, num_layers, dtype=torch.float64)
    x = torch.rand(4, 3, 3, dtype=torch.float64) + 0.5
    h_0 = torch.randn(num_layers, 3, 4, dtype=torch.float64)
    h_0[:, 0] = float("nan")
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], lengths: Tensor) -> tuple[Tensor, Any]:
        keywords = {"lengths": lengths}
        answer = functional_call(layer, parameters, (x, (h_0, h_0)), keywords)
        return answer[0].square().sum() + answer[1][1][:, 1:].sum(), answer

    gradient = torch.func.grad(loss, has_aux=True)
    expected = gradient(parameters, torch.tensor(lengths))
    with loops_chosen() as loops:
        actual = torch.vmap(gradient, (None, 0))(parameters, torch.tensor([lengths]))
    assert loops == {"PLAIN"}
    for name, found in actual[0].items():
        assert_near(found[0], expected[0][name])
    (output, states), (output_once, states_once) = actual[1], expected[1]
    torch.testing.assert_close(output[0], output_once, rtol=0, atol=1e-12)
    for state, once in zip(states, states_once):
        torch.testing.assert_close(state[0], once, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_derivatives_of_higher_order(options: dict[str, Any]) -> None:
    layer = ManualLSTM(2, 3, **options, dtype=torch.float64)
    x, lengths = example(layer, 4, (3, 0, 4))
    tangent = torch.randn_like(x)

    def run(x: Tensor) -> Tensor:
        output: Tensor = layer(x, lengths=lengths)[0]
        return output

    found = torch.func.jvp(run, (x,), (tangent,))[1]
    clean, step = x.nan_to_num(), 1e-6
    expected = (run(clean + step * tangent) - run(clean - step * tangent)) / (2 * step)
    assert_near(found, expected, 1e-8)
    assert torch.autograd.gradgradcheck(run, clean.requires_grad_())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "cls", [ManualLSTM, pytest.param(PeepholeLSTM, marks=[compiles_scan, pytest.mark.slow])]
)
def test_a_compiled_function_serves_all_lengths(cls: type[ManualLSTM], backend: str) -> None:
    torch.compiler.reset()
    layer = cls(3, 4, 2, bidirectional=True, dtype=torch.float64)
    parameters = list(layer.parameters())
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    @torch.compile(fullgraph=True, backend=count)
    def compiled(x: Tensor, lengths: Tensor) -> Any:
        return layer(x, lengths=lengths)

    for T, lengths in ((5, (5, 2, 0)), (7, (3, 3, 1, 7)), (4, (0, 0, 0, 4, 2)), (6, (6, 1))):
        x, of_x = example(layer, T, lengths)
        expected = results(lambda x, of_x=of_x: layer(x, lengths=of_x), x, parameters)
        actual = results(lambda x, of_x=of_x: compiled(x, of_x), x, parameters)
        assert_near(actual, expected, 1e-11)
    assert graphs <= 2


@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 2])], ids=["dense", "lengths"])
def test_cuda_graphs_are_cut_where_the_operators_look_at_lengths(lengths: Tensor | None) -> None:
    layer, unsafe = ManualLSTM(3, 4), {}

    def collect(graph: Any, _: Any) -> Any:
        for node in graph.graph.nodes:
            if "manual_lstm" in str(node.target):
                unsafe[str(node.target)] = torch.Tag.cudagraph_unsafe in node.target.tags
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=collect), fullgraph=True)
    compiled(torch.randn(5, 2, 3), lengths=lengths)[0].sum().backward()
    assert len(unsafe) == 2  # forward and backward
    assert set(unsafe.values()) == {lengths is not None}
    torch.compiler.reset()


class Model(nn.Module):
    """A layer that is called with lengths."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        return self.layer(x, lengths=lengths)


def _dynamic(layer: Any) -> tuple[dict[int, Any], dict[int, Any]]:
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    return ({0: B, 1: T} if layer.batch_first else {0: T, 1: B}), {0: B}


@pytest.mark.parametrize("cls", [ManualLSTM, pytest.param(PeepholeLSTM, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, *SLOW_OPTIONS], ids=str)
def test_an_exported_program_serves_all_lengths(options: dict[str, Any], cls: type[ManualLSTM]) -> None:
    layer = cls(3, 4, **options)
    torch.compiler.reset()
    program = torch.export.export(
        Model(layer), example(layer), dynamic_shapes=_dynamic(layer), strict=False
    ).module()
    for T, lengths in ((6, (4, 0, 6, 2)), (9, (9, 2)), (3, (0, 1, 2, 3, 3))):
        x, of_x = example(layer, T, lengths)
        torch.testing.assert_close(program(x, of_x), layer(x, lengths=of_x))


@pytest.mark.optional
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_onnx_at_other_sizes(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    layer = ManualLSTM(3, 4, **options).eval()
    torch.compiler.reset()
    program = torch.onnx.export(
        Model(layer), example(layer), dynamo=True, dynamic_shapes=_dynamic(layer), verbose=False
    )
    assert program is not None
    program.save(tmp_path / "layer.onnx")
    session = runtime.InferenceSession(tmp_path / "layer.onnx")
    names = [each.name for each in session.get_inputs()]
    x, lengths = example(layer, 9, (9, 0, 3))
    found = session.run(None, dict(zip(names, (x.numpy(), lengths.numpy()))))
    output, states = layer(x, lengths=lengths)
    for actual, expected in zip(found, (output, *states), strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@compiles_scan
def test_aotinductor(options: dict[str, Any], tmp_path: Path) -> None:
    layer = ManualLSTM(3, 4, **options).eval()
    torch.compiler.reset()
    program = torch.export.export(Model(layer), example(layer), dynamic_shapes=_dynamic(layer))
    file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    x, lengths = example(layer, 9, (9, 0, 3))
    loaded = torch._inductor.aoti_load_package(file)
    torch.testing.assert_close(loaded(x, lengths), layer(x, lengths=lengths))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_trace_records_packing_the_operator_and_padding(options: dict[str, Any]) -> None:
    layer = ManualLSTM(3, 4, **options)
    traced: Any = torch.jit.trace(Model(layer), example(layer, lengths=(4, 6, 2)))  # type: ignore[no-untyped-call]
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    for kind in ("aten::_pack_padded_sequence", "aten::lstm", "aten::_pad_packed_sequence"):
        assert kinds.count(kind) == 1
    for T, lengths in ((9, (8, 2)), (6, (1, 2, 3, 3))):
        x, of_x = example(layer, T, lengths)
        torch.testing.assert_close(traced(x, of_x), layer(x, lengths=of_x))


@pytest.mark.optional
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_the_older_onnx_exporter_with_lengths(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    layer = ManualLSTM(3, 4, **options).eval()
    file = tmp_path / "layer.onnx"
    axes = {"x": {0: "first", 1: "second"}, "lengths": {0: "B"}}
    torch.onnx.export(
        Model(layer),
        example(layer, lengths=(4, 6)),
        file,
        dynamo=False,
        input_names=["x", "lengths"],
        dynamic_axes=axes,
    )
    x, lengths = example(layer, 9, (8, 2, 3))
    x = x.nan_to_num()
    found = runtime.InferenceSession(file).run(None, {"x": x.numpy(), "lengths": lengths.numpy()})
    output, states = layer(x, lengths=lengths)
    for actual, expected in zip(found, (output, *states), strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), expected)


def test_lengths_on_meta() -> None:
    layer = ManualLSTM(3, 4, device="meta", batch_first=True)
    for lengths in ([3, 0], torch.tensor([3, 0]), torch.tensor([3, 0], device="meta")):
        output, (h_n, _) = layer(torch.randn(2, 5, 3, device="meta"), lengths=lengths)
        assert output.shape == (2, 5, 4)
        assert h_n.is_meta


# Everything else that the layer does.


def test_the_fused_loop_runs_with_gradients_or_without() -> None:
    layer = ManualLSTM(3, 4)
    x, lengths = example(layer)
    with loops_chosen() as chosen:
        layer(x, lengths=lengths)
    assert chosen == {"FUSED"}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_unroll(options: dict[str, Any]) -> None:
    layer = ManualLSTM(3, 4, **options, dtype=torch.float64)
    x, lengths = example(layer)
    unrolled = layer.unroll(x, lengths=lengths)
    assert_near((unrolled.output, unrolled.states), layer(x, lengths=lengths))
    present = torch.arange(6) < lengths.unsqueeze(1)  # [B, T]
    present = (present if layer.batch_first else present.t()).unsqueeze(2)
    for field in (unrolled.i, unrolled.f, unrolled.g, unrolled.o, unrolled.c, unrolled.m, unrolled.h):
        for sequence in field:
            assert sequence.shape[:2] == x.shape[:2]
            assert torch.equal(sequence, sequence.masked_fill(~present, 0))
    assert unrolled.sample_of.tolist() == [2, 0, 3]
    assert [len(step.h) for step in unrolled.steps[0]] == [3, 3, 2, 2, 1, 1]
    with pytest.raises(TypeError, match="packed, nested or padded"):
        unrolled.after(2)
    with torch.no_grad():
        again = layer.unroll(x, lengths=lengths)
    assert_near(again.f, tuple(part.detach() for part in unrolled.f))


def test_masked_fields_are_zero_in_the_padding() -> None:
    layer = ManualLSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    inputs = [example(layer, lengths=lengths) for lengths in ((4, 0, 6), (6, 1, 2))]
    x, lengths = torch.stack([i[0] for i in inputs]), torch.stack([i[1] for i in inputs])
    fields = torch.vmap(lambda x, lengths: layer.unroll(x, lengths=lengths).f)(x, lengths)
    for k, (one, of_one) in enumerate(inputs):
        assert_near(tuple(f[k] for f in fields), layer.unroll(one, lengths=of_one).f)


def test_plain_loop_and_a_changed_cell() -> None:
    reference, layer = twins(3, 4, 2, bidirectional=True, dtype=torch.float64)
    peephole = PeepholeLSTM.from_lstm(reference)  # computes the same until it is trained
    x, lengths = example(layer)
    expected = run_in_pieces(reference, x, None, lengths.tolist())
    with plain_loop():
        assert_near(layer(x, lengths=lengths), expected)
    assert_near(peephole(x, lengths=lengths), expected)
    with always_plainly():
        assert_near(layer(x, lengths=lengths), expected)


def test_a_cell_gets_masks_by_sequence() -> None:
    layer = VariationalLSTM(3, 4, dtype=torch.float64)
    x, lengths = example(layer)
    torch.manual_seed(2)
    output, _ = layer(x, lengths=lengths)
    assert bool(output.isfinite().all())


def test_swapped_layers_have_it() -> None:
    model = replace_lstm(nn.ModuleDict({"lstm": nn.LSTM(3, 4, batch_first=True)}))
    output, _ = model["lstm"](torch.randn(2, 5, 3), lengths=[5, 2])
    assert not output[1, 2:].any()
    assert restore_lstm.__doc__ is not None
    assert "lengths" in restore_lstm.__doc__


def test_autocast_gives_the_dtypes_of_packing() -> None:
    reference, layer = twins(3, 4, 2)
    x, lengths = example(layer, lengths=(4, 6, 2))
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    with torch.autocast("cpu", torch.bfloat16):
        output, (h_n, c_n) = layer(x, lengths=lengths)
        rows, expected = reference(packed)
        dtypes = torch.vmap(lambda x, n: layer(x, lengths=n)[0])(x[None], lengths[None]).dtype
    assert output.dtype == rows.data.dtype == dtypes
    assert (h_n.dtype, c_n.dtype) == tuple(state.dtype for state in expected)


def test_the_output_lies_in_memory_as_the_padded_one() -> None:
    for batch_first in (False, True):
        layer = ManualLSTM(3, 4, batch_first=batch_first)
        assert layer(torch.randn(5, 4, 3), lengths=[3] * (5 if batch_first else 4))[0].is_contiguous()
