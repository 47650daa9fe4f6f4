"""Which loop runs where: the operator never where it would be wrong, and always where it is right.

Under torch.func's vmap and grad, see test_vmap.py too.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, functional
from torch.func import grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from manual_lstm import ManualLSTM
from manual_lstm.engine.dispatch import Loop, choose
from manual_lstm.report.function import LayerFunction, Point, loss, results_by_name
from manual_lstm.report.row import Setting
from tests.helpers.changed import every_recipe
from tests.helpers.loops import always_plainly, counted, loops_chosen, runs_fused
from tests.helpers.recipes import RECIPES
from tests.helpers.versions import compiles_packing

OPTIONS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers": {"num_layers": 2, "bidirectional": True, "proj_size": 2},
}


FUSED, SAMPLES, PLAIN, SCAN, TRACED = "FUSED", "VMAP", "PLAIN", "SCAN", "TRACED"


class CalledLayer:
    """A layer, its point, and the ways in which contexts call it."""

    def __init__(self, options: dict[str, Any], packed: bool, eager: bool = False) -> None:
        self.eager = eager  # leave out compilers and tracers
        self.function = LayerFunction(Setting(ManualLSTM, options, packed=packed), T=3)
        self.layer = self.function.layer
        self.point = self.function.point
        self.x = self.point["input"]
        torch.manual_seed(3)
        self.xs = torch.randn(3, *self.x.shape, dtype=self.x.dtype)
        self.weights = self.function.weights

    def output(self, x: Tensor) -> Tensor:
        return results_by_name(*_flat(self.layer(self.function.like(x))))["output"]

    def value(self, x: Tensor) -> Tensor:
        return loss(results_by_name(*_flat(self.layer(self.function.like(x)))))

    def of_weights(self, weights: Point, x: Tensor) -> Tensor:
        return loss(self.function({"input": x} | weights))

    def gradients(self, value: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, list(self.layer.parameters()), **options)

    def compiled(self, function: Any, *arguments: Any) -> Any:
        if self.eager:
            return function(*arguments)
        torch.compiler.reset()
        compiled: Any = torch.compile(function, backend="eager", fullgraph=True)
        return compiled(*arguments)

    def traced(self, function: Any, *arguments: Any, **options: Any) -> Any:
        if self.eager:
            return function(*arguments)
        trace: Any = make_fx(function, **options)
        return trace(*arguments)(*arguments)

    def asking(self) -> Tensor:
        return self.x.clone().requires_grad_()


def _flat(results: Any) -> tuple[Any, Tensor, Tensor]:
    output, (h_n, c_n) = results
    return output, h_n, c_n


def _dual(m: CalledLayer) -> Any:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(m.x, m.x.cos())  # type: ignore[no-untyped-call]
        return tuple(forward_ad.unpack_dual(m.output(dual)))  # type: ignore[no-untyped-call]


def _dual_of_vmap(m: CalledLayer) -> Any:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(m.xs, m.xs.cos())  # type: ignore[no-untyped-call]
        return tuple(forward_ad.unpack_dual(vmap(m.output)(dual)))  # type: ignore[no-untyped-call]


def _after_a_failure(m: CalledLayer) -> Any:
    with pytest.raises(ZeroDivisionError):
        vmap(lambda x: m.output(x[:0]) if False else 1 // 0)(m.xs)
    with pytest.raises(ZeroDivisionError), forward_ad.dual_level():
        _ = 1 // 0
    return m.gradients(m.value(m.x))


def _under_autocast(call: Callable[[], Any]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        return call()


def _normed(m: CalledLayer) -> Any:
    parametrizations.weight_norm(m.layer, "weight_hh_l0")
    return m.gradients(m.value(m.x))


class _Subclass(Tensor):
    pass


def _subclassed_input(m: CalledLayer) -> Any:
    return m.output(m.x.as_subclass(_Subclass)).as_subclass(Tensor)


def _subclassed_weight(m: CalledLayer) -> Any:
    name = "weight_hh_l0"
    weight = m.weights[name].as_subclass(_Subclass)
    return m.of_weights(m.weights | {name: weight}, m.x).as_subclass(Tensor)


def _saved_elsewhere(m: CalledLayer) -> Any:
    with torch.autograd.graph.save_on_cpu():
        value = m.value(m.x)
    return m.gradients(value)


class _Output(torch.nn.Module):
    def __init__(self, model: CalledLayer) -> None:
        super().__init__()
        self.layer = model.layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0]
        return output


def _exported(m: CalledLayer) -> Any:
    module = _Output(m)
    if m.eager:
        return module(m.x)
    program = torch.export.export(module, (m.x,))
    assert "manual_lstm" not in program.graph_module.code
    return program.module()(m.x)


def _jit_traced(m: CalledLayer) -> Any:
    module: Any = _Output(m)
    if not m.eager:
        module = torch.jit.trace(module, m.x, check_trace=False)  # type: ignore[no-untyped-call]
    return module(m.x)


def _nested(m: CalledLayer) -> Any:
    sequences = [m.x[:3, 0], m.x[:1, 1]]
    output, states = m.layer(torch.nested.nested_tensor(sequences, layout=torch.jagged))
    return output.values(), states


def _fake(m: CalledLayer) -> Any:
    with FakeTensorMode() as mode:
        results = m.function({name: mode.from_tensor(t) for name, t in m.point.items()})
    return [torch.zeros(part.shape) for part in results.values()]


# The loops that run, and what is computed.
CONTEXTS: dict[str, tuple[set[str], Callable[[CalledLayer], Any]]] = {
    "forward and backward": ({FUSED}, lambda m: m.gradients(m.value(m.x))),
    "no_grad": ({FUSED}, lambda m: torch.no_grad()(m.output)(m.x)),
    "inference_mode": ({FUSED}, lambda m: torch.inference_mode()(m.output)(m.x)),
    "eval": ({FUSED}, lambda m: (m.layer.eval(), m.gradients(m.value(m.x)))[1]),
    "functional_call": ({FUSED}, lambda m: m.of_weights(m.weights, m.x)),
    "create_graph": ({FUSED}, lambda m: m.gradients(m.value(m.x), create_graph=True)),
    "double backward": (
        {FUSED},
        lambda m: m.gradients(loss(dict(enumerate(m.gradients(m.value(m.x), create_graph=True))))),  # type: ignore[arg-type]
    ),
    "functional.vhp": ({FUSED}, lambda m: functional.vhp(m.value, m.x, m.x.cos())),  # type: ignore[no-untyped-call]
    "weight_norm": ({FUSED}, _normed),
    "save_on_cpu": ({FUSED}, _saved_elsewhere),
    "checkpoint": (
        {FUSED},
        lambda m: m.gradients(checkpoint(m.value, m.asking(), use_reentrant=False)),
    ),
    "checkpoint within checkpoint": (
        {FUSED},
        lambda m: m.gradients(
            checkpoint(
                lambda x: checkpoint(m.value, x, use_reentrant=False), m.asking(), use_reentrant=False
            )
        ),
    ),
    "autocast": ({FUSED}, lambda m: _under_autocast(lambda: m.gradients(m.value(m.x)))),
    "make_fx": ({FUSED}, lambda m: m.traced(lambda x: m.output(x), m.x)),
    "after a transform that failed": ({FUSED}, _after_a_failure),
    # A transform has the samples as rows, or the plain loop.
    "vmap": ({SAMPLES}, lambda m: vmap(m.output)(m.xs)),
    "per-sample gradients": (
        {SAMPLES},
        lambda m: vmap(grad(m.of_weights), (None, 0))(m.weights, m.xs),
    ),
    "per-sample gradients under autocast": (
        {SAMPLES},
        lambda m: _under_autocast(lambda: vmap(grad(m.of_weights), (None, 0))(m.weights, m.xs)),
    ),
    "make_fx of grad": ({SAMPLES}, lambda m: m.traced(lambda x: grad(m.value)(x), m.x)),
    "jvp": ({PLAIN}, lambda m: jvp(m.output, (m.x,), (m.x.cos(),))),
    "vmap of jvp": ({PLAIN}, lambda m: vmap(lambda x: jvp(m.output, (x,), (x.cos(),)))(m.xs)),
    "jvp of vmap": ({PLAIN}, lambda m: jvp(vmap(m.output), (m.xs,), (m.xs.cos(),))),
    "grad of jvp": ({PLAIN}, lambda m: grad(lambda x: jvp(m.value, (x,), (x.cos(),))[1])(m.x)),
    "jvp of per-sample gradients": (
        {PLAIN},
        lambda m: jvp(vmap(grad(m.value)), (m.xs,), (m.xs.cos(),)),
    ),
    "dual numbers": ({PLAIN}, _dual),
    "dual numbers through vmap": ({PLAIN}, _dual_of_vmap),
    "weights of a subclass": ({PLAIN}, _subclassed_weight),
    "input of a subclass": ({PLAIN}, _subclassed_input),
    "hessian": ({PLAIN}, lambda m: hessian(m.value)(m.x)),
    # The operator takes fake tensors only together, and the weights here are real.
    "make_fx, symbolic, of the input": (
        {PLAIN},
        lambda m: m.traced(
            lambda x: m.output(x), m.x, tracing_mode="symbolic", _allow_non_fake_inputs=True
        ),
    ),
    # Compiled, what is not transformed is still one operator for a direction.
    "compile": ({FUSED}, lambda m: m.gradients(m.compiled(m.value, m.x))),
    "compile of checkpoint": (
        {FUSED},
        lambda m: m.gradients(
            m.compiled(lambda x: checkpoint(m.value, x, use_reentrant=False), m.asking())
        ),
    ),
    "compile under autocast": (
        {FUSED},
        lambda m: _under_autocast(lambda: m.compiled(m.output, m.x)),
    ),
}


# Where the sizes of packed data are not known, or are no tensors of the same kind.
DENSE_ONLY: dict[str, tuple[set[str], Callable[[CalledLayer], Any]]] = {
    "compile of grad": ({PLAIN}, lambda m: m.compiled(lambda x: grad(m.value)(x), m.x)),
    "compile of vmap": ({PLAIN}, lambda m: m.compiled(lambda xs: vmap(m.output)(xs), m.xs)),
    "compile of jvp": ({PLAIN}, lambda m: m.compiled(lambda x: jvp(m.output, (x,), (x,)), m.x)),
    "compile of per-sample gradients": (
        {PLAIN},
        lambda m: m.compiled(lambda xs: vmap(grad(m.of_weights), (None, 0))(m.weights, xs), m.xs),
    ),
    "fake tensors": ({FUSED}, _fake),
    "make_fx, symbolic": (
        {FUSED},
        lambda m: m.traced(lambda p: m.function(p), m.point, tracing_mode="symbolic"),
    ),
    "export": ({SCAN}, _exported),
    "jit.trace": ({TRACED}, _jit_traced),
    "nested tensor": ({FUSED}, _nested),
}


def _choices() -> Iterator[Any]:
    """Contexts with each form of input and options.

    Compilers see one layer in the slow run alone, and export both: its own tests are in the quick one.
    """
    trials = [(name, CONTEXTS[name], packed) for packed in (False, True) for name in CONTEXTS]
    trials += [(name, DENSE_ONLY[name], False) for name in DENSE_ONLY]
    for name, context, packed in trials:
        for label, options in OPTIONS.items():
            late = name == "export" or (label == "one layer" and name.startswith("compile"))
            marks = [pytest.mark.slow] if late else []
            marks += [compiles_packing] if packed and name.startswith("compile") else []
            test_id = f"{name}{', packed' * packed}-{label}"
            yield pytest.param(context, packed, options, id=test_id, marks=marks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("context", "packed", "options"), list(_choices()))
def test_the_choice(
    context: tuple[set[str], Callable[[CalledLayer], Any]], packed: bool, options: dict[str, Any]
) -> None:
    loops, compute = context
    with loops_chosen() as chosen:
        actual = compute(CalledLayer(options, packed))
    assert chosen == loops
    with always_plainly():
        expected = compute(CalledLayer(options, packed, eager=True))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_one_step_has_nothing_to_fuse() -> None:
    model = CalledLayer({}, packed=False)
    with counted() as calls:
        model.output(model.x[:1])
    assert not calls


def test_ordinary_calls_take_the_operator() -> None:
    layer = ManualLSTM(3, 4, 2, bidirectional=True)
    x = torch.randn(5, 2, 3)
    packed = pack_padded_sequence(x, [3, 5], enforce_sorted=False)
    for input in (x, x[:, 0], packed, x.transpose(0, 1).contiguous().transpose(0, 1)):
        for context in (nullcontext(), torch.no_grad(), torch.inference_mode()):
            with context, counted() as calls:
                layer(input)
            assert len(calls) == 4
    with counted() as calls:
        layer(x[:1])
    assert not calls  # one step has nothing to fuse


def test_a_missing_private_name_means_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    x, state = torch.zeros(5, 2, 3), torch.zeros(1, 2, 4)
    arguments = x, None, state, state, [{"weight_ih": torch.zeros(16, 3)}]
    assert choose(*arguments) is Loop.FUSED
    monkeypatch.setattr("manual_lstm.engine.context._functorch_active", None)
    assert choose(*arguments) is Loop.PLAIN


def test_an_unchanged_cell_keeps_the_operator() -> None:
    class Named(ManualLSTM):
        def cell_parameters(self) -> dict[str, Tensor]:
            return {"scale": torch.ones(1)}

        def forward(self, *args: Any, **options: Any) -> Any:
            return super().forward(*args)

    wrapped = Named(3, 4)
    wrapped.__class__ = type(
        "FSDPNamed", (type("FSDPModule", (), {}), Named), {}
    )  # as fully_shard does
    parametrized = ManualLSTM(3, 4)
    parametrize.register_parametrization(parametrized, "weight_hh_l0", nn.Tanh())
    for layer in (ManualLSTM(3, 4), Named(3, 4), wrapped, parametrized):
        assert runs_fused(layer), type(layer)


@every_recipe
def test_a_changed_cell_never_gets_it(name: str) -> None:
    assert not runs_fused(RECIPES[name](3, 4))
    layer = RECIPES[name](3, 4).eval()
    x = torch.randn(5, 2, 3)
    expected = layer(x)
    parametrize.register_parametrization(layer, "weight_hh_l0", nn.Identity())
    assert not runs_fused(layer)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
