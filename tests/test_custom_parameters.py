"""A changed cell's own parameters, where its layer comes from, and what is said of mistakes."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from manual_lstm import ManualLSTM, replace_lstm, restore_lstm
from tests.helpers.changed import OWN, every_recipe, make_recipe
from tests.helpers.layers import DEEP, randn
from tests.helpers.recipes import RECIPES

# Parameters


@pytest.mark.parametrize("options", [{}, DEEP, {"bias": False, "num_layers": 2}], ids=str)
@every_recipe
def test_the_state_dict_is_that_of_nn_lstm_and_the_cells_own(
    name: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(1)
    reference = nn.LSTM(3, 4, **options)
    layer = RECIPES[name](3, 4, **options)
    suffixes = [key.removeprefix("weight_ih") for key in reference.state_dict() if "weight_ih" in key]
    own = [kind + suffix for suffix in suffixes for kind in OWN.get(name, [])]
    assert list(layer.state_dict()) == [*reference.state_dict(), *own]
    assert [key for key, _ in layer.named_parameters()] == [*reference.state_dict(), *own]

    loaded = layer.load_state_dict(reference.state_dict(), strict=False)
    assert (loaded.missing_keys, loaded.unexpected_keys) == (own, [])
    if own:
        with pytest.raises(RuntimeError, match="Missing key"):
            layer.load_state_dict(reference.state_dict())
    again = RECIPES[name](3, 4, **options)
    again.load_state_dict(layer.state_dict())
    reference.load_state_dict({k: v for k, v in layer.state_dict().items() if k not in own})


@pytest.mark.parametrize("options", [{}, DEEP, {"bias": False, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("name", ["PeepholeLSTM", "ZoneoutLSTM", "VariationalLSTM"])
def test_where_it_begins_as_nn_lstm(name: str, options: dict[str, Any]) -> None:
    reference = nn.LSTM(3, 4, dtype=torch.float64, **options)
    layer: Any = RECIPES[name].from_lstm(reference)
    if name == "ZoneoutLSTM":
        layer.zoneout_c = layer.zoneout_h = 0.0
    layer.eval()
    for x in (randn(5, 2, 3), pack_sequence([randn(n, 3) for n in (2, 5, 1)], enforce_sorted=False)):
        torch.testing.assert_close(layer(x), reference(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", OWN)
def test_each_direction_owns_its_parameters(name: str) -> None:
    layer = make_recipe(name, **DEEP)
    own = [[f"{kind}_l{k}{r}" for kind in OWN[name]] for k in (0, 1) for r in ("", "_reverse")]
    tensors = [layer.get_parameter(key) for names in own for key in names]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    x = randn(5, 2, 3)
    before = layer.unroll(x).c
    for k, names in enumerate(own):  # a direction's own parameters change that direction first
        other = copy.deepcopy(layer)
        with torch.no_grad():
            other.get_parameter(names[0]).add_(0.1)
        after = other.unroll(x).c
        changed = [not torch.equal(a, b) for a, b in zip(before, after)]
        assert changed == [j == k or (j > 1 and k < 2) for j in range(4)]


@every_recipe
def test_reset_parameters(name: str) -> None:
    reference, layer = nn.LSTM(3, 4, num_layers=2), RECIPES[name](3, 4, num_layers=2)
    start = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)
    kept = list(layer.parameters())
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    reference.reset_parameters()
    assert all(a is b for a, b in zip(kept, layer.parameters()))
    own = {key: value for key, value in start.state_dict().items() if key not in reference.state_dict()}
    expected = {**reference.state_dict(), **own}
    torch.testing.assert_close(dict(layer.state_dict()), expected, rtol=0, atol=0)


@every_recipe
def test_copies(name: str) -> None:
    layer = make_recipe(name, **DEEP)
    x = randn(5, 2, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is RECIPES[name]
        assert {p.data_ptr() for p in other.parameters()}.isdisjoint(
            p.data_ptr() for p in layer.parameters()
        )
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


@every_recipe
def test_training_reaches_every_parameter(name: str) -> None:
    layer = make_recipe(name, training=True, **DEEP)
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(randn(5, 2, 3))[0].square().sum().backward()
    optimizer.step()
    for key, value in layer.state_dict().items():
        assert not torch.equal(value, before[key]), key


# Where a layer comes from


@every_recipe
def test_from_lstm_and_swapping(name: str) -> None:
    cls = RECIPES[name]
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.LSTM(3, 4, num_layers=2, bidirectional=True)})
    model.double().eval()
    alone = [cls.from_lstm(lstm) for lstm in model.values()]  # type: ignore[arg-type]
    layers, weights = list(model.values()), list(model.parameters())
    assert replace_lstm(model, layer_class=cls) is model
    assert list(model.values()) == layers
    assert all(type(layer) is cls for layer in layers)
    own = {id(p) for p in model.parameters()} - {id(p) for p in weights}
    assert {id(p) for p in weights} <= {id(p) for p in model.parameters()}
    assert len(own) == 5 * len(OWN.get(name, []))
    assert all(p.dtype == torch.float64 for p in model.parameters())
    x = randn(5, 2, 3)
    for layer, other in zip(layers, alone):
        assert layer.weight_ih_l0 is other.weight_ih_l0
        assert list(layer.state_dict()) == list(other.state_dict())
        torch.testing.assert_close(layer(x), other(x), rtol=0, atol=0)

    replace_lstm(model)  # twice is once
    assert all(type(layer) is cls for layer in layers)
    with pytest.warns(UserWarning, match="left as it is"):
        restore_lstm(model)
    assert all(type(layer) is cls for layer in layers)
    with pytest.raises(TypeError, match="only a ManualLSTM"):
        alone[0].to_lstm()


def test_a_swap_that_fails_leaves_the_model_as_it_was() -> None:
    class Second(ManualLSTM):
        def cell_parameters(self) -> dict[str, Tensor]:
            if self.hidden_size == 5:
                raise KeyError("no such size")
            return {"scale": torch.ones(self.hidden_size)}

    model = nn.ModuleList([nn.LSTM(3, 4), nn.LSTM(3, 5)])
    before = [(type(layer), dict(vars(layer)), list(layer._parameters)) for layer in model]
    with pytest.raises(KeyError, match="no such size"):
        replace_lstm(model, layer_class=Second)
    assert [(type(layer), dict(vars(layer)), list(layer._parameters)) for layer in model] == before
    with pytest.raises(KeyError, match="no such size"):
        Second.from_lstm(model[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [nn.LSTM, nn.Linear, "ManualLSTM", ManualLSTM(1, 1)], ids=str)
def test_another_class_is_no_layer_class(wrong: Any) -> None:
    with pytest.raises(TypeError, match="layer_class should be ManualLSTM or a subclass"):
        replace_lstm(nn.LSTM(3, 4), layer_class=wrong)


# What is said of mistakes


def with_cell(cell: Any = None, **methods: Any) -> ManualLSTM:
    cls: Any = type("Changed", (ManualLSTM,), {"cell": cell, **methods} if cell else methods)
    layer: ManualLSTM = cls(3, 4)
    return layer


def test_a_cell_that_returns_no_step() -> None:
    layer = with_cell(lambda self, x_t, h, c, w: (h, c))
    with pytest.raises(TypeError, match="cell should return a Step, but got tuple"):
        layer(torch.randn(5, 2, 3))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"scale": 1.0}, TypeError, "cell_parameters should return tensors, but scale is float"),
        ({"weight_hh": torch.ones(1)}, ValueError, "new names, but got 'weight_hh'"),
        ({"bias_ih": torch.ones(1)}, ValueError, "new names, but got 'bias_ih'"),
        ({"bias": torch.ones(1)}, ValueError, "new names, but got 'bias'"),
        ({"weight_hr": torch.ones(1)}, ValueError, "new names, but got 'weight_hr'"),
    ],
)
def test_parameters_that_cannot_be(
    values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        with_cell(cell_parameters=lambda self: values)
    cls: Any = type("Changed", (ManualLSTM,), {"cell_parameters": lambda self: values})
    with pytest.raises(error, match=message):
        cls.from_lstm(nn.LSTM(3, 4))


def test_a_name_that_the_layer_has() -> None:
    lstm = nn.LSTM(3, 4)
    lstm.register_buffer("scale_l0", torch.ones(1))
    cls: Any = type(
        "Changed", (ManualLSTM,), {"cell_parameters": lambda self: {"scale": torch.ones(1)}}
    )
    with pytest.raises(ValueError, match="new names, but got 'scale'"):
        cls.from_lstm(lstm)
