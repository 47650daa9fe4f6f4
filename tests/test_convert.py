"""One layer there and back: from_lstm, to_lstm, and the state that each class keeps."""

import warnings
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn

from manual_lstm import ManualLSTM, replace_lstm, restore_lstm
from manual_lstm.check.parity import largest_difference
from manual_lstm.testing.comparing import assert_close
from tests.helpers.models import Halving, check_private, untrained
from tests.helpers.trees import Tree, trees

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.ao:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


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
        check_private(back)
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
        names = [lstm._all_weights, layer._all_weights, back._all_weights]
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


def test_from_lstm_of_a_subclass_of_ours_makes_that_subclass() -> None:
    lstm, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    layer = Halving.from_lstm(lstm)
    assert type(layer) is Halving
    torch.testing.assert_close(layer(x)[0], lstm(x)[0] / 2)
    with pytest.raises(TypeError, match="Halving, a subclass of ManualLSTM"):
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
        for model in (odd, replace_lstm(odd)):
            with pytest.raises(TypeError):
                model(x)
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
    untrained(plain)
    alone = [ManualLSTM(3, 4, 2), ManualLSTM(3, 4).double()]
    restore_lstm(nn.Sequential(alone[0], in_a_buffer, plain, meta, alone[1]))
    assert [[id(w) for w in weights] for weights in flattened] == [
        [id(w) for w in layer.parameters()] for layer in alone
    ]
    assert all(p.data_ptr() == buffer.data_ptr() for p in in_a_buffer.parameters())
