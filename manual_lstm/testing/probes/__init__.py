"""What nn.LSTM does for its callers: for each row a function that raises if a layer does not do it."""

from manual_lstm.testing.probes import module, parameters, results
from manual_lstm.testing.probes.subject import Probes, Subject

__all__ = ["PROBES", "BEYOND", "IMPLIED", "Subject"]

PROBES = Probes(results.PROBES | parameters.PROBES | module.PROBES)
# The rows at which nn.LSTM itself fails. A class may fail there too, with the same exception.
BEYOND = {"no steps"}
# The rows that need the feature of another row. A class that lacks the one lacks the others too.
IMPLIED: dict[str, tuple[str, ...]] = {
    "packed": ("packed unsorted", "packed by hand"),
    "num_layers": ("dropout", "dropout in eval"),
    "dropout": ("dropout in eval",),
    "parameters": (
        "order of parameters",
        "initial values",
        "state_dict",
        "load from meta",
        "gradients, one by one",
        "functional_call",
        "parametrized weights",
    ),
}
