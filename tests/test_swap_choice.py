"""replace_lstm and restore_lstm: which layers they take, which they leave alone, and all or nothing."""

import io
import re
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from manual_lstm import ManualLSTM, SwapCandidate, find_lstm, replace_lstm, restore_lstm
from manual_lstm import module as module_module
from manual_lstm.swap import replace as swap_module
from tests.helpers.models import Halving, Net

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.ao:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


# What is left alone.


class _Doubling(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        output, states = super().forward(input, hx)
        return output * 2, states


def _dynamic() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torch.ao.quantization")
        if not {"fbgemm", "x86"} & set(torch.backends.quantized.supported_engines):
            pytest.skip("no engine for quantized layers here")
        model = quantization.quantize_dynamic(nn.Sequential(nn.LSTM(3, 4)), {nn.LSTM})
        layer: nn.Module = model[0]
    return layer


def _quantizable() -> nn.Module:
    layer: nn.Module = pytest.importorskip("torch.ao.nn.quantizable").LSTM(3, 4)
    return layer


def _parametrized() -> nn.Module:
    lstm = nn.LSTM(3, 4)
    parametrizations.weight_norm(lstm, "weight_hh_l0")
    return lstm


def _patched() -> nn.Module:
    """As libraries do that move weights before a call."""
    lstm: Any = nn.LSTM(3, 4)
    lstm.old_forward = lstm.forward
    lstm.forward = lambda *inputs: lstm.old_forward(*inputs)
    return lstm  # type: ignore[no-any-return]


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: _Doubling(3, 4), r"_Doubling, a subclass of nn\.LSTM whose own methods"),
    "traced": (
        lambda: torch.jit.trace(nn.LSTM(3, 4), torch.zeros(5, 2, 3)),  # type: ignore[no-untyped-call]
        "TorchScript",
    ),
    "quantized": (_dynamic, r"quantized layer, torch\.ao\.nn\.quantized\.dynamic.*LSTM"),
    "quantizable": (_quantizable, "quantized"),
    "parametrized": (_parametrized, "parametrizations, of weight_hh_l0"),
    "patched forward": (_patched, "forward was replaced on the object"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_left_alone_with_a_warning(kind: str) -> None:
    make, reason = LEFT[kind]
    layer = make()
    model = nn.ModuleDict({"plain": nn.LSTM(3, 4), "deep": nn.Sequential(layer)})
    x = torch.randn(5, 2, 3)
    expected, cls, state = layer(x)[0], type(layer), dict(vars(layer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (plain, left) = find_lstm(model)
        assert plain.reason is None
        assert left.reason
        assert re.search(reason, left.reason)
        assert left.module is layer
        replace_lstm(model, target_modules=["plain"])  # one that was not chosen is no matter
        restore_lstm(model)
    with pytest.warns(UserWarning, match=rf"^deep\.0 is left as it is: .*{reason}") as caught:
        replace_lstm(model)
    assert [w.filename for w in caught] == [__file__]
    assert isinstance(model["plain"], ManualLSTM)
    assert type(layer) is cls
    assert vars(layer).keys() == state.keys()
    assert all(vars(layer)[key] is value for key, value in state.items())
    assert torch.equal(layer(x)[0], expected)
    if isinstance(layer, nn.LSTM) or "quant" in kind:
        with pytest.raises(TypeError, match=reason):
            ManualLSTM.from_lstm(layer)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=f"^the model itself is left as it is: .*{reason}"):
        assert replace_lstm(layer) is layer


def test_a_whole_scripted_model_is_left_alone() -> None:
    x, model = torch.randn(5, 2, 3), nn.Sequential(nn.LSTM(3, 4))
    expected, scripted = model(x)[0], torch.jit.script(model)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    for compiled in (scripted, torch.jit.load(file)):  # type: ignore[no-untyped-call]
        with pytest.warns(UserWarning, match="^0 is left as it is: it is a TorchScript module"):
            replace_lstm(compiled)
        assert torch.equal(compiled(x)[0], expected)


def test_restore_leaves_alone_too() -> None:
    parametrized = parametrizations.weight_norm(ManualLSTM(3, 4), "weight_hh_l0")
    patched = ManualLSTM(3, 4)
    patched.forward = types.MethodType(Halving.forward, patched)  # type: ignore[method-assign]
    traced = torch.jit.trace(ManualLSTM(3, 4), torch.zeros(5, 2, 3))  # type: ignore[no-untyped-call]
    model = nn.Sequential(Halving(3, 4), parametrized, patched, traced, ManualLSTM(3, 4))
    with pytest.warns(UserWarning, match="left as it is") as caught:
        restore_lstm(model)
    reasons = ["Halving, a subclass of ManualLSTM", "parametrizations", "forward", "TorchScript"]
    for k, (warning, reason) in enumerate(zip(caught, reasons, strict=True)):
        assert re.search(rf"^{k} is left as it is: .*{reason}", str(warning.message))
    assert [type(m) is nn.LSTM for m in model] == [False, False, False, False, True]


def test_layers_of_other_kinds_are_passed_over_silently() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.LSTM(3, 4)

    LSTM = type("LSTM", (Mine,), {})  # the name alone means nothing
    traced = torch.jit.trace(type("LSTM", (nn.Linear,), {})(3, 4), torch.zeros(2, 3))  # type: ignore[no-untyped-call]
    model = nn.Sequential(nn.GRU(3, 4), nn.RNN(3, 4), nn.Linear(1, 1), LSTM(), traced)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_lstm(model)
    assert [type(m).__name__ for m in model][:4] == ["GRU", "RNN", "Linear", "LSTM"]
    assert isinstance(model[3].inside, ManualLSTM)
    assert model[4] is traced


class _Recurrent(nn.Module):
    def __init__(self, lstm: bool) -> None:
        super().__init__()
        self.encoder = nn.GRU(3, 4)
        self.steps = nn.ModuleList([nn.LSTMCell(3, 4), nn.LSTMCell(4, 4)])
        self.head = nn.Linear(4, 1)
        if lstm:
            self.decoder = nn.LSTM(3, 4)


def _warnings_of(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


def test_a_model_without_an_lstm_is_told_what_it_has_instead() -> None:
    (text,) = _warnings_of(lambda: replace_lstm(_Recurrent(lstm=False)))
    for shown in ("no nn.LSTM", "GRU: encoder", "LSTMCell: steps.0, steps.1", "plain Python list"):
        assert shown in text
    (text,) = _warnings_of(lambda: replace_lstm(nn.Linear(3, 4)))
    assert "nor another recurrent layer" in text
    assert "LSTMCell" not in text


def test_an_lstm_cell_beside_an_lstm_is_named_once() -> None:
    model = _Recurrent(lstm=True)
    (text,) = _warnings_of(lambda: replace_lstm(model))
    assert "LSTMCell: steps.0, steps.1" in text
    assert "GRU" not in text
    assert type(model.get_submodule("decoder")) is ManualLSTM
    assert type(model.steps[0]) is nn.LSTMCell
    assert not _warnings_of(lambda: replace_lstm(model))
    assert not _warnings_of(lambda: restore_lstm(model))


@pytest.mark.parametrize("lstm", [False, True])
def test_what_chooses_nothing_does_not_warn(lstm: bool) -> None:
    model = _Recurrent(lstm)
    assert not _warnings_of(lambda: restore_lstm(model))
    assert not _warnings_of(lambda: find_lstm(model))
    assert not _warnings_of(lambda: replace_lstm(model, filter_fn=lambda layer, path: False))


def test_that_warning_made_an_error_changes_nothing() -> None:
    model = _Recurrent(lstm=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="LSTMCell"):
            replace_lstm(model)
    assert type(model.decoder) is nn.LSTM


# All or nothing.


def _snapshot(model: nn.Module) -> list[Any]:
    return [
        (module, type(module), id(vars(module)), list(vars(module).items()))
        for module in model.modules()
    ]


def _three() -> nn.Sequential:
    return nn.Sequential(*[nn.LSTM(3, 3, bidirectional=k == 1) for k in range(3)])


@pytest.mark.parametrize("swap", [replace_lstm, restore_lstm])
@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("phase", ["state", "class", "dict"])
def test_a_swap_that_fails_changes_nothing(
    swap: Callable[[nn.Module], nn.Module], k: int, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _three()
    if swap is restore_lstm:
        replace_lstm(model)
    before, calls = _snapshot(model), list[nn.Module]()
    make = "manual_state" if swap is replace_lstm else "official_state"
    name = make if phase == "state" else "_become"
    place = module_module if name == "manual_state" else swap_module
    whole = getattr(place, name)

    def fail(module: nn.Module, *rest: Any) -> Any:
        calls.append(module)
        if len(calls) == k + 1:
            if phase == "dict":
                whole(module, rest[0], vars(module))  # interrupted between the two
            raise KeyboardInterrupt(f"at {k}")
        return whole(module, *rest)

    monkeypatch.setattr(place, name, fail)
    with pytest.raises(KeyboardInterrupt, match=f"at {k}"):
        swap(model)
    assert len(calls) >= k + 1
    assert _snapshot(model) == before
    monkeypatch.undo()
    x = torch.randn(5, 2, 3)
    assert model[0](x)[0].shape == (5, 2, 3)
    assert all(type(m) is not before[1][1] for m in swap(model).children())


def test_a_warning_made_an_error_or_a_filter_that_raises_changes_nothing() -> None:
    model = nn.Sequential(nn.LSTM(3, 4), _Doubling(3, 4))
    before = _snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"^1 is left as it is"):
            replace_lstm(model)
    assert _snapshot(model) == before

    def raises(module: nn.Module, path: str) -> bool:
        if path == "1":
            raise LookupError(path)
        return True

    with pytest.raises(LookupError):
        replace_lstm(model, filter_fn=raises)
    assert _snapshot(model) == before


# Choosing.


def _chosen(model: nn.Module, **options: Any) -> list[str]:
    """The first names of what is listed, which must be what is replaced and restored."""
    found = find_lstm(model, **options)
    assert all(isinstance(each, SwapCandidate) for each in found)
    replace_lstm(model, **options)
    ours: list[nn.Module] = [m for m in model.modules() if isinstance(m, ManualLSTM)]
    assert ours == [each.module for each in found]
    replace_lstm(model)
    restore_lstm(model, **options)
    assert [m for m in model.modules() if type(m) is nn.LSTM] == ours
    restore_lstm(model)
    return [each.names[0] for each in found]


def test_choosing() -> None:
    model = Net()
    every = ["encoder.0", "blocks.0", "table.a"]
    assert _chosen(model) == every
    assert _chosen(model, target_modules=["rnn"]) == ["encoder.0"]  # another name of it
    assert _chosen(model, target_modules=("0",)) == ["encoder.0", "blocks.0"]
    assert _chosen(model, target_modules={"blocks.0", "a"}) == ["blocks.0", "table.a"]
    assert _chosen(model, target_modules=["1.0"]) == ["encoder.0"]
    assert len(find_lstm(model, target_modules=iter(["1.0", "a"]))) == 2
    assert _chosen(model, target_modules=[]) == []
    assert _chosen(model, target_modules=r"(blocks|table)\..*") == every  # blocks.1.0 is encoder.0
    assert _chosen(model, target_modules=r"table\.a") == ["table.a"]
    assert _chosen(model, filter_fn=lambda m, name: m.num_layers > 1) == ["table.a"]
    assert _chosen(model, filter_fn=lambda m, name: name == "rnn") == ["encoder.0"]
    assert _chosen(model, filter_fn=lambda m, name: "b" in name, target_modules=["0"]) == every[:2]
    assert _chosen(nn.LSTM(3, 4), target_modules=[""]) == [""]
    assert _chosen(nn.LSTM(3, 4), filter_fn=lambda m, name: name == "") == [""]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (
            {"target_modules": ["rnn", "rn", "coder.0"]},
            "got 'rn' and 'coder.0'; it has 'encoder.0', 'rnn'",
        ),
        (
            {"target_modules": "rn"},
            "'rn' .a regular expression for the whole path.; it has",
        ),
        ({"target_modules": ["none"]}, "'none'"),
        ({"target_modules": [""]}, "''"),
        ({"target_modules": "("}, r"'\(': missing \)"),
        ({"target_modules": [3]}, "3 .int"),
        ({"target_modules": 3}, "3 .int"),
        ({"target_modules": b"rnn"}, "b'rnn' .bytes"),
        ({"filter_fn": "rnn"}, "filter_fn should be a function.*'rnn' .str"),
    ],
    ids=str,
)
def test_mistakes_in_choosing(options: dict[str, Any], shown: str) -> None:
    model = Net()
    before = _snapshot(model)
    for swap in (replace_lstm, restore_lstm, find_lstm):
        with pytest.raises((TypeError, ValueError), match=shown) as caught:
            swap(model, **options)
        value = options.get("target_modules")
        names = isinstance(value, str) or (isinstance(value, list) and isinstance(value[0], str))
        assert caught.type is (ValueError if names else TypeError)
    assert _snapshot(model) == before
    with pytest.raises(ValueError, match="it has none"):
        replace_lstm(nn.Linear(1, 1), target_modules=["rnn"])


@pytest.mark.parametrize("model", [None, nn.LSTM, {"rnn": nn.LSTM(3, 4)}, [nn.LSTM(3, 4)]], ids=str)
def test_a_model_is_a_module(model: Any) -> None:
    for swap in (replace_lstm, restore_lstm, find_lstm):
        with pytest.raises(TypeError, match=r"model should be an nn\.Module, but got"):
            swap(model)
