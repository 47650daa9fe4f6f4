"""The constructor's arguments, checked as nn.LSTM checks them."""

import numbers
import operator
import warnings
from typing import Any, NoReturn


def check_arguments(
    input_size: Any,
    hidden_size: Any,
    num_layers: Any,
    bias: Any,
    batch_first: Any,
    dropout: Any,
    bidirectional: Any,
    proj_size: Any,
) -> None:
    """Check the constructor's arguments, in the order and with the exceptions of nn.LSTM."""
    probability = f"dropout should be a number in the range [0, 1], but got {dropout!r}"
    try:
        float(dropout)
    except (TypeError, ValueError, OverflowError) as error:
        raise type(error)(probability) from None
    number = isinstance(dropout, numbers.Number) and not isinstance(dropout, bool)
    if not number or not 0 <= dropout <= 1:
        raise ValueError(probability)
    _check_comparable("num_layers", num_layers)
    if dropout > 0 and num_layers == 1:
        warnings.warn(
            "dropout acts on the output of all layers but the last, so it wants num_layers > 1, "
            f"but got dropout={dropout} and num_layers={num_layers}",
            stacklevel=3,
        )

    for name, flag in (("bias", bias), ("batch_first", batch_first), ("bidirectional", bidirectional)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} should be a bool, but got {flag!r} ({type(flag).__name__})")
    for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
        if not isinstance(size, int):
            raise TypeError(f"{name} should be an int, but got {size!r} ({type(size).__name__})")
        if size <= 0:
            raise ValueError(f"{name} should be greater than zero, but got {size}")
    if num_layers <= 0:
        raise ValueError(f"num_layers should be greater than zero, but got {num_layers}")
    _check_comparable("proj_size", proj_size)
    if proj_size < 0:
        raise ValueError(
            f"proj_size should be positive, or zero for no projection, but got {proj_size}"
        )
    if proj_size >= hidden_size:
        raise ValueError(
            f"proj_size should be smaller than hidden_size, {hidden_size}, but got {proj_size}"
        )
    for name, size in (("num_layers", num_layers), ("proj_size", proj_size)):
        try:
            operator.index(size)
        except TypeError:
            _refuse_size(name, size)
        if isinstance(size, bool):  # nn.LSTM fails when it is called
            _refuse_size(name, size)


def _check_comparable(name: str, size: Any) -> None:
    """Raise for what has no order, which nn.LSTM meets before it meets other mistakes."""
    try:
        size > 0  # noqa: B015
    except TypeError:
        _refuse_size(name, size)


def _refuse_size(name: str, size: Any) -> NoReturn:
    kind = type(size).__name__
    raise TypeError(f"{name} should be an int, but got {size!r} ({kind})") from None
