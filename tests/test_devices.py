"""Device placement: every device there is, meta, and a fake CUDA that needs none."""

import pytest
import torch
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence

from manual_lstm import ManualLSTM
from manual_lstm.check.parity import data_of
from manual_lstm.testing import Case, cases
from manual_lstm.testing.cases import DEVICES, KEYWORDS


def _strides(tensor: torch.Tensor) -> list[int]:
    """Those that matter."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape) if size != 1]


def _check_placement(case: Case, device: str) -> None:
    """The layer with weights, input and state on ``device`` answers there, in the right shapes."""
    on_cpu = ManualLSTM(**case.options, dtype=case.dtype)
    keywords = case.keywords()
    expected, expected_states = on_cpu(case.input(), case.hx(), **keywords)
    input, hx = case.input(), case.hx()

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    with FakeTensorMode() if device == "cuda" else torch.device(device), torch.no_grad():
        layer = ManualLSTM(**case.options, dtype=case.dtype, device="meta")
        weights = {name: place(weight) for name, weight in layer.state_dict().items()}
        layer.load_state_dict(weights, assign=True)
        placed: torch.Tensor | PackedSequence
        if isinstance(input, PackedSequence):
            indices = [
                None if i is None else place(i) for i in (input.sorted_indices, input.unsorted_indices)
            ]
            placed = PackedSequence(place(input.data), input.batch_sizes, *indices)
        else:
            placed = place(input)
        placed_hx = None if hx is None else (place(hx[0]), place(hx[1]))
        resets = keywords.get("resets")
        if isinstance(resets, PackedSequence):
            assert isinstance(placed, PackedSequence)
            keywords["resets"] = placed._replace(data=place(resets.data))
        elif resets is not None:
            keywords["resets"] = place(resets)
        actual, actual_states = layer(placed, placed_hx, **keywords)
        pairs = zip([data_of(actual), *actual_states], [data_of(expected), *expected_states])
        for ours, theirs in pairs:
            assert ours.device.type == device
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            assert _strides(ours) == _strides(theirs) or theirs.numel() == 0
        # And where one of them is elsewhere, the error names both devices.
        elsewhere = torch.empty(data_of(placed).shape, dtype=case.dtype, device="cpu")
        stray = placed._replace(data=elsewhere) if isinstance(placed, PackedSequence) else elsewhere
        with pytest.raises(RuntimeError, match=f"{device}.*but got input of cpu"):
            layer(stray, placed_hx)


@given(case=cases(dtypes=(torch.float32, torch.bfloat16), large=False, beyond=KEYWORDS))
def test_fake_cuda(case: Case) -> None:
    case.device = "cpu"
    _check_placement(case, "cuda")


@given(
    case=cases(
        dtypes=(torch.float32, torch.complex64), large=False, without={"dropout"}, beyond=KEYWORDS
    )
)
def test_meta(case: Case) -> None:
    case.device = "cpu"
    _check_placement(case, "meta")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_the_layer_moves(device: str) -> None:
    if device not in DEVICES:
        pytest.skip(f"no {device} on this machine")
    layer, x = ManualLSTM(3, 4, 2, bidirectional=True), torch.randn(5, 2, 3)
    expected = layer(x)[0]
    output = layer.to(device)(x.to(device))[0]
    assert output.device.type == device
    torch.testing.assert_close(output.cpu(), expected, rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match=f"{device}.*but got input of cpu"):
        layer(x)
