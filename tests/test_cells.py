"""manual_lstm.cells: arguments, swaps, and what a swap says of a class's __init__."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manual_lstm
from manual_lstm import ManualLSTM, find_lstm, replace_lstm, restore_lstm
from manual_lstm.cells import (
    CoupledLSTM,
    HardSigmoidLSTM,
    LayerNormLSTM,
    PeepholeLSTM,
    VariationalLSTM,
    ZoneoutLSTM,
)
from manual_lstm.engine.constructor import set_by_init
from tests.helpers.changed import every_recipe, make_recipe
from tests.helpers.layers import DEEP, randn
from tests.helpers.recipes import RECIPES

ARGUMENTS: dict[str, dict[str, Any]] = {
    "LayerNormLSTM": {"eps": 1e-3},
    "ZoneoutLSTM": {"zoneout_h": 0.25, "zoneout_c": 0.125},
    "VariationalLSTM": {"input_dropout": 0.125, "hidden_dropout": 0.375},
}


def test_they_can_be_had_from_the_package() -> None:
    for name, cls in RECIPES.items():
        assert getattr(manual_lstm.cells, name) is cls
        assert cls.__doc__ is not None
    assert len(RECIPES) == 6


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name: str) -> None:
    cls, given = RECIPES[name], ARGUMENTS[name]
    layer = cls(3, 4, 2, False, batch_first=True, **given)
    assert {key: getattr(layer, key) for key in given} == given
    assert all(f"{key}={value}" in repr(layer) for key, value in given.items())
    assert (layer.num_layers, layer.bias, layer.batch_first) == (2, False, True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer)
    default = cls.from_lstm(nn.LSTM(3, 4))
    assert {key: getattr(default, key) for key in given} == {key: getattr(cls, key) for key in given}
    for key, value in given.items():
        setattr(default, key, value)
        assert getattr(default, key) == value
        assert getattr(cls, key) != value


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, given in ARGUMENTS.items() for key in given]
)
@pytest.mark.parametrize("value", [-0.5, float("nan"), 2.0, "0.5", None, True])
def test_nonsense_raises_when_it_is_given_and_when_it_is_used(name: str, key: str, value: Any) -> None:
    if name == "LayerNormLSTM" and value == 2.0:
        return
    with pytest.raises((ValueError, TypeError), match=key):
        RECIPES[name](3, 4, **{key: value})
    layer = RECIPES[name](3, 4)
    setattr(layer, key, value)
    with pytest.raises((ValueError, TypeError), match=key):
        layer(torch.randn(5, 2, 3))


def test_arguments_take_effect() -> None:
    x, hx = randn(5, 2, 3), (randn(1, 2, 4), randn(1, 2, 4))
    for training in (True, False):
        layer = ZoneoutLSTM(3, 4, zoneout_h=1, zoneout_c=1, dtype=torch.float64).train(training)
        torch.testing.assert_close(layer(x, hx)[1], hx, rtol=0, atol=0)
    plain = ManualLSTM(3, 4, dtype=torch.float64)
    dropped = VariationalLSTM(3, 4, input_dropout=1.0, hidden_dropout=0.0, dtype=torch.float64)
    dropped.load_state_dict(plain.state_dict())
    torch.testing.assert_close(dropped(x, hx), plain(0 * x, hx), rtol=0, atol=1e-15)
    torch.testing.assert_close(dropped.eval()(x, hx), plain(x, hx), rtol=0, atol=1e-15)
    big, small = (LayerNormLSTM(3, 4, eps=eps, dtype=torch.float64) for eps in (10.0, 1e-9))
    big.load_state_dict(small.state_dict())
    assert not torch.allclose(big(x)[0], small(x)[0])


def test_the_mask_of_the_input_stays_for_all_steps() -> None:
    """Of zeros and equal steps, with the recurrent weights at zero, every step is alike."""
    layer = VariationalLSTM(3, 4, num_layers=2, hidden_dropout=0.0, input_dropout=0.5)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if "weight_hh" in name:
                weight.zero_()
            if name.startswith("bias"):  # the forget gate is shut
                weight[4:8] = -100.0
    x = torch.randn(1, 50, 3).expand(6, 50, 3)
    gates = layer.unroll(x).i
    for of_layer in gates[:1]:
        torch.testing.assert_close(of_layer, of_layer[:1].expand(6, 50, 4))
    assert len({tuple(row) for row in gates[0][0].tolist()}) > 30  # a mask of zeros for one in eight


@every_recipe
def test_from_a_pretrained_layer_and_back(name: str) -> None:
    cls, official = RECIPES[name], nn.LSTM(3, 4, dtype=torch.float64, **DEEP)
    model = nn.ModuleDict({"encoder": official, "head": nn.Linear(4, 1)})
    weights = dict(official.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = cls.from_lstm(official)
        replace_lstm(model, layer_class=cls)
        replace_lstm(model, layer_class=cls)  # changes nothing
    encoder: Any = model["encoder"]
    assert type(encoder) is cls
    assert all(encoder.get_parameter(key) is weight for key, weight in weights.items())
    assert all(layer.get_parameter(key) is weight for key, weight in weights.items())
    x = randn(5, 2, 3)
    torch.testing.assert_close(encoder.eval()(x), layer.eval()(x), rtol=0, atol=0)
    assert find_lstm(model) == []
    with pytest.warns(UserWarning, match=f"encoder is left as it is: it is a .*{name}, a subclass"):
        restore_lstm(model)
    fresh = cls(3, 4, dtype=torch.float64, **DEEP)
    keys = fresh.load_state_dict(nn.LSTM(3, 4, **DEEP).state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert not any(key.startswith(("weight_", "bias_")) for key in keys.missing_keys)


@every_recipe
def test_reset_parameters(name: str) -> None:
    layer = make_recipe(name)
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    again = type(layer)(3, 4, dtype=torch.float64)
    torch.testing.assert_close(dict(layer.state_dict()), dict(again.state_dict()), rtol=0, atol=0)


def test_a_layer_that_is_swapped_already_gets_the_cell() -> None:
    model = nn.ModuleList([nn.LSTM(3, 4), nn.LSTM(4, 4)])
    replace_lstm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model[0].weight_ih_l0
    replace_lstm(model, layer_class=PeepholeLSTM, target_modules=["0"])
    assert [type(layer) for layer in model] == [PeepholeLSTM, ManualLSTM]
    assert model[0].weight_ih_l0 is weight is optimizer.param_groups[0]["params"][0]
    replace_lstm(model)  # ManualLSTM's subclasses stay
    assert [type(layer) for layer in model] == [PeepholeLSTM, ManualLSTM]


# What a swap says of __init__


class Silent(ManualLSTM):
    rate = 0.5

    def __init__(self, *arguments: Any, rate: float = 0.5, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rate = rate
        self.hidden_size = self.hidden_size


class Loud(ManualLSTM):
    """Everything that a constructor may do; it must not run."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rate = 0.5
        self.first, self.second = 1, 2
        self.linear = nn.Linear(3, 3)
        self.linear.extra = 3  # type: ignore[assignment]
        self.register_buffer("scale", torch.ones(()))
        self.register_parameter("gain", nn.Parameter(torch.ones(())))
        self.add_module("norm", nn.LayerNorm(3))
        setattr(self, "by_name", 3)  # noqa: B010
        self._more()
        self.get = lambda: self.rate  # self is in a closure
        raise AssertionError("not to be run")

    def _more(self) -> None:
        self.later = 3
        self._more_still()

    def _more_still(self) -> None:
        self.last = 3
        self._more()


class Louder(Loud):
    by_name = 3

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.own = 1


LACKING = [
    *("rate", "first", "second", "linear", "scale"),
    *("gain", "norm", "by_name", "later", "last", "get"),
]


def test_what_init_sets_is_read_off_its_code() -> None:
    assert sorted(set_by_init(Loud, ManualLSTM)) == sorted(LACKING)
    assert sorted(set_by_init(Louder, ManualLSTM)) == sorted([*LACKING, "own"])
    assert set_by_init(ManualLSTM, ManualLSTM) == []
    assert set_by_init(type("Plain", (ManualLSTM,), {}), ManualLSTM) == []
    odd = type("Odd", (ManualLSTM,), {"__init__": print})  # no code to read
    assert set_by_init(odd, ManualLSTM) == []


def test_a_swap_names_what_will_be_missing() -> None:
    model = nn.ModuleList([nn.LSTM(3, 4), nn.LSTM(4, 4)])
    with pytest.warns(UserWarning, match="does not run its __init__") as caught:
        replace_lstm(model, layer_class=Louder)
    assert len(caught) == 1  # for both layers
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    names = text.split("the layers lack ")[1].split(":")[0].split(", ")
    assert sorted(names) == sorted({*LACKING, "own"} - {"by_name"})
    assert "Louder" in text
    with pytest.warns(UserWarning, match=r"__init__.*rate") as caught:
        Loud.from_lstm(nn.LSTM(3, 4))
    assert caught[0].filename == __file__


def test_as_an_error_it_changes_nothing() -> None:
    model = nn.ModuleList([nn.LSTM(3, 4), nn.LSTM(4, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="__init__"):
            replace_lstm(model, layer_class=Loud)
        assert [type(layer) for layer in model] == [nn.LSTM, nn.LSTM]
        swapped = nn.ModuleList([Silent(3, 4)])
        replace_lstm(swapped, layer_class=Loud)  # nothing to swap


@pytest.mark.parametrize(
    "cls",
    [
        Silent,
        LayerNormLSTM,
        PeepholeLSTM,
        CoupledLSTM,
        ZoneoutLSTM,
        VariationalLSTM,
        HardSigmoidLSTM,
        ManualLSTM,
    ],
)
def test_classes_with_defaults_are_silent(cls: type[ManualLSTM]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = cls.from_lstm(nn.LSTM(3, 4))
        replace_lstm(nn.ModuleList([nn.LSTM(3, 4)]), layer_class=cls)
    output: Tensor = layer(torch.randn(5, 2, 3))[0]
    assert output.shape == (5, 2, 4)
