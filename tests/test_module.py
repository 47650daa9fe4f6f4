"""The manners of a Module: construction, parameters, checkpoints, copies, hooks, tracing, threads."""

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from manual_lstm import ManualLSTM
from manual_lstm.testing import Case, cases, mistakes
from tests.helpers.models import old_weight_norm

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@given(case=cases(dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.complex64)))
def test_same_parameters_from_the_same_seed(case: Case) -> None:
    options = {**case.options, "dtype": case.dtype, "device": case.device}
    torch.manual_seed(case.seed)
    reference = nn.LSTM(**options)
    torch.manual_seed(case.seed)
    layer = ManualLSTM(**options)
    for _ in range(2):
        pairs = zip(reference.named_parameters(), layer.named_parameters(), strict=True)
        for (name, theirs), (our_name, ours) in pairs:
            assert our_name == name
            assert torch.equal(ours, theirs)
            assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        for lstm in (reference, layer):
            torch.manual_seed(case.seed + 1)
            lstm.reset_parameters()
    assert list(layer.state_dict()) == list(reference.state_dict())
    assert repr(layer) == repr(reference).replace("LSTM(", "ManualLSTM(")
    for name in ManualLSTM.__annotations__:
        if not name.startswith("_"):
            assert getattr(layer, name) == getattr(reference, name)
    for our_list, their_list in zip(layer.all_weights, reference.all_weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(our_list, their_list, strict=True))
    assert layer.flatten_parameters() is None  # type: ignore[func-returns-value]


@given(case=cases(large=False, without={"dropout"}))
def test_checkpoints_load_both_ways(case: Case) -> None:
    reference, layer = case.pair(ManualLSTM)
    checkpoint = reference.state_dict()
    from_meta = ManualLSTM(**case.options, dtype=case.dtype, device="meta")
    from_meta.load_state_dict(checkpoint, assign=True)
    emptied = ManualLSTM(**case.options, dtype=case.dtype, device="meta").to_empty(device=case.device)
    emptied.load_state_dict(checkpoint)
    for lstm in (layer, from_meta, emptied):
        back = nn.LSTM(**case.options, dtype=case.dtype, device=case.device)
        assert not any(back.load_state_dict(lstm.state_dict()))
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), reference.parameters()))
        output = lstm(case.input(), case.hx())[0]
        expected = layer(case.input(), case.hx())[0]
        assert torch.equal(output.data, expected.data)


def test_a_load_that_fails_changes_nothing() -> None:
    layer = ManualLSTM(3, 4)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(nn.LSTM(3, 5).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values()))


def test_signature_is_that_of_nn_lstm() -> None:
    parameters = inspect.signature(nn.RNNBase.__init__).parameters
    names = [name for name in parameters if name not in ("self", "mode")]
    ours = inspect.signature(ManualLSTM).parameters
    assert list(ours) == names
    assert all(ours[name].default == parameters[name].default for name in names)
    positional = ("self", "input", "hx", "nothing")
    forward = inspect.signature(ManualLSTM.forward).parameters
    assert tuple(forward) == (*positional, "lengths", "resets")
    assert forward["nothing"].kind is inspect.Parameter.VAR_POSITIONAL
    with pytest.raises(TypeError, match="by name"):
        ManualLSTM(3, 4)(torch.randn(5, 2, 3), None, [5, 5])
    assert not issubclass(ManualLSTM, nn.LSTM)
    public = {name for name in dir(nn.LSTM) if not name.startswith("_")}
    assert public <= set(dir(ManualLSTM))


# What the message shows for each of mistakes.ARGUMENTS, in their order.
ARGUMENTS_SHOWN = [
    "'yes'",
    "bias .* 1",
    "batch_first .* None",
    "input_size .* 3.0",
    "hidden_size .* 4.5",
    "input_size .* None",
    "input_size .* 0",
    "input_size .* -1",
    "hidden_size .* 0",
    "hidden_size .* -4",
    "num_layers .* 0",
    "num_layers .* -1",
    "num_layers .* 1.5",
    "num_layers .* '2'",
    "num_layers .* None",
    "proj_size .* -1",
    "proj_size .* smaller than hidden_size, 4, but got 4",
    "proj_size .* 9",
    "proj_size .* 1.5",
    "proj_size .* '1'",
    "proj_size .* None",
    "dropout .* '0.5'",
    "dropout .* 'much'",
    "dropout .* None",
    "dropout .* True",
    "dropout .* -0.1",
    "dropout .* 1.1",
    "dropout .* nan",
    "dropout .* 1j",
    "dropout .* tensor",
    r"dropout .* \[0.5\]",
    "dropout .* 1000",
    "dropout .* 2",
    "nowhere",
    "float",
    "floating point",
    "str",
    "hidden_size",
    "width",
]


@pytest.mark.parametrize(
    ("mistake", "shown"), list(zip(mistakes.ARGUMENTS, ARGUMENTS_SHOWN, strict=True)), ids=str
)
def test_constructor(mistake: tuple[tuple[Any, ...], dict[str, Any]], shown: str) -> None:
    args, kwargs = mistake
    with pytest.raises(Exception, match=f"(?s){shown}") as actual:
        ManualLSTM(*args, **kwargs)
    if mistakes.unchecked_by_older_torch(args, kwargs):
        assert actual.type in (TypeError, ValueError)  # nn.LSTM did not look yet
        return
    with pytest.raises(Exception) as expected:  # noqa: PT011
        nn.LSTM(*args, **kwargs)
    assert actual.type is expected.type


@pytest.mark.parametrize("bidirectional", ["no", 1, None])
def test_bidirectional_that_is_no_bool_is_refused_at_once(bidirectional: Any) -> None:
    with pytest.raises(TypeError):  # nn.LSTM builds it, and fails when called
        nn.LSTM(3, 4, bidirectional=bidirectional)(torch.zeros(1, 1, 3))
    with pytest.raises(TypeError, match="bidirectional should be a bool"):
        ManualLSTM(3, 4, bidirectional=bidirectional)


def test_dropout_with_one_layer_warns_at_the_callers_line() -> None:
    with pytest.warns(UserWarning, match="dropout=0.5 and num_layers=1") as caught:
        ManualLSTM(3, 4, dropout=0.5)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ManualLSTM(3, 4, 2, dropout=0.5)
        ManualLSTM(3, 4)


def _deepcopied(layer: ManualLSTM) -> ManualLSTM:
    return copy.deepcopy(layer)


def _pickled(layer: ManualLSTM) -> ManualLSTM:
    copied: ManualLSTM = pickle.loads(pickle.dumps(layer))
    return copied


def _saved(layer: ManualLSTM) -> ManualLSTM:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copied: ManualLSTM = torch.load(file, weights_only=False)
    return copied


def _shared(layer: ManualLSTM) -> ManualLSTM:
    assert all(p.is_shared() for p in layer.share_memory().parameters())  # type: ignore[no-untyped-call]
    return layer


def _replica(layer: ManualLSTM) -> ManualLSTM:
    """As DataParallel makes it: weights are plain tensors there, not parameters."""
    replica: ManualLSTM = layer._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter * 1.0)
    assert not list(replica.parameters())
    return replica


def _averaged(layer: ManualLSTM) -> nn.Module:
    model = torch.optim.swa_utils.AveragedModel(layer)
    model.update_parameters(layer)
    return model


COPIES = [_deepcopied, _pickled, _saved, _shared, _replica, _averaged]


@pytest.mark.parametrize("make", COPIES, ids=lambda make: make.__name__)
def test_a_copy_gives_the_same_numbers(make: Any) -> None:
    layer = ManualLSTM(3, 4, 2, bidirectional=True, proj_size=2)
    x = torch.randn(5, 2, 3)
    expected = layer(x)
    torch.testing.assert_close(make(layer)(x), expected, rtol=0, atol=0)


def test_to_another_dtype() -> None:
    reference, layer = nn.LSTM(3, 4), ManualLSTM(3, 4)
    layer.load_state_dict(reference.state_dict())
    for cast in ("half", "double", "bfloat16", "float"):
        x = torch.randn(5, 2, 3, dtype=next(getattr(reference, cast)().parameters()).dtype)
        output = getattr(layer, cast)()(x)[0]
        torch.testing.assert_close(output, reference(x)[0], rtol=0, atol=8 * torch.finfo(x.dtype).eps)


@pytest.mark.parametrize("swap", [False, True])
def test_swap_module_params_on_conversion(swap: bool) -> None:
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        layer = ManualLSTM(3, 4).double()
        layer.load_state_dict(nn.LSTM(3, 4).state_dict())
        assert layer(torch.randn(5, 2, 3, dtype=torch.float64))[0].dtype == torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_functional_call_uses_the_weights_it_is_given() -> None:
    reference, layer = nn.LSTM(3, 4), ManualLSTM(3, 4)
    x = torch.randn(5, 2, 3)
    output = torch.func.functional_call(layer, dict(reference.named_parameters()), (x,))[0]
    torch.testing.assert_close(output, reference(x)[0], rtol=0, atol=1e-6)


def test_hooks_run() -> None:
    layer, seen = ManualLSTM(3, 4), list[str]()
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer(torch.randn(5, 2, 3, requires_grad=True), hx=None)[0].sum().backward()
    assert seen == ["before", "after", "backward"]


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


OPTIONS = {"input_size": 3, "hidden_size": 4, "num_layers": 2, "bidirectional": True, "proj_size": 2}


WEIGHTS = [name for name in ManualLSTM(**OPTIONS).state_dict() if name.startswith("weight")]  # type: ignore[arg-type]


CHANGES: dict[str, Callable[..., Any]] = {
    "parametrize": lambda layer, name: parametrize.register_parametrization(layer, name, _Halved()),
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": old_weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruning": lambda layer, name: prune.RandomUnstructured.apply(layer, name, amount=0.5),  # type: ignore[no-untyped-call]
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_takes_effect_and_gets_gradients(change: str, name: str) -> None:
    torch.manual_seed(0)
    layer = ManualLSTM(**OPTIONS)  # type: ignore[arg-type]
    CHANGES[change](layer, name)
    layer.eval()  # so that spectral_norm stands still
    x = torch.randn(5, 2, 3)
    output = layer(x)[0]  # old weight_norm computes its weight in a hook of the call
    reference = nn.LSTM(**OPTIONS)
    effective = {n: getattr(layer, n).detach() for n in reference.state_dict()}
    reference.load_state_dict(effective)
    torch.testing.assert_close(output, reference(x)[0], rtol=0, atol=1e-6)
    output.sum().backward()
    assert all(p.grad is not None for n, p in layer.named_parameters() if name in n and "weight" in n)
    assert any(p.grad.any() for n, p in layer.named_parameters() if name in n and p.grad is not None)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_parametrized_weight_is_computed_once_a_call(name: str) -> None:
    calls = list[str]()

    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append(name)
            return weight

    layer = ManualLSTM(**OPTIONS)  # type: ignore[arg-type]
    parametrize.register_parametrization(layer, name, Counted())
    calls.clear()
    layer(torch.randn(5, 2, 3))
    assert calls == [name]


def test_eight_threads_call_one_layer() -> None:
    layer = ManualLSTM(8, 16, 2, bidirectional=True)
    inputs = [torch.randn(T, 4, 8) for T in range(1, 33)]
    expected = [layer(x)[0] for x in inputs]

    def call(x: Tensor) -> Tensor:
        with torch.set_grad_enabled(len(x) % 2 == 0):
            output: Tensor = layer(x)[0]
        return output

    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            for ours, theirs in zip(pool.map(call, inputs), expected):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
