"""Models, drawn: LSTMs of any options, nested, shared, tied, frozen, hooked, and added to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from manual_lstm.check.parity import EitherLSTM

# Each registers a hook that tells the log of its call.
HOOKS: dict[str, Callable[[Any, Callable[..., None]], Any]] = {
    "forward": lambda m, f: m.register_forward_hook(f),
    "forward, first": lambda m, f: m.register_forward_hook(f, prepend=True),
    "forward, always": lambda m, f: m.register_forward_hook(f, always_call=True),
    "forward, kwargs": lambda m, f: m.register_forward_hook(f, with_kwargs=True),
    "forward pre": lambda m, f: m.register_forward_pre_hook(f),
    "forward pre, kwargs": lambda m, f: m.register_forward_pre_hook(f, with_kwargs=True),
    "backward": lambda m, f: m.register_full_backward_hook(f),
    "backward pre": lambda m, f: m.register_full_backward_pre_hook(f),
    "state_dict pre": lambda m, f: m.register_state_dict_pre_hook(f),
    "state_dict": lambda m, f: m.register_state_dict_post_hook(f),
    "state_dict, old": lambda m, f: m._register_state_dict_hook(f),
    "load pre": lambda m, f: m.register_load_state_dict_pre_hook(f),
    "load pre, old": lambda m, f: m._register_load_state_dict_pre_hook(f),
    "load post": lambda m, f: m.register_load_state_dict_post_hook(f),
}


def _buffer(lstm: nn.LSTM) -> None:
    lstm.register_buffer("steps", torch.tensor(7))
    lstm.register_buffer("scratch", torch.ones(2), persistent=False)


def _attributes(lstm: Any) -> None:
    lstm.note = {"made": "by hand"}
    lstm.nothing = None
    lstm.plain = torch.ones(3)


def _reorder(lstm: nn.LSTM) -> None:
    weight = lstm.weight_ih_l0
    del lstm.weight_ih_l0
    lstm.weight_ih_l0 = weight


EXTRAS: dict[str, Callable[[nn.LSTM], object]] = {
    "buffers": _buffer,
    "attributes": _attributes,
    "order": _reorder,
    "parameter": lambda m: m.register_parameter("scale", Parameter(torch.ones(2))),
    "submodule": lambda m: m.add_module("inner", nn.Linear(2, 2)),
    "tied": lambda m: setattr(m, "weight_hh_l1", m.weight_hh_l0) if m.num_layers > 1 else None,
    "frozen": lambda m: m.weight_hh_l0.requires_grad_(False),
    "all frozen": lambda m: m.requires_grad_(False),
    "eval": lambda m: m.eval(),
    "double": lambda m: m.double(),
    "dropout": lambda m: setattr(m, "dropout", 0.4),
    "batch_first": lambda m: setattr(m, "batch_first", not m.batch_first),
}


@dataclass
class Tree:
    """A drawn model; the hooks write to ``log``."""

    model: nn.Module
    lstms: list[nn.Module]
    seed: int
    log: list[str] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)

    def run(self) -> dict[str, Tensor]:
        """Run every LSTM forwards and backwards; outputs, and gradients, which stay."""
        results: dict[str, Tensor] = {}
        torch.manual_seed(self.seed)
        for k, lstm in enumerate(self.lstms):
            layer: EitherLSTM = lstm  # type: ignore[assignment]
            x = torch.randn(
                3, 2, layer.input_size, dtype=layer.all_weights[0][0].dtype
            ).requires_grad_()
            output, (h_n, c_n) = layer(x)
            (output.sin().sum() + h_n.sum() + c_n.cos().sum()).backward()
            assert x.grad is not None
            results |= {f"{k} output": output, f"{k} h_n": h_n, f"{k} c_n": c_n, f"{k} grad": x.grad}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                results[name] = parameter.grad.clone()
        return {name: result.detach() for name, result in results.items()}


class Block(nn.Module):
    """Holds its parts as attributes."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        for k, part in enumerate(parts):
            setattr(self, f"part{k}", part)
        self.nothing = None


CONTAINERS: list[Callable[[list[nn.Module]], nn.Module]] = [
    lambda parts: nn.Sequential(*parts),
    lambda parts: nn.ModuleList(parts),
    lambda parts: nn.ModuleDict({f"key{k}": part for k, part in enumerate(parts)}),
    Block,
]


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Draw a model with one to four LSTMs; each is somewhere in it, and maybe in several places."""
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    lstms: list[nn.LSTM] = []
    for _ in range(draw(st.integers(1, 4))):
        H, L = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        lstm = nn.LSTM(
            draw(st.integers(1, 4)),
            H,
            num_layers=L,
            bias=draw(st.booleans()),
            batch_first=draw(st.booleans()),
            dropout=draw(st.sampled_from([0.0, 0.5])) if L > 1 else 0.0,
            bidirectional=draw(st.booleans()),
            proj_size=draw(st.integers(0, H - 1)),
        )
        for extra in draw(st.lists(st.sampled_from(sorted(EXTRAS)), max_size=3, unique=True)):
            EXTRAS[extra](lstm)
        lstms.append(lstm)
    first, last = lstms[0], lstms[-1]
    if (
        first.hidden_size == last.hidden_size
        and first.proj_size == last.proj_size
        and draw(st.booleans())
    ):
        last.weight_hh_l0 = first.weight_hh_l0  # tied across layers
        last.to(first.all_weights[0][0].dtype)

    others = st.sampled_from([nn.Linear(2, 2), nn.GRU(2, 2), nn.RNNCell(2, 2), nn.Dropout()])
    leaves = others | st.sampled_from(lstms)
    nodes = st.recursive(
        leaves,
        lambda inner: st.builds(
            lambda make, parts: make(parts),
            st.sampled_from(CONTAINERS),
            st.lists(inner, max_size=4),
        ),
        max_leaves=8,
    )
    if len(lstms) == 1 and draw(st.booleans()):
        model: nn.Module = lstms[0]  # the model is an nn.LSTM itself
    else:
        parts = [*lstms, *draw(st.lists(nodes, max_size=3))]
        model = draw(st.sampled_from(CONTAINERS))(draw(st.permutations(parts)))
    tree = Tree(model, list(lstms), seed)
    for k, lstm in enumerate(lstms):
        for kind in draw(st.lists(st.sampled_from(sorted(HOOKS)), max_size=4)):
            tree.handles.append(HOOKS[kind](lstm, _tell(tree.log, f"{kind} {k}")))
    return tree


def _tell(log: list[str], text: str) -> Callable[..., None]:
    def hook(*args: Any, **kwargs: Any) -> None:
        log.append(text)

    return hook
