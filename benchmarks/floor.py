"""The floor: a bare loop of the matrix products of an LSTM, each computed in the fastest way.

The loop has no activation, no state and no autograd. An LSTM that multiplies matrices step by step
takes at least this long. nn.LSTM can be faster, because it has products that torch does not offer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from benchmarks.timing import clock
from benchmarks.workload import TRAINING, Settings, Workload
from manual_lstm.engine.gemm import find_onednn

Call = Callable[[], object]


@dataclass(frozen=True)
class _Way:
    """A way to compute ``a + x @ weight``.

    ``lay_out`` makes the call for one ``x`` and ``a``. ``once`` is called once before all of them.
    """

    name: str
    lay_out: Callable[[Tensor, Tensor], Call]
    once: Call | None = None


def floor_loop(w: Workload, mode: str) -> tuple[Call, list[str]]:
    """Return the loop, and a description of the ways that were chosen for its products."""
    calls: list[Call] = []
    chosen: list[str] = []
    settings = w.settings
    rows, T, B = sum(w.sizes), len(w.sizes), w.case.B

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=settings.device).to(settings.dtype)

    def every_step(x: Tensor, a: Tensor, weight: Tensor) -> None:
        way = _fastest(_adding_ways(weight, B), x, a, T, settings)
        calls.extend([] if way.once is None else [way.once])
        calls.extend(way.lay_out(x[:b], a[:b]) for b in w.sizes)
        chosen.append(f"steps {list(x.shape)} by {list(weight.shape)}: {way.name}")

    def all_steps(x: Tensor, weight: Tensor) -> None:
        way = _fastest(_plain_ways(weight), x, x, 1, settings)
        calls.append(way.lay_out(x, x))
        chosen.append(f"all {list(x.shape)} by {list(weight.shape)}: {way.name}")

    directions = 2 if w.case.bidirectional else 1
    for k, weights in enumerate(w.lstm.all_weights):  # for each direction of each layer
        weight_ih, weight_hh = weights[0].detach(), weights[1].detach()
        H, I = weight_hh.size(1), weight_ih.size(1)
        x, h, a = random(rows, I), random(B, H), random(B, 4 * H)
        all_steps(x, weight_ih.t())
        every_step(h, a, weight_hh.t())
        if mode == TRAINING:
            da, h_rows = random(rows, 4 * H), random(rows, H)
            every_step(a, h, weight_hh)
            all_steps(da.t(), h_rows)
            all_steps(da.t(), x)
            if k >= directions:  # the input of the first layer needs no gradient
                all_steps(da, weight_ih)

    def step() -> None:
        for call in calls:
            call()

    return step, chosen


def _fastest(ways: Iterator[_Way], x: Tensor, a: Tensor, times: int, settings: Settings) -> _Way:
    best, least = None, float("inf")
    for way in ways:
        try:
            total = times * _seconds(way.lay_out(x, a), settings)
            total += 0.0 if way.once is None else _seconds(way.once, settings)
        except RuntimeError:  # this way does not support the dtype or device
            continue
        if total < least:
            best, least = way, total
    assert best is not None
    return best


def _seconds(call: Call, settings: Settings) -> float:
    timer = Timer(
        "call()", globals={"call": call}, num_threads=settings.threads, timer=clock(settings.device)
    )
    return timer.blocked_autorange(min_run_time=0.01).median


def _adding_ways(weight: Tensor, rows: int) -> Iterator[_Way]:
    """Yield the ways to compute ``a + x @ weight``."""
    yield _Way("addmm", lambda x, a: partial(torch.addmm, a, x, weight))
    for parts in (2, 4):
        if weight.size(1) % parts == 0:
            yield _split(weight, parts)
    linear, linear_add, pack = (
        find_onednn("_linear_pointwise", "default"),
        find_onednn("_linear_pointwise", "binary"),
        find_onednn("_reorder_linear_weight", "default"),
    )
    if linear is None or linear_add is None or pack is None or not _for_onednn(weight):
        return
    add, weight_t = linear_add, weight.t()
    yield _Way("oneDNN", lambda x, a: partial(add, x, a, weight_t, None, "add"))
    try:
        packed = pack(weight_t.contiguous(), rows)
    except RuntimeError:
        return
    once = partial(pack, weight_t.contiguous(), rows)
    yield _Way("oneDNN, packed", lambda x, a: partial(add, x, a, packed, None, "add"), once)


def _split(weight: Tensor, parts: int) -> _Way:
    pieces = weight.view(weight.size(0), parts, -1).movedim(1, 0)  # [parts, K, N / parts]

    def lay_out(x: Tensor, a: Tensor) -> Call:
        a_pieces = a.reshape(parts, a.size(0), -1)
        return partial(torch.baddbmm, a_pieces, x.expand(parts, *x.shape), pieces)

    return _Way(f"baddbmm in {parts}", lay_out)


def _plain_ways(weight: Tensor) -> Iterator[_Way]:
    """Yield the ways to compute ``x @ weight``."""
    yield _Way("mm", lambda x, _: partial(torch.mm, x, weight))
    linear = find_onednn("_linear_pointwise", "default")
    if linear is not None and _for_onednn(weight):
        multiply, weight_t = linear, weight.t()
        yield _Way("oneDNN", lambda x, _: partial(multiply, x, weight_t, None, "none", [], ""))


def _for_onednn(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype != torch.float64
