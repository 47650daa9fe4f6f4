"""The row on nested tensors: sequences of different lengths in one tensor."""

import torch
from torch import Tensor

from manual_lstm.report.function import FLOATS, LayerFunction, loss
from manual_lstm.report.row import ReportRow, Setting


def check_jagged(setting: Setting) -> None:
    """Input ``[B, j, I]``, whatever ``batch_first`` is, gives what the single sequences give."""
    function = LayerFunction(setting, B=3, training=False)
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
        # The length in the shape is a symbol. Two tensors share it if their offsets are the same.
        assert output.shape[:2] == nested.shape[:2], f"{output.shape} is nested unlike {nested.shape}"

        results: list[tuple[Tensor, Tensor, Tensor]] = []
        for b, sequence in enumerate(alone):
            states = None if hx is None else tuple(part[:, b].double() for part in hx)
            sequence_output, final_states = function.official(sequence, states)
            results.append((sequence_output, *final_states))
        expected = {
            "output": torch.cat([sequence_output for sequence_output, _, _ in results]),
            "h_n": torch.stack([h for _, h, _ in results], 1),
            "c_n": torch.stack([c for _, _, c in results], 1),
        }
        actual = {"output": output.values(), "h_n": h_n, "c_n": c_n}
        function.assert_close(actual, expected)
        ours = torch.autograd.grad(loss(actual), [values, *function.layer.parameters()])
        theirs = torch.autograd.grad(loss(expected), [*alone, *function.official.parameters()])
        function.assert_close(ours, (torch.cat(theirs[:3]), *theirs[3:]))


ROWS = [ReportRow("nested tensors, layout=torch.jagged", check_jagged, dtypes=FLOATS)]
