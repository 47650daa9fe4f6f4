"""The weights of a layer: with which ones a call computes, and whether the layer's attributes fit them.

A call finds its weights by name, because a parametrized, pruned or replicated weight is not in the
layer's ``_parameters``. nn.LSTM keeps a list of them besides, ``_flat_weights``, which people read and
assign.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from torch import Tensor

from manual_lstm.engine.context import is_tracing

# What _flat_weights was assigned, and the layer's own weights at that time.
Assigned = tuple[list[Tensor | None], list[Tensor | None]]


class Layer(Protocol):
    """What a layer says of its weights."""

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    _all_weights: list[list[str]]  # the names of each layer and direction
    _parameters: dict[str, Any]
    _assigned: Assigned | None


def kind_of(name: str) -> str:
    """The kind of a weight: ``weight_ih`` of ``weight_ih_l0_reverse``."""
    return name[: name.index("_l")]


def count_directions(layer: Layer) -> int:
    """The number of directions of all layers, L * D."""
    return layer.num_layers * (2 if layer.bidirectional else 1)


def flat_names(layer: Layer) -> list[str]:
    """The names of all weights."""
    return [name for names in layer._all_weights for name in names]


def read_weights(layer: Layer, check_shapes: bool) -> list[dict[str, Any]]:
    """The weights of each direction by kind, each read once.

    As nn.LSTM, the layer computes with the first of its weights if its attributes ask for fewer.

    Args:
        layer: the layer that is called.
        check_shapes: whether each weight should have the shape that nn.LSTM's has.

    Raises:
        TypeError: an attribute is of the wrong type.
        RuntimeError: the attributes do not fit the weights.
    """
    _check_types(layer)
    D = 2 if layer.bidirectional else 1
    directions, count = layer._all_weights, count_directions(layer)
    if len(directions) != count:
        if not 0 < count < len(directions):
            _refuse_attributes(layer)
        directions = directions[:count]
    shapes = weight_shapes(layer, 0)
    if len(directions[0]) != len(shapes):
        if not _fits_without_bias(layer):
            _refuse_attributes(layer)
        directions = [directions[0][:2]]
    assigned = None if layer._assigned is None else dict(zip(flat_names(layer), flat_weights(layer)))
    check_shapes = check_shapes and not is_tracing()  # sizes are symbols there
    parameters = layer._parameters
    weights = []
    for k, names in enumerate(directions):
        if k == D:
            shapes = weight_shapes(layer, 1)
        w: dict[str, Any] = {}
        for name, kind in zip(names, shapes):
            if assigned is not None:
                weight = assigned[name]
            else:
                weight = parameters[name] if name in parameters else getattr(layer, name)
            if weight is None or (check_shapes and weight.shape != shapes[kind]):
                _refuse_attributes(layer)
            w[kind] = weight
        weights.append(w)
    return weights


def own_weights(layer: Any) -> list[Any]:
    """The weights that an nn.LSTM or a ManualLSTM has by name; ``None`` for one that is gone."""
    return [getattr(layer, name, None) for name in layer._flat_weights_names]


def flat_weights(layer: Layer) -> list[Any]:
    """The tensors with which the layer computes, as they stand in ``_flat_weights``."""
    own = own_weights(layer)
    if layer._assigned is not None:
        assigned, instead_of = layer._assigned
        if all(weight is old for weight, old in zip(own, instead_of)):
            return assigned
    return own  # nn.LSTM, too, forgets what was assigned when any weight is another object


def weight_shapes(layer: Layer, k: int) -> dict[str, tuple[int, ...]]:
    """The kinds and shapes of the weights of layer k, in either direction, in the order of nn.LSTM."""
    H, P = layer.hidden_size, layer.proj_size
    D = 2 if layer.bidirectional else 1
    features = layer.input_size if k == 0 else D * (P or H)
    shapes: dict[str, tuple[int, ...]] = {
        "weight_ih": (4 * H, features),
        "weight_hh": (4 * H, P or H),
    }
    if layer.bias:
        shapes |= {"bias_ih": (4 * H,), "bias_hh": (4 * H,)}
    if P:
        shapes["weight_hr"] = (P, H)
    return shapes


def _check_types(layer: Layer) -> None:
    if (
        layer.bias.__class__ is layer.batch_first.__class__ is layer.bidirectional.__class__ is bool
        and layer.num_layers.__class__
        is layer.hidden_size.__class__
        is layer.proj_size.__class__
        is int
        and layer.dropout.__class__ is float
    ):
        return
    for name in ("bias", "batch_first", "bidirectional"):
        if not isinstance(getattr(layer, name), bool):
            _refuse_type(layer, name, "a bool")
    for name in ("hidden_size", "num_layers", "proj_size"):
        try:
            operator.index(getattr(layer, name))
        except TypeError:
            _refuse_type(layer, name, "an int")
    try:
        layer.dropout > 0  # noqa: B015
    except TypeError:
        _refuse_type(layer, "dropout", "a number")


def _refuse_type(layer: Layer, name: str, expected: str) -> NoReturn:
    value = getattr(layer, name)
    raise TypeError(
        f"the layer's attribute {name} should be {expected}, but got {value!r} ({type(value).__name__})"
    ) from None


def _refuse_attributes(layer: Layer) -> NoReturn:
    """Say which attributes do not fit the weights, or which weight does not fit the attributes."""
    sizes = {
        name: None if weight is None else list(weight.shape)
        for name, weight in zip(flat_names(layer), flat_weights(layer))
    }
    wrong = {
        name: value
        for name, value in _attributes_of(sizes).items()
        if getattr(layer, name) != value
        and not (name == "num_layers" and 0 < layer.num_layers < value)
        and not (name == "bias" and _fits_without_bias(layer))
    }
    if wrong:
        given = ", ".join(f"{name}={getattr(layer, name)}" for name in wrong)
        expected = ", ".join(f"{name}={value}" for name, value in wrong.items())
        raise RuntimeError(
            f"the layer's attributes should fit its weights, so {expected}, but got {given}. "
            "Set them back, or make a new layer"
        )
    D = 2 if layer.bidirectional else 1
    fitting = {
        name: list(shape)
        for k, names in enumerate(layer._all_weights)
        for name, shape in zip(names, weight_shapes(layer, k // D).values())
    }
    name = next(name for name, size in fitting.items() if size != sizes[name])
    raise RuntimeError(f"{name} should be of size {fitting[name]}, but got {sizes[name]}")


def _fits_without_bias(layer: Layer) -> bool:
    """Whether the biases may be left out: nn.LSTM takes weights in their order, and would take them."""
    return not layer.bias and count_directions(layer) == 1 and len(layer._all_weights[0]) == 4


def _attributes_of(sizes: Mapping[str, Sequence[int] | None]) -> dict[str, int]:
    """The attributes of a layer whose weights have these sizes."""
    directions = [name for name in sizes if name.startswith("weight_ih")]
    D = 2 if any(name.endswith("_reverse") for name in directions) else 1
    attributes = {
        "num_layers": len(directions) // D,
        "bias": "bias_ih_l0" in sizes,
        "bidirectional": D == 2,
    }
    if size := sizes["weight_ih_l0"]:
        attributes |= {"input_size": size[-1], "hidden_size": size[0] // 4}
    if "weight_hr_l0" not in sizes:
        attributes["proj_size"] = 0
    elif size := sizes["weight_hr_l0"]:
        attributes["proj_size"] = size[0]
    return attributes


class FlatWeights(list[Any]):
    """The weights of a layer in one list, nn.LSTM's ``_flat_weights``.

    To assign an item changes with what the layer computes, as with nn.LSTM. The length stays.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(flat_weights(layer))
        self._layer = layer

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value)
        assign_flat_weights(self._layer, self)

    def __reduce__(self) -> Any:
        return list, (list(self),)  # a copy belongs to no layer

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            "_flat_weights should keep its weights and their order: assign an item, or a whole list"
        )

    append = extend = insert = pop = remove = clear = reverse = sort = _refuse
    __delitem__ = __iadd__ = __imul__ = _refuse


def assign_flat_weights(layer: Layer, weights: Iterable[Tensor | None]) -> None:
    """Let a layer compute with these tensors, which stand in the order of its weights.

    The layer's parameters stay as they are. They come back when one of them is set, and when the layer
    is copied or moved, as with nn.LSTM.

    Raises:
        TypeError: something is neither a tensor nor ``None``.
        ValueError: there are more than the layer has weights.
    """
    names, given = flat_names(layer), list(weights)
    for weight in given:
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"_flat_weights should have tensors, but got {type(weight).__name__}")
    if len(given) > len(names):
        raise ValueError(f"_flat_weights should have {len(names)} tensors, but got {len(given)}")
    given += [None] * (len(names) - len(given))
    own = own_weights(layer)
    same = all(weight is mine for weight, mine in zip(given, own))
    layer._assigned = None if same else (given, own)
