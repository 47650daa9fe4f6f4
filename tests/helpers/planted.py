"""A gate loop at its plainest, and the mistakes that are planted in copies of it."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


class PlainLSTM(nn.LSTM):
    """nn.LSTM with a forward spelled out for every option, and without checks."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        packed = isinstance(input, PackedSequence)
        x: Any
        sizes: Any
        x, sizes, order, back = input if packed else (input, None, None, None)
        batched = packed or x.dim() == 3
        if packed:
            steps = list(x.split(sizes.tolist()))
        elif batched:
            steps = list(x.unbind(1 if self.batch_first else 0))
        else:
            steps = list(x.unsqueeze(1))
        B, D = len(steps[0]), 2 if self.bidirectional else 1
        if hx is None:
            h_0 = x.new_zeros(self.num_layers * D, B, self.proj_size or self.hidden_size)
            c_0 = x.new_zeros(self.num_layers * D, B, self.hidden_size)
        else:
            h_0, c_0 = hx if batched else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        if hx is not None and order is not None:
            h_0, c_0 = h_0[:, order], c_0[:, order]
        h_last: list[Tensor] = []
        c_last: list[Tensor] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.training:
                rows = torch.dropout(torch.cat(steps), self.dropout, True)
                steps = list(rows.split_with_sizes([len(x_t) for x_t in steps]))
            directions = []
            for direction in range(D):
                k = len(h_last)
                place = f"_l{layer}" + ("_reverse" if direction else "")
                w_ih, w_hh = getattr(self, "weight_ih" + place), getattr(self, "weight_hh" + place)
                h, c = h_0[k], c_0[k]
                outputs = []
                for x_t in reversed(steps) if direction else steps:
                    b = len(x_t)
                    gates = x_t @ w_ih.T + h[:b] @ w_hh.T
                    if self.bias:
                        gates = gates + getattr(self, "bias_ih" + place)
                        gates = gates + getattr(self, "bias_hh" + place)
                    i, f, g, o = gates.chunk(4, dim=1)
                    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
                    c_t = f * c[:b] + i * g
                    h_t = o * c_t.tanh()
                    if self.proj_size:
                        h_t = h_t @ getattr(self, "weight_hr" + place).T
                    h, c = torch.cat([h_t, h[b:]]), torch.cat([c_t, c[b:]])
                    outputs.append(h_t)
                directions.append(outputs[::-1] if direction else outputs)
                h_last.append(h)
                c_last.append(c)
            steps = [torch.cat(parts, dim=1) for parts in zip(*directions)]
        h_n, c_n = torch.stack(h_last), torch.stack(c_last)
        if packed:
            if back is not None:
                h_n, c_n = h_n[:, back], c_n[:, back]
            return PackedSequence(torch.cat(steps), sizes, order, back), (h_n, c_n)
        if not batched:
            return torch.cat(steps), (h_n.squeeze(1), c_n.squeeze(1))
        output = torch.stack(steps)
        return output.transpose(0, 1) if self.batch_first else output, (h_n, c_n)


def planted(old: str, new: str) -> type[PlainLSTM]:
    """PlainLSTM with one piece of its source changed."""
    source = inspect.getsource(PlainLSTM)
    assert source.count(old) == 1, f"{source.count(old)} times in PlainLSTM: {old}"
    names: dict[str, Any] = dict(globals())
    exec(source.replace(old, new), names)
    changed: type[PlainLSTM] = names["PlainLSTM"]
    return changed


# What people get wrong when they write an LSTM by hand.
MISTAKES: dict[str, tuple[str, str]] = {
    "two gates swapped": ("i, f, g, o = gates", "f, i, g, o = gates"),
    "one bias forgotten": ('gates + getattr(self, "bias_hh" + place)', "gates"),
    "tanh of the cell state dropped": ("o * c_t.tanh()", "o * c_t"),
    "reverse direction not reversed": ("reversed(steps) if direction else steps", "steps"),
    "outputs left in reverse": ("outputs[::-1] if direction else outputs", "outputs"),
    "h_n of sequences that have ended": ("h[b:]])", "0 * h[b:]])"),
    "dropout in eval": ("layer > 0 and self.training", "layer > 0"),
    "dropout before the first layer": ("layer > 0 and self.training", "self.training"),
    "hx batch first": (
        "h_0, c_0 = hx if batched",
        "h_0, c_0 = (s.transpose(0, 1) if self.batch_first else s for s in hx) if batched",
    ),
    "hx in the order of the lengths": ("h_0[:, order], c_0[:, order]", "h_0, c_0"),
    "h_n in the order of the lengths": ("h_n[:, back], c_n[:, back]", "h_n, c_n"),
    "order of the output forgotten": ("sizes, order, back), (h_n", "sizes), (h_n"),
    "c detached": ("f * c[:b] + i * g", "f * c[:b].detach() + i * g"),
    "h_0 detached": ("h, c = h_0[k]", "h, c = h_0[k].detach()"),
    "projection cut off": (
        'h_t @ getattr(self, "weight_hr" + place).T',
        "h_t[:, : self.proj_size]",
    ),
    "projection without a gradient": (
        'getattr(self, "weight_hr" + place).T',
        'getattr(self, "weight_hr" + place).T.detach()',
    ),
    "every layer starts from the first's state": ("h_0[k], c_0[k]", "h_0[k % D], c_0[k % D]"),
    "float32 in between": ("f * c[:b] + i * g", "(f * c[:b] + i * g).float().to(f.dtype)"),
    "wrong from the 33rd step": ("o * c_t.tanh()", "o * c_t.tanh() * (1 + (len(outputs) > 31))"),
}
