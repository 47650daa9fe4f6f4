"""Opacus: the per-sample gradients of DPLSTM, and of the samples one by one."""

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from manual_lstm import ManualLSTM, plain_loop

pytest.importorskip("opacus")
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModule
from opacus.layers import DPLSTM

pytestmark = [
    pytest.mark.optional,
    pytest.mark.filterwarnings("ignore"),  # Opacus' own
]
B, I, H = 4, 3, 5
Loss = Callable[[Any, Tensor, Tensor], Tensor]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True},
]
LOSSES: dict[str, Loss] = {
    "output": lambda output, h_n, c_n: _data(output).sin().sum(),
    "h_n": lambda output, h_n, c_n: h_n.sin().sum(),
    "c_n": lambda output, h_n, c_n: c_n.square().sum(),
    "all": lambda output, h_n, c_n: _data(output).sin().sum() + h_n.cos().sum() + c_n.square().sum(),
}


def _data(output: Any) -> Tensor:
    data: Tensor = output.data if isinstance(output, PackedSequence) else output
    return data


def sequences(form: str) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n if form != "dense" else 6, I).double() for n in (2, 6, 1, 4)]


def states(options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    L = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    return torch.randn(L, B, options.get("proj_size", H)).double(), torch.randn(L, B, H).double()


def make_input(form: str) -> Any:
    each = sequences(form)
    if form == "dense":
        return torch.stack(each)
    if form == "nested":
        return torch.nested.as_nested_tensor(each, layout=torch.jagged)
    if form == "sorted":
        return pack_sequence(sorted(each, key=len, reverse=True))
    return pack_sequence(each, enforce_sorted=False)


def gradients_one_by_one(
    layer: ManualLSTM, form: str, loss: Loss, hx: tuple[Tensor, Tensor] | None
) -> dict[str, Tensor]:
    each = sequences(form)
    if form == "sorted":
        each.sort(key=len, reverse=True)
    found = []
    for k, sequence in enumerate(each):
        own = None if hx is None else (hx[0][:, k : k + 1], hx[1][:, k : k + 1])
        output, (h_n, c_n) = layer(sequence.unsqueeze(0), own)
        total = loss(output, h_n, c_n)
        found.append(torch.autograd.grad(total, list(layer.parameters()), materialize_grads=True))
    names = [name for name, _ in layer.named_parameters()]
    return {name: torch.stack(parts) for name, parts in zip(names, zip(*found))}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("form", ["dense", "sorted", "unsorted", "nested"])
@pytest.mark.parametrize("options", [*OPTIONS, {"proj_size": 2, "bidirectional": True}], ids=str)
def test_equal_to_the_samples_one_by_one(
    options: dict[str, Any], form: str, with_hx: bool, loss: str
) -> None:
    torch.manual_seed(0)
    layer = ManualLSTM(I, H, batch_first=True, dtype=torch.float64, **options)
    hx = states(options) if with_hx else None
    expected = gradients_one_by_one(layer, form, LOSSES[loss], hx)
    model = GradSampleModule(layer, loss_reduction="sum")
    output, (h_n, c_n) = model(make_input(form), hx)
    LOSSES[loss](output.values() if form == "nested" else output, h_n, c_n).backward()  # type: ignore[no-untyped-call]
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(_gradient(parameter), expected[name], rtol=0, atol=1e-12)
        torch.testing.assert_close(parameter.grad, expected[name].sum(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["dense", "sorted", "unsorted", "nested"])
def test_in_the_plain_loop(form: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
    layer = ManualLSTM(I, H, batch_first=True, dtype=torch.float64, **options)
    expected = gradients_one_by_one(layer, form, LOSSES["all"], None)
    model = GradSampleModule(layer, loss_reduction="sum")
    with (
        plain_loop(),
        mock.patch("manual_lstm.engine.opacus.direction", side_effect=AssertionError),
    ):
        output, (h_n, c_n) = model(make_input(form))
        loss = LOSSES["all"](output.values() if form == "nested" else output, h_n, c_n)
        loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(_gradient(parameter), expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["dense", "sorted", "unsorted"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equal_to_dplstm(options: dict[str, Any], reduction: str, form: str) -> None:
    torch.manual_seed(0)
    layer = ManualLSTM(I, H, batch_first=True, **options)
    peer = DPLSTM(I, H, batch_first=True, **options)
    peer.load_state_dict(layer.state_dict())
    x = make_input(form).to(torch.float32)
    for each in (layer, peer):
        output, (h_n, c_n) = GradSampleModule(each, loss_reduction=reduction)(x)
        LOSSES["all"](output, h_n, c_n).backward()  # type: ignore[no-untyped-call]
    theirs = _dplstm_gradients(peer)
    for name, parameter in layer.named_parameters():
        ours = _gradient(parameter)
        if form == "unsorted":  # DPLSTM leaves its gradients in the order of the lengths
            ours = ours[x.sorted_indices]
        torch.testing.assert_close(ours, theirs[name], rtol=1e-5, atol=1e-5)


def _gradient(parameter: Any) -> Tensor:
    gradient: Tensor = parameter.grad_sample
    return gradient


def _dplstm_gradients(peer: Any) -> dict[str, Tensor]:
    """DPLSTM's per-sample gradients by nn.LSTM's names, which its state dict has."""
    where = {id(p): p for p in peer.parameters()}
    keep = {name: p for name, p in peer.state_dict(keep_vars=True).items()}
    return {name: _gradient(where[id(p)]) for name, p in keep.items()}


def test_the_dropout_is_the_forwards() -> None:
    torch.manual_seed(0)
    layer = ManualLSTM(I, H, 2, dropout=0.5, batch_first=True, dtype=torch.float64)
    model = GradSampleModule(layer, loss_reduction="sum")
    output, _ = model(make_input("dense"))
    output.sin().sum().backward()
    for parameter in layer.parameters():
        torch.testing.assert_close(_gradient(parameter).sum(0), parameter.grad)


def test_frozen_and_tied_and_called_twice() -> None:
    torch.manual_seed(0)
    layer = ManualLSTM(I, I, 2, batch_first=True, dtype=torch.float64)
    layer.weight_ih_l1 = layer.weight_ih_l0
    layer.bias_ih_l1.requires_grad_(False)
    model = GradSampleModule(layer, loss_reduction="sum")
    x = make_input("dense")
    (model(x)[0].sin().sum() + model(2 * x)[0].cos().sum()).backward()
    assert not hasattr(layer.bias_ih_l1, "grad_sample")
    for parameter in layer.parameters():
        if parameter.requires_grad:
            assert _gradient(parameter).shape == (B, *parameter.shape)
            torch.testing.assert_close(_gradient(parameter).sum(0), parameter.grad)


class Classifier(nn.Module):
    def __init__(self, make: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.lstm = make(I, H, batch_first=True)
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.lstm(x)[1][0][-1])
        return scores


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_privacy_engine_trains_alike(mode: str) -> None:
    # Without noise all three ways come to the same numbers.
    contenders = [(ManualLSTM, mode), (DPLSTM, "hooks")]
    results = []
    torch.manual_seed(0)
    start = Classifier(ManualLSTM)
    data = torch.utils.data.TensorDataset(torch.randn(12, 6, I), torch.arange(12) % 2)
    for make, grad_sample_mode in contenders:
        model = Classifier(make)
        model.lstm.load_state_dict(start.lstm.state_dict())
        model.head.load_state_dict(start.head.state_dict())
        ghost = grad_sample_mode == "ghost"
        options: dict[str, Any] = {"criterion": nn.CrossEntropyLoss()} if ghost else {}
        made = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
            data_loader=torch.utils.data.DataLoader(data, batch_size=4),
            noise_multiplier=0.0,
            max_grad_norm=0.3,
            poisson_sampling=False,
            grad_sample_mode=grad_sample_mode,
            **options,
        )
        private, optimizer, *criterion, loader = made
        compute = criterion[0] if criterion else nn.CrossEntropyLoss()
        for x, y in loader:
            optimizer.zero_grad()
            compute(private(x), y).backward()
            optimizer.step()
        results.append(model.lstm.state_dict())
    ours, theirs = results
    assert list(ours) == list(nn.LSTM(I, H).state_dict())
    for name, weight in ours.items():
        assert not torch.equal(weight, start.lstm.state_dict()[name])
        torch.testing.assert_close(weight, theirs[name], rtol=1e-4, atol=1e-6)


def test_the_hooks_go_and_evaluation_does_without() -> None:
    layer = ManualLSTM(I, H, batch_first=True)
    expected = layer(torch.ones(B, 6, I))
    model = GradSampleModule(layer)
    torch.testing.assert_close(model(torch.ones(B, 6, I)), expected)
    layer.eval()(torch.ones(B, 6, I))[0].sum().backward()
    assert _gradient(layer.weight_hh_l0) is None
    copy.deepcopy(model)
    model.to_standard_module()
    layer.train()(torch.ones(B, 6, I))[0].sum().backward()
    assert not hasattr(layer.weight_hh_l0, "grad_sample")
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    layer(torch.ones(B, 6, I))
    assert calls == [1]


def test_a_changed_cell_is_an_error_that_says_what_works() -> None:
    class Changed(ManualLSTM):
        def cell(self, *arguments: Any) -> Any:
            return super().cell(*arguments)

    with pytest.raises(NotImplementedError, match=r"a changed cell; vmap\(grad\(...\)\) takes both"):
        GradSampleModule(Changed(I, H))(torch.ones(B, 6, I))
    with pytest.raises(NotImplementedError, match="unroll"):
        GradSampleModule(ManualLSTM(I, H))._module.unroll(torch.ones(B, 6, I))
