"""Nested tensors: sequences of different lengths in one."""

import torch
from torch import Tensor

from manual_lstm.report.function import BOTH, Function, loss
from manual_lstm.report.row import Row, Setting


def jagged(setting: Setting) -> None:
    """``[B, j, I]`` whatever ``batch_first`` says: equal to the sequences one by one."""
    function = Function(setting, B=3, training=False)
    torch.manual_seed(0)
    lengths = (2, 5, 1)
    sequences = [torch.randn(n, setting.I, dtype=setting.dtype).to(setting.device) for n in lengths]
    alone = [sequence.double().requires_grad_() for sequence in sequences]
    point = function.point
    values = torch.cat(sequences).requires_grad_()
    offsets = torch.tensor([0, 2, 7, 8], device=setting.device)
    nested = torch.nested.nested_tensor_from_jagged(values, offsets)

    for hx in ((point["h_0"], point["c_0"]), None):
        output, (h_n, c_n) = function.layer(nested, hx)
        assert output.layout == torch.jagged, f"the output is {output.layout}"
        # The length in a shape is a symbol, which two tensors share if their offsets are the same.
        assert output.shape[:2] == nested.shape[:2], f"{output.shape} is nested unlike {nested.shape}"

        results: list[tuple[Tensor, Tensor, Tensor]] = []
        for b, sequence in enumerate(alone):
            states = None if hx is None else tuple(part[:, b].double() for part in hx)
            one, ends = function.official(sequence, states)
            results.append((one, *ends))
        expected = {
            "output": torch.cat([one for one, _, _ in results]),
            "h_n": torch.stack([h for _, h, _ in results], 1),
            "c_n": torch.stack([c for _, _, c in results], 1),
        }
        actual = {"output": output.values(), "h_n": h_n, "c_n": c_n}
        function.same(actual, expected)
        found = torch.autograd.grad(loss(actual), [values, *function.layer.parameters()])
        wanted = torch.autograd.grad(loss(expected), [*alone, *function.official.parameters()])
        function.same(found, (torch.cat(wanted[:3]), *wanted[3:]))


ROWS = [Row("nested tensors, layout=torch.jagged", jagged, dtypes=BOTH)]
