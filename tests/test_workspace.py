"""Buffers that calls share, the way past torch's dispatcher, and what a first call loads."""

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from manual_lstm import ManualLSTM
from manual_lstm.check.parity import twins
from manual_lstm.engine import context, fused, workspace

# T, B, I, H and options: their steps are small, so their buffers are kept.
SMALL: list[tuple[int, int, int, int, dict[str, Any]]] = [
    (7, 1, 3, 4, {}),
    (5, 2, 3, 4, {"num_layers": 2, "bidirectional": True}),
    (150, 1, 2, 5, {"bidirectional": True}),
    (9, 3, 4, 6, {"proj_size": 2}),
]


def _train(layer: nn.Module, x: Tensor) -> list[Tensor]:
    output, (h_n, c_n) = layer(x)
    loss = (output.sin().sum() + h_n.cos().sum() + (c_n * c_n).sum()) / 10
    return [output.detach(), *torch.autograd.grad(loss, list(layer.parameters()))]


@pytest.mark.parametrize("size", SMALL, ids=str)
def test_calls_in_turn_do_not_disturb_each_other(
    size: tuple[int, int, int, int, dict[str, Any]],
) -> None:
    T, B, I, H, options = size
    reference, layer = twins(I, H, dtype=torch.float64, **options)
    first, second = torch.randn(2, T, B, I, dtype=torch.float64)
    expected = [_train(reference, first), _train(reference, second)]
    with torch.no_grad():
        before = layer(first)
        copies = [part.clone() for part in (before[0], *before[1])]
    out = [layer(x)[0] for x in (first, second)]  # two graphs alive at once
    for k in (1, 0):
        torch.testing.assert_close(out[k], expected[k][0], rtol=0, atol=1e-12)
        torch.autograd.grad(out[k].sum(), list(layer.parameters()))
    for x, values in ((second, expected[1]), (first, expected[0])):
        torch.testing.assert_close(_train(layer, x), values, rtol=0, atol=1e-11)
    with torch.inference_mode():
        layer(first)
    torch.testing.assert_close(_train(layer, second), expected[1], rtol=0, atol=1e-11)
    assert all(torch.equal(a, b) for a, b in zip((before[0], *before[1]), copies))


def test_a_hook_in_the_backward_may_call_the_layer() -> None:
    reference, layer = twins(3, 4, 2, dtype=torch.float64)
    x = torch.randn(6, 1, 3, dtype=torch.float64, requires_grad=True)
    found: dict[str, list[Tensor]] = {}
    for name, lstm in (("reference", reference), ("layer", layer)):
        inner: list[Tensor] = []

        def call_again(_: Tensor, lstm: nn.Module = lstm, inner: list[Tensor] = inner) -> None:
            with torch.enable_grad():
                inner.extend(_train(lstm, x.detach()))

        output = lstm(x)[0]
        output.register_hook(call_again)
        (gradient,) = torch.autograd.grad(output.sum(), x)
        found[name] = [gradient, *inner]
    torch.testing.assert_close(found["layer"], found["reference"], rtol=0, atol=1e-12)


def test_threads_have_buffers_of_their_own() -> None:
    layer = ManualLSTM(3, 8, dtype=torch.float64)
    xs = torch.randn(4, 40, 1, 3, dtype=torch.float64)
    expected = [_train(layer, x) for x in xs]
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(20):
            for actual, value in zip(_train(layer, xs[k]), expected[k]):
                if not torch.equal(actual, value):
                    wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_few_buffers_are_kept() -> None:
    with torch.no_grad():
        for H in range(1, 12):
            ManualLSTM(2, H)(torch.randn(4, 1, 2))
    assert 0 < len(workspace._thread.kept) <= workspace._MOST


def test_an_error_in_a_step_leaves_the_next_call_right(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, layer = twins(3, 4, dtype=torch.float64)
    x = torch.randn(6, 1, 3, dtype=torch.float64)
    layer(x)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("manual_lstm.engine.forward.lstm_cell_out", fail)
        with pytest.raises(KeyboardInterrupt):
            layer(x)
    torch.testing.assert_close(layer(x)[0], reference(x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("missing", ["_count_modes", "_is_legacy_batched", "_any_autocast"])
def test_without_a_private_name_the_operator_runs(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, missing, None)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    reference, layer = twins(3, 4, dtype=torch.float64)
    assert context.nobody_watches(x) is (missing == "_any_autocast")
    torch.testing.assert_close(_train(layer, x), _train(reference, x), rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], reference(x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_a_profiler_shows_the_operator(training: bool) -> None:
    layer, x = ManualLSTM(3, 4), torch.randn(5, 2, 3)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.set_grad_enabled(training):
        output, _ = layer(x)
        if training:
            output.sum().backward()
    seen = {event.key for event in profiler.key_averages()}
    assert "manual_lstm::direction" in seen
    assert ("manual_lstm::direction_backward" in seen) is training


def test_programs_on_disk_are_found_by_the_layout_that_they_expect() -> None:
    """torch keeps compiled programs by their operators' names, also for later versions of this package.

    If this fails because the layout has changed, change the overloads' name with it.
    """
    layer = ManualLSTM(2, 3, dtype=torch.float64)
    weight_ih, weight_hh, bias_ih, bias_hh = layer.all_weights[0]
    w = [weight_ih, weight_hh, bias_ih + bias_hh]
    x, state = torch.randn(4, 2, 2, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    with torch.no_grad():
        *_, gates, cells = fused.direction(x, None, None, None, state, state, *w, None, False, True)
        steps = layer.unroll(x)
    expected = torch.stack([steps.i[0], steps.f[0], steps.o[0], steps.g[0]], 1)  # [T, 4, B, H]
    layout = (expected.flatten(0, 2), steps.c[0].flatten(0, 1))
    torch.testing.assert_close((gates, cells), layout, rtol=0, atol=1e-12)
    operators: Any = torch.ops.manual_lstm
    for operator in (operators.direction, operators.direction_backward):
        assert operator.overloads() == ["cut", "padded"]


COLD = """
import sys, torch
from manual_lstm import ManualLSTM, replace_lstm
layer, x = ManualLSTM(4, 5, num_layers=2, bidirectional=True), torch.randn(6, 3, 4)
replace_lstm(torch.nn.Sequential(torch.nn.LSTM(3, 4)))
with torch.no_grad():
    layer(x), layer(x[:1]), layer(x[:2]), layer.unroll(x)
layer(x)[0].sum().backward()
with torch.autocast("cpu", torch.bfloat16):
    layer(x)
layer(torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 6, 1]), enforce_sorted=False))
print([name for name in ("torch._dynamo", "torch._inductor", "matplotlib") if name in sys.modules])
"""


def test_eager_calls_do_not_load_the_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COLD], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
