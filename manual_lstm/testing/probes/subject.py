"""The class under test, the cases that a probe tries on it, and what a set of probes is."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn

from manual_lstm.check.parity import largest_difference
from manual_lstm.testing.cases import (
    DEVICES,
    FEATURES,
    OPTIONS,
    Case,
    Factory,
    Load,
    cases,
    load_state_dict,
)
from manual_lstm.testing.comparing import assert_same_layer


def search_settings(max_examples: int) -> settings:
    """Settings of a search for a failure: the same cases in every run, and none is shrunk."""
    return settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Subject:
    """The class under test, and the features that it is declared to lack."""

    factory: Factory
    load: Load = load_state_dict
    without: frozenset[str] = frozenset()
    max_examples: int = 30

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all rows that are not about a dtype."""
        return torch.float32 if "float64" in self.without else torch.float64

    def make(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Call the factory. If it lacks the arguments dtype or device, convert the layer afterwards."""
        missing = {name: kwargs.pop(name, None) for name in ("dtype", "device") if name in self.without}
        return self.factory(*args, **kwargs).to(**missing)

    def pair(self, case: Case) -> tuple[nn.LSTM, nn.Module]:
        return case.pair(self.make, self.load)

    def draw(
        self,
        test: Callable[[Case], None],
        features: Collection[str] = FEATURES,
        dtype: torch.dtype | None = None,
        large: bool = False,
        dense: bool = True,
        always: Collection[str] = (),
        beyond: Collection[str] = (),
    ) -> None:
        """Run ``test`` on drawn cases that have no other features than these.

        The cases are the same in every run. They are not shrunk, which takes long: they are small.
        """
        without = {name for name in FEATURES if name not in features or name in self.without}
        if not dense:
            without.add("dense")
        # In low precision, devices differ in their results and in what they support.
        devices = ["cpu"] if dtype else DEVICES
        drawn = cases([dtype or self.dtype], devices, without, always, large, beyond)
        search_settings(self.max_examples * (4 if large else 1))(given(case=drawn)(test))()

    def offers(self, keyword: str) -> bool:
        """Whether the layer is called with an argument of this name."""
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            try:
                return keyword in inspect.signature(self.make(2, 3).forward).parameters
            except Exception:  # the rows of the constructor say what is wrong with it
                return False

    def lacking(self, *names: str) -> "Subject":
        """Return the same subject without these features too."""
        return replace(self, without=self.without | set(names))

    def assert_same(self, case: Case) -> None:
        """Assert that the layer gives what nn.LSTM gives on a case."""
        reference, layer = self.pair(case)
        assert_same_layer(layer, reference, case, parameters="parameters" not in self.without)

    def case(self, **changes: Any) -> Case:
        """Return a case with all options that the class has, except dropout."""
        values = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
        options = {
            "input_size": 3,
            "hidden_size": 4,
            **OPTIONS,
            **{name: value for name, value in values.items() if name not in self.without},
        }
        return replace(Case(options, "dense", [4] * 3, dtype=self.dtype), **changes)


Probe = Callable[[Subject], None]  # raises if the class does not do what the row is about


class Probes(dict[str, Probe]):
    """Probes by the names of their rows, in the order of the table."""

    def add(self, name: str) -> Callable[[Probe], Probe]:
        """Return a decorator that adds a function as the probe of a row."""

        def add_function(function: Probe) -> Probe:
            self[name] = function
            return function

        return add_function


def assert_near(name: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype | None = None) -> None:
    """Assert that tensors are close: by 1e-12 in float64, otherwise by 16 units in the last place."""
    allowed = max(1e-12, 16 * torch.finfo(dtype or theirs.dtype).eps)
    gap = largest_difference(theirs, ours)
    assert gap <= allowed, f"{name} differs by {gap:.1e}, allowed is {allowed:.1e}"
