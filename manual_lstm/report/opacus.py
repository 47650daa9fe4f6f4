"""Opacus: per-sample gradients, and training with differential privacy."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, unpack_sequence

from manual_lstm.report.row import Row, Setting


class Model(nn.Module):
    """A layer and a head on its final states."""

    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.layer = layer
        torch.manual_seed(4)
        self.head = nn.Linear(features, 2)

    def forward(self, input: Tensor | PackedSequence) -> Tensor:
        _, (h_n, c_n) = self.layer(input)
        scores: Tensor = self.head(torch.cat([h_n, c_n], -1).transpose(0, 1).flatten(1))
        return scores


def _models(setting: Setting) -> tuple[Model, Model]:
    """The model with the layer, and its like with nn.LSTM's weights."""
    h_n, c_n = setting.hx()
    features = h_n.size(0) * (h_n.size(2) + c_n.size(2))
    layer, official = setting.layer(), setting.but(make=nn.LSTM).layer()
    official.load_state_dict(layer.state_dict())
    return Model(layer, features).to(setting.dtype), Model(official, features).to(setting.dtype)


def grad_sample(setting: Setting) -> None:
    """Every sample's gradients are those that it has alone."""
    model, official = _models(setting)
    input = setting.input()
    module = importlib.import_module("opacus.grad_sample")
    # batch_first is the head's; a ManualLSTM knows its own.
    private: Any = module.GradSampleModule(model, batch_first=True, loss_reduction="sum")
    private(input).square().sum().backward()
    dim = 0 if setting.options.get("batch_first") else 1
    alone = unpack_sequence(input) if isinstance(input, PackedSequence) else input.unbind(dim)
    for k, sample in enumerate(alone):
        one = nn.utils.rnn.pack_sequence([sample]) if setting.packed else sample.unsqueeze(dim)
        gradients = torch.autograd.grad(official(one).square().sum(), list(official.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients):
            found: Tensor = parameter.grad_sample[k]  # type: ignore[attr-defined]
            torch.testing.assert_close(found, gradient, rtol=0, atol=1e-10)


def privacy_engine(setting: Setting) -> None:
    """Without noise, and with a bound that clips nothing, training is ordinary training."""
    model, official = _models(setting.but(options={**setting.options, "batch_first": True}))
    torch.manual_seed(setting.seed)
    inputs, labels = torch.randn(8, 6, setting.I, dtype=setting.dtype), torch.arange(8) % 2
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, labels), batch_size=4)
    engine = importlib.import_module("opacus").PrivacyEngine()
    private, optimizer, private_loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=1e6,
        poisson_sampling=False,
    )
    for each, optimize, batches in (
        (private, optimizer, private_loader),
        (official, torch.optim.SGD(official.parameters(), lr=0.5), loader),
    ):
        for x, y in batches:
            optimize.zero_grad()
            nn.functional.cross_entropy(each(x), y).backward()  # type: ignore[no-untyped-call]
            optimize.step()
    for ours, theirs in zip(model.parameters(), official.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


ROWS = [
    Row("Opacus GradSampleModule", grad_sample, packed=True, needs=("opacus",)),
    Row("Opacus PrivacyEngine", privacy_engine, needs=("opacus",)),
]
