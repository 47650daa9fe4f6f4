"""What a layer carries from nn.LSTM to ManualLSTM and back: everything, in the very same objects.

No constructor runs on the way. So no random number is drawn, no argument is judged anew, no warning
comes again, and what was never a Parameter (a pruned weight, for one) need not become one.
"""

import copy
import re
import weakref
from typing import Any

import torch
from torch import nn

# What each class keeps for itself. nn.LSTM: the names of its weights, and the weights once more.
_MANUAL_ONLY = {"_weight_names", "_own_names", "_sample_hooks"}
_OFFICIAL_ONLY = {"_all_weights", "_flat_weights", "_flat_weights_names", "_flat_weight_refs"}


def manual_state(lstm: nn.LSTM) -> dict[str, Any]:
    """The ``__dict__`` that makes a ManualLSTM of ``lstm``, with its own containers."""
    state = {key: value for key, value in vars(lstm).items() if key not in _OFFICIAL_ONLY}
    state["_weight_names"] = [list(names) for names in lstm._all_weights]
    return state


def official_state(layer: Any) -> dict[str, Any]:
    """The ``__dict__`` that makes an nn.LSTM of a ManualLSTM, with its own containers."""
    state = {key: value for key, value in vars(layer).items() if key not in _MANUAL_ONLY}
    state["_all_weights"] = [list(names) for names in layer._weight_names]
    state["_flat_weights_names"] = [name for names in layer._weight_names for name in names]
    weights = [getattr(layer, name, None) for name in state["_flat_weights_names"]]
    state["_flat_weights"] = weights
    # This is what torch.load does with a saved layer: nn.LSTM knows what its version needs besides.
    lstm = nn.LSTM.__new__(nn.LSTM)
    lstm.__setstate__(state)  # type: ignore[no-untyped-call]
    if _alone(weights):
        lstm.flatten_parameters()  # on CUDA, into one chunk for cuDNN
    return vars(lstm)


def _alone(weights: list[Any]) -> bool:
    """Whether nothing else lies in the weights' memory: no chunk of cuDNN's, nor anybody's buffer."""
    return all(
        type(weight) is nn.Parameter
        and weight.device.type in ("cpu", "cuda")  # elsewhere there may be no storage to ask for
        and weight.untyped_storage().nbytes() == weight.nbytes
        for weight in weights
    )


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
        # __torch__.torch.nn.modules.rnn.___torch_mangle_3.LSTM; others have an LSTM of their own
        compiled = re.sub(r"___torch_mangle_\d+\.", "", layer._c._type().qualified_name())
        return bool(compiled == f"__torch__.{cls.__module__}.{cls.__qualname__}")
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
        return "it is a TorchScript module, compiled already: swap first, then trace"
    if isinstance(layer, nn.Module) and _is_quantized(layer):
        return f"it is a quantized layer, {kind}"
    if not isinstance(layer, cls):
        return f"it is {kind}" if isinstance(layer, nn.Module) else f"it is {layer!r}, no module"
    if nn.utils.parametrize.is_parametrized(layer):
        names = ", ".join(layer.parametrizations)  # type: ignore[arg-type]
        return f"it has parametrizations, of {names}: swap first, then register them"
    if type(layer) is not cls:
        name = "nn.LSTM" if cls is nn.LSTM else cls.__name__
        return f"it is a {kind}, a subclass of {name} whose own methods would be lost"
    if "forward" in vars(layer):
        return "its forward was replaced on the object, by one that may need the class it has now"
    return None
