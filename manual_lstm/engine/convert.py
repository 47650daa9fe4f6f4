"""Convert the state of an nn.LSTM into that of a ManualLSTM, and back.

Everything is kept, as the same objects: parameters, buffers, hooks and extra attributes. No
constructor runs. So no random number is drawn, no argument is checked again, no warning is repeated,
and a weight that is not a Parameter (a pruned one, for example) stays as it is.
"""

import copy
import re
import weakref
from typing import Any

import torch
from torch import nn

from manual_lstm.engine.weights import own_weights

# Attributes that only one of the classes has. nn.LSTM keeps the names of its weights twice, and the
# weights twice.
_MANUAL_ONLY = {"_assigned", "_own_names", "_sample_hooks"}
_OFFICIAL_ONLY = {"_flat_weights", "_flat_weights_names", "_flat_weight_refs"}


def manual_state(lstm: nn.LSTM) -> dict[str, Any]:
    """Return the ``__dict__`` that makes ``lstm`` a ManualLSTM. Lists of its own are new."""
    state = {key: value for key, value in vars(lstm).items() if key not in _OFFICIAL_ONLY}
    state["_all_weights"] = [list(names) for names in lstm._all_weights]
    own = own_weights(lstm)
    same = all(weight is mine for weight, mine in zip(lstm._flat_weights, own))
    # nn.LSTM forgets what _flat_weights was assigned when a weight has changed.
    forgotten = same or lstm._weights_have_changed()  # type: ignore[no-untyped-call]
    state["_assigned"] = None if forgotten else (list(lstm._flat_weights), own)
    return state


def official_state(layer: Any) -> dict[str, Any]:
    """Return the ``__dict__`` that makes a ManualLSTM an nn.LSTM. Lists of its own are new."""
    state = {key: value for key, value in vars(layer).items() if key not in _MANUAL_ONLY}
    state["_all_weights"] = [list(names) for names in layer._all_weights]
    state["_flat_weights_names"] = layer._flat_weights_names
    state["_flat_weights"] = weights = own_weights(layer)
    # torch.load calls __setstate__ for a saved layer: it adds what this version of nn.LSTM needs.
    lstm = nn.LSTM.__new__(nn.LSTM)
    lstm.__setstate__(state)  # type: ignore[no-untyped-call]
    if _have_own_memory(weights):
        lstm.flatten_parameters()  # on CUDA, into one chunk for cuDNN
    if layer._assigned is not None:
        lstm._flat_weights = list(layer._flat_weights)
    return vars(lstm)


def _have_own_memory(weights: list[Any]) -> bool:
    """Return whether no weight shares its memory, with cuDNN's flat buffer or anything else."""
    return all(
        type(weight) is nn.Parameter
        and weight.device.type in ("cpu", "cuda")  # tensors of other devices may have no storage
        and weight.untyped_storage().nbytes() == weight.nbytes
        for weight in weights
    )


def install_state(layer: nn.Module, state: dict[str, Any], old: nn.Module) -> None:
    """Give ``layer`` the state of ``old``, and copies of its containers, as ``old`` stays in use."""
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
    """Return whether ``layer`` is a ``cls``, a subclass, or a scripted or quantized version of it."""
    if isinstance(layer, torch.jit.ScriptModule):
        # The name is like __torch__.torch.nn.modules.rnn.___torch_mangle_3.LSTM. All of it is
        # compared, because other packages have classes named LSTM too.
        compiled = re.sub(r"___torch_mangle_\d+\.", "", layer._c._type().qualified_name())
        return bool(compiled == f"__torch__.{cls.__module__}.{cls.__qualname__}")
    return isinstance(layer, cls) or (cls is nn.LSTM and _is_quantized(layer))


def _is_quantized(layer: nn.Module) -> bool:
    # By name, because torch.ao is moving to torchao and warns when it is looked up.
    return any(
        base.__name__ == "LSTM" and base.__module__.startswith(("torch.ao.", "torchao."))
        for base in type(layer).__mro__
    )


def why_not(layer: nn.Module, cls: type[nn.Module]) -> str | None:
    """Return why ``layer`` cannot be swapped as a ``cls``, or None if it can."""
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
