"""Rows on torch.compile, torch.export, and what is built on them.

The program that they make is compared with nn.LSTM in eager mode, with the same weights. So the report
compares two computations in the column of nn.LSTM too.
"""

import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence

from manual_lstm.check.parity import forward_and_backward, official_under_autocast
from manual_lstm.report.function import results_by_name
from manual_lstm.report.row import MissingRequirement, ReportRow, Setting, State

Input = Tensor | PackedSequence
Results = dict[str, Tensor]

EXAMPLE = (6, 3)  # T and B of the input that a layer is traced, compiled or exported with
OTHER_SHAPES = ((9, 2), (5, 5), (23, 4))  # T and B of the inputs that the program then runs on


def call_layer(layer: Any, input: Input, hx: State | None = None) -> Results:
    """Call a layer and return its results by name."""
    output, states = layer(input) if hx is None else layer(input, hx)
    return results_by_name(output, *states)


def results_and_gradients(layer: Any, input: Input, hx: State | None = None) -> Results:
    """Return the results and all gradients by name, with the dropout of one seed."""
    torch.manual_seed(0)
    results = forward_and_backward(layer, input, hx)
    # torch.compile puts the prefix before the names of a module's parameters.
    return {name.replace("_orig_mod.", ""): result for name, result in results.items()}


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Assert that tensors, or dicts and sequences of them, are close."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def require_compiler() -> None:
    """Raise MissingRequirement if there is no C++ compiler for Inductor."""
    names = (os.environ.get("CXX"), "g++", "clang++", "cl")
    if not any(name and shutil.which(name) for name in names):
        raise MissingRequirement("no C++ compiler")


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Forget everything compiled, before the block and after it."""
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


def check_compile(setting: Setting, backend: str = "inductor") -> None:
    """Compile the forward alone, and forward and backward, each without hx and with it."""
    if backend == "inductor":
        require_compiler()
    layer = setting.layer()
    lstm = setting.official(layer)
    with fresh_compiler():
        program: Any = torch.compile(layer, fullgraph=True, backend=backend)
        input = setting.input(*EXAMPLE)
        for hx in (None, setting.hx(EXAMPLE[1])):
            with torch.no_grad():
                assert_close(call_layer(program.eval(), input, hx), call_layer(lstm.eval(), input, hx))
            assert_close(
                results_and_gradients(program.train(), input, hx),
                results_and_gradients(lstm.train(), input, hx),
            )


def check_any_shape(setting: Setting) -> None:
    """After two shapes, 20 others do not compile again."""
    layer = setting.layer()
    lstm = setting.official(layer)
    with fresh_compiler():
        program = torch.compile(layer, fullgraph=True, backend="aot_eager")

        def check(T: int, B: int) -> None:
            input, hx = setting.input(T, B), setting.hx(B)
            assert_close(
                results_and_gradients(program, input, hx), results_and_gradients(lstm, input, hx)
            )

        check(*EXAMPLE)
        check(7, 4)
        with torch.compiler.set_stance("fail_on_recompile"):
            for T in (4, 5, 8, 17, 40):
                for B in (2, 3, 5, 11):
                    check(T, B)
        check(1, 3)  # torch.compile makes another program for a size of one
        check(5, 1)


def graph_sizes(setting: Setting, T: int) -> list[int]:
    """Return the number of nodes of the compiled forward and backward, for T steps."""
    sizes: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    layer = setting.layer()
    lstm = setting.official(layer)
    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    with fresh_compiler():
        program = torch.compile(layer, fullgraph=True, backend=backend)
        input, hx = setting.input(T, 2), setting.hx(2)
        assert_close(results_and_gradients(program, input, hx), results_and_gradients(lstm, input, hx))
    return sizes


def check_graph_sizes(setting: Setting) -> None:
    """The graphs for 1000 steps are as large as for 10, so they do not take longer to compile."""
    short, long = graph_sizes(setting, 10), graph_sizes(setting, 1000)
    assert len(short) == 2, f"{len(short)} graphs, not a forward and a backward"
    assert short == long, f"graphs of {short} nodes for 10 steps, but of {long} for 1000"


def check_autocast_inside(setting: Setting) -> None:
    """Autocast inside the compiled function, forwards and backwards."""
    setting = setting.with_changes(dtype=torch.float32)
    layer = setting.layer()
    input, hx = setting.input(*EXAMPLE), setting.hx(EXAMPLE[1])

    class UnderAutocast(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, input: Input, hx: State) -> Any:
            with torch.autocast(hx[0].device.type, torch.bfloat16):
                return self.layer(input, hx)

    official = setting.official(layer)
    if setting.device == "cpu":
        official = official_under_autocast(official, torch.bfloat16)
    expected = results_and_gradients(UnderAutocast(official), input, hx)
    with fresh_compiler():
        program = torch.compile(UnderAutocast(layer), fullgraph=True, backend="aot_eager")
        actual = results_and_gradients(program, input, hx)
    for name, tensor in expected.items():
        scale = float(tensor.abs().max())
        assert_close(actual[name] / scale, tensor / scale, 2**-5)


def check_per_sample_gradients(setting: Setting) -> None:
    """Compile a function that uses the transforms of torch.func."""
    layer = setting.layer()
    lstm = setting.official(layer)
    dim = 0 if setting.options.get("batch_first") else 1
    x = setting.dense(*EXAMPLE)

    def loss(layer: nn.Module, weights: Results, x: Tensor) -> Tensor:
        output, (h_n, c_n) = functional_call(layer, weights, (x,))
        return torch.stack([output.square().sum(), h_n.sin().sum(), c_n.cos().sum()]).sum()

    weights = {name: weight.detach() for name, weight in layer.named_parameters()}
    with fresh_compiler():
        gradients_of_samples = vmap(grad(partial(loss, layer)), in_dims=(None, dim))
        program = torch.compile(gradients_of_samples, fullgraph=True, backend="aot_eager")
        actual = program(weights, x)
    for b in range(EXAMPLE[1]):
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        value = loss(lstm, leaves, x.select(dim, b))
        expected = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()))))
        assert_close({name: gradient[b] for name, gradient in actual.items()}, expected)


class FunctionOfTensors(nn.Module):
    """A layer as a function of tensors only: export and tracing take no PackedSequence.

    Packed input is passed as its four tensors: data, batch_sizes and both indices.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Sequence[Tensor], hx: State | None = None) -> tuple[Tensor, ...]:
        x = input[0] if len(input) == 1 else PackedSequence(*input)
        return tuple(call_layer(self.layer, x, hx).values())


def input_tensors(input: Input) -> tuple[Tensor, ...]:
    """Return the tensors that :class:`FunctionOfTensors` takes in place of the input."""
    # No list: a loaded program has another type for it once the package tensordict is imported.
    return (input,) if isinstance(input, Tensor) else tuple(t for t in input if t is not None)


def dynamic_sizes(setting: Setting, hx: bool, named: bool) -> Any:
    """Return the ``dynamic_shapes`` for torch.export: those of the input's tensors, and of hx."""
    T, B, N = (Dim(name) if named else Dim.DYNAMIC for name in ("T", "B", "N"))
    t, b = (1, 0) if setting.options.get("batch_first") else (0, 1)
    x: tuple[Any, ...] = ({0: N}, {0: T}, {0: B}, {0: B}) if setting.packed else ({t: T, b: B},)
    return (x, ({1: B}, {1: B}) if hx else None)


def check_other_shapes(setting: Setting, program: Any, layer: nn.Module, hx: bool) -> None:
    """Compare a program of :class:`FunctionOfTensors` with nn.LSTM on shapes unlike its example."""
    lstm = FunctionOfTensors(setting.official(layer))
    for T, B in OTHER_SHAPES:
        arguments = input_tensors(setting.input(T, B)), setting.hx(B) if hx else None
        assert_close(program(*arguments), lstm(*arguments))


def example_arguments(setting: Setting, hx: bool) -> tuple[tuple[Tensor, ...], State | None]:
    """Return the arguments that a layer is exported or traced with."""
    return input_tensors(setting.input(*EXAMPLE)), setting.hx(EXAMPLE[1]) if hx else None


def export_program(
    setting: Setting, layer: nn.Module, hx: bool, named: bool = True, strict: bool = False
) -> ExportedProgram:
    """Export a layer for any T and B."""
    return torch.export.export(
        FunctionOfTensors(layer),
        example_arguments(setting, hx),
        dynamic_shapes=dynamic_sizes(setting, hx, named),
        strict=strict,
    )


def namespaces(program: ExportedProgram) -> set[str]:
    """Return the namespaces of a program's operators, and the modules of its Python functions."""
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [node.target for m in graphs for node in m.graph.nodes if node.op == "call_function"]
    return {getattr(target, "namespace", target.__module__) for target in targets}


def check_export(setting: Setting) -> None:
    """Export, save and load in each mode, and run on other shapes."""
    for strict in (False, True):
        for named in (False, True):
            hx = strict == named  # so that each mode is tried with hx and without
            layer = setting.layer()
            program = export_program(setting, layer, hx, named, strict)
            others = namespaces(program) - {"aten", "higher_order", "_operator"}
            assert not others, f"operators of {others} in the program"
            file = io.BytesIO()
            torch.export.save(program, file)
            file.seek(0)
            check_other_shapes(setting, torch.export.load(file).module(), layer, hx)


def check_onnx(setting: Setting) -> None:
    """Export to ONNX, check with onnx, and run in onnxruntime."""
    import onnx
    import onnxruntime

    layer = setting.layer().eval()
    for hx in (False, True):
        program = torch.onnx.export(
            FunctionOfTensors(layer),
            example_arguments(setting, hx),
            dynamo=True,
            dynamic_shapes=dynamic_sizes(setting, hx, named=True),
            verbose=False,
        )
        assert program is not None
        model = program.model_proto
        onnx.checker.check_model(model, full_check=True)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        check_other_shapes(setting, partial(call_onnx, session), layer, hx)


def call_onnx(session: Any, input: Sequence[Tensor], hx: State | None) -> tuple[Tensor, ...]:
    """Run a session of onnxruntime with the arguments of :class:`FunctionOfTensors`."""
    names = [argument.name for argument in session.get_inputs()]
    arrays = {name: t.numpy() for name, t in zip(names, [*input, *(hx or ())])}
    return tuple(torch.from_numpy(part) for part in session.run(None, arrays))


def check_ahead_of_time(setting: Setting) -> None:
    """Compile to a library with AOTInductor, and run it on other shapes."""
    require_compiler()
    if torch.__version__ < "2.13":
        raise MissingRequirement("torch 2.13: before it, AOTInductor refuses scan")
    layer = setting.layer()
    program = export_program(setting, layer, hx=True)
    with tempfile.TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "layer.pt2")
        )
        check_other_shapes(setting, torch._inductor.aoti_load_package(package), layer, hx=True)


def check_trace(setting: Setting) -> None:
    """Trace with torch.jit.trace, and run the trace on other shapes."""
    layer = setting.layer()
    for hx in (False, True):
        arguments = [argument for argument in example_arguments(setting, hx) if argument is not None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sizes become constants, and of a deprecation
            program = torch.jit.trace(FunctionOfTensors(layer), arguments)  # type: ignore[no-untyped-call]
        check_other_shapes(setting, without_none(program), layer, hx)


def without_none(program: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that leaves out arguments that are None, because a trace takes only tensors."""
    return lambda *arguments: program(*(argument for argument in arguments if argument is not None))


def check_fx_graph(setting: Setting) -> None:
    """Trace the forward and its gradients with make_fx, in each of its modes."""
    layer = setting.layer()
    lstm = setting.official(layer)

    def gradients(layer: nn.Module, weights: Results, x: Any, hx: State) -> tuple[Tensor, ...]:
        parts = functional_call(
            FunctionOfTensors(layer), {f"layer.{k}": w for k, w in weights.items()}, (x, hx)
        )
        sources = [*weights.values(), x[0], *hx]
        return *parts, *torch.autograd.grad([part.sin().sum() for part in parts], sources)

    def arguments(T: int, B: int) -> Any:
        weights = {name: weight.detach().requires_grad_() for name, weight in layer.named_parameters()}
        x, *rest = input_tensors(setting.input(T, B))
        h_0, c_0 = setting.hx(B)
        return weights, [x.requires_grad_(), *rest], (h_0.requires_grad_(), c_0.requires_grad_())

    for mode in ("real", "fake", "symbolic"):
        program = make_fx(partial(gradients, layer), tracing_mode=mode)(*arguments(*EXAMPLE))
        for T, B in OTHER_SHAPES if mode == "symbolic" else [EXAMPLE]:
            assert_close(program(*arguments(T, B)), gradients(lstm, *arguments(T, B)))


def check_without_data(setting: Setting) -> None:
    """Shapes, dtypes and strides are right in FakeTensorMode and on the meta device."""
    lstm = setting.official(setting.layer())
    input, hx = setting.input(*EXAMPLE), setting.hx(EXAMPLE[1])
    expected = {
        name: (t.shape, t.dtype, t.stride())
        for name, t in results_and_gradients(lstm, input, hx).items()
    }

    def check(to: Callable[[Tensor], Tensor], device: str) -> None:
        layer = setting.layer()
        layer.load_state_dict({k: to(t) for k, t in layer.state_dict().items()}, assign=True)
        moved: Input
        if isinstance(input, PackedSequence):
            assert input.sorted_indices is not None
            assert input.unsorted_indices is not None
            indices = to(input.sorted_indices), to(input.unsorted_indices)
            moved = PackedSequence(to(input.data), input.batch_sizes, *indices)
        else:
            moved = to(input)
        results = results_and_gradients(layer, moved, (to(hx[0]), to(hx[1])))
        for name, result in results.items():
            assert result.device.type == device
            assert (result.shape, result.dtype, result.stride()) == expected[name], name

    check(lambda t: t.to("meta"), "meta")
    mode = FakeTensorMode()
    with mode:
        check(mode.from_tensor, "cpu")


ROWS = [
    ReportRow(
        "torch.compile(fullgraph=True), forward and training", check_compile, packed=True, slow=True
    ),
    ReportRow(
        "torch.compile, 20 shapes without recompilation", check_any_shape, packed=True, slow=True
    ),
    ReportRow("torch.compile, 1000 steps as large a graph as 10", check_graph_sizes, packed=True),
    ReportRow("torch.compile, autocast inside", check_autocast_inside, packed=True),
    ReportRow("torch.compile of per-sample gradients", check_per_sample_gradients, slow=True),
    ReportRow("torch.export with dynamic T and B", check_export, packed=True, slow=True),
    ReportRow(
        "torch.onnx.export with dynamic T and B",
        check_onnx,
        needs=("onnx", "onnxscript", "onnxruntime"),
        slow=True,
    ),
    ReportRow("AOTInductor package with dynamic T and B", check_ahead_of_time, slow=True),
    ReportRow("torch.jit.trace", check_trace, packed=True),
    ReportRow("make_fx", check_fx_graph),
    ReportRow("FakeTensorMode and meta", check_without_data, packed=True),
]
