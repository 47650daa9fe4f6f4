"""One row of the report: a check, and the layer and inputs that it is tried on."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """A layer of some class and options, and inputs for it. All are drawn from the seed."""

    make: Callable[..., nn.Module]  # nn.LSTM, ManualLSTM or a class with their arguments
    options: dict[str, Any] = field(default_factory=dict)  # without the sizes
    packed: bool = False
    I: int = 4
    H: int = 5
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    seed: int = 0

    def layer(self) -> nn.Module:
        """Make the layer; every call makes an equal one."""
        torch.manual_seed(self.seed)
        return self.make(self.I, self.H, dtype=self.dtype, device=self.device, **self.options)

    def official(self, layer: nn.Module) -> nn.LSTM:
        """Make an nn.LSTM with copies of the weights of ``layer``, in the same mode."""
        lstm = self.with_changes(make=nn.LSTM).layer()
        assert isinstance(lstm, nn.LSTM)
        lstm.load_state_dict(layer.state_dict())
        return lstm.train(layer.training)

    def dense(self, T: int = 6, B: int = 3) -> Tensor:
        """Draw a batch, ``[T, B, I]`` or, with batch_first, ``[B, T, I]``."""
        torch.manual_seed(self.seed + 1)
        batch_first = self.options.get("batch_first", False)
        return self._randn(*((B, T) if batch_first else (T, B)), self.I)

    def input(self, T: int = 6, B: int = 3) -> Tensor | PackedSequence:
        """Draw a dense batch, or in a packed setting a packed one of unsorted lengths."""
        if not self.packed:
            return self.dense(T, B)
        torch.manual_seed(self.seed + 1)
        lengths = [max(T - 2 * ((k + 1) % B), 1) for k in range(B)]  # the longest comes last
        return pack_sequence([self._randn(n, self.I) for n in lengths], enforce_sorted=False)

    def hx(self, B: int = 3) -> State:
        """Draw initial states for a batch of B: ``[L * D, B, P or H]`` and ``[L * D, B, H]``."""
        torch.manual_seed(self.seed + 2)
        rows = self.options.get("num_layers", 1) * (2 if self.options.get("bidirectional") else 1)
        features = self.options.get("proj_size", 0) or self.H
        h_0 = self._randn(rows, B, features)
        return h_0, self._randn(rows, B, self.H)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype).to(self.device)

    def with_changes(self, **changes: Any) -> "Setting":
        """Return the same setting with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class ReportRow:
    """A feature of PyTorch, and the check that a layer works with it."""

    label: str
    # Raises what PyTorch raised, or AssertionError. May return what the table shows beside the tick.
    check: Callable[[Setting], str | None]
    packed: bool = False  # whether the check is made with packed input too
    needs: tuple[str, ...] = ()  # the packages it imports
    slow: bool = False  # takes ten seconds or more, so that tests try fewer settings
    dtypes: tuple[torch.dtype, ...] = ()  # to try instead of the setting's; kernels differ by dtype

    def missing(self) -> list[str]:
        """Return the packages it needs that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def run(self, setting: Setting) -> str:
        """Make the check in each dtype; return what the table shows beside the tick."""
        notes = [self.check(setting.with_changes(dtype=t)) for t in self.dtypes or (setting.dtype,)]
        return notes[-1] or ""


class MissingRequirement(Exception):
    """This machine lacks something that a row needs and that is not a package, such as a compiler."""
