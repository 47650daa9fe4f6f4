"""replace_lstm and restore_lstm: the layer changes, and nothing else does."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim.swa_utils import AveragedModel

from manual_lstm import ManualLSTM, find_lstm, replace_lstm, restore_lstm
from manual_lstm.testing.comparing import assert_close
from tests.helpers.models import Net, check_private, old_weight_norm, untrained
from tests.helpers.search import share
from tests.helpers.trees import Tree, trees

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
    ours |= {"_all_weights"}  # a list that each has of its own
    return {key: id(value) for key, value in vars(layer).items() if key not in ours}


@share(0.5)
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
                check_private(lstm)
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


def test_shared_layers_and_every_reference() -> None:
    model = Net().double()
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
    model = Net()
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
    model = wrap(Net().double())
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
    inner = model = Net().double()
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


def _pruned(layer: nn.Module) -> None:
    for name in ("weight_hh_l0", "weight_ih_l0_reverse"):
        prune.random_unstructured(layer, name, 0.5)  # type: ignore[no-untyped-call]


CHANGED: dict[str, Callable[[nn.Module], Any]] = {
    "old weight_norm": lambda layer: old_weight_norm(layer, "weight_hh_l0"),
    "old spectral_norm": lambda layer: nn.utils.spectral_norm(layer, "weight_hh_l0"),
    "prune": _pruned,
    "a plain tensor": untrained,
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


# Saving.


@pytest.mark.parametrize("swaps", [[replace_lstm], [replace_lstm, restore_lstm]], ids=len)
@pytest.mark.parametrize("copying", ["deepcopy", "pickle", "save"])
def test_a_copy_keeps_sharing_and_ties(
    swaps: list[Callable[[nn.Module], nn.Module]], copying: str
) -> None:
    model: Any = Net().double()
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
