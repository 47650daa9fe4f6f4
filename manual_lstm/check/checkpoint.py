"""Find the LSTMs in a checkpoint by their weights, and compare ManualLSTM with nn.LSTM on them.

Checkpoints are not trusted. Only tensors and plain containers are unpickled; for any other object there
is a stand-in, which does nothing.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from manual_lstm.check.derived import with_derived
from manual_lstm.check.loading import CheckpointError
from manual_lstm.check.parity import compare_layers, forward_and_backward, largest_difference
from manual_lstm.check.rebuilt import MOST_REPEATED, as_tensor
from manual_lstm.check.stand_ins import StandIn
from manual_lstm.module import ManualLSTM

_WEIGHT = re.compile(
    r"(.*\.)?((?:weight_ih|weight_hh|bias_ih|bias_hh|weight_hr)_l(\d+)(_reverse)?)", re.DOTALL
)
_CELL_WEIGHT = re.compile(r"(.*\.)?(weight_ih|weight_hh|bias_ih|bias_hh)", re.DOTALL)
_OWN = re.compile(r"(.*\.)?(\w+_l\d+(?:_reverse)?)", re.DOTALL)  # of a changed cell
_QUANTIZED = re.compile(r"(.*\.)?(_all_weight_values|_packed_weight_ih)\..*", re.DOTALL)
_LONGEST_PATH = 1000  # of characters: paths in a deep container would fill the memory
_PYTHONS_OWN = ("builtins.", "__builtin__.", "collections.", "torch.Size", "torch.device")
_FLOATING = {
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
}


@dataclass
class FoundLSTM:
    """An LSTM found in a checkpoint.

    Attributes:
        name: the path to its weights, such as ``"encoder.rnn"``; empty at the top level.
        weights: its state dict.
        options: the constructor's arguments, without ``batch_first`` and ``dropout``: no weight
            depends on them.
        notes: what else there is to say: how a weight was computed, what was left out.
    """

    name: str
    weights: dict[str, Tensor]
    options: dict[str, int | bool | torch.dtype]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        call = repr(ManualLSTM(**self.options, device="meta"))  # type: ignore[arg-type]
        dtype = self.options["dtype"]
        return call if dtype == torch.float32 else f"{call[:-1]}, dtype={dtype})"


class OtherLayer(CheckpointError):
    """A layer that is no LSTM, or one that cannot be compared. It is named, and no failure."""


def find_lstms(
    checkpoint: object, foreign: Counter[str] | None = None
) -> list[FoundLSTM | CheckpointError]:
    """Find every recurrent layer in nested containers and stand-ins, in the order of the file.

    Where an LSTM lacks a weight, or a weight has the wrong shape or dtype, an error stands in its
    place, and in the place of a GRU, a plain RNN or a quantized LSTM an :class:`OtherLayer`. An
    nn.LSTMCell counts as an LSTM of one layer.

    Args:
        checkpoint: what was loaded.
        foreign: receives the names of the objects of other packages, and how many there are of each.
    """
    foreign = Counter() if foreign is None else foreign
    tensors = dict(_tensors(checkpoint, foreign))
    quantized = {
        (match[1] or "")[:-1]: "cell" if match[2] == "_packed_weight_ih" else "recurrent layer"
        for match in map(_QUANTIZED.fullmatch, tensors)
        if match
    }
    tensors, how = with_derived(tensors)
    groups: dict[str, dict[str, Tensor]] = {}
    beside: dict[str, list[str]] = {}
    computed: dict[str, list[str]] = {}
    for path, tensor in tensors.items():
        match, cell = _WEIGHT.fullmatch(path), _CELL_WEIGHT.fullmatch(path)
        if match:
            name, kind = (match[1] or "")[:-1], match[2]
        elif cell:
            name, kind = (cell[1] or "")[:-1], cell[2] + "_l0"
        else:
            if own := _OWN.fullmatch(path):
                beside.setdefault((own[1] or "")[:-1], []).append(own[2])
            continue
        if name in quantized:
            continue
        groups.setdefault(name, {})[kind] = tensor
        if path in how:
            computed.setdefault(name, []).append(how[path])
    not_made: dict[str, str] = {}
    for path, made in how.items():
        match = _WEIGHT.fullmatch(path)
        if match and path not in tensors:
            not_made.setdefault((match[1] or "")[:-1], f"{match[2]} is {made}")
    lstms: list[FoundLSTM | CheckpointError] = []
    for name, weights in groups.items():
        try:
            if name in not_made:
                raise CheckpointError(f"{_layer(name)}: {not_made[name]}")
            kind = _kind(weights)
            is_cell = f"{name}.weight_ih".lstrip(".") in tensors
            if kind != "LSTM":
                raise OtherLayer(f"{_layer(name)} is a {kind}{'Cell' * is_cell}, which is not compared")
            notes = [f"an {kind}Cell, as one layer"] if is_cell else []
            notes += computed.get(name, [])
            if name in beside:
                notes.append(f"without the cell's own {', '.join(beside[name])}")
            lstms.append(FoundLSTM(name, weights, _infer_options(name, weights), tuple(notes)))
        except CheckpointError as error:
            lstms.append(error)
        except Exception:  # a hostile file's tensors may raise anything at any use
            lstms.append(CheckpointError(f"{_layer(name)}: its weights cannot be read"))
    lstms += [
        CheckpointError(f"{_layer(name)}: {what}")
        for name, what in not_made.items()
        if name not in groups
    ]
    return lstms + [
        OtherLayer(f"{_layer(name)} is a quantized {kind}: to compare it, save the model before")
        for name, kind in quantized.items()
    ]


def _layer(name: str) -> str:
    """How a message calls a layer."""
    return f"'{name}'" if name else "the layer"


def _tensors(checkpoint: object, foreign: Counter[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with its dotted path.

    A loop, not a recursion: the containers of a file may nest very deeply, or contain themselves.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, object]] = [("", checkpoint)]
    while waiting:
        path, value = waiting.pop()
        items: Iterable[tuple[object, object]]
        if isinstance(value, Tensor):
            yield path, value
            continue
        if id(value) in seen:
            continue
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, (list, tuple, set, frozenset)):
            items = enumerate(value)
        elif isinstance(value, StandIn):
            tensor = as_tensor(value)
            if tensor is not None:
                yield path, tensor
                continue
            if not value.name.startswith(_PYTHONS_OWN):
                foreign[value.name] += 1
            items = value.children()
        else:
            continue
        seen.add(id(value))
        waiting += reversed(list(_with_paths(path, items)))


def _with_paths(path: str, items: Iterable[tuple[object, object]]) -> Iterator[tuple[str, object]]:
    """Name the items of a container; a key that is there again, as another type, is told apart."""
    if len(path) > _LONGEST_PATH:
        path = f"{path[: _LONGEST_PATH // 2]}...{path[-_LONGEST_PATH // 2 :]}"
    keys: Counter[str] = Counter()
    for key, item in items:
        if isinstance(item, (Tensor, Mapping, list, tuple, set, frozenset, StandIn)):
            name = str(key)[-_LONGEST_PATH:]
            keys[name] += 1
            name = name if keys[name] == 1 else f"{name} ({keys[name]})"
            yield ".".join(filter(None, (path, name))), item


def _kind(weights: dict[str, Tensor]) -> str:
    """Whether these are the weights of an LSTM, a GRU, of 3H rows, or a plain RNN, of H rows."""
    weight_ih, weight_hh = weights.get("weight_ih_l0"), weights.get("weight_hh_l0")
    if weight_ih is None or weight_hh is None or weight_ih.dim() != 2 or weight_hh.dim() != 2:
        return "LSTM"
    rows, H = weight_hh.shape
    if "weight_hr_l0" in weights or weight_ih.size(0) != rows or rows not in (H, 3 * H):
        return "LSTM"
    return "RNN" if rows == H else "GRU"


def _infer_options(name: str, weights: dict[str, Tensor]) -> dict[str, int | bool | torch.dtype]:
    """Infer the constructor's arguments, and check every weight against them."""
    where = f"LSTM '{name}'" if name else "LSTM"
    for key in ("weight_ih_l0", "weight_hh_l0"):
        if key not in weights:
            raise CheckpointError(f"{where}: missing {key}")
        if weights[key].dim() != 2:
            raise CheckpointError(f"{where}: {key} should be 2-D, but is {list(weights[key].shape)}")
    dtype = weights["weight_ih_l0"].dtype
    for key, tensor in weights.items():
        if tensor.is_meta:
            raise CheckpointError(f"{where}: {key} is a meta tensor: it was saved without its values")
        if tensor.layout == torch.strided and tensor.numel() > MOST_REPEATED:
            held = tensor.untyped_storage().nbytes() // tensor.element_size()
            if tensor.numel() > held:
                raise CheckpointError(
                    f"{where}: {key} has {tensor.numel()} numbers, of which the file holds {held}"
                )
        if tensor.dtype != dtype or dtype not in _FLOATING or tensor.layout != torch.strided:
            expected = "dense, floating-point or complex" if key == "weight_ih_l0" else f"dense {dtype}"
            raise CheckpointError(
                f"{where}: {key} should be {expected}, but is {tensor.layout} {tensor.dtype}"
            )

    rows, columns = weights["weight_hh_l0"].shape  # [4H, P or H]
    options: dict[str, int | bool | torch.dtype] = {
        "input_size": weights["weight_ih_l0"].size(1),
        "hidden_size": rows // 4,
        "num_layers": 1 + max(int(re.findall(r"_l(\d+)", key)[-1]) for key in weights),
        "bias": any(key.startswith("bias") for key in weights),
        "bidirectional": any(key.endswith("_reverse") for key in weights),
        "proj_size": columns if any(key.startswith("weight_hr") for key in weights) else 0,
        "dtype": dtype,
    }
    if options["num_layers"] > len(weights):  # type: ignore[operator]
        raise CheckpointError(f"{where}: {len(weights)} weights for {options['num_layers']} layers")
    try:
        expected_shapes = ManualLSTM(**options, device="meta").state_dict()  # type: ignore[arg-type]
    except ValueError as error:
        raise CheckpointError(f"{where}: misshapen weights: {error}") from None
    for key, expected_tensor in expected_shapes.items():
        if key not in weights:
            raise CheckpointError(f"{where}: missing {key}")
        expected_shape, shape = list(expected_tensor.shape), list(weights[key].shape)
        if shape != expected_shape:
            raise CheckpointError(f"{where}: {key} should be {expected_shape}, but is {shape}")
    surplus = [key for key in weights if key not in expected_shapes]
    if surplus:
        raise CheckpointError(f"{where}: unexpected {', '.join(surplus)}")
    return options


class Comparison(NamedTuple):
    """How far ManualLSTM is from nn.LSTM, in outputs, states and gradients.

    Attributes:
        gap: the largest difference in the checkpoint's dtype.
        own_gap: the largest difference of nn.LSTM itself, in that dtype, from nn.LSTM in float64.
        wide_gap: the largest difference in float64 (complex128 for complex weights).
        tolerance: that for ``wide_gap``: 1e-9, or a hundred times what a change in the last bits of the
            input does to nn.LSTM itself, whichever is larger: some weights amplify such changes.
    """

    gap: float
    own_gap: float
    wide_gap: float
    tolerance: float


def compare_with_official(lstm: FoundLSTM) -> Comparison:
    """Load the weights into nn.LSTM and ManualLSTM, each also by way of the other, and run both.

    Raises:
        CheckpointError: a weight was changed by ``state_dict`` and ``load_state_dict``, or a layer
            could not be run.
    """
    try:
        return _compare_with_official(lstm)
    except CheckpointError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = "not enough memory" if "allocate" in lines[0] else lines[0]
        raise CheckpointError(f"{_layer(lstm.name)} could not be run: {reason}") from None


def _compare_with_official(lstm: FoundLSTM) -> Comparison:
    torch.manual_seed(0)
    dtype = lstm.options["dtype"]
    assert isinstance(dtype, torch.dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    reference = nn.LSTM(**lstm.options)
    layer = ManualLSTM(**lstm.options)  # type: ignore[arg-type]
    reference.load_state_dict(lstm.weights)
    layer.load_state_dict(reference.state_dict())
    reference.load_state_dict(layer.state_dict())
    for key, weight in lstm.weights.items():
        if any(largest_difference(weight, each.state_dict()[key]) for each in (reference, layer)):
            raise CheckpointError(f"{_layer(lstm.name)}: {key} changed on its way through state_dict")

    input = torch.randn(8, 3, reference.input_size, dtype=wide).to(dtype)  # [T, B, I]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nn.LSTM warns of projections and of complex numbers
        narrow_gap = max(compare_layers(reference, layer, input).values())
        narrow = forward_and_backward(reference, input, None)
        input = input.to(wide)
        wide_gap = max(compare_layers(reference.to(wide), layer.to(wide), input).values())
        expected = forward_and_backward(reference, input, None)
        moved = forward_and_backward(reference, input * (1 + 1e-15), None)
        last_bits = max(largest_difference(expected[name], moved[name]) for name in expected)
        own_gap = max(largest_difference(expected[name], narrow[name].to(wide)) for name in expected)
    return Comparison(narrow_gap, own_gap, wide_gap, max(1e-9, 100 * last_bits))
