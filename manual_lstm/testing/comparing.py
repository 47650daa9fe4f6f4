"""Compare two layers on a case: which tensor differs, at which step, and by how much."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from manual_lstm.check.parity import data_of, forward_and_backward
from manual_lstm.testing.cases import Case, Input, State
from manual_lstm.testing.pieces import run_in_pieces

# Outputs, states and gradients by name, as forward_and_backward returns them.
Results = dict[str, Tensor]

# The tolerances of the dtypes that need no oracle. The complex tanh has poles, near which errors grow.
_EXACT = {torch.float64: 1e-12, torch.complex128: 1e-9}


@contextmanager
def _quiet(case: Case) -> Iterator[None]:
    # cuDNN refuses strided states, and a backward in eval mode; torch has another kernel on CUDA.
    cudnn_off = torch.backends.cudnn.flags(enabled=False) if case.device == "cuda" else nullcontext()
    with warnings.catch_warnings(), cudnn_off:
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        yield


def run_case(layer: nn.Module, case: Case) -> Results:
    """Run a case, and return outputs, states and gradients on CPU. All layers get the same dropout."""
    results = _seed_and_run(layer, case, case.input(), case.hx())
    return {name: tensor.cpu() for name, tensor in results.items()}


def oracle(layer: nn.Module, case: Case) -> Results:
    """Run a case with a copy of ``layer`` in float64 or complex128, on CPU."""
    wide = torch.complex128 if case.dtype.is_complex else torch.float64
    input, hx = case.input().cpu().to(wide), case.hx()
    wide_hx = None if hx is None else (hx[0].to("cpu", wide), hx[1].to("cpu", wide))
    return _seed_and_run(copy.deepcopy(layer).to("cpu", wide), case, input, wide_hx)


def _seed_and_run(layer: nn.Module, case: Case, input: Input, hx: State | None) -> Results:
    torch.manual_seed(case.seed + 3)  # for dropout, which on CPU draws the same in every dtype
    with _quiet(case):
        return forward_and_backward(layer, input, hx, lambda *args: call_layer(layer, case, *args))


def call_layer(layer: nn.Module, case: Case, input: Input, hx: State | None) -> Any:
    """Call a layer on a case, with the arguments that nn.LSTM does not have; it runs in pieces."""
    keywords = case.keywords()
    if keywords and isinstance(layer, nn.LSTM):
        return run_in_pieces(layer, input, hx, **keywords)
    return layer(input, hx, **keywords)


def relative_errors(layer: nn.Module, case: Case, exact: Results) -> dict[str, float]:
    """Return how far each result is from the oracle's, divided by its norm if above one."""
    distances = {}
    for name, tensor in run_case(layer, case).items():
        gap = (tensor.to(exact[name].dtype) - exact[name]).norm() / exact[name].norm().clamp_min(1.0)
        distances[name] = float(gap) if tensor.numel() else 0.0
    return distances


def assert_close(actual: Results, expected: Results, tolerance: float) -> None:
    """Assert that all results are close, relative to their largest element if above one.

    Raises:
        AssertionError: the names, the shapes or the numbers differ; the message names the tensor.
    """
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(1.0, float(tensor.abs().max())) if tensor.numel() else 1.0
        try:
            torch.testing.assert_close(actual[name], tensor, rtol=0, atol=tolerance * scale)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def assert_same_layer(a: nn.Module, b: nn.Module, case: Case, *, parameters: bool = True) -> None:
    """Assert that layers ``a`` and ``b`` agree in form, values and gradients on a case.

    Both must return the same types, shapes, dtypes, devices, and indices of packed output. Then the
    output, h_n, c_n, and the gradients of the input, h_0, c_0 and every parameter are compared with
    an oracle, which is ``b`` computed in float64. Relative to the tensor's largest element if above
    one, the error of ``a`` may be 1e-12 in float64 and 1e-9 in complex128. In lower precision it may
    be twice the largest error of ``b`` plus 16 units in the last place.

    Args:
        a: the layer under test, on the case's device and in its dtype.
        b: the reference, with the same weights.
        case: the case that both run, see :class:`Case`.
        parameters: whether the parameters have the same names, so that their gradients can be
            compared.

    Raises:
        AssertionError: the layers differ. The message names the first tensor that differs, the first
            step at which it does, the element there with the largest difference, the difference and
            the tolerance. Then it lists the other tensors that differ.

    Example:
        >>> from manual_lstm.testing.cases import OPTIONS
        >>> case = Case({"input_size": 3, "hidden_size": 4, **OPTIONS}, "dense", [5, 5])
        >>> reference, layer = case.pair(nn.LSTM)
        >>> assert_same_layer(layer, reference, case)
        >>> with torch.no_grad():
        ...     _ = layer.weight_hh_l0[0, 2].add_(1e-6)  # a weight of the input gate of unit 0
        >>> assert_same_layer(layer, reference, case)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        AssertionError: output differs first at step 1, sequence 0, feature 0: ...
    """
    _assert_same_form(a, b, case)
    ours, theirs = run_case(a, case), run_case(b, case)
    exact = theirs if case.dtype in _EXACT else oracle(b, case)
    if parameters:
        assert ours.keys() == theirs.keys(), (
            f"the parameters are named {_parameter_names(ours)}, "
            f"but should be {_parameter_names(theirs)}"
        )
    differing: list[str] = []
    for name in [name for name in theirs if name in ours]:
        allowed = _allowed(theirs[name], exact[name], case.dtype)
        message = _describe_difference(name, ours[name], exact[name], allowed, case)
        if message:
            differing.append(message)
    if differing:
        first, *others = differing
        headlines = [message.split("\n")[0] for message in others]
        raise AssertionError("\n  ".join([first, *headlines, str(case)]))


def _parameter_names(results: Results) -> list[str]:
    return [name.removeprefix("grad of ") for name in results if "grad of" in name]


def _assert_same_form(a: nn.Module, b: nn.Module, case: Case) -> None:
    """Assert that both return the same types, shapes, dtypes, devices and packed indices."""
    with _quiet(case), torch.no_grad():
        actual, expected = (call_layer(layer, case, case.input(), case.hx()) for layer in (a, b))
    try:
        output, (h_n, c_n) = actual
    except (TypeError, ValueError):
        raise AssertionError(
            f"the layer should return output, (h_n, c_n), but got {actual!r}"
        ) from None
    parts = zip(("output", "h_n", "c_n"), (output, h_n, c_n), (expected[0], *expected[1]))
    for name, ours, theirs in parts:
        assert isinstance(ours, type(theirs)), (
            f"{name} should be a {type(theirs).__name__}, but is a {type(ours).__name__}\n  {case}"
        )
        for attribute in ("shape", "dtype", "device"):
            got, should = getattr(data_of(ours), attribute), getattr(data_of(theirs), attribute)
            assert got == should, (
                f"the {attribute} of {name} should be {should}, but is {got}\n  {case}"
            )
    if isinstance(output, PackedSequence):
        for attribute in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            got, should = getattr(output, attribute), getattr(expected[0], attribute)
            same = got is should or (None not in (got, should) and torch.equal(got, should))
            assert same, f"{attribute} of the output should be {should}, but is {got}\n  {case}"


def _allowed(reference: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Return how far an element may be from the oracle's, given the reference's own result."""
    if exact.numel() == 0:
        return 0.0
    scale = max(1.0, float(exact.abs().max()))
    if dtype in _EXACT:
        return _EXACT[dtype] * scale
    error = float((reference.to(exact.dtype) - exact).abs().max())
    return 2 * error + 16 * torch.finfo(dtype).eps * scale


def _describe_difference(
    name: str, actual: Tensor, exact: Tensor, allowed: float, case: Case
) -> str | None:
    """Say where ``actual`` differs by more than is allowed; return None if it does not."""
    if actual.shape != exact.shape:
        return f"{name} has shape {list(actual.shape)}, but should have {list(exact.shape)}"
    gap = (actual.to(exact.dtype) - exact).abs()
    # The gap between equal infinities is NaN, so equal elements are found by comparing them.
    equal = (actual == exact) | (actual.isnan() & exact.isnan())
    gap = gap.masked_fill(equal, 0.0).nan_to_num(nan=float("inf"))
    wrong = (gap > allowed).nonzero()
    if len(wrong) == 0:
        return None
    steps = _steps(name, wrong, case)
    at_first = wrong[steps == steps.min()]
    place = at_first[gap[tuple(at_first.t())].argmax()].tolist()
    got, should = (tensor[tuple(place)].item() for tensor in (actual, exact))
    which, span = "most", ""
    if _has_steps(name):
        which, span = "first", f", in steps {int(steps.min())} to {int(steps.max())}"
    where, largest = _describe_place(name, place, case), float(gap[tuple(place)])
    return (
        f"{name} differs {which} at {where}: by {largest:.1e}, allowed is {allowed:.1e}\n"
        f"    {got:.10g} should be {should:.10g}\n"
        f"    {len(wrong)} of {gap.numel()} elements differ{span}"
    )


def _has_steps(name: str) -> bool:
    return name in ("output", "grad of input")


def _packed_rows(case: Case) -> list[tuple[int, int]]:
    """Return the step and the sequence of each row of packed data, numbered as the caller does."""
    input = case.input()
    assert isinstance(input, PackedSequence)
    order = range(len(case.lengths)) if input.sorted_indices is None else input.sorted_indices.tolist()
    sizes = input.batch_sizes.tolist()
    return [(step, order[row]) for step, size in enumerate(sizes) for row in range(size)]


def _steps(name: str, places: Tensor, case: Case) -> Tensor:
    """Return the step of each place, or 0 if the tensor has no steps. Places: ``[n, dimensions]``."""
    if not _has_steps(name):
        return torch.zeros(len(places), dtype=torch.int64)
    if case.form.startswith("packed"):
        return torch.tensor([step for step, _ in _packed_rows(case)])[places[:, 0]]
    return places[:, 1 if case.form == "dense" and case.options["batch_first"] else 0]


def _describe_place(name: str, place: list[int], case: Case) -> str:
    """Say in words where an element is."""
    *front, feature = place
    if _has_steps(name):
        if case.form.startswith("packed"):
            front = list(_packed_rows(case)[front[0]])
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
