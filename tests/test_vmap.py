"""The operator under torch.func's vmap and grad, against the plain loop under the same transforms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from manual_lstm import ManualLSTM
from tests.helpers.layers import randn
from tests.helpers.loops import loops_chosen, plainly

OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True},
    {"proj_size": 2, "bidirectional": True},
]


class LayerOfSamples:
    """A layer as a function of its parameters, and inputs for it: one sample's, and six samples'."""

    def __init__(self, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.layer = ManualLSTM(3, 4, dtype=torch.float64, **options)
        self.p: dict[str, Tensor] = dict(self.layer.named_parameters())
        L = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
        P = options.get("proj_size", 4)
        self.x, self.xs = randn(5, 2, 3), randn(6, 5, 2, 3)
        self.hx, self.hxs = (randn(L, 2, P), randn(L, 2, 4)), (randn(6, L, 2, P), randn(6, L, 2, 4))
        self.packed = pack_sequence([randn(n, 3) for n in (5, 3, 3, 1)])
        self.packeds = randn(6, 12, 3)
        self.packed_hx = randn(L, 4, P), randn(L, 4, 4)

    def output(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0]
        return output

    def loss(self, p: dict[str, Tensor], x: Tensor, hx: Any = None, packed: bool = False) -> Tensor:
        sequence = PackedSequence(x, self.packed.batch_sizes) if packed else x
        output, (h_n, c_n) = functional_call(self.layer, p, (sequence, hx))
        data = output.data if packed else output
        total: Tensor = data.sin().sum() + h_n.cos().sum() + c_n.square().sum()
        return total

    def gradient(self, x: Tensor) -> Tensor:
        of_x: Tensor = grad(lambda x: self.loss(self.p, x))(x)
        return of_x

    def penalty(self, gradients: dict[str, Tensor]) -> Tensor:
        return torch.stack([g.square().sum() for g in gradients.values()]).sum()


# Whether the operator runs, and what is computed.
CONTEXTS: dict[str, tuple[bool, Callable[[LayerOfSamples], Any]]] = {
    "grad": (True, lambda m: grad(m.loss, (0, 1, 2))(m.p, m.x, m.hx)),
    "per sample": (True, lambda m: vmap(grad(m.loss, (0, 1)), (None, 0))(m.p, m.xs)),
    "per state": (True, lambda m: vmap(grad(m.loss, (0, 2)), (None, None, 0))(m.p, m.x, m.hxs)),
    "per sample, one state": (
        True,
        lambda m: vmap(grad(m.loss, (0, 2)), (None, 0, None))(m.p, m.xs, m.hx),
    ),
    "per sample, packed": (
        True,
        lambda m: vmap(grad(m.loss, (0, 1)), (None, 0, None, None))(m.p, m.packeds, None, True),
    ),
    "per sample, packed, hx": (
        True,
        lambda m: vmap(grad(m.loss, (0, 2)), (None, 0, None, None))(m.p, m.packeds, m.packed_hx, True),
    ),
    "vmap along another dimension": (
        True,
        lambda m: vmap(m.loss, (None, 2))(m.p, m.xs.movedim(0, 2)),
    ),
    "jacrev": (True, lambda m: jacrev(m.output)(m.x)),
    "vmap of jacrev": (True, lambda m: vmap(jacrev(lambda x: m.output(x)[-1, 0]))(m.xs)),
    "vmap of vmap of grad": (
        True,
        lambda m: vmap(vmap(grad(m.loss), (None, 0)), (None, 0))(m.p, m.xs.view(2, 3, 5, 2, 3)),
    ),
    "grad of grad": (True, lambda m: grad(lambda p: m.penalty(grad(m.loss)(p, m.x)))(m.p)),
    "grad of per sample": (
        True,
        lambda m: grad(lambda p: m.penalty(vmap(grad(m.loss), (None, 0))(p, m.xs)))(m.p),
    ),
    "jacrev of jacrev": (True, lambda m: jacrev(jacrev(lambda x: m.loss(m.p, x)))(m.x)),
    "autograd of per sample": (
        True,
        lambda m: torch.autograd.grad(
            [m.penalty(vmap(grad(m.loss), (None, 0))(m.p, m.xs))], list(m.p.values())
        ),
    ),
    "autograd of vmap": (
        True,
        lambda m: torch.autograd.grad(
            [vmap(m.loss, (None, 0))(m.p, m.xs).square().sum()], list(m.p.values())
        ),
    ),
    "jvp of a vjp's function": (
        True,
        lambda m: jvp(
            vjp(m.output, m.x)[1], (m.output(m.x).detach(),), (m.output(m.x).detach().cos(),)
        ),
    ),
    "hessian": (False, lambda m: hessian(lambda x: m.loss(m.p, x))(m.x)),
    "jacfwd of jacrev": (False, lambda m: jacfwd(jacrev(lambda x: m.loss(m.p, x)))(m.x)),
    "jvp of grad": (False, lambda m: jvp(m.gradient, (m.x,), (m.x.cos(),))),
    "vmap of jvp of grad": (
        False,
        lambda m: vmap(lambda x: jvp(m.gradient, (x,), (x.cos(),)))(m.xs),
    ),
    "ensemble": (
        False,
        lambda m: vmap(grad(m.loss), (0, None))({k: torch.stack([w, -w]) for k, w in m.p.items()}, m.x),
    ),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equal_to_the_plain_loop(options: dict[str, Any], context: str) -> None:
    fast, compute = CONTEXTS[context]
    model = LayerOfSamples(options)
    with loops_chosen() as chosen:
        actual = compute(model)
    assert ("VMAP" in chosen) == fast
    with plainly():
        expected = compute(model)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_per_sample_gradients_are_those_of_each_sample() -> None:
    model = LayerOfSamples(OPTIONS[2])
    together = vmap(grad(model.loss), (None, 0))(model.p, model.xs)
    for k in range(6):
        alone = torch.autograd.grad(model.loss(model.p, model.xs[k]), list(model.p.values()))
        for name, gradient in zip(model.p, alone):
            torch.testing.assert_close(together[name][k], gradient, rtol=0, atol=1e-12)
