"""The layer under torch.jit.trace: one node that other programs know, for every length and batch."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from benchmarks.deploy import OutputModel
from manual_lstm import ManualLSTM
from manual_lstm.cells import CoupledLSTM


class _Packing(nn.Module):
    def __init__(self, layer: nn.Module, enforce_sorted: bool = False) -> None:
        super().__init__()
        self.layer, self.enforce_sorted = layer, enforce_sorted

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=self.enforce_sorted)
        output: PackedSequence = self.layer(packed)[0]
        return pad_packed_sequence(output)[0]


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 2}], ids=str
)
def test_a_trace_serves_other_lengths_and_batches_as_nn_lstms_does(options: dict[str, Any]) -> None:
    layer = ManualLSTM(3, 4, **options)
    example, x = torch.randn(5, 2, 3), torch.randn(9, 3, 3)
    traced = torch.jit.trace(layer, example)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(x), layer(x))
    h_n, c_n = layer(example)[1]
    traced = torch.jit.trace(layer, (example, (h_n, c_n)))  # type: ignore[no-untyped-call]
    hx = layer(x)[1]
    torch.testing.assert_close(traced(x, hx), layer(x, hx))
    packing = _Packing(layer)
    traced = torch.jit.trace(packing, (example, torch.tensor([3, 5])))  # type: ignore[no-untyped-call]
    lengths = torch.tensor([4, 9, 1])
    torch.testing.assert_close(traced(x, lengths), packing(x, lengths))


def test_a_trace_is_one_node_that_other_programs_know() -> None:
    layer, x = ManualLSTM(3, 4, 2, bidirectional=True, batch_first=True), torch.randn(2, 5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings("error", message=".*torch.jit.script.*")
        traced: Any = torch.jit.trace(layer, x)  # type: ignore[no-untyped-call]
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert kinds.count("aten::lstm") == 1
    assert not any(kind.startswith(("manual_lstm", "prim::Loop")) for kind in kinds)


def test_a_trace_of_no_steps() -> None:
    layer, x = ManualLSTM(3, 4), torch.randn(0, 2, 3)  # nn.LSTM's operator refuses these
    traced: Any = torch.jit.trace(layer, x)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(x), layer(x))


def test_a_changed_cell_is_recorded_and_says_so() -> None:
    layer, x = CoupledLSTM(3, 4), torch.randn(5, 2, 3)
    with pytest.warns(torch.jit.TracerWarning, match="records the 5 steps of its example"):  # type: ignore[attr-defined]
        traced: Any = torch.jit.trace(layer, x)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(x), layer(x))
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert kinds.count("aten::lstm") == 0
    assert kinds.count("aten::tanh") == 2 * 5


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_unroll_records_the_loop() -> None:
    class Gates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = ManualLSTM(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            gate: Tensor = self.layer.unroll(x).f[0]
            return gate

    model, x = Gates(), torch.randn(5, 2, 3)
    traced: Any = torch.jit.trace(model, x)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(2 * x), model(2 * x))
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert kinds.count("aten::lstm") == 0


@pytest.mark.optional
@pytest.mark.filterwarnings("ignore")  # the exporter is deprecated, and says so
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "options", [{"bias": False}, {"num_layers": 2, "bidirectional": True}], ids=str
)
def test_the_older_onnx_exporter_converts_the_trace(
    options: dict[str, Any], packing: bool, tmp_path: Path
) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    layer = ManualLSTM(3, 4, **options).eval()
    model = _Packing(layer, enforce_sorted=True) if packing else layer
    example: Any = (torch.randn(5, 2, 3), torch.tensor([5, 3]))
    other: Any = (torch.randn(9, 3, 3), torch.tensor([9, 4, 1]))
    names = ["x", "lengths"] if packing else ["x"]
    file = tmp_path / "layer.onnx"
    torch.onnx.export(
        model,
        example[: len(names)],
        file,
        dynamo=False,
        input_names=names,
        dynamic_axes={"x": {0: "T", 1: "B"}, "lengths": {0: "B"}},
    )
    session = runtime.InferenceSession(file)
    results = session.run(None, {name: t.numpy() for name, t in zip(names, other)})
    expected = model(*other[: len(names)])
    flat = [expected] if packing else [expected[0], *expected[1]]
    for actual, tensor in zip(results, flat, strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), tensor)


CONVERTED = pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str
)


@pytest.mark.optional
@pytest.mark.filterwarnings("ignore")
@CONVERTED
def test_openvino_converts_the_trace(options: dict[str, Any]) -> None:
    openvino = pytest.importorskip("openvino")
    model = OutputModel(ManualLSTM(3, 4, **options)).eval()
    # OpenVINO computes in bfloat16 of its own accord where the CPU has it.
    compiled = openvino.compile_model(
        openvino.convert_model(model, example_input=torch.randn(5, 2, 3)),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32"},
    )
    x = torch.randn(9, 4, 3)
    torch.testing.assert_close(torch.from_numpy(compiled(x.numpy())[0]), model(x))


@pytest.mark.optional
@pytest.mark.filterwarnings("ignore")
@CONVERTED
def test_core_ml_converts_the_trace(options: dict[str, Any]) -> None:
    coremltools = pytest.importorskip("coremltools")  # a conversion is all that Linux can do
    some = coremltools.RangeDim(1, 50, default=5)
    for shape in ((5, 2, 3), (some, some, 3)):
        converted = []
        for cls in (nn.LSTM, ManualLSTM):
            traced: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
                OutputModel(cls(3, 4, **options)).eval(), torch.randn(5, 2, 3)
            )
            program = coremltools.convert(traced, inputs=[coremltools.TensorType(shape=shape)])
            operations = program._mil_program.functions["main"].operations
            converted.append([operation.op_type for operation in operations])
        assert "lstm" in converted[1]
        assert converted[1] == converted[0]
