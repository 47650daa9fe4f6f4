"""ManualLSTM into models that exist, and out of them again."""

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from manual_lstm.engine.convert import official_state, resembles, why_not
from manual_lstm.module import ManualLSTM

M = TypeVar("M", bound=nn.Module)
Filter = Callable[[nn.Module, str], bool]
Names = Iterable[str] | str


@dataclass(frozen=True)
class SwapCandidate:
    """A layer that a swap has chosen.

    Attributes:
        names: every path to it in the model; the model itself has the path ``""``.
        module: the layer.
        reason: why it is left as it is; None if it is swapped.
    """

    names: tuple[str, ...]
    module: nn.Module
    reason: str | None = None

    def __str__(self) -> str:
        where = ", ".join(name or "the model itself" for name in self.names)
        return f"{where} is left as it is: {self.reason}" if self.reason else f"{where}: {self.module}"


def replace_lstm(
    model: M,
    *,
    filter_fn: Filter | None = None,
    target_modules: Names | None = None,
    layer_class: type[ManualLSTM] = ManualLSTM,
) -> M:
    """Make every nn.LSTM in ``model`` a :class:`ManualLSTM`, in place.

    As with parametrize and FSDP2, each layer stays the same object and changes its class. So its
    Parameters stay the same objects too, with their gradients, names, order and ties; optimizers, hooks
    and their handles, extra attributes, and whatever else refers to the layer or to what is in it
    go on working; only ``isinstance(layer, nn.LSTM)`` is no longer true. No random number is drawn.
    For a layer beside the old one, see :meth:`ManualLSTM.from_lstm`.

    Exactly nn.LSTM is replaced. A subclass, a layer with parametrizations, with a ``forward``
    replaced on the object, a TorchScript or a quantized one is left as it is, with a warning that
    names it and the reason. Layers that only a plain Python list holds are no part of the model,
    here as everywhere in torch.

    Args:
        model (nn.Module): the model, which may be an nn.LSTM itself.
        filter_fn (callable, optional): called with a layer and its path, as torchao does; the layer
            is chosen if that is true for any of its paths.
        target_modules (iterable of str or str, optional): the layers to choose, as in PEFT: names,
            each a path or the last parts of one, or one string, a regular expression for the
            whole path. With ``filter_fn``, a layer must be chosen by both.
        layer_class (type, optional): the class that the layers get, ManualLSTM or a subclass of it
            with a cell of its own. Its ``__init__`` is not run; the cell's own parameters
            are added with their initial values.

    Returns:
        The model: the same object.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a name in ``target_modules`` that is no LSTM's.

        Whatever is raised, the model is as it was.

    Example:
        >>> from manual_lstm import replace_lstm
        >>> model = nn.Sequential(nn.Embedding(9, 10), nn.LSTM(10, 20))
        >>> replace_lstm(model)
        Sequential(
          (0): Embedding(9, 10)
          (1): ManualLSTM(10, 20)
        )
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, ManualLSTM)):
        raise TypeError(f"layer_class should be ManualLSTM or a subclass, but got {layer_class!r}")
    found = _find(model, nn.LSTM, filter_fn, target_modules)
    _swap(found, layer_class, layer_class._state_from)
    return model


def restore_lstm(
    model: M, *, filter_fn: Filter | None = None, target_modules: Names | None = None
) -> M:
    """Make every :class:`ManualLSTM` in ``model`` an nn.LSTM, in place: the way back.

    What is said of :func:`replace_lstm` is true of this too, and it takes, returns and raises the
    same. The model then needs nothing of this package any more, unless a warning named a layer
    that is left as it is.

    Example:
        >>> from manual_lstm import replace_lstm, restore_lstm
        >>> restore_lstm(replace_lstm(nn.LSTM(10, 20)))
        LSTM(10, 20)
    """
    found = _find(model, ManualLSTM, filter_fn, target_modules)
    _swap(found, nn.LSTM, official_state)
    return model


def find_lstm(
    model: nn.Module,
    *,
    filter_fn: Filter | None = None,
    target_modules: Names | None = None,
) -> list[SwapCandidate]:
    """List what :func:`replace_lstm` would replace, and what it would leave. Changes nothing.

    Takes and raises what that does.

    Returns:
        The layers in the order of ``model.modules()``, each once.

    Example:
        >>> from manual_lstm import find_lstm
        >>> for layer in find_lstm(nn.ModuleDict({"encoder": nn.LSTM(3, 4), "head": nn.Linear(4, 1)})):
        ...     print(layer)
        encoder: LSTM(3, 4)
    """
    return _find(model, nn.LSTM, filter_fn, target_modules)


def _swap(
    found: list[SwapCandidate], cls: type[nn.Module], make_state: Callable[[Any], dict[str, Any]]
) -> None:
    """Change the layers found, all or none."""
    swaps = [(each.module, make_state(each.module)) for each in found if each.reason is None]
    for each in found:
        if each.reason:
            warnings.warn(str(each), stacklevel=3)  # which may be an error
    before = []
    try:
        for module, state in swaps:
            before.append((module, type(module), vars(module)))
            _become(module, cls, state)
    except BaseException:
        for module, old_cls, old_state in before:
            _become(module, old_cls, old_state)
        raise


def _become(module: nn.Module, cls: type[nn.Module], state: dict[str, Any]) -> None:
    # Module.__setattr__ would look for parameters and buffers of these names.
    object.__setattr__(module, "__class__", cls)
    object.__setattr__(module, "__dict__", state)


def _find(
    model: nn.Module,
    cls: type[nn.Module],
    filter_fn: Filter | None,
    target_modules: Names | None,
) -> list[SwapCandidate]:
    """Every ``cls`` in the model that was chosen, of whatever make."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be an nn.Module, but got {model!r} ({type(model).__name__})")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            "filter_fn should be a function of a module and its path, "
            f"but got {filter_fn!r} ({type(filter_fn).__name__})"
        )
    paths = _paths(model)
    # A name may be that of a layer swapped already: twice is once.
    targets = None if target_modules is None else _targets(target_modules, [path for path, _ in paths])
    modules: dict[int, nn.Module] = {}
    names: dict[int, list[str]] = {}
    for path, module in paths:
        if resembles(module, cls):
            modules[id(module)] = module
            names.setdefault(id(module), []).append(path)
    return [
        SwapCandidate(tuple(names[key]), module, why_not(module, cls))
        for key, module in modules.items()
        if (targets is None or not targets.isdisjoint(names[key]))
        and (filter_fn is None or any(filter_fn(module, path) for path in names[key]))
    ]


def _paths(
    module: nn.Module, below: dict[int, list[tuple[str, nn.Module]]] | None = None
) -> list[tuple[str, nn.Module]]:
    """Every path to an LSTM in the module, of either class and any make.

    ``named_modules(remove_duplicate=False)`` enters a module once for each path to it, and one that
    holds itself forever. Here each is entered once, and what is below it remembered.
    """
    below = {} if below is None else below
    if id(module) not in below:
        below[id(module)] = []  # what one sees that comes back here from below
        found = []
        if resembles(module, nn.LSTM) or resembles(module, ManualLSTM):
            found.append(("", module))
        for name, child in module._modules.items():
            if child is not None:
                lstms = _paths(child, below)
                found += [(f"{name}.{path}" if path else name, lstm) for path, lstm in lstms]
        below[id(module)] = found
    return below[id(module)]


def _targets(target_modules: Names, paths: list[str]) -> set[str]:
    """The paths that ``target_modules`` names. Raises ValueError where it names none."""
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                "target_modules should be names or a regular expression, "
                f"but got {target_modules!r}: {error}"
            ) from None
        chosen = {path for path in paths if pattern.fullmatch(path)}
        missing = [] if chosen else [f"{target_modules!r} (a regular expression for the whole path)"]
    else:
        listed = isinstance(target_modules, Iterable) and not isinstance(target_modules, bytes)
        names = list(target_modules) if listed else [target_modules]
        for name in names:
            if not isinstance(name, str):
                raise TypeError(
                    "target_modules should be names or a regular expression, "
                    f"but got {name!r} ({type(name).__name__})"
                )
        named = {n: {path for path in paths if path == n or path.endswith(f".{n}")} for n in names}
        chosen = set().union(*named.values())
        missing = [repr(name) for name, matched in named.items() if not matched]
    if missing:
        raise ValueError(
            f"target_modules should name LSTMs of the model, but got {' and '.join(missing)}; "
            f"it has {', '.join(map(repr, paths)) if paths else 'none'}"
        )
    return chosen
