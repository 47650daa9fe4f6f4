"""The cells as their papers print them: one sequence, one step and one gate at a time.

Nothing of the package's own computation is used here: no stacked gates, no batch, no packing.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, sigmoid, tanh
from torch.nn.utils.rnn import PackedSequence, unpack_sequence

from manual_lstm import ManualLSTM
from manual_lstm.testing.cases import Case, Input, State


class Made(NamedTuple):
    """What one step makes, of one sequence: vectors."""

    i: Tensor
    f: Tensor
    g: Tensor
    o: Tensor
    c: Tensor
    m: Tensor
    h: Tensor


class Weights:
    """A matrix for each gate of one direction of one layer, and the cell's own parameters."""

    def __init__(self, layer: ManualLSTM, suffix: str, drawn: dict[str, Tensor]) -> None:
        self.own = {
            name.removesuffix(suffix): parameter
            for name, parameter in layer.named_parameters()
            if name.endswith(suffix)
        }
        self.drawn = drawn  # what was drawn for this sequence
        self.layer = layer
        H = layer.hidden_size
        self.W: dict[str, Tensor] = {}  # of x
        self.U: dict[str, Tensor] = {}  # of h
        self.b: dict[str, Tensor] = {}
        for k, gate in enumerate("ifgo"):
            rows = slice(k * H, (k + 1) * H)
            self.W[gate] = self.own["weight_ih"][rows]
            self.U[gate] = self.own["weight_hh"][rows]
            self.b[gate] = self.W[gate].new_zeros(H)
            if layer.bias:
                self.b[gate] = self.own["bias_ih"][rows] + self.own["bias_hh"][rows]

    def sum(self, gate: str, x: Tensor, h: Tensor) -> Tensor:
        return self.W[gate] @ x + self.U[gate] @ h + self.b[gate]

    def project(self, m: Tensor) -> Tensor:
        return self.own["weight_hr"] @ m if self.layer.proj_size else m


Equations = Callable[[Tensor, Tensor, Tensor, Weights], Made]


def lstm(x: Tensor, h: Tensor, c: Tensor, p: Weights) -> Made:
    i = sigmoid(p.sum("i", x, h))
    f = sigmoid(p.sum("f", x, h))
    g = tanh(p.sum("g", x, h))
    o = sigmoid(p.sum("o", x, h))
    c = f * c + i * g
    m = o * tanh(c)
    return Made(i, f, g, o, c, m, p.project(m))


def layer_norm(x: Tensor, h: Tensor, c: Tensor, p: Weights) -> Made:
    """Ba et al. 2016, equations 20 to 22: each vector of all four gates is normalised as one."""

    def norm(z: Tensor, name: str) -> Tensor:
        mean = z.mean()
        variance = (z - mean).square().mean()
        gain, bias = p.own[name]
        normed: Tensor = gain * (z - mean) / torch.sqrt(variance + 1e-5) + bias
        return normed

    of_h = norm(torch.cat([p.U[gate] @ h for gate in "ifgo"]), "ln_h")
    of_x = norm(torch.cat([p.W[gate] @ x for gate in "ifgo"]), "ln_x")
    H = len(c)
    both = of_h + of_x
    i = sigmoid(both[:H] + p.b["i"])
    f = sigmoid(both[H : 2 * H] + p.b["f"])
    g = tanh(both[2 * H : 3 * H] + p.b["g"])
    o = sigmoid(both[3 * H :] + p.b["o"])
    c = f * c + i * g
    m = o * tanh(norm(c, "ln_c"))
    return Made(i, f, g, o, c, m, p.project(m))


def peephole(x: Tensor, h: Tensor, c: Tensor, p: Weights) -> Made:
    """Gers & Schmidhuber 2000: i and f look at the old cell state, o at the new one."""
    p_i, p_f, p_o = p.own["peephole"]
    i = sigmoid(p.sum("i", x, h) + p_i * c)
    f = sigmoid(p.sum("f", x, h) + p_f * c)
    g = tanh(p.sum("g", x, h))
    c = f * c + i * g
    o = sigmoid(p.sum("o", x, h) + p_o * c)
    m = o * tanh(c)
    return Made(i, f, g, o, c, m, p.project(m))


def coupled(x: Tensor, h: Tensor, c: Tensor, p: Weights) -> Made:
    """Greff et al. 2017, CIFG: f = 1 - i."""
    i = sigmoid(p.sum("i", x, h))
    g = tanh(p.sum("g", x, h))
    o = sigmoid(p.sum("o", x, h))
    c = c - i * c + i * g
    m = o * tanh(c)
    return Made(i, 1 - i, g, o, c, m, p.project(m))


def zoneout(x: Tensor, h: Tensor, c: Tensor, p: Weights) -> Made:
    """Krueger et al. 2017 in evaluation: each unit keeps its old value by its probability's part.

    h is made of the new cell state, not of the mixed one.
    """
    z_c, z_h = 0.5, 0.05
    new = lstm(x, h, c, p)
    return new._replace(c=z_c * c + (1 - z_c) * new.c, h=z_h * h + (1 - z_h) * new.h)


def variational(x: Tensor, h: Tensor, c: Tensor, p: Weights) -> Made:
    """Gal & Ghahramani 2016: one mask of x and one of h, for all gates and steps of the sequence."""
    return lstm(x * p.drawn["input_mask"][: len(x)], h * p.drawn["hidden_mask"], c, p)


def hard_sigmoid(x: Tensor, h: Tensor, c: Tensor, p: Weights) -> Made:
    def hard(a: Tensor) -> Tensor:
        return (a / 6 + 0.5).clamp(0, 1)

    i, f, o = (hard(p.sum(gate, x, h)) for gate in "ifo")
    g = tanh(p.sum("g", x, h))
    c = f * c + i * g
    m = o * tanh(c)
    return Made(i, f, g, o, c, m, p.project(m))


def run(
    layer: ManualLSTM,
    equations: Equations,
    sequences: list[Tensor],
    hx: tuple[Tensor, Tensor],
    drawn: list[list[dict[str, Tensor]]] | None = None,
) -> tuple[list[Tensor], Tensor, Tensor, list[list[list[Made]]]]:
    """Run a layer without dropout on sequences ``[T, I]``, each by itself.

    Args:
        hx: h_0 and c_0, ``[L * D, B, features]``.
        drawn: for each layer and direction, and each sequence, what the layer drew.

    Returns:
        The outputs ``[T, D * (P or H)]``, h_n, c_n, and for each layer and direction, and each
        sequence, its T steps.
    """
    L, suffixes = layer.num_layers, ["", "_reverse"][: 1 + layer.bidirectional]
    outputs: list[Tensor] = []
    last = [torch.zeros_like(state) for state in hx]
    steps: list[list[list[Made]]] = [[] for _ in range(L * len(suffixes))]
    for b, x in enumerate(sequences):
        for k in range(L):
            made_by_direction = []
            for d, suffix in enumerate(suffixes):
                row = k * len(suffixes) + d
                p = Weights(layer, f"_l{k}{suffix}", drawn[row][b] if drawn else {})
                h, c = hx[0][row, b], hx[1][row, b]
                made = []
                for x_t in reversed(x) if suffix else x:
                    made.append(equations(x_t, h, c, p))
                    h, c = made[-1].h, made[-1].c
                for state, value in zip(last, (h, c)):
                    state[row, b] = value
                steps[row].append(made[::-1] if suffix else made)
                made_by_direction.append(steps[row][b])
            x = torch.stack([torch.cat([step.h for step in at_t]) for at_t in zip(*made_by_direction)])
        outputs.append(x)
    return outputs, last[0], last[1], steps


def split(sequence: Input, case: Case) -> list[Tensor]:
    """The sequences of a batch, ``[T, features]`` each, in the caller's order."""
    if isinstance(sequence, PackedSequence):
        return unpack_sequence(sequence)
    if case.form == "unbatched":
        return [sequence]
    return list(sequence.unbind(0 if case.options["batch_first"] else 1))


def run_case(
    layer: ManualLSTM,
    equations: Equations,
    case: Case,
    input: Input,
    hx: State | None,
    drawn: list[dict[str, Tensor]] | None = None,
) -> tuple[list[Tensor], list[list[list[Made]]]]:
    """Run a layer on a case's input.

    Args:
        drawn: for each layer and direction what the layer drew, in the order of its loop.

    Returns:
        The outputs of all sequences, h_n and c_n as the layer returns them; and the steps, as by
        :func:`run`.
    """
    sequences = split(input, case)
    B, L = len(sequences), len(layer.all_weights)
    H, P = layer.hidden_size, layer.proj_size or layer.hidden_size
    states = (sequences[0].new_zeros(L, B, P), sequences[0].new_zeros(L, B, H)) if hx is None else hx
    states = states[0].view(L, B, P), states[1].view(L, B, H)
    order = list(range(B))  # where each sequence stands in the loop
    if isinstance(input, PackedSequence) and input.unsorted_indices is not None:
        order = input.unsorted_indices.tolist()
    rows = [[{k: t[row] for k, t in each.items()} for row in order] for each in drawn or []]
    outputs, h_n, c_n, steps = run(layer, equations, sequences, states, rows)
    if case.form == "unbatched":
        h_n, c_n = h_n.squeeze(1), c_n.squeeze(1)
    return [*outputs, h_n, c_n], steps


def parts(steps: list[list[list[Made]]], name: str) -> list[list[Tensor]]:
    """One part of all steps: for each layer and direction, and each sequence, ``[T, features]``."""
    return [[torch.stack([getattr(step, name) for step in made]) for made in each] for each in steps]


def gradients(results: list[Tensor], wanted: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of a sum in which every element has a weight of its own."""
    flat = torch.cat([result.flatten() for result in results])
    loss = (flat * torch.linspace(0.5, 1.5, len(flat)).to(flat)).sum()
    return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
