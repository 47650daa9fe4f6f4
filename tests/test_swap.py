"""replace_lstm, restore_lstm, from_lstm and to_lstm: the layer changes, and nothing else does."""

import copy
import gc
import io
import pickle
import re
import subprocess
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim.swa_utils import AveragedModel

from manual_lstm import ManualLSTM, SwapCandidate, find_lstm, replace_lstm, restore_lstm
from manual_lstm import module as module_module
from manual_lstm.check.parity import largest_difference
from manual_lstm.swap import replace as swap_module
from manual_lstm.testing.comparing import assert_close
from tests.trees import Tree, trees

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.ao:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


# The training that the swap must not disturb.


class Tagger(nn.Module):
    def __init__(self, make: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.rnn = make(6, 8, num_layers=2, bidirectional=True, dropout=0.3, batch_first=True)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        padded, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        logits: Tensor = self.head(padded)
        return logits


def _train(
    make: Callable[..., nn.Module], swaps: dict[int, Callable[[nn.Module], nn.Module]]
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of 100 steps of Adam with a schedule; and the weights at the end, with their average."""
    torch.manual_seed(0)
    model = Tagger(make).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    average = AveragedModel(model)
    losses = []
    for step in range(100):
        if step in swaps:
            swaps[step](model)
        lengths = torch.randint(1, 8, (4,))
        tokens = torch.randint(0, 11, (4, int(lengths.max())))
        padding = torch.arange(tokens.size(1)) >= lengths.unsqueeze(1)
        wanted = tokens.masked_fill(padding, -100)
        loss = nn.functional.cross_entropy(model(tokens, lengths).transpose(1, 2), wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        losses.append(loss.item())
    return losses, {**model.state_dict(), **average.state_dict()}


def test_the_same_training_step_for_step() -> None:
    losses, weights = _train(nn.LSTM, {})
    assert losses[-1] < losses[0] / 2  # it does learn
    swaps = {50: replace_lstm, 75: restore_lstm}
    for others in (_train(ManualLSTM, {}), _train(nn.LSTM, swaps)):  # type: ignore[arg-type]
        assert max(abs(a - b) for a, b in zip(others[0], losses, strict=True)) < 1e-9
        assert_close(others[1], weights, 1e-9)


# Drawn models, there and back.


def _identities(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that no swap may change."""
    seen: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        seen[f"{path} module"] = id(module)
        seen[f"{path} training"] = module.training
        seen[f"{path} children"] = list(module._modules)
        state = vars(module)
        for key in vars(nn.Module()):
            if isinstance(state[key], (dict, set)):
                seen[f"{path} {key}"] = (id(state[key]), list(state[key]))
        if not isinstance(module, (nn.LSTM, ManualLSTM)):
            seen[f"{path} class"] = type(module)
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        seen[name] = (id(tensor), tensor.requires_grad, tensor.dtype, tensor.device)
        if tensor.grad is not None:
            seen[f"{name} grad"] = (id(tensor.grad), tensor.grad.tolist())
    checkpoint = model.state_dict()
    seen["keys"] = list(checkpoint)
    seen["metadata"] = checkpoint._metadata  # type: ignore[attr-defined]
    seen["values"] = [value.tolist() for value in checkpoint.values()]
    return seen


def _rest(layer: nn.Module) -> dict[str, Any]:
    """A layer's attributes, but what each class keeps for itself."""
    ours = vars(nn.LSTM(1, 1)).keys() ^ vars(ManualLSTM(1, 1)).keys()
    return {key: id(value) for key, value in vars(layer).items() if key not in ours}


@given(tree=trees())
def test_drawn_models_there_and_back(tree: Tree) -> None:
    model, log = tree.model, tree.log
    checkpoint = copy.deepcopy(model.state_dict())
    attributes = [_rest(lstm) for lstm in tree.lstms]
    tree.run()
    log.clear()
    expected = tree.run()  # gradients add up
    _load(model, checkpoint)
    called = list(log)
    assert {id(each.module) for each in find_lstm(model)} == {id(lstm) for lstm in tree.lstms}

    for swap, cls in ((replace_lstm, ManualLSTM), (restore_lstm, nn.LSTM)):
        model.zero_grad()
        tree.run()
        before, random = _identities(model), torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert swap(model) is model
            assert swap(model) is model
        assert torch.equal(torch.get_rng_state(), random)
        assert all(type(lstm) is cls for lstm in tree.lstms)
        assert _identities(model) == before
        assert [_rest(lstm) for lstm in tree.lstms] == attributes
        for lstm in tree.lstms:
            if isinstance(lstm, nn.LSTM):
                _check_private(lstm)
        log.clear()
        results = tree.run()
        _load(model, checkpoint)
        assert log == called
        tight = all(tensor.dtype == torch.float64 for tensor in expected.values())
        assert_close(results, expected, 1e-12 if tight else 1e-5)
        checkpoint = copy.deepcopy(model.state_dict())

    half = len(tree.handles) // 2
    for swap, handles in ((replace_lstm, tree.handles[:half]), (restore_lstm, tree.handles[half:])):
        swap(model)
        for handle in handles:
            handle.remove()
    log.clear()
    tree.run()
    _load(model, checkpoint)
    assert not log


def _load(model: nn.Module, checkpoint: dict[str, Tensor]) -> None:
    """All of state_dict's and load_state_dict's hooks are called."""
    model.state_dict()
    assert not any(model.load_state_dict(checkpoint))


def _check_private(lstm: nn.LSTM) -> None:
    """What nn.LSTM keeps for itself is what it would have made itself."""
    fresh = nn.LSTM(
        lstm.input_size,
        lstm.hidden_size,
        lstm.num_layers,
        bias=lstm.bias,
        bidirectional=lstm.bidirectional,
        proj_size=lstm.proj_size,
    )
    assert vars(fresh).keys() <= vars(lstm).keys()
    for key in ("_flat_weights_names", "_all_weights"):
        assert getattr(lstm, key) == getattr(fresh, key)
    weights = [getattr(lstm, name) for name in lstm._flat_weights_names]
    for weight, kept, reference in zip(
        weights, lstm._flat_weights, lstm._flat_weight_refs, strict=True
    ):
        assert kept is weight
        assert reference is not None
        assert reference() is weight


# One layer.


@given(tree=trees())
def test_one_layer_there_and_back(tree: Tree) -> None:
    for lstm in tree.lstms:
        assert isinstance(lstm, nn.LSTM)
        before = dict(vars(lstm))
        keys, values = list(lstm.state_dict()), list(lstm.state_dict().values())
        random = torch.get_rng_state()
        layer = ManualLSTM.from_lstm(lstm)
        back = layer.to_lstm()
        assert torch.equal(torch.get_rng_state(), random)
        assert type(lstm) is type(back) is nn.LSTM
        assert vars(lstm).keys() == vars(back).keys()
        assert all(vars(lstm)[key] is value for key, value in before.items())
        _check_private(back)
        for new in (layer, back):
            assert list(new.state_dict()) == keys
            for name, parameter in lstm.named_parameters(remove_duplicate=False):
                assert new.get_parameter(name) is parameter
            for name, buffer in lstm.named_buffers():
                assert new.get_buffer(name) is buffer
            assert dict(new.named_children()) == dict(lstm.named_children())
            assert not any(new.load_state_dict(dict(zip(keys, values))))
            assert new.training is lstm.training
            # What is registered from now on is each one's own.
            new.register_buffer("later", torch.ones(1))
            new.register_buffer("passing", torch.ones(1), persistent=False)
            new.register_forward_hook(lambda *_: None)
            new.register_state_dict_pre_hook(lambda *_: None)  # type: ignore[no-untyped-call]
        assert list(lstm.state_dict()) == keys
        for key in ("_forward_hooks", "_state_dict_pre_hooks"):
            assert len(vars(new)[key]) == len(vars(lstm)[key]) + 1
        assert "passing" not in lstm._non_persistent_buffers_set
        names = [lstm._all_weights, layer._weight_names, back._all_weights]
        lists = {id(each) for lists in names for each in (lists, *lists)}
        assert len(lists) == 3 * (1 + len(names[0]))


def test_a_new_layer_has_what_a_built_one_has() -> None:
    """A new attribute in ManualLSTM.__init__ must be made by from_lstm too."""
    for options in ({}, {"num_layers": 3, "bias": False, "bidirectional": True, "proj_size": 2}):
        lstm, built = nn.LSTM(3, 4, **options), ManualLSTM(3, 4, **options)  # type: ignore[arg-type]
        layer = ManualLSTM.from_lstm(lstm)
        assert vars(layer).keys() == vars(built).keys()
        plain = [key for key, value in vars(built).items() if not isinstance(value, dict)]
        assert [getattr(layer, key) for key in plain] == [getattr(built, key) for key in plain]
        assert vars(layer.to_lstm()).keys() == vars(lstm).keys()
        assert repr(layer.to_lstm()) == repr(lstm)


def test_a_load_hook_follows_the_new_layer_when_the_old_one_is_gone() -> None:
    seen = list[nn.Module]()
    lstm: Any = nn.LSTM(3, 4)
    lstm.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    layer = ManualLSTM.from_lstm(lstm)
    lstm.load_state_dict(layer.state_dict())
    assert seen == [lstm]
    seen.clear()
    gone = weakref.ref(lstm)
    del lstm
    assert gone() is None
    layer.load_state_dict(layer.state_dict())
    assert seen == [layer]


class _Halving(ManualLSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        output, states = super().forward(input, hx)
        return output / 2, states


def test_from_lstm_of_a_subclass_of_ours_makes_that_subclass() -> None:
    lstm, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    layer = _Halving.from_lstm(lstm)
    assert type(layer) is _Halving
    torch.testing.assert_close(layer(x)[0], lstm(x)[0] / 2)
    with pytest.raises(TypeError, match="_Halving, a subclass of ManualLSTM"):
        layer.to_lstm()


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        (None, "None, no module"),
        (nn.LSTM, "no module"),
        (nn.GRU(3, 4), "torch.nn.modules.rnn.GRU"),
        (ManualLSTM(3, 4), "manual_lstm.module.ManualLSTM"),
        (type("Mine", (nn.LSTM,), {})(3, 4), "Mine, a subclass of nn.LSTM"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_from_lstm_takes_an_nn_lstm(wrong: Any, shown: str) -> None:
    with pytest.raises(TypeError, match=f"lstm should be an nn.LSTM and nothing more.*{shown}"):
        ManualLSTM.from_lstm(wrong)


# Values that a constructor would refuse, or warn of, are there already.


def test_the_values_of_now_move() -> None:
    lstm: Any = nn.LSTM(3, 4, 2)
    lstm.dropout, lstm.batch_first = 0.5, True
    lstm.hidden_size = torch.tensor(4).numpy()[()]
    x = torch.randn(2, 5, 3)
    torch.manual_seed(0)
    expected = lstm(x)
    replace_lstm(lstm)
    torch.manual_seed(0)
    torch.testing.assert_close(lstm(x), expected)
    lstm.dropout = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm = nn.LSTM(3, 4)
        lstm.dropout = 0.5  # the constructors warn of that, with one layer
        restore_lstm(replace_lstm(lstm))
        odd = nn.LSTM(3, 4, bidirectional=1)
        assert len(replace_lstm(odd)(x)[0][0, 0]) == 8
        assert restore_lstm(odd).bidirectional == 1


def test_a_layer_that_an_old_torch_saved() -> None:
    lstm = nn.LSTM(3, 4, 2, bidirectional=True)
    state = lstm.__getstate__()  # type: ignore[no-untyped-call]
    names = state["_all_weights"]
    for new in ("_flat_weights", "_flat_weights_names", "_backward_pre_hooks", "proj_size"):
        del state[new]
    state["_all_weights"] = [[getattr(lstm, name) for name in direction] for direction in names]
    old = nn.LSTM.__new__(nn.LSTM)
    old.__setstate__(state)  # type: ignore[no-untyped-call]
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(replace_lstm(old)(x), lstm(x))
    assert torch.equal(restore_lstm(old)(x)[0], lstm(x)[0])
    assert vars(old).keys() == vars(nn.LSTM(3, 4)).keys()


def test_on_meta_and_in_half() -> None:
    model = nn.Sequential(nn.LSTM(3, 4, device="meta"))
    replace_lstm(model).load_state_dict(nn.Sequential(nn.LSTM(3, 4)).state_dict(), assign=True)
    assert model(torch.randn(5, 2, 3))[0].device.type == "cpu"
    restore_lstm(model)
    assert model(torch.randn(5, 2, 3))[0].device.type == "cpu"
    x = torch.randn(5, 2, 3, dtype=torch.bfloat16)
    expected = model.bfloat16()(x)[0]
    assert largest_difference(replace_lstm(model)(x)[0], expected) < 0.02
    x = x.double()
    assert model.double()(x)[0].dtype == torch.float64
    assert restore_lstm(model)(x)[0].dtype == torch.float64


def test_no_parameter_is_registered_on_the_way() -> None:
    """Somebody's global hook would see it, and might replace it."""
    lstm, seen = nn.LSTM(3, 4), []
    handle = nn.modules.module.register_module_parameter_registration_hook(
        lambda *arguments: seen.append(arguments)
    )
    try:
        restore_lstm(replace_lstm(lstm))
    finally:
        handle.remove()
    assert not seen


def test_a_swap_between_forward_and_backward() -> None:
    lstm, x = nn.LSTM(3, 4, 2).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    lstm(x)[0].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in lstm.named_parameters() if p.grad is not None}
    for swap in (replace_lstm, restore_lstm):
        lstm.zero_grad()
        loss = lstm(x)[0].square().sum()
        swap(lstm)
        loss.backward()
        grads = {name: p.grad for name, p in lstm.named_parameters() if p.grad is not None}
        assert_close(grads, expected, 1e-12)


def test_weights_are_flattened_on_the_way_back_where_nothing_else_lies_in_their_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """nn.LSTM.flatten_parameters acts on CUDA only; that it is called can be seen anywhere."""
    flattened = list[list[Any]]()
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", lambda m: flattened.append(m._flat_weights))
    buffer = torch.zeros(1000)
    in_a_buffer, plain, meta = ManualLSTM(3, 4), ManualLSTM(3, 4), ManualLSTM(3, 4, device="meta")
    for parameter in in_a_buffer.parameters():
        parameter.data = buffer[: parameter.numel()].view_as(parameter)
    _untrained(plain)
    alone = [ManualLSTM(3, 4, 2), ManualLSTM(3, 4).double()]
    restore_lstm(nn.Sequential(alone[0], in_a_buffer, plain, meta, alone[1]))
    assert [[id(w) for w in weights] for weights in flattened] == [
        [id(w) for w in layer.parameters()] for layer in alone
    ]
    assert all(p.data_ptr() == buffer.data_ptr() for p in in_a_buffer.parameters())


# What refers to a layer, from wherever, has the new one.


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.LSTM(3, 4), nn.Identity())
        self.rnn = self.encoder[0]
        self.blocks = nn.ModuleList([nn.LSTM(4, 4), self.encoder])
        self.table = nn.ModuleDict({"a": nn.LSTM(4, 3, 2), "none": nn.GRU(1, 1)})
        self.plain = [self.rnn]

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain[0](x)[0]
        for layer in (self.blocks[0], self.table["a"]):
            x = layer(x)[0]
        return x


def test_shared_layers_and_every_reference() -> None:
    model = _Net().double()
    closure = model.rnn
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    expected = model(x)
    assert [str(each) for each in find_lstm(model)] == [
        "encoder.0, rnn, blocks.1.0: LSTM(3, 4)",
        "blocks.0: LSTM(4, 4)",
        "table.a: LSTM(4, 3, num_layers=2)",
    ]
    replace_lstm(model)
    for layer in (model.plain[0], closure, model.encoder[0], model.blocks[1][0]):  # type: ignore[index]
        assert layer is model.rnn
        assert isinstance(layer, ManualLSTM)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    restore_lstm(model)
    assert type(closure) is nn.LSTM
    assert torch.equal(model(x), expected)


def test_a_model_that_holds_itself_or_shares_at_every_depth() -> None:
    model = _Net()
    model.encoder.add_module("up", model)
    assert len(find_lstm(replace_lstm(model))) == 0
    assert isinstance(model.rnn, ManualLSTM)
    deep: nn.Module = nn.ReLU()
    for _ in range(64):  # 2 ** 64 paths
        deep = nn.Sequential(deep, deep)
    found = find_lstm(nn.ModuleList([deep, nn.LSTM(3, 4)]))
    assert [each.names for each in found] == [("1",)]


def test_nothing_holds_on_to_the_model() -> None:
    """Its memory, on a GPU too, is free when its last name goes, not when the collector comes."""
    lstm = nn.LSTM(3, 4)
    model, layer = nn.Sequential(nn.Sequential(lstm)), ManualLSTM.from_lstm(lstm).to_lstm()
    gone: list[weakref.ref[Any]] = [weakref.ref(lstm), weakref.ref(lstm.weight_ih_l0)]
    gc.disable()
    try:
        find_lstm(restore_lstm(replace_lstm(model)), target_modules=["0"])
        del model, lstm, layer
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, torch.fx.symbolic_trace])
def test_wrapped(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(_Net().double())
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    expected = model(x)
    copied = replace_lstm(copy.deepcopy(model))
    assert [type(m) for m in copied.modules()].count(ManualLSTM) == 3
    torch.testing.assert_close(copied(x), expected, rtol=0, atol=1e-12)
    assert torch.equal(restore_lstm(copied)(x), expected)


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ManualLSTM) or super().is_leaf_module(m, module_qualified_name)


def test_symbolically_traced_after_the_swap() -> None:
    model, x = replace_lstm(nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4))), torch.randn(5, 2, 3)
    traced = torch.fx.GraphModule(model, _Tracer().trace(model))
    assert torch.equal(traced(x)[0], model(x)[0])
    assert type(restore_lstm(traced).get_submodule("1")) is nn.LSTM
    torch.testing.assert_close(traced(x)[0], model(x)[0])


@pytest.mark.parametrize("on", ["forward pre", "forward", "backward"])
def test_a_hook_may_swap(on: str) -> None:
    lstm, x = nn.LSTM(3, 4).double(), torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    model, expected = nn.Sequential(lstm), lstm(x)[0]

    def swap(module: nn.Module, *_: Any) -> None:
        (restore_lstm if isinstance(lstm, ManualLSTM) else replace_lstm)(module)

    if on == "forward pre":  # the layer's own comes when its call is under way
        model.register_forward_pre_hook(swap)
    elif on == "forward":
        lstm.register_forward_hook(swap)
    else:
        lstm.register_full_backward_hook(swap)
    for cls in (ManualLSTM, nn.LSTM):
        output = model(x)[0]
        output.sum().backward()
        assert type(lstm) is cls
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["torch.compile", "Module.compile"])
def test_compiled(way: str) -> None:
    """Compiled code notices that the class is another."""
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    inner = model = _Net().double()
    if way == "torch.compile":
        model = torch.compile(inner, backend="eager")  # type: ignore[assignment]
    else:
        inner.compile(backend="eager")
    expected = model(x)
    replace_lstm(model)
    assert isinstance(inner.rnn, ManualLSTM)
    with torch.no_grad():
        for parameter in inner.rnn.parameters():
            parameter.mul_(2)
    changed = model(x)
    assert not torch.allclose(changed, expected)
    torch.testing.assert_close(changed, inner.forward(x), rtol=0, atol=1e-12)
    restore_lstm(model)
    torch.testing.assert_close(model(x), changed, rtol=0, atol=1e-12)


# Changed weights that are no Parameters: these truly work.


def _old_weight_norm(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer, "weight_hh_l0")


def _pruned(layer: nn.Module) -> None:
    for name in ("weight_hh_l0", "weight_ih_l0_reverse"):
        prune.random_unstructured(layer, name, 0.5)  # type: ignore[no-untyped-call]


def _untrained(layer: nn.Module) -> None:
    del layer.bias_hh_l0
    layer.bias_hh_l0 = torch.ones(16, dtype=torch.float64)


CHANGED: dict[str, Callable[[nn.Module], Any]] = {
    "old weight_norm": _old_weight_norm,
    "old spectral_norm": lambda layer: nn.utils.spectral_norm(layer, "weight_hh_l0"),
    "prune": _pruned,
    "a plain tensor": _untrained,
}


@pytest.mark.parametrize("change", CHANGED)
def test_weights_that_are_no_parameters(change: str) -> None:
    def make() -> nn.LSTM:
        torch.manual_seed(0)
        layer = nn.LSTM(3, 4, 2, bidirectional=True).double()
        CHANGED[change](layer)
        return layer

    lstm, twin = make(), make()
    x = torch.randn(5, 2, 3, dtype=torch.float64)

    def step(layer: nn.Module) -> dict[str, Tensor]:
        """A step of training; the weights of the next must be computed anew."""
        layer.zero_grad()
        output = layer(x)[0]
        output.square().sum().backward()
        results = {"output": output.detach()}
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None
            results[name] = parameter.grad.clone()
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.sub_(results[name], alpha=0.01)
        return results

    names = list(lstm.state_dict())
    for swap in (replace_lstm, restore_lstm, replace_lstm, restore_lstm):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            swap(lstm)
        assert list(lstm.state_dict()) == names
        for _ in range(2):
            assert_close(step(lstm), step(twin), 1e-12)
    if change == "prune":
        prune.remove(replace_lstm(lstm), "weight_hh_l0")  # type: ignore[no-untyped-call]
        assert isinstance(lstm.weight_hh_l0, nn.Parameter)
        assert int((lstm.weight_hh_l0 == 0).sum()) == 32
        torch.testing.assert_close(restore_lstm(lstm)(x), twin(x), rtol=0, atol=1e-12)


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
    patched.forward = types.MethodType(_Halving.forward, patched)  # type: ignore[method-assign]
    traced = torch.jit.trace(ManualLSTM(3, 4), torch.zeros(5, 2, 3))  # type: ignore[no-untyped-call]
    model = nn.Sequential(_Halving(3, 4), parametrized, patched, traced, ManualLSTM(3, 4))
    with pytest.warns(UserWarning, match="left as it is") as caught:
        restore_lstm(model)
    reasons = ["_Halving, a subclass of ManualLSTM", "parametrizations", "forward", "TorchScript"]
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
    model = nn.Sequential(
        nn.GRU(3, 4), nn.RNN(3, 4), nn.LSTMCell(3, 4), nn.Linear(1, 1), LSTM(), traced
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_lstm(model)
    assert [type(m).__name__ for m in model][:5] == ["GRU", "RNN", "LSTMCell", "Linear", "LSTM"]
    assert isinstance(model[4].inside, ManualLSTM)
    assert model[5] is traced


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
    model = _Net()
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
    model = _Net()
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


# Saving.


@pytest.mark.parametrize("swaps", [[replace_lstm], [replace_lstm, restore_lstm]], ids=len)
@pytest.mark.parametrize("copying", ["deepcopy", "pickle", "save"])
def test_a_copy_keeps_sharing_and_ties(
    swaps: list[Callable[[nn.Module], nn.Module]], copying: str
) -> None:
    model: Any = _Net().double()
    model.table["a"].weight_hh_l1 = model.table["a"].weight_hh_l0
    model.rnn.note = ["plain"]
    for swap in swaps:
        swap(model)
    file = io.BytesIO()
    if copying == "deepcopy":
        copied = copy.deepcopy(model)
    elif copying == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    assert copied.rnn is copied.encoder[0] is copied.plain[0]
    assert copied.rnn is not model.rnn
    assert copied.rnn.note == ["plain"]
    assert copied.table["a"].weight_hh_l1 is copied.table["a"].weight_hh_l0
    assert type(copied.rnn) is (nn.LSTM if len(swaps) == 2 else ManualLSTM)
    assert torch.equal(copied(x), model(x))
    restore_lstm(replace_lstm(copied))
    assert copied.table["a"]._flat_weights[5] is copied.table["a"].weight_hh_l0


LOADER = """
import sys
sys.modules["manual_lstm"] = None  # as where it is not installed
import torch
model, x, expected = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(model["rnn"](x)[0], expected)
assert model["rnn"].weight_hh_l1 is model["rnn"].weight_hh_l0
torch.optim.SGD(model.parameters(), lr=0.1).step()
"""


def test_a_restored_model_loads_where_this_package_is_not(tmp_path: Path) -> None:
    lstm: Any = nn.LSTM(3, 4, 2)
    lstm.weight_hh_l1 = lstm.weight_hh_l0
    lstm.register_load_state_dict_pre_hook(torch.is_tensor)
    lstm.register_buffer("steps", torch.tensor(7))
    lstm.note = ["plain"]
    x = torch.randn(5, 2, 3)
    model = nn.ModuleDict({"rnn": lstm, "again": nn.Sequential(lstm), "built": ManualLSTM(3, 4)})
    results = {}
    for swap in (replace_lstm, restore_lstm):
        swap(model)
        path = tmp_path / swap.__name__
        torch.save((model, x, lstm(x)[0].detach()), path)
        command = [sys.executable, "-I", "-c", LOADER, str(path)]
        results[swap] = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (b"manual_lstm" in path.read_bytes()) is (swap is replace_lstm)
    assert results[restore_lstm].returncode == 0, results[restore_lstm].stderr
    assert results[replace_lstm].returncode == 1  # so the loader could have failed
    assert "manual_lstm" in results[replace_lstm].stderr
