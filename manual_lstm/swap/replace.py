"""Change the nn.LSTMs of an existing model into ManualLSTMs, and back."""

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
    """A layer that was chosen for a swap.

    Attributes:
        names: every path to the layer in the model; the path of the model itself is ``""``.
        module: the layer.
        reason: why the layer is left as it is; None if it is swapped.
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
    Parameters stay the same objects too, with their gradients, names, order and ties. Optimizers,
    hooks and their handles, extra attributes, and everything else that refers to the layer or to its
    parts continue to work. After the swap ``isinstance(layer, nn.LSTM)`` is False. No random number
    is drawn. To make a new layer beside the old one, use :meth:`ManualLSTM.from_lstm`.

    Only layers whose class is exactly nn.LSTM are replaced. A subclass, a layer with
    parametrizations, a layer whose ``forward`` was replaced on the object, a TorchScript layer and a
    quantized layer are left as they are, with a warning that names the layer and the reason. Layers
    that only a plain Python list holds are not part of the model, as everywhere in torch. A model
    without any LSTM gets a warning that names its other recurrent layers; so does one that also has
    nn.LSTMCells, which stay: they are steps of plain operations already.

    Args:
        model (nn.Module): the model, which may be an nn.LSTM itself.
        filter_fn (callable, optional): a function of a layer and its path, as in torchao. A layer is
            chosen if the function returns true for any of its paths.
        target_modules (iterable of str or str, optional): the layers to choose, as in PEFT: either
            names, each of which is a path or the last parts of one, or one string, which is a
            regular expression for the whole path. With ``filter_fn``, both must choose the layer.
        layer_class (type, optional): the class that the layers get, ManualLSTM or a subclass of it
            with its own cell. Its ``__init__`` does not run: attributes have the class's defaults, and
            a warning names those that have none. The cell's own parameters are added with their
            initial values. A subclass also replaces layers that are exactly ManualLSTM.

    Returns:
        The model: the same object.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``target_modules`` contains a name that no LSTM of the model has; the message
            lists the names that they have.

        If anything is raised, the model is unchanged.

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
    candidates = _choose(model, nn.LSTM, filter_fn, target_modules)
    if layer_class is not ManualLSTM:  # layers that are swapped already, to the class without a cell
        plain = _choose(model, ManualLSTM, filter_fn, target_modules)
        candidates += [c for c in plain if type(c.module) is ManualLSTM]
    chosen_freely = filter_fn is None and target_modules is None
    if candidates or (chosen_freely and not _paths(model)):
        _warn_of_others(model, found=bool(candidates))
    _swap(candidates, layer_class, layer_class._state_from, layer_class._missing_after_swap)
    return model


def restore_lstm(
    model: M, *, filter_fn: Filter | None = None, target_modules: Names | None = None
) -> M:
    """Make every :class:`ManualLSTM` in ``model`` an nn.LSTM, in place.

    This reverses :func:`replace_lstm`, and works in the same way: it takes, returns and raises the
    same. Afterwards the model no longer needs this package, unless a warning named a layer that was
    left as it is. A model that calls a layer with ``lengths`` or ``resets`` needs ManualLSTM: nn.LSTM
    does not take them.

    Example:
        >>> from manual_lstm import replace_lstm, restore_lstm
        >>> restore_lstm(replace_lstm(nn.LSTM(10, 20)))
        LSTM(10, 20)
    """
    candidates = _choose(model, ManualLSTM, filter_fn, target_modules)
    _swap(candidates, nn.LSTM, official_state)
    return model


def find_lstm(
    model: nn.Module,
    *,
    filter_fn: Filter | None = None,
    target_modules: Names | None = None,
) -> list[SwapCandidate]:
    """List what :func:`replace_lstm` would replace and what it would leave. The model is unchanged.

    The arguments and exceptions are those of :func:`replace_lstm`.

    Returns:
        The layers in the order of ``model.modules()``, each once.

    Example:
        >>> from manual_lstm import find_lstm
        >>> for layer in find_lstm(nn.ModuleDict({"encoder": nn.LSTM(3, 4), "head": nn.Linear(4, 1)})):
        ...     print(layer)
        encoder: LSTM(3, 4)
    """
    return _choose(model, nn.LSTM, filter_fn, target_modules)


def _swap(
    candidates: list[SwapCandidate],
    cls: type[nn.Module],
    make_state: Callable[[Any], dict[str, Any]],
    missing: Callable[[dict[str, Any]], str | None] = lambda state: None,
) -> None:
    """Give all candidates without a reason the new class, or none of them.

    ``make_state`` makes the new ``__dict__`` of a layer from the old one. ``__init__`` does not run, so
    an attribute that only ``__init__`` sets is missing after the swap: ``missing`` says so.
    """
    # All states are made, and all warnings given, before the first layer changes: both may raise.
    swaps = [(c.module, make_state(c.module)) for c in candidates if c.reason is None]
    for text in dict.fromkeys(missing(state) for _, state in swaps):
        if text:
            warnings.warn(text, stacklevel=3)
    for candidate in candidates:
        if candidate.reason:
            warnings.warn(str(candidate), stacklevel=3)
    changed = []
    try:
        for module, state in swaps:
            changed.append((module, type(module), vars(module)))
            _become(module, cls, state)
    except BaseException:
        for module, old_cls, old_state in changed:
            _become(module, old_cls, old_state)
        raise


def _warn_of_others(model: nn.Module, found: bool) -> None:
    """Warn of an nn.LSTMCell, and of every other recurrent layer if no LSTM was found."""
    others: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.LSTMCell) or (
            not found and isinstance(module, (nn.RNNBase, nn.RNNCellBase))
        ):
            others.setdefault(type(module).__name__, []).append(name or "the model itself")
    listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in others.items())
    parts = []
    if not found:
        instead = f"but {listed}" if listed else "nor another recurrent layer"
        parts.append(f"there is no nn.LSTM in the model, {instead}")
        parts.append("layers that only a plain Python list holds cannot be seen (use nn.ModuleList)")
    elif others:
        parts.append(f"the model also has {listed}")
    if "LSTMCell" in listed:
        parts.append("an nn.LSTMCell stays as it is, being a step of plain operations already")
    if parts:
        warnings.warn("replace_lstm: " + "; ".join(parts), stacklevel=3)


def _become(module: nn.Module, cls: type[nn.Module], state: dict[str, Any]) -> None:
    # Not by plain assignment: Module.__setattr__ would search parameters and buffers for these names.
    object.__setattr__(module, "__class__", cls)
    object.__setattr__(module, "__dict__", state)


def _choose(
    model: nn.Module,
    cls: type[nn.Module],
    filter_fn: Filter | None,
    target_modules: Names | None,
) -> list[SwapCandidate]:
    """Return every ``cls`` in the model that the arguments choose, subclasses included."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be an nn.Module, but got {model!r} ({type(model).__name__})")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            "filter_fn should be a function of a module and its path, "
            f"but got {filter_fn!r} ({type(filter_fn).__name__})"
        )
    paths = _paths(model)
    # The names of layers that are swapped already are valid too, so that a second call is harmless.
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
    """Return every path to an LSTM in the module, with the LSTM: nn.LSTM, ManualLSTM, or like them.

    ``named_modules(remove_duplicate=False)`` enters a module once for each path to it, and never
    ends where a module contains itself. Here each module is entered once; ``below`` keeps the paths
    that start there.
    """
    below = {} if below is None else below
    if id(module) not in below:
        below[id(module)] = []  # for a module that contains itself and comes back here
        paths = []
        if resembles(module, nn.LSTM) or resembles(module, ManualLSTM):
            paths.append(("", module))
        for name, child in module._modules.items():
            if child is not None:
                lstms = _paths(child, below)
                paths += [(f"{name}.{path}" if path else name, lstm) for path, lstm in lstms]
        below[id(module)] = paths
    return below[id(module)]


def _targets(target_modules: Names, paths: list[str]) -> set[str]:
    """Return the paths that ``target_modules`` names.

    Raises:
        ValueError: one of the names matches no path, or the expression matches none.
    """
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
