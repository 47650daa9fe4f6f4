"""What is timed beside nn.LSTM: ManualLSTM, and its peers by name.

Each contender gets nn.LSTM's weights and input. It is timed only if its output and its gradients are
those of nn.LSTM.
"""

import copy
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Runner, clock
from benchmarks.workload import TRAINING, Workload
from manual_lstm import ManualLSTM, plain_loop

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
MOST_TILE_BYTES = 512e6  # above this, the notebook's function, which copies weights, is left out


@dataclass
class Contender:
    """An LSTM that can be timed.

    Attributes:
        forward: the call, from the input to the output as one tensor.
        x: the input, in the layout that ``forward`` takes.
        parameters: the tensors that get gradients.
        around: a context in which it runs, for switches of torch.
        as_official: brings the output into nn.LSTM's shape.
    """

    forward: Callable[[Any], Tensor]
    x: Any
    parameters: list[Tensor]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    as_official: Callable[[Tensor], Tensor] = torch.Tensor.detach

    def inference(self) -> Tensor:
        """Run the forward. The caller has switched gradients off."""
        return self.forward(self.x)

    def training(self) -> Tensor:
        """Run forward and backward, after clearing gradients as an optimizer's zero_grad does."""
        for parameter in self.parameters:
            parameter.grad = None
        output = self.forward(self.x)
        output.sum().backward()  # type: ignore[no-untyped-call]
        return output

    def step(self, mode: str) -> Callable[[], Tensor]:
        return self.training if mode == TRAINING else self.inference

    @contextmanager
    def during(self, mode: str) -> Iterator[None]:
        """Enter the context in which it runs in this mode."""
        with torch.set_grad_enabled(mode == TRAINING), self.around():
            yield

    def runner(self, mode: str) -> Runner:
        """Return what :func:`interleave` times."""
        return Runner(self.step(mode), lambda: self.during(mode))


@dataclass(frozen=True)
class Peer:
    """Another LSTM, or nn.LSTM or ManualLSTM run in another way.

    Attributes:
        heading: the two lines above its column, of at most six characters each.
        about: what it is, in one line.
        build: makes the contender, or returns ``None`` if it does not support the case.
        needs: the module that must be installed.
    """

    heading: tuple[str, str]
    about: str
    build: Callable[[Workload], Contender | None]
    needs: str = "torch"

    @property
    def title(self) -> str:
        """The heading in one line."""
        top, bottom = self.heading
        return top[:-1] + bottom if top.endswith("-") else f"{top} {bottom}"

    def installed(self) -> bool:
        try:
            return importlib.util.find_spec(self.needs) is not None
        except ModuleNotFoundError:  # the package that contains the module is not installed
            return False


def contender_of_layer(layer: nn.Module, w: Workload) -> Contender:
    """Make a contender of a layer that is called like nn.LSTM."""
    if w.case.packed:
        return Contender(lambda x: layer(x)[0].data, w.x, list(layer.parameters()))
    return Contender(lambda x: layer(x)[0], w.x, list(layer.parameters()))


def official_contender(w: Workload) -> Contender:
    return contender_of_layer(w.lstm, w)


def our_contender(w: Workload) -> Contender:
    return contender_of_layer(ManualLSTM.from_lstm(copy.deepcopy(w.lstm)), w)


def _of_class(w: Workload, module: str, name: str, **options: bool) -> Contender:
    """Make a contender of a class that has nn.LSTM's parameters, from a module that may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls = getattr(importlib.import_module(module), name)
    layer = cls(w.case.I, w.case.H, num_layers=w.case.layers, **options)
    layer.load_state_dict(w.lstm.state_dict())
    return contender_of_layer(layer.to(w.settings.device, w.settings.dtype), w)


def _opacus(w: Workload) -> Contender | None:
    return _of_class(w, "opacus.layers", "DPLSTM", bidirectional=w.case.bidirectional)


def _torchrl(w: Workload) -> Contender | None:
    if w.case.packed or w.case.bidirectional:
        return None
    return _of_class(w, "torchrl.modules", "LSTM", batch_first=False)


def _quantizable(w: Workload) -> Contender | None:
    if w.case.packed or w.case.layers > 1:  # its second layer does not accept two directions
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = importlib.import_module("torch.ao.nn.quantizable").LSTM(w.case.I, w.case.H)
    cell = layer.layers[0].layer_fw.cell
    targets = [cell.igates.weight, cell.hgates.weight, cell.igates.bias, cell.hgates.bias]
    _copy(w.lstm, targets)
    layer = layer.to(w.settings.device, w.settings.dtype)
    if w.settings.dtype == torch.float32:
        return contender_of_layer(layer, w)
    zeros = torch.zeros(1, w.case.B, w.case.H, device=w.settings.device, dtype=w.settings.dtype)
    states = zeros, zeros  # passed in, because the states that it makes are float32
    return Contender(lambda x: layer(x, states)[0], w.x, list(layer.parameters()))


def _cell(w: Workload) -> Contender | None:
    if w.case.packed or w.case.layers > 1:
        return None
    cell = nn.LSTMCell(w.case.I, w.case.H, device=w.settings.device, dtype=w.settings.dtype)
    _copy(w.lstm, list(cell.parameters()))

    def forward(x: Tensor) -> Tensor:
        states = None
        outputs = []
        for x_t in x.unbind(0):
            states = cell(x_t, states)
            outputs.append(states[0])
        return torch.stack(outputs)

    return Contender(forward, w.x, list(cell.parameters()))


def _notebook(w: Workload) -> Contender | None:
    case = w.case
    tiles = case.B * 4 * case.H * (case.I + case.H) * w.settings.dtype.itemsize
    if case.packed or case.layers > 1 or tiles > MOST_TILE_BYTES:
        return None
    assert isinstance(w.x, Tensor)
    weights = [nn.Parameter(p.detach().clone()) for p in w.lstm.parameters()]
    zeros = w.x.new_zeros(case.B, case.H)

    def forward(x: Tensor) -> Tensor:
        return notebook_forward(x, zeros, zeros, *weights)

    x = w.x.transpose(0, 1).contiguous()  # batch first
    return Contender(forward, x, list(weights), as_official=lambda output: output.transpose(0, 1))


def notebook_forward(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> Tensor:
    """Compute as the notebook does: weights tiled over the batch, two bmm and eight slices a step."""
    B, T, _ = x.shape
    H = h.size(1)
    tiled_ih = w_ih.unsqueeze(0).tile(B, 1, 1)  # [B, 4H, I]
    tiled_hh = w_hh.unsqueeze(0).tile(B, 1, 1)  # [B, 4H, H]
    output = x.new_zeros(B, T, H)
    gates = [slice(k * H, (k + 1) * H) for k in range(4)]
    for t in range(T):
        from_x = torch.bmm(tiled_ih, x[:, t, :].unsqueeze(-1)).squeeze(-1)  # [B, 4H]
        from_h = torch.bmm(tiled_hh, h.unsqueeze(-1)).squeeze(-1)
        i, f, g, o = (from_x[:, k] + from_h[:, k] + b_ih[k] + b_hh[k] for k in gates)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        output[:, t, :] = h
    return output


def _official_without_onednn(w: Workload) -> Contender | None:
    return _without_onednn(official_contender(w), w)


def _without_onednn(contender: Contender, w: Workload) -> Contender | None:
    if w.settings.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    contender.around = _onednn_off
    return contender


@contextmanager
def _onednn_off() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch sets other switches too, and warns of some
        flags = torch.backends.mkldnn.flags(enabled=False)
        flags.__enter__()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flags.__exit__(None, None, None)


def _plain_loop(w: Workload) -> Contender | None:
    contender = our_contender(w)
    contender.around = plain_loop
    return contender


def _copy(lstm: nn.LSTM, targets: list[Tensor]) -> None:
    with torch.no_grad():
        for source, target in zip(lstm.parameters(), targets):
            target.copy_(source)


PEERS = {
    "opacus": Peer(("DP-", "LSTM"), "Opacus' DPLSTM, open for per-sample gradients", _opacus, "opacus"),
    "torchrl": Peer(("Torch", "RL"), "TorchRL's LSTM, open for vmap", _torchrl, "torchrl.modules"),
    "quantizable": Peer(
        ("quan-", "tiz."),
        "torch.ao.nn.quantizable.LSTM, open for quantization",
        _quantizable,
        "torch.ao.nn.quantizable",
    ),
    "cell": Peer(("LSTM", "Cell"), "a loop over nn.LSTMCell", _cell),
    "notebook": Peer(
        ("note-", "book"), "the notebook's function, its weights tiled over the batch", _notebook
    ),
    "nn-no-onednn": Peer(
        ("nn", "-1DNN"), "nn.LSTM with oneDNN switched off (mkldnn.flags)", _official_without_onednn
    ),
    "plain-loop": Peer(
        ("plain", "loop"), "ManualLSTM's plain loop, without the fused operator", _plain_loop
    ),
}
OWN_VARIANTS = {"plain-loop"}  # the peers that are ManualLSTM


class WrongError(Exception):
    """A contender does not compute what nn.LSTM computes. The message is one line."""


@dataclass(frozen=True)
class Answer:
    """The output of a contender, in training the norm of all its gradients, and its time."""

    output: Tensor
    norm: float
    seconds: float


def run_once(contender: Contender, mode: str) -> Answer:
    """Run a contender once."""
    now = clock(contender.x.data.device)
    with contender.during(mode):
        start = now()
        output = contender.step(mode)()
        seconds = now() - start
    norm = 0.0
    if mode == TRAINING:
        # Layers arrange their weights differently. The norm of all gradients is the same for all.
        squares = [p.grad.double().square().sum() for p in contender.parameters if p.grad is not None]
        norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    return Answer(contender.as_official(output.detach()), norm, seconds)


def check_answer(got: Answer, expected: Answer) -> None:
    """Raise WrongError if the answer is not nn.LSTM's."""
    if got.output.shape != expected.output.shape:
        raise WrongError(
            f"an output of {list(got.output.shape)}, not of {list(expected.output.shape)} as nn.LSTM's"
        )
    tolerance = TOLERANCE[expected.output.dtype]
    gap = float((got.output.double() - expected.output.double()).abs().max())
    if not gap <= tolerance:
        raise WrongError(f"its output differs from nn.LSTM's by {gap:.1e}")
    if not abs(got.norm - expected.norm) <= tolerance * expected.norm:
        raise WrongError(f"its gradients' norm is {got.norm:.6g}, nn.LSTM's {expected.norm:.6g}")
