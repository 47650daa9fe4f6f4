"""torch.vmap: over inputs, states and weights, with dropout; and per-sample gradients."""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from manual_lstm.report.function import BOTH, Function, Point, Results, loss, parts, pick
from manual_lstm.report.row import Row, Setting

# Dropout draws the same for all members, as calls one by one do from the same seed.
same_vmap = partial(vmap, randomness="same")
MEMBERS = 3


def drawn(point: Point, *names: str) -> Point:
    """For each name a stack of tensors like the point's."""
    torch.manual_seed(5)
    return {name: torch.randn(MEMBERS, *point[name].shape).to(point[name]) for name in names}


def one_by_one(function: Callable[[Point], Results], batch: Point) -> Results:
    """What vmap does, as a loop."""
    members = [function({name: t[k] for name, t in batch.items()}) for k in range(MEMBERS)]
    return {name: torch.stack([member[name] for member in members]) for name in members[0]}


def vmap_over(*names: str) -> Callable[[Setting], None]:
    """The check of vmap over a part of the point."""

    def check(setting: Setting) -> None:
        function = Function(setting)
        batch = drawn(function.point, *names)
        last = {name: t.movedim(0, -1) for name, t in batch.items()}
        for point in (function.point, pick(function.point, "input")):  # with hx, and without

            def call(part: Point, rest: Point = point) -> Results:
                return function(rest | part)

            def official(part: Point, rest: Point = point) -> Results:
                return function.expected(rest | part)

            expected = one_by_one(official, batch)
            function.same(same_vmap(call)(batch), expected)
            # Over the last dimension, two members at a time.
            function.same(same_vmap(call, in_dims=-1, chunk_size=2)(last), expected)

    return check


def vmap_weights(setting: Setting) -> None:
    """Over all of them."""
    vmap_over(*setting.layer().state_dict())(setting)


def nested_vmap(setting: Setting) -> None:
    """Over the states within over the input."""
    function = Function(setting)
    point = function.point
    inputs, states = drawn(point, "input"), drawn(point, "h_0", "c_0")
    inner = same_vmap(lambda x, hx: function(point | x | hx), in_dims=(None, 0))
    actual = same_vmap(inner, in_dims=(0, None))(inputs, states)
    expected = one_by_one(
        lambda x: one_by_one(lambda hx: function.expected(point | x | hx), states), inputs
    )
    function.same(actual, expected)


def ensemble(setting: Setting) -> None:
    """Layers of one shape as one, on the same input and each on its own."""
    functions = [Function(setting.but(seed=seed)) for seed in range(MEMBERS)]
    weights, buffers = stack_module_state([function.layer for function in functions])
    first = functions[0]
    states = (first.point["h_0"], first.point["c_0"])

    def call(weights: Point, buffers: Point, x: Tensor) -> Results:
        torch.manual_seed(0)
        output, hx = functional_call(first.layer, (weights, buffers), (first.like(x), states))
        return parts(output, *hx)

    inputs = drawn(first.point, "input")["input"]
    for x, in_dim in ((first.point["input"], None), (inputs, 0)):
        actual = same_vmap(call, in_dims=(0, 0, in_dim))(weights, buffers, x)
        for k, function in enumerate(functions):
            given = pick(first.point, "h_0", "c_0") | {"input": x if in_dim is None else x[k]}
            expected = function.expected(function.point | given)
            first.same({name: t[k] for name, t in actual.items()}, expected)
    # And it trains: the gradients of all members at once.
    outputs = same_vmap(call, in_dims=(0, 0, None))(weights, buffers, first.point["input"])
    value = torch.stack([loss({name: t[k] for name, t in outputs.items()}) for k in range(MEMBERS)])
    gradients = torch.autograd.grad(value.sum(), list(weights.values()))
    for k, function in enumerate(functions):
        given = pick(first.point, "input", "h_0", "c_0")
        expected = function.gradients(function.point | given, weights)
        first.same({name: t[k] for name, t in zip(weights, gradients)}, expected)


def dropout_same(setting: Setting) -> None:
    """Every member has the mask of a call by itself."""
    dropping = {"num_layers": 2, "dropout": 0.5}
    vmap_over("input")(setting.but(options=setting.options | dropping))


def dropout_different(setting: Setting) -> None:
    """Each member's result is that of some mask, and the masks differ."""
    options = setting.options | {"num_layers": 2, "dropout": 0.5, "batch_first": False}
    function = Function(setting.but(options=options, H=3, packed=False), T=2, B=1)
    x = function.point["input"]
    output: Tensor = vmap(lambda x: function.layer(x)[0], randomness="different")(
        x.expand(20, *x.shape)
    )
    output = output.squeeze(2).movedim(0, 1)  # [T, 20, D * (P or H)]

    # What each of the 2 ** n masks between the two layers gives, as one batch.
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
    function.same(nearest, torch.zeros_like(nearest))
    assert len(set(which.tolist())) > 10, "members have the same mask"


def per_sample_gradients(setting: Setting) -> None:
    """The gradient of each sample's loss, and all of them from one call."""
    function = Function(setting)
    point, weights = function.point, function.weights

    def value(weights: Point, sample: Point) -> Tensor:
        return loss(function(weights | sample))

    # Samples that are each a batch, packed where the setting is.
    samples = drawn(point, "input", "h_0", "c_0")
    actual = same_vmap(grad(value), in_dims=(None, 0))(weights, samples)
    expected = one_by_one(lambda sample: function.gradients(weights | sample, weights), samples)
    function.same(actual, expected)
    if setting.packed:
        return

    # Samples that are a batch's own sequences, unbatched and as batches of one.
    dims = {"input": 0 if setting.options.get("batch_first") else 1, "h_0": 1, "c_0": 1}
    batch = pick(point, *dims)
    for keep in (False, True):

        def one(weights: Point, sample: Point, keep: bool = keep) -> Tensor:
            if keep:
                sample = {name: t.unsqueeze(dims[name]) for name, t in sample.items()}
            return value(weights, sample)

        actual = same_vmap(grad(one), in_dims=(None, dims))(weights, batch)
        for b in range(2):
            sample = {name: t.narrow(dims[name], b, 1) for name, t in batch.items()}
            expected = function.gradients(weights | sample, weights)
            function.same({name: t[b] for name, t in actual.items()}, expected)


ROWS = [
    Row("torch.vmap over the input", vmap_over("input"), packed=True, dtypes=BOTH),
    Row("torch.vmap over hx", vmap_over("h_0", "c_0"), packed=True, dtypes=BOTH),
    Row("torch.vmap over weights", vmap_weights, packed=True, dtypes=BOTH),
    Row("torch.vmap, nested", nested_vmap, packed=True, dtypes=BOTH),
    Row("torch.vmap, dropout the same for all", dropout_same, packed=True, dtypes=BOTH),
    Row("torch.vmap, dropout different for each", dropout_different, dtypes=BOTH),
    Row("ensemble: stack_module_state", ensemble, packed=True, dtypes=BOTH),
    Row("per-sample gradients: vmap(grad(...))", per_sample_gradients, packed=True, dtypes=BOTH),
]
