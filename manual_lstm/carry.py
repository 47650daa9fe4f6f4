"""What a layer carries from nn.LSTM to ManualLSTM and back: everything, in the very same objects.

No constructor runs on the way. So no random number is drawn, no argument is judged anew, no warning
comes again, and what was never a Parameter (a pruned weight, for one) need not become one.
"""

import copy
import weakref
from typing import Any

import torch
from torch import nn

# What nn.LSTM keeps beside a Module's own: the names of its weights, and the weights once more.
_OFFICIAL_ONLY = {"_all_weights", "_flat_weights", "_flat_weights_names", "_flat_weight_refs"}


def manual_state(lstm: nn.LSTM) -> dict[str, Any]:
    """The ``__dict__`` that makes a ManualLSTM of ``lstm``, with its own containers."""
    state = {key: value for key, value in vars(lstm).items() if key not in _OFFICIAL_ONLY}
    state["_weight_names"] = [list(names) for names in lstm._all_weights]
    return state


def official_state(layer: nn.Module) -> dict[str, Any]:
    """The ``__dict__`` that makes an nn.LSTM of a ManualLSTM, with its own containers."""
    state = dict(vars(layer))
    names: list[list[str]] = [list(names) for names in state.pop("_weight_names")]
    flat = [name for direction in names for name in direction]
    state |= {
        "_all_weights": names,
        "_flat_weights_names": flat,
        "_flat_weights": [getattr(layer, name, None) for name in flat],
    }
    # This is what torch.load does with a saved layer: nn.LSTM knows what its version needs besides.
    lstm = nn.LSTM.__new__(nn.LSTM)
    lstm.__setstate__(state)  # type: ignore[no-untyped-call]
    lstm.flatten_parameters()  # one chunk for cuDNN; elsewhere nothing happens
    return vars(lstm)


def settle(layer: nn.Module, state: dict[str, Any], old: nn.Module) -> None:
    """Give ``layer`` the state of ``old``, which lives on: in containers of its own."""
    for key in vars(nn.Module()):
        if isinstance(state.get(key), (dict, set)):
            state[key] = copy.copy(state[key])
    hooks = state["_load_state_dict_pre_hooks"]
    for key, hook in hooks.items():
        if getattr(hook, "with_module", False) and hook.module() is old:
            hooks[key] = copy.copy(hook)
            hooks[key].module = weakref.ref(layer)
    object.__setattr__(layer, "__dict__", state)


def resembles(layer: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether ``layer`` is a ``cls`` of any make: also a subclass, compiled or quantized."""
    if isinstance(layer, torch.jit.ScriptModule):
        return getattr(layer, "original_name", None) == cls.__name__
    return isinstance(layer, cls) or (cls is nn.LSTM and _is_quantized(layer))


def _is_quantized(layer: nn.Module) -> bool:
    # By name: torch.ao is leaving torch for torchao, and a lookup there would warn of it.
    return any(
        base.__name__ == "LSTM" and base.__module__.startswith(("torch.ao.", "torchao."))
        for base in type(layer).__mro__
    )


def why_not(layer: nn.Module, cls: type[nn.Module]) -> str | None:
    """Why ``layer`` cannot be swapped as a ``cls``; None if it can."""
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is a TorchScript module, compiled already: swap first, then script or trace"
    if isinstance(layer, nn.Module) and _is_quantized(layer):
        return f"it is quantized, {kind}: swap first, then quantize"
    if not isinstance(layer, cls):
        return f"it is {kind}" if isinstance(layer, nn.Module) else f"it is {layer!r}, no module"
    if nn.utils.parametrize.is_parametrized(layer):
        names = ", ".join(layer.parametrizations)  # type: ignore[arg-type]
        return f"it has parametrizations, of {names}, which belong to its class: swap before these"
    if type(layer) is not cls:
        name = "nn.LSTM" if cls is nn.LSTM else cls.__name__
        return f"it is a {kind}, a subclass of {name} whose own methods would be lost"
    if "forward" in vars(layer):
        return "its forward was replaced on the object, by one that may need the class it has now"
    return None
