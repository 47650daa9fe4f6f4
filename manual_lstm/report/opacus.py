"""Rows on Opacus: per-sample gradients, and training with differential privacy."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, unpack_sequence

from manual_lstm.report.row import ReportRow, Setting


class StatesClassifier(nn.Module):
    """A layer, and a classifier of its final states."""

    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.layer = layer
        torch.manual_seed(4)
        self.head = nn.Linear(features, 2)

    def forward(self, input: Tensor | PackedSequence) -> Tensor:
        _, (h_n, c_n) = self.layer(input)
        scores: Tensor = self.head(torch.cat([h_n, c_n], -1).transpose(0, 1).flatten(1))
        return scores


def _models(setting: Setting) -> tuple[StatesClassifier, StatesClassifier]:
    """Return a model with the layer of the setting, and the same model with an nn.LSTM."""
    h_0, c_0 = setting.hx()
    features = h_0.size(0) * (h_0.size(2) + c_0.size(2))
    layer = setting.layer()
    model = StatesClassifier(layer, features).to(setting.dtype)
    official = StatesClassifier(setting.official(layer), features).to(setting.dtype)
    return model, official


def check_grad_sample(setting: Setting) -> None:
    """The gradients of each sample are those of nn.LSTM on that sample alone."""
    model, official = _models(setting)
    input = setting.input()
    module = importlib.import_module("opacus.grad_sample")
    # batch_first says where the head's batch is. Opacus asks a ManualLSTM where its own is.
    private: Any = module.GradSampleModule(model, batch_first=True, loss_reduction="sum")
    private(input).square().sum().backward()
    dim = 0 if setting.options.get("batch_first") else 1
    alone = unpack_sequence(input) if isinstance(input, PackedSequence) else input.unbind(dim)
    for k, sample in enumerate(alone):
        batch = nn.utils.rnn.pack_sequence([sample]) if setting.packed else sample.unsqueeze(dim)
        gradients = torch.autograd.grad(official(batch).square().sum(), list(official.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients):
            actual: Tensor = parameter.grad_sample[k]  # type: ignore[attr-defined]
            torch.testing.assert_close(actual, gradient, rtol=0, atol=1e-10)


def check_privacy_engine(setting: Setting) -> None:
    """Without noise, and with a bound that clips nothing, private training is ordinary training."""
    model, official = _models(setting.with_changes(options={**setting.options, "batch_first": True}))
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
    for trained, sgd, batches in (
        (private, optimizer, private_loader),
        (official, torch.optim.SGD(official.parameters(), lr=0.5), loader),
    ):
        for x, y in batches:
            sgd.zero_grad()
            nn.functional.cross_entropy(trained(x), y).backward()  # type: ignore[no-untyped-call]
            sgd.step()
    for ours, theirs in zip(model.parameters(), official.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


ROWS = [
    ReportRow("Opacus GradSampleModule", check_grad_sample, packed=True, needs=("opacus",)),
    ReportRow("Opacus PrivacyEngine", check_privacy_engine, needs=("opacus",)),
]
