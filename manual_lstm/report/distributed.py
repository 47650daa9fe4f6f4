"""Rows on training on two processes, compared with nn.LSTM on one process and the same batches."""

import os
import signal
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

from manual_lstm.check.interrupt import left_alone
from manual_lstm.check.parity import data_of
from manual_lstm.report.row import MissingRequirement, ReportRow, Setting

STEPS = 20
LENGTHS = (5, 3, 6, 4)  # of the sequences of a packed batch; each process gets half of them
R = TypeVar("R")


class LossModel(nn.Module):
    """A layer and a head. The output is a loss, a mean over the sequences."""

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
        scores = self.head(data_of(output))
        values: list[Tensor] = [scores.square().sum(), h_n.sin().sum(), c_n.sin().sum()]
        return torch.stack(values).sum() / len(h_n[0])


def draw_batch(setting: Setting, step: int, part: slice) -> Tensor | PackedSequence:
    """Draw the batch of a step, and return some of its sequences."""
    torch.manual_seed(step)
    if setting.packed:
        sequences = [torch.randn(n, setting.I, dtype=setting.dtype) for n in LENGTHS]
        return pack_sequence(sequences[part], enforce_sorted=False)
    x = torch.randn(len(LENGTHS), 5, setting.I, dtype=setting.dtype)[part]
    return x if setting.options.get("batch_first") else x.transpose(0, 1)


def train_model(model: nn.Module, setting: Setting, part: slice) -> list[float]:
    """Train with Adam, and return the loss of each step, averaged over all processes."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(draw_batch(setting, step, part))
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(float(loss))
    return losses


def _spawn(run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Run a function in two processes, and leave none behind, also when this one is interrupted."""
    with left_alone():
        context: Any = spawn(run, arguments, nprocs=2, join=False)  # type: ignore[no-untyped-call]
    try:
        while not context.join():
            pass
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def run_on_two_processes(job: Callable[[int, Path], R], folder: Path) -> R:
    """Run a job on two processes, and return what it returned on the first.

    The arguments of the job are the number of the process and the folder, which both processes share.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        raise MissingRequirement("torch without gloo")
    try:
        _spawn(_run_in_process, (job, folder))
    except ProcessRaisedException as error:
        reason = folder / "error"  # the message alone, without the traceback of the process
        raise RuntimeError(
            reason.read_text(encoding="utf-8") if reason.exists() else str(error)
        ) from error
    result: R = torch.load(folder / "result")
    return result


def _run_in_process(rank: int, job: Callable[[int, Path], Any], folder: Path) -> None:
    # As torch's spawn has it, the end of the process that has started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
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
    # Exit at once: after FSDP2, threads of gloo sometimes abort a process that ends normally.
    os._exit(0)


def sequences_of(rank: int) -> slice:
    """Return which sequences of a batch belong to a process."""
    return slice(rank, None, 2)


def train_on_one_process(setting: Setting) -> tuple[list[float], LossModel]:
    """Train nn.LSTM on one process; return the losses, and the trained model."""
    model = LossModel(setting.official(setting.layer()), setting)
    return train_model(model, setting, slice(None)), model


def assert_close(actual: Any, expected: Any) -> None:
    """Assert that results are close. They may differ, because sums are made in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def _train_data_parallel(setting: Setting, recompute: bool, rank: int, folder: Path) -> list[float]:
    model = DistributedDataParallel(LossModel(setting.layer(), setting, recompute))
    return train_model(model, setting, sequences_of(rank))


def check_data_parallel(setting: Setting, recompute: bool = False) -> None:
    """DistributedDataParallel gives the losses of training on one process."""
    with tempfile.TemporaryDirectory() as folder:
        job = partial(_train_data_parallel, setting, recompute)
        losses = run_on_two_processes(job, Path(folder))
    assert_close(losses, train_on_one_process(setting)[0])


def shard_model(setting: Setting, layer_too: bool) -> LossModel:
    """Shard the model with FSDP2, and in it, if asked for, the layer as a unit of its own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = LossModel(setting.layer(), setting)
    if layer_too:
        fully_shard(model.layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _train_fully_sharded(setting: Setting, layer_too: bool, rank: int, folder: Path) -> list[float]:
    model = shard_model(setting, layer_too)
    losses = train_model(model, setting, sequences_of(rank))
    save(model.state_dict(), checkpoint_id=folder / "checkpoint")
    return losses


def check_fully_sharded(setting: Setting, layer_too: bool) -> None:
    """FSDP2 gives the losses of training on one process, and a checkpoint that nn.LSTM loads."""
    expected, trained = train_on_one_process(setting)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert_close(
            run_on_two_processes(partial(_train_fully_sharded, setting, layer_too), folder), expected
        )
        loaded = LossModel(setting.with_changes(make=nn.LSTM, seed=setting.seed + 1).layer(), setting)
        state = loaded.state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that there is only one process
            load(state, checkpoint_id=folder / "checkpoint")
        loaded.load_state_dict(state)
    for name, weight in trained.state_dict().items():
        assert_close(loaded.state_dict()[name], weight)


ROWS = [
    ReportRow("DistributedDataParallel on two processes", check_data_parallel, packed=True, slow=True),
    ReportRow(
        "DistributedDataParallel with activation checkpointing",
        partial(check_data_parallel, recompute=True),
        packed=True,
        slow=True,
    ),
    ReportRow(
        "FSDP2, fully_shard of the model; checkpoint into nn.LSTM",
        partial(check_fully_sharded, layer_too=False),
        packed=True,
        needs=("numpy",),  # torch's distributed checkpoints
        slow=True,
    ),
    ReportRow(
        "FSDP2, fully_shard of the layer; checkpoint into nn.LSTM",
        partial(check_fully_sharded, layer_too=True),
        packed=True,
        needs=("numpy",),  # torch's distributed checkpoints
        slow=True,
    ),
]
