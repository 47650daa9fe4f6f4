"""The inside that people reach into: attributes edited after construction, and nn.LSTM's lists."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import pack_sequence

from manual_lstm import ManualLSTM, replace_lstm, restore_lstm
from tests.helpers.layers import DEEP, make_layer, randn

VALUES: dict[str, list[Any]] = {
    "input_size": [3, 4, 5],
    "hidden_size": [3, 4, 5],
    "num_layers": [0, 1, 2, 3],
    "bias": [False, True],
    "batch_first": [False, True],
    "dropout": [0.0, 0.5],
    "bidirectional": [False, True],
    "proj_size": [0, 1, 2],
}
BUILT = {name: [v for v in values if v not in (0, 5)] for name, values in VALUES.items()}
BUILT |= {"bias": [False, True], "bidirectional": [False, True], "proj_size": [0, 1, 2]}


def _fitting(layer: ManualLSTM, options: dict[str, Any]) -> nn.LSTM | None:
    """The nn.LSTM with these options and the first of the layer's weights; ``None`` if they misfit."""
    if options["num_layers"] == 0 or options["proj_size"] >= options["hidden_size"]:
        return None
    reference = nn.LSTM(**options, dtype=torch.float64)
    biases = "bias_ih_l0" in layer.state_dict()
    if biases and not options["bias"] and (len(reference._all_weights) > 1 or options["proj_size"]):
        return None  # nn.LSTM takes its weights in their order, and so takes biases for weights
    for names, their_names in zip(reference._all_weights, layer._all_weights):
        wanted = {name.split("_l")[0]: reference.get_parameter(name) for name in names}
        given = {name.split("_l")[0]: layer.get_parameter(name) for name in their_names}
        if not options["bias"]:
            given = {kind: w for kind, w in given.items() if not kind.startswith("bias")}
        if {k: w.shape for k, w in wanted.items()} != {k: w.shape for k, w in given.items()}:
            return None
        with torch.no_grad():
            for kind, weight in wanted.items():
                weight.copy_(given[kind])
    return reference if len(reference._all_weights) <= len(layer._all_weights) else None


@pytest.mark.filterwarnings("ignore:dropout")
@given(
    built=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in BUILT.items()}),
    edit=st.sampled_from([(name, value) for name, values in VALUES.items() for value in values]),
    with_hx=st.booleans(),
)
def test_an_edited_attribute_takes_effect_where_it_fits_the_weights_and_raises_otherwise(
    built: dict[str, Any], edit: tuple[str, Any], with_hx: bool
) -> None:
    layer = ManualLSTM(**built, dtype=torch.float64)
    name, value = edit
    setattr(layer, name, value)
    options = {**built, name: value}
    reference = _fitting(layer, options)
    x = randn(4, 2, options["input_size"])
    hx = None
    if with_hx and reference is not None:
        B = 4 if options["batch_first"] else 2
        H, P = options["hidden_size"], options["proj_size"]
        rows = len(reference._all_weights)
        hx = randn(rows, B, P or H), randn(rows, B, H)
    torch.manual_seed(0)
    if reference is None:
        with pytest.raises(RuntimeError, match=rf"attributes should fit .*{name}={value}\. Set"):
            layer(x, hx)
        setattr(layer, name, built[name])
        layer(randn(4, 2, built["input_size"]))
        return
    output = layer(x, hx)
    torch.manual_seed(0)
    torch.testing.assert_close(output, reference(x, hx), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "edit", [("num_layers", 1), ("bias", False), ("bidirectional", False)], ids=str
)
def test_an_edit_does_what_it_does_to_nn_lstm(edit: tuple[str, Any]) -> None:
    options = {
        "bidirectional": edit[0] == "bidirectional",
        "num_layers": 3 if edit[0] == "num_layers" else 1,
    }
    lstm = nn.LSTM(3, 4, **options)
    layer = ManualLSTM.from_lstm(lstm)
    x = torch.randn(5, 2, 3)  # dense float32, which nn.LSTM gives to oneDNN: its own loop refuses
    for each in (lstm, layer):
        setattr(each, *edit)
    torch.testing.assert_close(layer(x), lstm(x), rtol=0, atol=1e-6)
    assert repr(layer) == repr(lstm).replace("LSTM", "ManualLSTM")
    torch.testing.assert_close(layer.to_lstm()(x), lstm(x))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bias", 1),
        ("batch_first", None),
        ("bidirectional", 0),
        ("num_layers", 2.0),
        ("num_layers", None),
        ("proj_size", "0"),
        ("dropout", "0.5"),
        ("dropout", None),
    ],
)
def test_an_attribute_of_another_type_is_named(name: str, value: Any) -> None:
    lstm, x = nn.LSTM(3, 4, 2), torch.randn(5, 2, 3)
    layer = ManualLSTM.from_lstm(lstm)
    for each in (lstm, layer):
        setattr(each, name, value)
    with pytest.raises(TypeError):
        lstm(x)
    with pytest.raises(TypeError, match=f"{name} should be a.*{value!r}"):
        layer(x)


def test_a_dropout_out_of_range_raises_as_for_nn_lstm() -> None:
    for layer in (nn.LSTM(3, 4, 2), ManualLSTM(3, 4, 2)):
        for wrong in (-1.0, 2.0):
            layer.dropout = wrong
            with pytest.raises(RuntimeError, match="probability"):
                layer(torch.randn(5, 2, 3))


def test_a_weight_of_another_size_is_named_and_one_that_fits_the_attributes_is_taken() -> None:
    layer = make_layer(num_layers=2)
    layer.weight_hh_l1 = nn.Parameter(randn(16, 5))
    with pytest.raises(RuntimeError, match=r"weight_hh_l1 should be of size \[16, 4\].*\[16, 5\]"):
        layer(randn(5, 2, 3))
    layer = make_layer()
    layer.weight_ih_l0 = nn.Parameter(
        torch.cat([layer.get_parameter("weight_ih_l0"), randn(16, 2)], dim=1)
    )
    with pytest.raises(RuntimeError, match="input_size=5, but got input_size=3"):
        layer(randn(5, 2, 5))
    layer.input_size = 5
    assert layer(randn(5, 2, 5))[0].shape == (5, 2, 4)


def test_integers_of_other_kinds() -> None:
    for integer in (np.int64(3), np.uint8(3), torch.tensor(3)):
        options: dict[str, Any] = {"num_layers": integer, "proj_size": integer}
        lstm = nn.LSTM(3, 4, **options)
        layer = ManualLSTM(3, 4, **options)
        layer.load_state_dict(lstm.state_dict())
        x = torch.randn(5, 2, 3)
        torch.testing.assert_close(layer(x), lstm(x))
        assert repr(layer) == repr(lstm).replace("LSTM", "ManualLSTM")
        assert type(layer.num_layers) is type(layer.proj_size) is int
        swapped = replace_lstm(lstm)
        torch.testing.assert_close(swapped(x), layer(x))
        if not isinstance(integer, Tensor):
            assert _compiled(swapped)(x)[0].shape == (5, 2, 3)
    for wrong in (True, 2.0):
        with pytest.raises(TypeError, match="num_layers should be an int"):
            ManualLSTM(3, 4, wrong)  # type: ignore[arg-type]


# The lists that nn.LSTM keeps.


def test_the_lists_are_nn_lstms() -> None:
    several: list[dict[str, Any]] = [{}, {"num_layers": 2, "bias": False}, DEEP]
    for options in several:
        lstm: Any = nn.LSTM(3, 4, **options)
        layer: Any = ManualLSTM.from_lstm(lstm)
        assert layer._all_weights == lstm._all_weights
        assert layer._flat_weights_names == lstm._flat_weights_names
        assert isinstance(layer._flat_weights, list)
        assert len(layer._flat_weights) == len(lstm._flat_weights)
        assert all(ours is theirs for ours, theirs in zip(layer._flat_weights, lstm._flat_weights))


def test_the_recipe_for_the_forget_gates_bias() -> None:
    layer = make_layer(num_layers=2, bidirectional=True)
    for names in layer._all_weights:  # the recipe of discuss.pytorch.org/t/1745
        for name in filter(lambda n: "bias" in n, names):
            bias = getattr(layer, name)
            n = bias.size(0)
            bias.data[n // 4 : n // 2].fill_(1.0)
    assert all(
        bool((layer.get_parameter(n)[4:8] == 1).all())
        for n in dict(layer.named_parameters())
        if "bias" in n
    )


def _drop_weights(layer: Any, x: Tensor) -> list[Tensor]:
    kept = layer._flat_weights
    layer._flat_weights = [
        dropout(w, 0.5) if name.startswith("weight_hh") else w
        for w, name in zip(kept, layer._flat_weights_names)
    ]
    layer.flatten_parameters()
    dropped = layer(x)[0]
    layer._flat_weights = kept
    return [dropped, layer(x)[0], *torch.autograd.grad(dropped.sum(), list(layer.parameters()))]


def _assign_items(layer: Any, x: Tensor) -> list[Tensor]:
    layer._flat_weights[0] = torch.full_like(layer._flat_weights[0], 0.01)
    layer._flat_weights[-1] = torch.full_like(layer._flat_weights[-1], 0.02)
    assert not bool((layer.weight_ih_l0 == 0.01).all())
    return [layer(x)[0], layer._flat_weights[0]]


def _without_parameters(layer: Any, x: Tensor) -> list[Tensor]:
    weights = [w.detach() / 2 for w in layer._flat_weights]
    for name in layer._flat_weights_names:
        delattr(layer, name)
    layer._flat_weights = []
    layer._flat_weights = weights
    return [layer(x)[0]]


def _then(act: Callable[[Any], Any]) -> Callable[[Any, Tensor], list[Tensor]]:
    """Assign, then do something that makes nn.LSTM take its own weights again."""

    def run(layer: Any, x: Tensor) -> list[Tensor]:
        _assign_items(layer, x)
        layer = act(layer) or layer
        return [layer(x)[0], *layer._flat_weights]

    return run


def _set_another(layer: Any) -> None:
    layer.weight_hh_l0 = nn.Parameter(torch.full_like(layer.weight_hh_l0, 0.03))


def _compiled(layer: Any) -> Any:
    return torch.compile(layer, backend="eager")


ACTS: dict[str, Callable[[Any, Tensor], list[Tensor]]] = {
    "weight drop": _drop_weights,
    "items": _assign_items,
    "no parameters": _without_parameters,
    "then to": _then(lambda layer: layer.float()),
    "then set": _then(_set_another),
    "then copy": _then(copy.deepcopy),
    "then pickle": _then(lambda layer: pickle.loads(pickle.dumps(layer))),
    "then load": _then(lambda layer: layer.load_state_dict(layer.state_dict()) and None),
    "compiled": lambda layer, x: [
        *_assign_items(layer, x),
        _compiled(layer)(x)[0],
    ],
}


@pytest.mark.parametrize("act", ACTS)
def test_what_flat_weights_are_assigned_takes_effect_as_for_nn_lstm(act: str) -> None:
    lstm, x = nn.LSTM(3, 4, 2, bidirectional=True), torch.randn(5, 2, 3)
    layer = ManualLSTM.from_lstm(copy.deepcopy(lstm))
    results = []
    for each in (lstm, layer):
        torch.manual_seed(0)
        results.append(ACTS[act](each, x))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


def test_a_swap_keeps_what_flat_weights_were_assigned() -> None:
    lstm, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = _assign_items(lstm, x)[0]
    assert not torch.equal(nn.LSTM.forward(copy.deepcopy(lstm), x)[0], expected)  # a copy forgets it
    torch.testing.assert_close(replace_lstm(lstm)(x)[0], expected)
    torch.testing.assert_close(restore_lstm(lstm)(x)[0], expected)


def test_what_would_have_no_effect_raises() -> None:
    layer: Any = make_layer()
    with pytest.raises(TypeError, match="keep its weights and their order"):
        layer._flat_weights.append(randn(3))
    with pytest.raises(TypeError, match="should have tensors, but got str"):
        layer._flat_weights = ["weight"]
    with pytest.raises(ValueError, match="should have 4 tensors, but got 5"):
        layer._flat_weights = [*layer._flat_weights, randn(3)]
    with pytest.raises(AttributeError):
        layer._flat_weights_names = ["weight_ih_l0"]
    layer._flat_weights = layer._flat_weights[:2]
    with pytest.raises(RuntimeError, match=r"bias_ih_l0 should be of size \[16\], but got None"):
        layer(randn(5, 2, 3))


# Weights that are a subclass of Tensor, as those of torchao and DTensor.


class _Halves(Tensor):
    """A weight kept as its half, which knows only linear."""

    part: Tensor

    @staticmethod
    def __new__(cls, part: Tensor) -> "_Halves":
        return torch.Tensor._make_wrapper_subclass(cls, part.shape, dtype=part.dtype)

    def __init__(self, part: Tensor) -> None:
        self.part = part

    def __tensor_flatten__(self) -> Any:
        return ["part"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            x, weight, bias = (*args, None)[:3]
            return func(x, 2 * weight.part, bias)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].part)
        raise NotImplementedError(f"{func} of such a weight")


@pytest.mark.parametrize("options", [{}, {"bias": False, "batch_first": True}, DEEP], ids=str)
def test_a_weight_of_a_subclass_of_tensor_works_where_linear_does(options: dict[str, Any]) -> None:
    layer = make_layer(**options).requires_grad_(False)
    x, packed = randn(5, 2, 3), pack_sequence([randn(4, 3), randn(2, 3)])
    calls: list[Callable[[], Any]] = [
        lambda: layer(x),
        lambda: layer(x[:1, :1]),
        lambda: layer(packed),
        lambda: layer(x[0]),
        lambda: tuple(layer.unroll(x).i),
        lambda: layer(x.expand(-1, 2, -1).repeat(1, 100, 1)),
    ]
    expected = [call() for call in calls]
    for name, weight in list(layer.named_parameters()):
        if name.startswith("weight"):
            setattr(layer, name, nn.Parameter(_Halves(weight / 2), requires_grad=False))
    for call, answer in zip(calls, expected):
        torch.testing.assert_close(call(), answer, rtol=0, atol=1e-12)
    with pytest.raises(NotImplementedError):
        nn.LSTM.forward(layer.to_lstm(), x)
