"""Draw whole cases: constructor arguments, input, initial states, dtype, device and mode."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

DEVICES: tuple[str, ...] = ("cpu",)
if torch.cuda.is_available():
    DEVICES += ("cuda",)
if torch.backends.mps.is_available():
    DEVICES += ("mps",)

Input = Tensor | PackedSequence
State = tuple[Tensor, Tensor]
# Makes a layer: a class with nn.LSTM's arguments, or a function of them.
Factory = Callable[..., nn.Module]
# Gives a layer (the first argument) the weights of an nn.LSTM (the second).
Load = Callable[[nn.Module, nn.LSTM], object]

# nn.LSTM's arguments and their defaults, without the two sizes.
OPTIONS: dict[str, Any] = {
    "num_layers": 1,
    "bias": True,
    "batch_first": False,
    "dropout": 0.0,
    "bidirectional": False,
    "proj_size": 0,
}
FORMS = ("dense", "unbatched", "packed", "packed unsorted", "packed by hand")
# Arguments of a call that nn.LSTM does not have. With lengths, the form is "padded".
KEYWORDS = ("lengths", "resets")
LAYOUTS = ("contiguous", "transposed", "expanded", "sliced")
# What a layer may lack. "packed" stands for all three packed forms, "strides" for every layout that
# is not contiguous.
FEATURES = (*OPTIONS, "hx", *FORMS[1:], "batch of 0", "strides")


def load_state_dict(layer: nn.Module, reference: nn.LSTM) -> None:
    """Load the weights of ``reference`` into ``layer``, which must name them as nn.LSTM does."""
    layer.load_state_dict(reference.state_dict())


@dataclass
class Case:
    """A drawn case: how to make a layer, what to call it with, and in which dtype, device and mode.

    Tensors are drawn from ``seed``. So the printed case is short, and evaluating it makes the case
    again. Every call makes equal tensors.

    Args:
        options: all of nn.LSTM's arguments from ``input_size`` to ``proj_size``, by name.
        form: ``"dense"``, ``"unbatched"``, ``"packed"``, ``"packed unsorted"``, ``"packed by
            hand"`` (a PackedSequence of data and batch_sizes alone) or ``"padded"`` (called with
            ``lengths``).
        lengths: the number of steps of each sequence. For dense input, B times T; of padded input
            some may be 0.
        layout: how the input lies in memory: ``"contiguous"``, ``"transposed"``, ``"expanded"``
            or ``"sliced"``.
        with_hx: whether the layer is called with initial states.
        training: whether the layer is in training mode.
        dtype: of parameters, input and states.
        device: of the same tensors.
        seed: the seed for parameters, input, states and dropout.
        resets: the probability with which a step begins a new sequence. If positive, the layer is
            called with ``resets``.

    Example:
        >>> case = Case({"input_size": 3, "hidden_size": 4, **OPTIONS}, "dense", [5, 5])
        >>> case.input().shape
        torch.Size([5, 2, 3])
        >>> case.layer(nn.LSTM)
        LSTM(3, 4)
    """

    options: dict[str, Any]
    form: str
    lengths: list[int]
    layout: str = "contiguous"
    with_hx: bool = False
    training: bool = True
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    seed: int = 0
    resets: float = 0.0

    @property
    def given(self) -> dict[str, Any]:
        """The options that differ from nn.LSTM's defaults, so that a class may lack the others."""
        return {name: self.options[name] for name in OPTIONS if self.options[name] != OPTIONS[name]}

    def layer(self, factory: Factory) -> nn.Module:
        """Make the layer of this case, its parameters drawn from the seed.

        Args:
            factory: is called with the two sizes, and by name with the options in :attr:`given`,
                ``dtype`` and ``device``.
        """
        torch.manual_seed(self.seed)
        sizes = self.options["input_size"], self.options["hidden_size"]
        layer = factory(*sizes, **self.given, dtype=self.dtype, device=self.device)
        return layer.train(self.training)

    def pair(self, factory: Factory, load: Load = load_state_dict) -> tuple[nn.LSTM, nn.Module]:
        """Make an nn.LSTM and the layer of ``factory``, with the same weights."""
        reference, layer = self.layer(nn.LSTM), self.layer(factory)
        assert isinstance(reference, nn.LSTM)
        load(layer, reference)
        return reference, layer

    def randn(self, *shape: int) -> Tensor:
        """Draw a tensor of the case's dtype and device; in float64, so that dtypes agree."""
        return torch.randn(*shape, dtype=torch.float64).to(dtype=self.dtype, device=self.device)

    def input(self) -> Input:
        """Make the input, in the case's form and layout.

        Returns:
            A tensor ``[T, B, I]``, ``[B, T, I]`` with batch_first, or ``[T, I]`` unbatched; or a
            PackedSequence with data ``[N, I]``.
        """
        torch.manual_seed(self.seed + 1)
        features = self.options["input_size"]
        if self.form in ("dense", "padded"):
            T, B = self.steps, len(self.lengths)
            shape = (B, T, features) if self.options["batch_first"] else (T, B, features)
            return self._lay_out(self.randn(*shape))
        if self.form == "unbatched":
            return self._lay_out(self.randn(self.lengths[0], features))
        sequences = [self.randn(n, features) for n in self.lengths]
        if self.form != "packed unsorted":
            sequences.sort(key=len, reverse=True)
        packed = pack_sequence(sequences, enforce_sorted=self.form != "packed unsorted")
        packed = packed._replace(data=self._lay_out(packed.data))
        if self.form == "packed by hand":
            return PackedSequence(packed.data, packed.batch_sizes)
        return packed

    @property
    def steps(self) -> int:
        """The number of steps of dense and padded input, T. The longest sequence may have padding."""
        if self.form == "padded":
            return max(self.lengths, default=1) + self.seed % 3
        return self.lengths[0] if self.lengths else 3

    def keywords(self) -> dict[str, Any]:
        """Make the arguments that nn.LSTM does not have: ``lengths`` of padded input, ``resets``.

        Returns:
            Nothing for a case that nn.LSTM can be called with. The lengths are a list; the resets have
            the form of the input: a bool tensor, or a PackedSequence of bools.
        """
        made: dict[str, Any] = {}
        if self.form == "padded":
            made["lengths"] = list(self.lengths)
        if self.resets:
            input = self.input()
            torch.manual_seed(self.seed + 4)
            data = input.data if isinstance(input, PackedSequence) else input
            resets = torch.rand(data.shape[:-1]) < self.resets
            resets = resets.to(self.device)
            packed = isinstance(input, PackedSequence)
            made["resets"] = input._replace(data=resets) if packed else resets  # type: ignore[union-attr]
        return made

    def _lay_out(self, x: Tensor) -> Tensor:
        """Return ``x`` in the layout of the case. An expanded tensor repeats its first row."""
        if self.layout == "transposed":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if self.layout == "expanded":
            return x[:1].expand_as(x)
        if self.layout == "sliced":
            return torch.stack([x, x], dim=-1)[..., 0]
        return x

    def hx(self) -> State | None:
        """Make h_0 ``[L * D, B, P or H]`` and c_0 ``[L * D, B, H]``, or return None."""
        if not self.with_hx:
            return None
        torch.manual_seed(self.seed + 2)
        rows = self.options["num_layers"] * (2 if self.options["bidirectional"] else 1)
        batch = [] if self.form == "unbatched" else [len(self.lengths)]
        H, P = self.options["hidden_size"], self.options["proj_size"]
        h_0, c_0 = self.randn(rows, *batch, P or H), self.randn(rows, *batch, H)
        return self._lay_out(h_0), self._lay_out(c_0)


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: Collection[torch.dtype] = (torch.float64,),
    devices: Collection[str] = DEVICES,
    without: Collection[str] = (),
    always: Collection[str] = (),
    large: bool = True,
    beyond: Collection[str] = (),
) -> Case:
    """Draw a :class:`Case`.

    Args:
        dtypes: the dtypes to draw from.
        devices: the devices to draw from; by default all that this machine has.
        without: what to leave out: ``"num_layers"``, ``"bias"``, ``"batch_first"``, ``"dropout"``,
            ``"bidirectional"``, ``"proj_size"``, ``"hx"``, ``"dense"``, ``"unbatched"``,
            ``"packed"`` (all its forms), ``"packed unsorted"``, ``"packed by hand"``,
            ``"batch of 0"``, ``"strides"``.
        always: the options, or ``"hx"``, that every case must have with another value than the
            default. Dropout needs two layers: ``{"num_layers", "dropout"}``. A name that is also in
            ``without`` is left out.
        large: if true, H and I reach 70, B 40 and T 60, though small sizes are more likely. Otherwise
            they reach 6, 5 and 5.
        beyond: what nn.LSTM does not have: ``"lengths"`` also draws padded input, with lengths of 0
            among others, and ``"resets"`` also draws resets. Call the layer with
            ``**case.keywords()``; :func:`assert_same_layer` runs nn.LSTM on packed input, and piece by
            piece. A case with resets has no dropout.

    There is no dropout on devices other than the CPU, whose kernels draw other random numbers. There
    is no double precision on MPS, which does not support it.

    Raises:
        ValueError: ``without`` or ``always`` contains another name, or ``without`` leaves no form of
            input.

    Example:
        >>> from hypothesis import given
        >>> @given(case=cases(without={"proj_size", "packed"}))
        ... def test_the_output_has_a_row_for_each_step(case: Case) -> None:
        ...     output, _ = case.layer(nn.LSTM)(case.input(), case.hx())
        ...     assert output.shape[:-1] == case.input().shape[:-1]
        >>> test_the_output_has_a_row_for_each_step()
    """
    allowed = {*FEATURES, "dense"}
    if not set(KEYWORDS) >= set(beyond):
        raise ValueError(f"beyond should name some of {list(KEYWORDS)}, but got {sorted(beyond)}")
    if not allowed >= set(without) or not _forms(without, beyond):
        raise ValueError(
            f"without should name some of {sorted(allowed)} and leave a form of input, "
            f"but got {sorted(without)}"
        )
    if not {*OPTIONS, "hx"} >= set(always):
        raise ValueError(f"always should name some of {[*OPTIONS, 'hx']}, but got {sorted(always)}")

    def option(name: str, values: st.SearchStrategy[Any]) -> Any:
        if name in always:
            values = values.filter(lambda value: value != OPTIONS[name])
        return OPTIONS[name] if name in without else draw(values)

    size = st.integers(1, 6)
    H = draw(size | st.integers(1, 70) if large else size) + ("proj_size" in always)
    num_layers = option("num_layers", st.integers(1, 4))
    device = draw(st.sampled_from(sorted(devices)))
    dtype = draw(st.sampled_from(list(dtypes)))
    if device == "mps" and dtype in (torch.float64, torch.complex128):
        device = "cpu"
    options = {
        "input_size": draw(size | st.integers(1, 70) if large else size),
        "hidden_size": H,
        "num_layers": num_layers,
        "bias": option("bias", st.booleans()),
        "batch_first": option("batch_first", st.booleans()),
        "dropout": 0.0,
        "bidirectional": option("bidirectional", st.booleans()),
        "proj_size": option("proj_size", st.just(0) | st.integers(1, H - 1)) if H > 1 else 0,
    }
    resets = draw(st.sampled_from([0.05, 0.3, 1.0])) if "resets" in beyond else 0.0
    if num_layers > 1 and device == "cpu" and not resets:
        options["dropout"] = option("dropout", st.sampled_from([0.0, 0.3, 1.0]))
    T = st.integers(1, 7) | st.integers(1, 60) if large else st.integers(1, 5)
    B = draw(st.integers(1, 5) | st.integers(1, 40) if large else st.integers(1, 5))
    forms = _forms(without, beyond)
    # This form is drawn twice as often, because a layer can handle it wrongly in the most ways.
    form = draw(st.sampled_from(forms + forms.count("packed unsorted") * ["packed unsorted"]))
    if form == "dense":
        lengths = [draw(T)] * draw(st.sampled_from([B] if "batch of 0" in without else [B, B, B, B, 0]))
    elif form == "unbatched":
        lengths = [draw(T)]
    elif form == "padded":
        lengths = draw(st.lists(st.just(0) | T, min_size=B, max_size=B))
    else:
        lengths = draw(st.lists(T, min_size=B, max_size=B))
    return Case(
        options=options,
        form=form,
        lengths=lengths,
        layout="contiguous" if "strides" in without else draw(st.sampled_from(LAYOUTS)),
        with_hx="hx" not in without and ("hx" in always or draw(st.sampled_from([False, True, True]))),
        training=draw(st.booleans()),
        dtype=dtype,
        device=device,
        seed=draw(st.integers(0, 2**16)),
        resets=resets,
    )


def _forms(without: Collection[str], beyond: Collection[str]) -> list[str]:
    """Return the forms of input that are left."""
    packed = "packed" not in without
    forms = [name for name in FORMS if name not in without]
    forms = [name for name in forms if packed or not name.startswith("packed")]
    return [*forms, *(["padded"] if "lengths" in beyond else [])]
