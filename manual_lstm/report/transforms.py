"""Rows on torch.vmap, over inputs, states and weights, with dropout; and per-sample gradients."""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from manual_lstm.report.function import (
    FLOATS,
    LayerFunction,
    Point,
    Results,
    loss,
    results_by_name,
    select,
)
from manual_lstm.report.row import ReportRow, Setting

# All members get the same dropout, as separate calls with the same seed would.
same_vmap = partial(vmap, randomness="same")
MEMBERS = 3


def stacked_tensors(point: Point, *names: str) -> Point:
    """Draw for each name ``MEMBERS`` tensors like the point's, stacked: ``[MEMBERS, ...]``."""
    torch.manual_seed(5)
    return {name: torch.randn(MEMBERS, *point[name].shape).to(point[name]) for name in names}


def one_by_one(function: Callable[[Point], Results], batch: Point) -> Results:
    """Do in a loop what vmap does."""
    members = [function({name: t[k] for name, t in batch.items()}) for k in range(MEMBERS)]
    return {name: torch.stack([member[name] for member in members]) for name in members[0]}


def check_vmap_over(*names: str) -> Callable[[Setting], None]:
    """Make the check of vmap over some tensors of the point."""

    def check(setting: Setting) -> None:
        function = LayerFunction(setting)
        batch = stacked_tensors(function.point, *names)
        batch_last = {name: t.movedim(0, -1) for name, t in batch.items()}  # [..., MEMBERS]
        for point in (function.point, select(function.point, "input")):  # with hx, and without it

            def call(part: Point, rest: Point = point) -> Results:
                return function(rest | part)

            def official(part: Point, rest: Point = point) -> Results:
                return function.expected(rest | part)

            expected = one_by_one(official, batch)
            function.assert_close(same_vmap(call)(batch), expected)
            # Over the last dimension, two members at a time.
            function.assert_close(same_vmap(call, in_dims=-1, chunk_size=2)(batch_last), expected)

    return check


def check_vmap_over_weights(setting: Setting) -> None:
    """vmap over all weights."""
    check_vmap_over(*setting.layer().state_dict())(setting)


def check_nested_vmap(setting: Setting) -> None:
    """vmap over the states inside vmap over the input."""
    function = LayerFunction(setting)
    point = function.point
    inputs, states = stacked_tensors(point, "input"), stacked_tensors(point, "h_0", "c_0")
    inner = same_vmap(lambda x, hx: function(point | x | hx), in_dims=(None, 0))
    actual = same_vmap(inner, in_dims=(0, None))(inputs, states)
    expected = one_by_one(
        lambda x: one_by_one(lambda hx: function.expected(point | x | hx), states), inputs
    )
    function.assert_close(actual, expected)


def check_ensemble(setting: Setting) -> None:
    """Several layers of one shape run as one, on one input and on an input for each."""
    functions = [LayerFunction(setting.with_changes(seed=seed)) for seed in range(MEMBERS)]
    weights, buffers = stack_module_state([function.layer for function in functions])
    first = functions[0]
    states = (first.point["h_0"], first.point["c_0"])

    def call(weights: Point, buffers: Point, x: Tensor) -> Results:
        torch.manual_seed(0)
        output, hx = functional_call(first.layer, (weights, buffers), (first.like(x), states))
        return results_by_name(output, *hx)

    inputs = stacked_tensors(first.point, "input")["input"]
    for x, in_dim in ((first.point["input"], None), (inputs, 0)):
        actual = same_vmap(call, in_dims=(0, 0, in_dim))(weights, buffers, x)
        for k, function in enumerate(functions):
            member = select(first.point, "h_0", "c_0") | {"input": x if in_dim is None else x[k]}
            expected = function.expected(function.point | member)
            first.assert_close({name: t[k] for name, t in actual.items()}, expected)
    # The gradients of all members come from one backward.
    outputs = same_vmap(call, in_dims=(0, 0, None))(weights, buffers, first.point["input"])
    value = torch.stack([loss({name: t[k] for name, t in outputs.items()}) for k in range(MEMBERS)])
    gradients = torch.autograd.grad(value.sum(), list(weights.values()))
    shared = select(first.point, "input", "h_0", "c_0")
    for k, function in enumerate(functions):
        expected = function.gradients(function.point | shared, weights)
        first.assert_close({name: t[k] for name, t in zip(weights, gradients)}, expected)


def check_same_dropout(setting: Setting) -> None:
    """Every member gets the dropout mask of a separate call."""
    dropping = {"num_layers": 2, "dropout": 0.5}
    check_vmap_over("input")(setting.with_changes(options=setting.options | dropping))


def check_different_dropout(setting: Setting) -> None:
    """The result of each member belongs to some dropout mask, and the masks differ."""
    options = setting.options | {"num_layers": 2, "dropout": 0.5, "batch_first": False}
    function = LayerFunction(setting.with_changes(options=options, H=3, packed=False), T=2, B=1)
    x = function.point["input"]
    output: Tensor = vmap(lambda x: function.layer(x)[0], randomness="different")(
        x.expand(20, *x.shape)
    )
    output = output.squeeze(2).movedim(0, 1)  # [T, 20, D * (P or H)]

    # The results of all 2 ** n masks between the two layers, computed as one batch.
    single = options | {"num_layers": 1, "dropout": 0.0, "dtype": torch.float64, "device": x.device}
    weights = function.official.state_dict()
    between = x.double()
    for layer in range(2):
        lstm = nn.LSTM(between.size(-1), 3, **single)
        names = {name: name.replace("_l0", f"_l{layer}") for name in lstm.state_dict()}
        lstm.load_state_dict({name: weights[source] for name, source in names.items()})
        if layer == 1:
            masks = list(itertools.product([0.0, 2.0], repeat=between.numel()))
            between = between * torch.tensor(masks).to(between).reshape(
                -1, 2, between.size(-1)
            ).transpose(0, 1)
        between = lstm(between)[0]
    gaps = (output.unsqueeze(2) - between.unsqueeze(1)).abs().amax((0, 3))  # [20, 2 ** n]
    nearest, which = gaps.min(1)
    function.assert_close(nearest, torch.zeros_like(nearest))
    assert len(set(which.tolist())) > 10, "members have the same mask"


def check_per_sample_gradients(setting: Setting) -> None:
    """One call gives the gradient of the loss of each sample."""
    function = LayerFunction(setting)
    point, weights = function.point, function.weights

    def value(weights: Point, sample: Point) -> Tensor:
        return loss(function(weights | sample))

    # Each sample is a batch of its own, packed in a packed setting.
    samples = stacked_tensors(point, "input", "h_0", "c_0")
    actual = same_vmap(grad(value), in_dims=(None, 0))(weights, samples)
    expected = one_by_one(lambda sample: function.gradients(weights | sample, weights), samples)
    function.assert_close(actual, expected)
    if setting.packed:
        return

    # The samples are the sequences of one batch, unbatched or as batches of one.
    dims = {"input": 0 if setting.options.get("batch_first") else 1, "h_0": 1, "c_0": 1}
    batch = select(point, *dims)
    for as_batches in (False, True):

        def sample_loss(weights: Point, sample: Point, as_batches: bool = as_batches) -> Tensor:
            if as_batches:
                sample = {name: t.unsqueeze(dims[name]) for name, t in sample.items()}
            return value(weights, sample)

        actual = same_vmap(grad(sample_loss), in_dims=(None, dims))(weights, batch)
        for b in range(2):
            sample = {name: t.narrow(dims[name], b, 1) for name, t in batch.items()}
            expected = function.gradients(weights | sample, weights)
            function.assert_close({name: t[b] for name, t in actual.items()}, expected)


ROWS = [
    ReportRow("torch.vmap over the input", check_vmap_over("input"), packed=True, dtypes=FLOATS),
    ReportRow("torch.vmap over hx", check_vmap_over("h_0", "c_0"), packed=True, dtypes=FLOATS),
    ReportRow("torch.vmap over weights", check_vmap_over_weights, packed=True, dtypes=FLOATS),
    ReportRow("torch.vmap, nested", check_nested_vmap, packed=True, dtypes=FLOATS),
    ReportRow("torch.vmap, dropout the same for all", check_same_dropout, packed=True, dtypes=FLOATS),
    ReportRow("torch.vmap, dropout different for each", check_different_dropout, dtypes=FLOATS),
    ReportRow("ensemble: stack_module_state", check_ensemble, packed=True, dtypes=FLOATS),
    ReportRow(
        "per-sample gradients: vmap(grad(...))",
        check_per_sample_gradients,
        packed=True,
        dtypes=FLOATS,
    ),
]
