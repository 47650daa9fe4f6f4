"""Comparing two layers on a case: which tensor differs, at which step, by how much."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from manual_lstm.check.parity import forward_and_backward
from manual_lstm.testing.cases import Case, Input, State

# Outputs, states and gradients by name, as manual_lstm.check.parity.run gives them.
Results = dict[str, Tensor]

_EXACT = {torch.float64: 1e-12, torch.complex128: 1e-9}  # the complex tanh has poles


def data_of(x: Tensor | PackedSequence) -> Tensor:
    """The tensor itself, or the data of a packed one."""
    return x.data if isinstance(x, PackedSequence) else x


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        yield


def run_case(layer: nn.Module, case: Case) -> Results:
    """Outputs, states and gradients of the case, on CPU; the same dropout for every layer."""
    return {name: tensor.cpu() for name, tensor in _run(layer, case, case.input(), case.hx()).items()}


def oracle(layer: nn.Module, case: Case) -> Results:
    """What ``layer`` gives for the case when it computes in float64 or complex128, on CPU."""
    wide = torch.complex128 if case.dtype.is_complex else torch.float64
    input, hx = case.input().cpu().to(wide), case.hx()
    wide_hx = None if hx is None else (hx[0].to("cpu", wide), hx[1].to("cpu", wide))
    return _run(copy.deepcopy(layer).to("cpu", wide), case, input, wide_hx)


def _run(layer: nn.Module, case: Case, input: Input, hx: State | None) -> Results:
    torch.manual_seed(case.seed + 3)  # for dropout, whose numbers are the same in every dtype on CPU
    with _quiet():
        return forward_and_backward(layer, input, hx)


def relative_errors(layer: nn.Module, case: Case, exact: Results) -> dict[str, float]:
    """How far each result lies from the oracle's, relative to its norm if that is above one."""
    far = {}
    for name, tensor in run_case(layer, case).items():
        gap = (tensor.to(exact[name].dtype) - exact[name]).norm() / exact[name].norm().clamp_min(1.0)
        far[name] = float(gap) if tensor.numel() else 0.0
    return far


def assert_close(actual: Results, expected: Results, tolerance: float) -> None:
    """Compare all results, each measured by its largest element if above one.

    Raises:
        AssertionError: the names, the shapes or the numbers differ; names the tensor.
    """
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(1.0, float(tensor.abs().max())) if tensor.numel() else 1.0
        try:
            torch.testing.assert_close(actual[name], tensor, rtol=0, atol=tolerance * scale)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def assert_same_layer(a: nn.Module, b: nn.Module, case: Case, *, parameters: bool = True) -> None:
    """Assert that ``a`` is the layer that ``b`` is: in form, values and gradients, on this case.

    The form of what both return must be the same: types, shapes, dtypes, devices and the indices of
    packed output. Then the output, h_n, c_n, and the gradients with respect to the input, h_0, c_0
    and every parameter are held against a float64 oracle, which is ``b`` computing in float64.
    Measured by the tensor's largest element if above one, ``a`` may be wrong by 1e-12 in
    float64 (1e-9 in complex128), and in lower precision by twice the largest error of ``b`` and
    16 units in the last place.

    Args:
        a: the layer under test, on the case's device and of its dtype.
        b: the reference, with the same weights.
        case: what both are run on, see :class:`Case`.
        parameters: whether both name their parameters alike, so that the gradients of those can be
            compared.

    Raises:
        AssertionError: they differ. The message names the first tensor that does, its first step that
            does, the element there that is farthest away, by how much, what is allowed, and the other
            tensors.

    Example:
        >>> from manual_lstm.testing.cases import OPTIONS
        >>> case = Case({"input_size": 3, "hidden_size": 4, **OPTIONS}, "dense", [5, 5])
        >>> reference, layer = case.pair(nn.LSTM)
        >>> assert_same_layer(layer, reference, case)
        >>> with torch.no_grad():
        ...     _ = layer.weight_hh_l0[0, 2].add_(1e-6)  # in the input gate of unit 0
        >>> assert_same_layer(layer, reference, case)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        AssertionError: output differs first at step 1, sequence 0, feature 0: ...
    """
    _assert_same_form(a, b, case)
    ours, theirs = run_case(a, case), run_case(b, case)
    exact = theirs if case.dtype in _EXACT else oracle(b, case)
    if parameters:
        assert ours.keys() == theirs.keys(), (
            f"the parameters are named {_parameters(ours)}, but should be {_parameters(theirs)}"
        )
    differing: list[str] = []
    for name in [name for name in theirs if name in ours]:
        allowed = _allowed(theirs[name], exact[name], case.dtype)
        message = _difference(name, ours[name], exact[name], allowed, case)
        if message:
            differing.append(message)
    if differing:
        first, *others = differing
        raise AssertionError("\n  ".join([first, *(each.split("\n")[0] for each in others), str(case)]))


def _parameters(found: Results) -> list[str]:
    return [name.removeprefix("grad of ") for name in found if "grad of" in name]


def _assert_same_form(a: nn.Module, b: nn.Module, case: Case) -> None:
    """Assert that both return the same types, shapes, dtypes, devices and packed indices."""
    found = []
    for layer in (a, b):
        with _quiet(), torch.no_grad():
            found.append(layer(case.input(), case.hx()))
    answer, expected = found
    try:
        output, (h_n, c_n) = answer
    except (TypeError, ValueError):
        raise AssertionError(
            f"the layer should return output, (h_n, c_n), but got {answer!r}"
        ) from None
    parts = zip(("output", "h_n", "c_n"), (output, h_n, c_n), (expected[0], *expected[1]))
    for name, ours, theirs in parts:
        assert isinstance(ours, type(theirs)), (
            f"{name} should be a {type(theirs).__name__}, but is a {type(ours).__name__}\n  {case}"
        )
        for what in ("shape", "dtype", "device"):
            got, wanted = getattr(data_of(ours), what), getattr(data_of(theirs), what)
            assert got == wanted, f"the {what} of {name} should be {wanted}, but is {got}\n  {case}"
    if isinstance(output, PackedSequence):
        for what in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            got, wanted = getattr(output, what), getattr(expected[0], what)
            same = got is wanted or (None not in (got, wanted) and torch.equal(got, wanted))
            assert same, f"{what} of the output should be {wanted}, but is {got}\n  {case}"


def _allowed(found: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """How far an element may lie from the oracle's, given what the reference found."""
    if exact.numel() == 0:
        return 0.0
    scale = max(1.0, float(exact.abs().max()))
    if dtype in _EXACT:
        return _EXACT[dtype] * scale
    error = float((found.to(exact.dtype) - exact).abs().max())
    return 2 * error + 16 * torch.finfo(dtype).eps * scale


def _difference(name: str, found: Tensor, exact: Tensor, allowed: float, case: Case) -> str | None:
    """Say where ``found`` is not what it should be, or ``None``."""
    if found.shape != exact.shape:
        return f"{name} has shape {list(found.shape)}, but should have {list(exact.shape)}"
    gap = (found.to(exact.dtype) - exact).abs()
    equal = (found == exact) | (found.isnan() & exact.isnan())  # infinities too
    gap = gap.masked_fill(equal, 0.0).nan_to_num(nan=float("inf"))
    wrong = (gap > allowed).nonzero()
    if len(wrong) == 0:
        return None
    steps = _steps(name, wrong, case)
    at_first = wrong[steps == steps.min()]
    place = at_first[gap[tuple(at_first.t())].argmax()].tolist()
    got, should = (tensor[tuple(place)].item() for tensor in (found, exact))
    which, span = "most", ""
    if _has_steps(name):
        which, span = "first", f", in steps {int(steps.min())} to {int(steps.max())}"
    return (
        f"{name} differs {which} at {_words(name, place, case)}: by {float(gap[tuple(place)]):.1e}, "
        f"allowed is {allowed:.1e}\n"
        f"    {got:.10g} should be {should:.10g}\n"
        f"    {len(wrong)} of {gap.numel()} elements differ{span}"
    )


def _has_steps(name: str) -> bool:
    return name in ("output", "grad of input")


def _rows(case: Case) -> list[tuple[int, int]]:
    """The step and the sequence of each row of packed data, sequences in the caller's order."""
    input = case.input()
    assert isinstance(input, PackedSequence)
    order = range(len(case.lengths)) if input.sorted_indices is None else input.sorted_indices.tolist()
    sizes = input.batch_sizes.tolist()
    return [(step, order[row]) for step, size in enumerate(sizes) for row in range(size)]


def _steps(name: str, places: Tensor, case: Case) -> Tensor:
    """The step of each place, ``[n, dimensions]``; of those that have none, 0."""
    if not _has_steps(name):
        return torch.zeros(len(places), dtype=torch.int64)
    if case.form.startswith("packed"):
        return torch.tensor([step for step, _ in _rows(case)])[places[:, 0]]
    return places[:, 1 if case.form == "dense" and case.options["batch_first"] else 0]


def _words(name: str, place: list[int], case: Case) -> str:
    """Say in words where an element is."""
    *front, feature = place
    if _has_steps(name):
        if case.form.startswith("packed"):
            front = list(_rows(case)[front[0]])
        elif case.form == "dense" and case.options["batch_first"]:
            front.reverse()
        return (
            ", ".join(f"{k} {n}" for k, n in zip(("step", "sequence"), front)) + f", feature {feature}"
        )
    if name in ("h_n", "c_n", "grad of h_0", "grad of c_0"):
        layer, reverse = divmod(front[0], 2) if case.options["bidirectional"] else (front[0], 0)
        rest = [f"sequence {n}" for n in front[1:]] + [f"feature {feature}"]
        return ", ".join([f"layer {layer}{' (reverse)' if reverse else ''}", *rest])
    if any(kind in name for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")):
        gate, unit = divmod(place[0], case.options["hidden_size"])
        return ", ".join([f"gate {'ifgo'[gate]}, unit {unit}", *(f"column {n}" for n in place[1:])])
    return str(place)
