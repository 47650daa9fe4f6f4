"""Training on two processes, beside nn.LSTM on one with the same batches."""

import os
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import ProcessRaisedException, spawn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint

from manual_lstm.report.row import Missing, Row, Setting

STEPS = 20
LENGTHS = (5, 3, 6, 4)  # of a packed batch's sequences; half of them for each process
R = TypeVar("R")


class Model(nn.Module):
    """A layer and a head, whose output is a loss: a mean over the sequences."""

    def __init__(self, layer: nn.Module, setting: Setting, recompute: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.recompute = recompute
        D = 2 if setting.options.get("bidirectional") else 1
        features = D * (setting.options.get("proj_size") or setting.H)
        torch.manual_seed(setting.seed + 4)
        self.head = nn.Linear(features, 1, dtype=setting.dtype)

    def forward(self, input: Tensor | PackedSequence) -> Tensor:
        if self.recompute:
            output, (h_n, c_n) = checkpoint(self.layer, input, use_reentrant=False)
        else:
            output, (h_n, c_n) = self.layer(input)
        data = output.data if isinstance(output, PackedSequence) else output
        values: list[Tensor] = [self.head(data).square().sum(), h_n.sin().sum(), c_n.sin().sum()]
        return torch.stack(values).sum() / len(h_n[0])


def batch(setting: Setting, step: int, part: slice) -> Tensor | PackedSequence:
    """Some sequences of a step's batch."""
    torch.manual_seed(step)
    if setting.packed:
        sequences = [torch.randn(n, setting.I, dtype=setting.dtype) for n in LENGTHS]
        return pack_sequence(sequences[part], enforce_sorted=False)
    x = torch.randn(len(LENGTHS), 5, setting.I, dtype=setting.dtype)[part]
    return x if setting.options.get("batch_first") else x.transpose(0, 1)


def train(model: nn.Module, setting: Setting, part: slice) -> list[float]:
    """The losses of some steps of Adam, each the mean over all processes."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(batch(setting, step, part))
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(float(loss))
    return losses


def on_two(job: Callable[[int, Path], R], folder: Path) -> R:
    """Run a job on two processes, each given its number and the folder; the first's result."""
    if not dist.is_available() or not dist.is_gloo_available():
        raise Missing("torch without gloo")
    try:
        spawn(_work, (job, folder), nprocs=2)  # type: ignore[no-untyped-call]
    except ProcessRaisedException as error:
        reason = folder / "error"  # without the process's traceback
        raise RuntimeError(
            reason.read_text(encoding="utf-8") if reason.exists() else str(error)
        ) from error
    result: R = torch.load(folder / "result")
    return result


def _work(rank: int, job: Callable[[int, Path], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    store = (folder / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        result = job(rank, folder)
        if rank == 0:
            torch.save(result, folder / "result")
        dist.barrier()
    except Exception as error:
        (folder / "error").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        raise
    # At once: gloo's threads now and then abort a process that ends in the usual way after FSDP2.
    os._exit(0)


def part_of(rank: int) -> slice:
    """The sequences of a process."""
    return slice(rank, None, 2)


def alone(setting: Setting) -> tuple[list[float], Model]:
    """nn.LSTM on one process: the losses, and the model trained."""
    lstm = nn.LSTM(setting.I, setting.H, dtype=setting.dtype, **setting.options)
    lstm.load_state_dict(setting.layer().state_dict())
    model = Model(lstm, setting)
    return train(model, setting, slice(None)), model


def same(actual: Any, expected: Any) -> None:
    """Compare what may differ by the order of sums."""
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def _replicated(setting: Setting, recompute: bool, rank: int, folder: Path) -> list[float]:
    model = DistributedDataParallel(Model(setting.layer(), setting, recompute))
    return train(model, setting, part_of(rank))


def replicated(setting: Setting, recompute: bool = False) -> None:
    """DistributedDataParallel: the losses of one process."""
    with tempfile.TemporaryDirectory() as folder:
        same(on_two(partial(_replicated, setting, recompute), Path(folder)), alone(setting)[0])


def shard(setting: Setting, layer_too: bool) -> Model:
    """The model sharded by FSDP2, and in it maybe the layer by itself."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Model(setting.layer(), setting)
    if layer_too:
        fully_shard(model.layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _sharded(setting: Setting, layer_too: bool, rank: int, folder: Path) -> list[float]:
    model = shard(setting, layer_too)
    losses = train(model, setting, part_of(rank))
    save(model.state_dict(), checkpoint_id=folder / "checkpoint")
    return losses


def sharded(setting: Setting, layer_too: bool) -> None:
    """FSDP2: the losses of one process, and a checkpoint that nn.LSTM loads."""
    expected, trained = alone(setting)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        same(on_two(partial(_sharded, setting, layer_too), folder), expected)
        lstm = nn.LSTM(setting.I, setting.H, dtype=setting.dtype, **setting.options)
        loaded = Model(lstm, setting)
        state = loaded.state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process
            load(state, checkpoint_id=folder / "checkpoint")
        loaded.load_state_dict(state)
    for name, weight in trained.state_dict().items():
        same(loaded.state_dict()[name], weight)


ROWS = [
    Row("DistributedDataParallel on two processes", replicated, packed=True, slow=True),
    Row(
        "DistributedDataParallel with activation checkpointing",
        partial(replicated, recompute=True),
        packed=True,
        slow=True,
    ),
    Row(
        "FSDP2, fully_shard of the model; checkpoint into nn.LSTM",
        partial(sharded, layer_too=False),
        packed=True,
        slow=True,
    ),
    Row(
        "FSDP2, fully_shard of the layer; checkpoint into nn.LSTM",
        partial(sharded, layer_too=True),
        packed=True,
        slow=True,
    ),
]
