"""torch.compile, torch.export and what is built on them: the program that comes out, beside eager mode.

What comes out is compared with nn.LSTM in eager mode, with the same weights: so nn.LSTM's row in the
report too compares two computations.
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

from manual_lstm.check.parity import run
from manual_lstm.report.row import Missing, Row, Setting, State

Input = Tensor | PackedSequence
Results = dict[str, Tensor]

EXAMPLE = (6, 3)  # T and B of what is traced, compiled, exported
SHAPES = ((9, 2), (5, 5), (23, 4))  # of what the program then runs on


def eager(setting: Setting, layer: nn.Module) -> nn.LSTM:
    """An nn.LSTM with the layer's weights."""
    lstm = nn.LSTM(setting.I, setting.H, dtype=setting.dtype, **setting.options)
    lstm.load_state_dict(layer.state_dict(), assign=True)
    return lstm.train(layer.training)


def results(layer: Any, input: Input, hx: State | None = None) -> Results:
    """The output (a packed one's data), h_n and c_n."""
    output, (h_n, c_n) = layer(input) if hx is None else layer(input, hx)
    data = output.data if isinstance(output, PackedSequence) else output
    return {"output": data, "h_n": h_n, "c_n": c_n}


def both_ways(layer: Any, input: Input, hx: State | None = None) -> Results:
    """The same and all gradients, with the dropout of one seed."""
    torch.manual_seed(0)
    return {name.replace("_orig_mod.", ""): result for name, result in run(layer, input, hx).items()}


def same(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Compare tensors, or dicts and sequences of them."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def need_compiler() -> None:
    """Raise Missing where Inductor finds no C++ compiler."""
    names = (os.environ.get("CXX"), "g++", "clang++", "cl")
    if not any(name and shutil.which(name) for name in names):
        raise Missing("no C++ compiler")


@contextmanager
def fresh() -> Iterator[None]:
    """Nothing is compiled before, and nothing after."""
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


def compiled(setting: Setting, backend: str = "inductor") -> None:
    """A forward alone, and forward and backward, each without hx and with."""
    if backend == "inductor":
        need_compiler()
    layer = setting.layer()
    lstm = eager(setting, layer)
    with fresh():
        program: Any = torch.compile(layer, fullgraph=True, backend=backend)
        input = setting.input(*EXAMPLE)
        for hx in (None, setting.hx(EXAMPLE[1])):
            with torch.no_grad():
                same(results(program.eval(), input, hx), results(lstm.eval(), input, hx))
            same(both_ways(program.train(), input, hx), both_ways(lstm.train(), input, hx))


def any_shape(setting: Setting) -> None:
    """After the second shape, 20 others do not compile again."""
    layer = setting.layer()
    lstm = eager(setting, layer)
    with fresh():
        program = torch.compile(layer, fullgraph=True, backend="aot_eager")

        def check(T: int, B: int) -> None:
            input, hx = setting.input(T, B), setting.hx(B)
            same(both_ways(program, input, hx), both_ways(lstm, input, hx))

        check(*EXAMPLE)
        check(7, 4)
        with torch.compiler.set_stance("fail_on_recompile"):
            for T in (4, 5, 8, 17, 40):
                for B in (2, 3, 5, 11):
                    check(T, B)
        check(1, 3)  # a size of one is another program
        check(5, 1)


def graph_sizes(setting: Setting, T: int) -> list[int]:
    """How many nodes the compiled forward and backward have, for T steps."""
    sizes: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    layer = setting.layer()
    lstm = eager(setting, layer)
    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    with fresh():
        program = torch.compile(layer, fullgraph=True, backend=backend)
        input, hx = setting.input(T, 2), setting.hx(2)
        same(both_ways(program, input, hx), both_ways(lstm, input, hx))
    return sizes


def long_as_short(setting: Setting) -> None:
    """1000 steps have no larger graphs than 10, so they do not take longer to compile."""
    short, long = graph_sizes(setting, 10), graph_sizes(setting, 1000)
    assert len(short) == 2, f"{len(short)} graphs, not a forward and a backward"
    assert short == long, f"graphs of {short} nodes for 10 steps, but of {long} for 1000"


def autocast_inside(setting: Setting) -> None:
    """Autocast within the compiled function, forwards and backwards."""
    setting = setting.but(dtype=torch.float32)
    layer = setting.layer()
    input, hx = setting.input(*EXAMPLE), setting.hx(EXAMPLE[1])

    class Cast(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, input: Input, hx: State) -> Any:
            with torch.autocast(hx[0].device.type, torch.bfloat16):
                return self.layer(input, hx)

    expected = both_ways(Cast(eager(setting, layer)), input, hx)
    with fresh():
        program = torch.compile(Cast(layer), fullgraph=True, backend="aot_eager")
        actual = both_ways(program, input, hx)
    for name, tensor in expected.items():
        scale = float(tensor.abs().max())
        same(actual[name] / scale, tensor / scale, 2**-5)


def per_sample_gradients(setting: Setting) -> None:
    """torch.func's transforms inside what is compiled."""
    layer = setting.layer()
    lstm = eager(setting, layer)
    dim = 0 if setting.options.get("batch_first") else 1
    x = setting.dense(*EXAMPLE)

    def loss(layer: nn.Module, weights: Results, x: Tensor) -> Tensor:
        output, (h_n, c_n) = functional_call(layer, weights, (x,))
        return torch.stack([output.square().sum(), h_n.sin().sum(), c_n.cos().sum()]).sum()

    weights = {name: weight.detach() for name, weight in layer.named_parameters()}
    with fresh():
        each = vmap(grad(partial(loss, layer)), in_dims=(None, dim))
        actual = torch.compile(each, fullgraph=True, backend="aot_eager")(weights, x)
    for b in range(EXAMPLE[1]):
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        value = loss(lstm, leaves, x.select(dim, b))
        expected = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()))))
        same({name: gradient[b] for name, gradient in actual.items()}, expected)


class OfTensors(nn.Module):
    """A layer as a function of tensors alone, as what is exported or traced has to be.

    A packed input's tensors are its data, batch_sizes and both indices.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Sequence[Tensor], hx: State | None = None) -> tuple[Tensor, ...]:
        x = input[0] if len(input) == 1 else PackedSequence(*input)
        return tuple(results(self.layer, x, hx).values())


def tensors(input: Input) -> list[Tensor]:
    """What :class:`OfTensors` takes."""
    return [input] if isinstance(input, Tensor) else [t for t in input if t is not None]


def dims(setting: Setting, hx: bool, named: bool) -> Any:
    """The dynamic sizes of these, for torch.export."""
    T, B, N = (Dim(name) if named else Dim.DYNAMIC for name in ("T", "B", "N"))
    t, b = (1, 0) if setting.options.get("batch_first") else (0, 1)
    x: list[Any] = [{0: N}, {0: T}, {0: B}, {0: B}] if setting.packed else [{t: T, b: B}]
    return (x, ({1: B}, {1: B}) if hx else None)


def runs_on(setting: Setting, program: Any, layer: nn.Module, hx: bool) -> None:
    """Check a program of :class:`OfTensors` on other shapes than its example's."""
    lstm = OfTensors(eager(setting, layer))
    for T, B in SHAPES:
        arguments = tensors(setting.input(T, B)), setting.hx(B) if hx else None
        same(program(*arguments), lstm(*arguments))


def example(setting: Setting, hx: bool) -> tuple[list[Tensor], State | None]:
    """What is exported or traced with."""
    return tensors(setting.input(*EXAMPLE)), setting.hx(EXAMPLE[1]) if hx else None


def exported(
    setting: Setting, layer: nn.Module, hx: bool, named: bool = True, strict: bool = False
) -> ExportedProgram:
    """The program of a layer, for any T and B."""
    return torch.export.export(
        OfTensors(layer),
        example(setting, hx),
        dynamic_shapes=dims(setting, hx, named),
        strict=strict,
    )


def namespaces(program: ExportedProgram) -> set[str]:
    """Whose operators a program is made of; Python's own work on sizes alone."""
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [node.target for m in graphs for node in m.graph.nodes if node.op == "call_function"]
    return {getattr(target, "namespace", target.__module__) for target in targets}


def export(setting: Setting) -> None:
    """Exported in every way, saved, loaded, and run on other shapes."""
    for strict in (False, True):
        for named in (False, True):
            hx = strict == named
            layer = setting.layer()
            program = exported(setting, layer, hx, named, strict)
            others = namespaces(program) - {"aten", "higher_order", "_operator"}
            assert not others, f"operators of {others} in the program"
            file = io.BytesIO()
            torch.export.save(program, file)
            file.seek(0)
            runs_on(setting, torch.export.load(file).module(), layer, hx)


def onnx(setting: Setting) -> None:
    """As ONNX, checked by onnx and run by onnxruntime."""
    import onnx
    import onnxruntime

    layer = setting.layer().eval()
    for hx in (False, True):
        program = torch.onnx.export(
            OfTensors(layer),
            example(setting, hx),
            dynamo=True,
            dynamic_shapes=dims(setting, hx, named=True),
            verbose=False,
        )
        assert program is not None
        model = program.model_proto
        onnx.checker.check_model(model, full_check=True)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        runs_on(setting, partial(call_onnx, session), layer, hx)


def call_onnx(session: Any, input: Sequence[Tensor], hx: State | None) -> tuple[Tensor, ...]:
    """Run an onnxruntime session as one runs :class:`OfTensors`."""
    names = [each.name for each in session.get_inputs()]
    given = {name: t.numpy() for name, t in zip(names, [*input, *(hx or ())])}
    return tuple(torch.from_numpy(part) for part in session.run(None, given))


def ahead_of_time(setting: Setting) -> None:
    """Compiled to a library of its own, which runs on other shapes."""
    need_compiler()
    layer = setting.layer()
    program = exported(setting, layer, hx=True)
    with tempfile.TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "layer.pt2")
        )
        runs_on(setting, torch._inductor.aoti_load_package(package), layer, hx=True)


def traced(setting: Setting) -> None:
    """torch.jit.trace: the trace serves other shapes."""
    layer = setting.layer()
    for hx in (False, True):
        arguments = [each for each in example(setting, hx) if each is not None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes are looked at; jit.trace is deprecated
            program = torch.jit.trace(OfTensors(layer), arguments)  # type: ignore[no-untyped-call]
        runs_on(setting, lambda *given: program(*(g for g in given if g is not None)), layer, hx)  # noqa: B023


def fx_graph(setting: Setting) -> None:
    """make_fx in all its modes, of the forward and of its gradients."""
    layer = setting.layer()
    lstm = eager(setting, layer)

    def gradients(layer: nn.Module, weights: Results, x: Any, hx: State) -> tuple[Tensor, ...]:
        parts = functional_call(
            OfTensors(layer), {f"layer.{k}": w for k, w in weights.items()}, (x, hx)
        )
        wanted = [*weights.values(), x[0], *hx]
        return *parts, *torch.autograd.grad([part.sin().sum() for part in parts], wanted)

    def arguments(T: int, B: int) -> Any:
        weights = {name: weight.detach().requires_grad_() for name, weight in layer.named_parameters()}
        x, *rest = tensors(setting.input(T, B))
        h_0, c_0 = setting.hx(B)
        return weights, [x.requires_grad_(), *rest], (h_0.requires_grad_(), c_0.requires_grad_())

    for mode in ("real", "fake", "symbolic"):
        program = make_fx(partial(gradients, layer), tracing_mode=mode)(*arguments(*EXAMPLE))
        for T, B in SHAPES if mode == "symbolic" else [EXAMPLE]:
            same(program(*arguments(T, B)), gradients(lstm, *arguments(T, B)))


def without_data(setting: Setting) -> None:
    """Shapes, dtypes and strides without numbers: FakeTensorMode, and the meta device."""
    lstm = eager(setting, setting.layer())
    input, hx = setting.input(*EXAMPLE), setting.hx(EXAMPLE[1])
    expected = {name: (t.shape, t.dtype, t.stride()) for name, t in both_ways(lstm, input, hx).items()}

    def check(to: Callable[[Tensor], Tensor], device: str) -> None:
        layer = setting.layer()
        layer.load_state_dict({k: to(t) for k, t in layer.state_dict().items()}, assign=True)
        if isinstance(input, PackedSequence):
            assert input.sorted_indices is not None
            assert input.unsorted_indices is not None
            indices = to(input.sorted_indices), to(input.unsorted_indices)
            given: Input = PackedSequence(to(input.data), input.batch_sizes, *indices)
        else:
            given = to(input)
        found = both_ways(layer, given, (to(hx[0]), to(hx[1])))
        for name, result in found.items():
            assert result.device.type == device
            assert (result.shape, result.dtype, result.stride()) == expected[name], name

    check(lambda t: t.to("meta"), "meta")
    mode = FakeTensorMode()
    with mode:
        check(mode.from_tensor, "cpu")


ROWS = [
    Row("torch.compile(fullgraph=True), forward and training", compiled, packed=True, slow=True),
    Row("torch.compile, 20 shapes without recompilation", any_shape, packed=True, slow=True),
    Row("torch.compile, 1000 steps as large a graph as 10", long_as_short, packed=True),
    Row("torch.compile, autocast inside", autocast_inside, packed=True),
    Row("torch.compile of per-sample gradients", per_sample_gradients),
    Row("torch.export with dynamic T and B", export, packed=True, slow=True),
    Row(
        "torch.onnx.export with dynamic T and B",
        onnx,
        needs=("onnx", "onnxscript", "onnxruntime"),
        slow=True,
    ),
    Row("AOTInductor package with dynamic T and B", ahead_of_time, slow=True),
    Row("torch.jit.trace", traced, packed=True),
    Row("make_fx", fx_graph),
    Row("FakeTensorMode and meta", without_data, packed=True),
]
