"""Find the LSTMs in a checkpoint by their weights, and compare ManualLSTM with nn.LSTM on them.

Checkpoints are not trusted. Only tensors and plain containers are unpickled, never other objects.
"""

import importlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from manual_lstm.check.parity import compare_layers, forward_and_backward, largest_difference
from manual_lstm.module import ManualLSTM

_WEIGHT = re.compile(
    r"(.*\.)?((?:weight_ih|weight_hh|bias_ih|bias_hh|weight_hr)_l(\d+)(_reverse)?)", re.DOTALL
)
_FLOATING = {
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
}


class CheckpointError(Exception):
    """A file cannot be read, or an LSTM in it is incomplete. The message is one line."""


@dataclass
class FoundLSTM:
    """An LSTM found in a checkpoint.

    Attributes:
        name: the path to its weights, such as ``"encoder.rnn"``; empty at the top level.
        weights: its state dict.
        options: the constructor's arguments, without ``batch_first`` and ``dropout``: no weight
            depends on them.
    """

    name: str
    weights: dict[str, Tensor]
    options: dict[str, int | bool | torch.dtype]

    def __str__(self) -> str:
        call = repr(ManualLSTM(**self.options, device="meta"))  # type: ignore[arg-type]
        dtype = self.options["dtype"]
        return call if dtype == torch.float32 else f"{call[:-1]}, dtype={dtype})"


def load_checkpoint(path: str | Path) -> object:
    """Load a file saved by torch.save, or a ``.safetensors`` file, onto the CPU.

    Raises:
        CheckpointError: the file cannot be read, or holds more than tensors and plain containers.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(error.strerror or str(error).splitlines()[0]) from None
    except Exception as error:  # a broken or hostile file may make the readers raise anything
        raise CheckpointError(_reason(path, error)) from None


def _load_safetensors(path: Path) -> object:
    try:
        reader = importlib.import_module("safetensors.torch")
    except ModuleNotFoundError:
        raise CheckpointError("reading .safetensors files needs: pip install safetensors") from None
    return reader.load_file(path, device="cpu")


def _reason(path: Path, error: Exception) -> str:
    """Say in one line why the file was not read."""
    text = str(error)
    refused = re.search(r"GLOBAL\s+([\w.]+)", text)
    if "TorchScript" in text:
        return "is a TorchScript archive, not a checkpoint: save its state_dict()"
    if refused:
        return (
            f"holds more than tensors and plain containers ({refused[1]}), "
            "which is not loaded from an untrusted file: save its state_dict()"
        )
    if path.stat().st_size == 0:
        return "is empty"
    # torch.load wraps the reason in advice on how to load the file unsafely. Only the reason is shown.
    inner = re.search(r"WeightsUnpickler error:\s+(.*)", text)
    text = inner[1] if inner else text
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return f"is not a checkpoint, or is damaged ({type(error).__name__}: {first[:120]})"


def find_lstms(checkpoint: object) -> list[FoundLSTM | CheckpointError]:
    """Find every LSTM in nested dicts, lists and tuples, in the order of the file.

    GRUs and plain RNNs are skipped: their weights have the same names, but fewer rows. Where an LSTM
    lacks a weight, or a weight has the wrong shape or dtype, an error stands in its place.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for path, tensor in _tensors(checkpoint):
        match = _WEIGHT.fullmatch(path)
        if match:
            groups.setdefault((match[1] or "")[:-1], {})[match[2]] = tensor
    lstms: list[FoundLSTM | CheckpointError] = []
    for name, weights in groups.items():
        try:
            if not _is_other_rnn(weights):
                lstms.append(FoundLSTM(name, weights, _infer_options(name, weights)))
        except CheckpointError as error:
            lstms.append(error)
        except Exception as error:  # a hostile file's tensors may raise anything at any use
            lstms.append(CheckpointError(f"LSTM '{name}': cannot be read ({type(error).__name__})"))
    return lstms


def _tensors(checkpoint: object) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with its dotted path.

    A loop, not a recursion: the containers of a file may nest very deeply, or contain themselves.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, object]] = [("", checkpoint)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Tensor):
            yield path, value
            continue
        if isinstance(value, Mapping):
            items = [(str(key), item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            items = [(str(k), item) for k, item in enumerate(value)]
        else:
            continue
        if id(value) not in seen:
            seen.add(id(value))
            waiting += [(f"{path}.{key}" if path else key, item) for key, item in reversed(items)]


def _is_other_rnn(weights: dict[str, Tensor]) -> bool:
    """Return whether these are a GRU's weights, of 3H rows, or a plain RNN's, of H rows."""
    weight_ih, weight_hh = weights.get("weight_ih_l0"), weights.get("weight_hh_l0")
    if weight_ih is None or weight_hh is None or weight_ih.dim() != 2 or weight_hh.dim() != 2:
        return False
    rows, H = weight_hh.shape
    return "weight_hr_l0" not in weights and weight_ih.size(0) == rows and rows in (H, 3 * H)


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


def compare_with_official(lstm: FoundLSTM) -> tuple[float, float, float]:
    """Load the weights into nn.LSTM and ManualLSTM, each also by way of the other, and run both.

    Returns:
        Three numbers: the largest difference of outputs, states and gradients in the checkpoint's
        dtype; the same in float64 (complex128 for complex weights); and the tolerance for the
        second. The tolerance is 1e-9, or a hundred times what a change in the last bits of the input
        does to nn.LSTM itself, whichever is larger: some weights amplify such changes.

    Raises:
        CheckpointError: a weight was changed by ``state_dict`` and ``load_state_dict``, or a layer
            could not be run.
    """
    try:
        return _compare_with_official(lstm)
    except CheckpointError:
        raise
    except Exception as error:  # such as a lack of memory
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"LSTM '{lstm.name}' could not be run: {reason}") from None


def _compare_with_official(lstm: FoundLSTM) -> tuple[float, float, float]:
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
            raise CheckpointError(f"LSTM '{lstm.name}': {key} changed on its way through state_dict")

    input = torch.randn(8, 3, reference.input_size, dtype=wide).to(dtype)  # [T, B, I]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nn.LSTM warns of projections and of complex numbers
        narrow_gap = max(compare_layers(reference, layer, input).values())
        input = input.to(wide)
        wide_gap = max(compare_layers(reference.to(wide), layer.to(wide), input).values())
        expected = forward_and_backward(reference, input, None)
        moved = forward_and_backward(reference, input * (1 + 1e-15), None)
        own_gap = max(largest_difference(expected[name], moved[name]) for name in expected)
    return narrow_gap, wide_gap, max(1e-9, 100 * own_gap)
