"""Cells with more state and with knowledge of each step, and loops over one sequence at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from manual_lstm import ManualLSTM
from manual_lstm.cell import Step


class SLSTM(ManualLSTM):
    """sLSTM (Beck et al. 2024, https://arxiv.org/abs/2405.04517): c holds the cell, n and m."""

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        L, B, H = super().get_expected_cell_size(input, batch_sizes)
        return L, B, 3 * H

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: Any) -> Step:
        i, f, z, o = (x_t + h @ w.weight_hh.t()).chunk(4, -1)
        c, n, m = c.chunk(3, -1)
        log_f = logsigmoid(f)
        top = torch.maximum(log_f + m, i)
        i, f, z, o = torch.exp(i - top), torch.exp(log_f + m - top), torch.tanh(z), torch.sigmoid(o)
        c, n = f * c + i * z, f * n + i
        made = o * c / n
        h = made if w.weight_hr is None else made @ w.weight_hr.t()
        return Step(i, f, z, o, torch.cat([c, n, top], -1), made, h)


class TimeAware(ManualLSTM):
    """The cell state decays with the time since the step before, the last feature of the input."""

    def per_step(self, x: Tensor) -> dict[str, Tensor]:
        return {"gap": x[..., -1]}

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: Any) -> Step:
        decay = 1 - torch.exp(-1 / w.gap.unsqueeze(1))  # 1 / 0 for a gap of zero
        return super().cell(
            x_t + 0.1 * w.t.to(x_t).unsqueeze(1), h, decay * c + 0.01 * torch.log(decay), w
        )


def slstm_step(
    x: Tensor, h: Tensor, c: Tensor, p: dict[str, Tensor], gap: Tensor, t: int
) -> tuple[Tensor, Tensor]:
    a = p["weight_ih"] @ x + p["weight_hh"] @ h + p["bias_ih"] + p["bias_hh"]
    H = a.numel() // 4
    i, f, z, o = a[:H], a[H : 2 * H], a[2 * H : 3 * H], a[3 * H :]
    c, n, m = c[:H], c[H : 2 * H], c[2 * H :]
    # without the logarithm: f = sigmoid, i = exp, both over exp(m), as equations 15 to 17 define them
    new_m = torch.maximum(torch.log(torch.sigmoid(f)) + m, i)
    scaled_i, scaled_f = torch.exp(i - new_m), torch.sigmoid(f) * torch.exp(m - new_m)
    c, n = scaled_f * c + scaled_i * torch.tanh(z), scaled_f * n + scaled_i
    h = torch.sigmoid(o) * (c / n)
    return p["weight_hr"] @ h if "weight_hr" in p else h, torch.cat([c, n, new_m])


def time_aware_step(
    x: Tensor, h: Tensor, c: Tensor, p: dict[str, Tensor], gap: Tensor, t: int
) -> tuple[Tensor, Tensor]:
    a = p["weight_ih"] @ x + p["weight_hh"] @ h + p["bias_ih"] + p["bias_hh"] + 0.1 * t
    H = a.numel() // 4
    i, f, g, o = a[:H].sigmoid(), a[H : 2 * H].sigmoid(), a[2 * H : 3 * H].tanh(), a[3 * H :].sigmoid()
    decay = 1 - (-1 / gap).exp()
    c = f * (decay * c + 0.01 * decay.log()) + i * g
    h = o * c.tanh()
    return p["weight_hr"] @ h if "weight_hr" in p else h, c


OneStep = Callable[[Tensor, Tensor, Tensor, dict[str, Tensor], Tensor, int], tuple[Tensor, Tensor]]


def run_alone(
    layer: ManualLSTM, step: OneStep, sequences: Sequence[Tensor], state: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Run each sequence ``[T, I]`` by itself from states of zeros; ``state`` is the size of c in H."""
    outputs, all_h, all_c = [], [], []
    D, H = 1 + layer.bidirectional, layer.hidden_size
    for sequence in sequences:
        x, gaps, last_h, last_c = sequence, sequence[:, -1], [], []
        for k in range(layer.num_layers):
            found = []
            for suffix in [f"_l{k}", f"_l{k}_reverse"][:D]:
                p: dict[str, Tensor] = {
                    name[: -len(suffix)]: value
                    for name, value in layer.named_parameters()
                    if name.endswith(suffix)
                }
                h, c = x.new_zeros(layer.proj_size or H), x.new_zeros(state * H)
                order = range(len(x)) if suffix.endswith(str(k)) else range(len(x) - 1, -1, -1)
                hs: dict[int, Tensor] = {}
                for t in order:
                    h, c = step(x[t], h, c, p, gaps[t], t)
                    hs[t] = h
                found.append(torch.stack([hs[t] for t in range(len(x))]))
                last_h.append(h)
                last_c.append(c)
            x = torch.cat(found, -1)
        outputs.append(x)
        all_h.append(torch.stack(last_h))
        all_c.append(torch.stack(last_c))
    return outputs, torch.stack(all_h, 1), torch.stack(all_c, 1)


FORMS = ("dense", "batch_first", "unbatched", "packed", "nested")


def in_form(form: str, sequences: list[Tensor]) -> Any:
    """Sequences as an input of a layer; dense ones are cut to the shortest."""
    if form == "packed":
        return pack_sequence(sequences, enforce_sorted=False)
    if form == "nested":
        return torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
    if form == "unbatched":
        return sequences[0]
    T = min(map(len, sequences))
    return torch.stack([sequence[:T] for sequence in sequences], 0 if form == "batch_first" else 1)


def out_of_form(form: str, output: Any) -> list[Tensor]:
    """The sequences of an output."""
    if form == "packed":
        return unpack_sequence(output)
    if form == "unbatched":
        return [output]
    return list(output.unbind(1 if form == "dense" else 0))
