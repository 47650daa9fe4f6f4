"""Probes on the constructor, the parameters and checkpoints."""

from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from manual_lstm.testing.cases import Case
from manual_lstm.testing.probes.subject import Probes, Subject, assert_near

PROBES = Probes()


@PROBES.add("arguments")
def _arguments(subject: Subject) -> None:
    """The class takes nn.LSTM's arguments by name and by position, and keeps each as an attribute.

    By position they are given up to the first that the class lacks.
    """
    values: dict[str, Any] = {
        "input_size": 3,
        "hidden_size": 4,
        "num_layers": 2,
        "bias": False,
        "batch_first": True,
    }
    values |= {"dropout": 0.5, "bidirectional": True, "proj_size": 2}
    by_name = {name: value for name, value in values.items() if name not in subject.without}
    by_position = dict(takewhile(lambda item: item[0] not in subject.without, values.items()))
    for how, expected, layer in (
        ("name", by_name, subject.make(**by_name)),
        ("position", by_position, subject.make(*by_position.values())),
    ):
        for name, value in expected.items():
            actual = getattr(layer, name, None)
            assert actual == value, f"layer.{name}, given by {how}, should be {value}, but is {actual}"


@PROBES.add("dtype")
def _dtype_argument(subject: Subject) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        parameters = subject.factory(3, 4, dtype=dtype).parameters()
        assert {p.dtype for p in parameters} == {dtype}, f"dtype={dtype} should be the parameters'"


@PROBES.add("device")
def _device_argument(subject: Subject) -> None:
    parameters = subject.factory(3, 4, device="meta").parameters()
    assert {p.device.type for p in parameters} == {"meta"}, "device should be the parameters'"


@PROBES.add("call by name")
def _call_by_name(subject: Subject) -> None:
    case = subject.case()
    layer, x = case.layer(subject.make), case.input()
    hx = {} if "hx" in subject.without else {"hx": replace(case, with_hx=True).hx()}
    assert_near("output", layer(input=x, **hx)[0], layer(x, *hx.values())[0])


@PROBES.add("order of parameters")
def _order_of_parameters(subject: Subject) -> None:
    """The parameters are in nn.LSTM's order, by which an optimizer's checkpoint identifies them."""

    def test(case: Case) -> None:
        ours, theirs = (
            [name for name, _ in case.layer(make).named_parameters()]
            for make in (subject.make, nn.LSTM)
        )
        assert ours == theirs, f"the order should be {theirs}, but is {ours}"

    subject.draw(test)


@PROBES.add("initial values")
def _initial_values(subject: Subject) -> None:
    """The same seed gives nn.LSTM's initial values, in the constructor and in reset_parameters."""
    # A class without the argument draws in float32, and its layer is converted afterwards.
    dtype = torch.float32 if "dtype" in subject.without else None

    def test(case: Case) -> None:
        modules = case.layer(nn.LSTM), case.layer(subject.make)
        for made in (True, False):
            for module in modules:
                if not made:
                    torch.manual_seed(case.seed)
                    module.reset_parameters()  # type: ignore[operator]
            for theirs, ours in zip(*(module.parameters() for module in modules), strict=True):
                assert torch.equal(theirs, ours), f"values drawn from seed {case.seed} differ\n  {case}"

    subject.draw(test, dtype=dtype)


@PROBES.add("state_dict")
def _state_dict(subject: Subject) -> None:
    """A state dict loads from nn.LSTM and into nn.LSTM, strictly."""

    def test(case: Case) -> None:
        reference, layer = case.layer(nn.LSTM), case.layer(subject.make)
        layer.load_state_dict(reference.state_dict())
        back = case.layer(nn.LSTM)
        back.load_state_dict(layer.state_dict())
        for theirs, ours in zip(reference.parameters(), back.parameters()):
            assert torch.equal(ours, theirs), "a weight came back changed"

    subject.draw(test)


@PROBES.add("load from meta")
def _load_from_meta(subject: Subject) -> None:
    """A layer made on the meta device takes weights by load_state_dict(assign=True)."""
    case = subject.case()
    reference = case.layer(nn.LSTM)
    layer = case.layer(lambda *args, **kwargs: subject.make(*args, **{**kwargs, "device": "meta"}))
    layer.load_state_dict(reference.state_dict(), assign=True)
    assert_near("output", layer(case.input())[0], reference(case.input())[0])


@PROBES.add("repr")
def _repr(subject: Subject) -> None:
    def test(case: Case) -> None:
        reference, layer = case.layer(nn.LSTM), case.layer(subject.make)
        expected = repr(reference).replace("LSTM(", f"{type(layer).__name__}(")
        assert repr(layer) == expected, f"repr should be {expected}, but is {layer!r}"

    subject.draw(test)
