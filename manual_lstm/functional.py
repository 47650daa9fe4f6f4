"""The notebook's function: one batch-first layer, its weights given one by one."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from manual_lstm.engine.stack import run_stack


def lstm_forward(
    input: Tensor,
    initial_states: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run one unidirectional batch-first LSTM layer, the equations of :class:`ManualLSTM`.

    Args:
        input: ``[B, T, I]``, of any dtype and on any device, which the result keeps.
        initial_states: h_0 and c_0, each ``[B, H]``.
        w_ih: ``[4H, I]``, gates in the order i, f, g, o.
        w_hh: ``[4H, H]``.
        b_ih: ``[4H]``, or ``None`` for no bias.
        b_hh: ``[4H]``, or ``None`` for no bias.

    Returns:
        output, ``[B, T, H]``, and (h_n, c_n), each ``[1, B, H]`` as nn.LSTM returns them.

    Raises:
        TypeError: initial_states that are no pair of tensors.
        ValueError: a tensor whose shape does not fit the others'.

    Example:
        >>> layer = nn.LSTM(6, 32, batch_first=True)
        >>> states = torch.zeros(100, 32), torch.zeros(100, 32)
        >>> output, (h_n, c_n) = lstm_forward(torch.randn(100, 1, 6), states, *layer.parameters())
        >>> output.shape, h_n.shape
        (torch.Size([100, 1, 32]), torch.Size([1, 100, 32]))
    """
    pair = isinstance(initial_states, Sequence) and len(initial_states) == 2
    if not pair or not all(isinstance(state, Tensor) for state in initial_states):
        raise TypeError(
            "initial_states should be the pair (h_0, c_0) of tensors [B, H], but got "
            f"{_described(initial_states)}; for zeros, pass input.new_zeros(B, H) twice"
        )
    h_0, c_0 = initial_states
    if input.dim() != 3 or w_hh.dim() != 2:
        raise ValueError(
            "input should be [B, T, I] and w_hh [4H, H], but got "
            f"{list(input.shape)} and {list(w_hh.shape)}"
        )
    B, I, H = input.size(0), input.size(2), w_hh.size(1)
    expected: list[tuple[str, Tensor | None, list[int]]] = [
        ("h_0", h_0, [B, H]),
        ("c_0", c_0, [B, H]),
        ("w_ih", w_ih, [4 * H, I]),
        ("w_hh", w_hh, [4 * H, H]),
        ("b_ih", b_ih, [4 * H]),
        ("b_hh", b_hh, [4 * H]),
    ]
    for name, tensor, shape in expected:
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"{name} should be of shape {shape}, but got {list(tensor.shape)}")

    weights = {"weight_ih": w_ih, "weight_hh": w_hh}
    if b_ih is not None or b_hh is not None:  # one of them is enough
        zeros = w_hh.new_zeros(w_hh.size(0))
        weights["bias_ih"] = zeros if b_ih is None else b_ih
        weights["bias_hh"] = zeros if b_hh is None else b_hh
    x = input.transpose(0, 1)  # [T, B, I]
    answer = run_stack(x, None, h_0.unsqueeze(0), c_0.unsqueeze(0), [weights], D=1)
    # Contiguous like the notebook's, whose readers call .view on it.
    return answer.output.transpose(0, 1).contiguous(), (answer.h_n, answer.c_n)


def _described(states: Any) -> str:
    if isinstance(states, Tensor):
        return f"one tensor of shape {list(states.shape)}"
    if isinstance(states, Sequence) and not isinstance(states, str):
        return f"({', '.join(type(state).__name__ for state in states)})"
    return repr(states)
