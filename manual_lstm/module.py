"""ManualLSTM: parameters, construction, and what a subclass may override.

A call goes through the door (``inputs.py``), the stack of layers and directions (``engine/stack.py``),
and out by the door again.
"""

import inspect
import math
import operator
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from manual_lstm.cell import Step, lstm_cell
from manual_lstm.engine.arguments import check_arguments
from manual_lstm.engine.constructor import set_by_init
from manual_lstm.engine.context import is_compiling, is_tracing
from manual_lstm.engine.convert import install_state, manual_state, official_state, why_not
from manual_lstm.engine.custom import CellWeights, of_each_step, prepare_custom
from manual_lstm.engine.opacus import OpacusCall, active_owner, attach, opacus_owner
from manual_lstm.engine.padding import fill
from manual_lstm.engine.stack import DEFAULT_OPTIONS, CallOptions, run_stack
from manual_lstm.engine.weights import (
    Assigned,
    FlatWeights,
    assign_flat_weights,
    count_directions,
    flat_names,
    kind_of,
    read_weights,
    weight_shapes,
)
from manual_lstm.inputs import Inputs, enter
from manual_lstm.loop import project
from manual_lstm.unrolled.request import Request, request_of
from manual_lstm.unrolled.result import Unrolled

_Layer = TypeVar("_Layer", bound="ManualLSTM")


class ManualLSTM(nn.Module):
    r"""A drop-in replacement for :class:`torch.nn.LSTM`, written as an unrolled gate loop.

    For each element of the sequence, each layer computes

    .. math::
        i_t &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t)

    and with ``proj_size > 0`` multiplies :math:`h_t` by :math:`W_{hr}`. See
    :mod:`manual_lstm.cell` for the same in code, and for the papers.

    Args:
        input_size (int): features of the input, I.
        hidden_size (int): features of the cell state, H.
        num_layers (int): layers stacked on one another, L.
        bias (bool): whether the layer has ``bias_ih`` and ``bias_hh``.
        batch_first (bool): whether input and output are ``[B, T, features]``. Does not apply to
            the states, nor to unbatched or packed input.
        dropout (float): in training mode, probability with which an element of the output of
            each layer but the last is zeroed.
        bidirectional (bool): whether each layer also runs backwards in time, D = 2.
        proj_size (int): if positive, the hidden state is projected to this size, P.
        device (torch.device, optional): where the parameters are made.
        dtype (torch.dtype, optional): floating-point or complex dtype of the parameters.

    Shape:
        - input: ``[T, B, I]``, with ``batch_first`` ``[B, T, I]``, unbatched ``[T, I]``, or a
          :class:`~torch.nn.utils.rnn.PackedSequence`; of the parameters' dtype and device. Also a
          nested tensor of layout ``torch.jagged``, ``[B, j, I]`` whatever ``batch_first`` says.
        - lengths: by name only; of padded input, ``[B]`` integers from 0 to T: a list, or a tensor on
          any device. The answer is that of packing, the layer and padding: the output is zero in the
          padding, and every sequence has its own last step. What stands in the padding does not
          matter. A sequence of length 0 returns its states as they are.
        - resets: by name only; bool, in the form of the input without its features: ``[T, B]``, with
          ``batch_first`` ``[B, T]``, unbatched ``[T]``, packed or nested. True where a new sequence
          begins: the answer is that of every piece alone, in both directions, and no gradient passes
          from one to another. h_n is that of the last piece forwards, and of the first backwards.
          hx acts on the first piece forwards, if no reset begins it, and on the last backwards.
        - hx: ``None`` for zeros, or the pair of h_0, ``[L * D, B, P or H]``, and c_0,
          ``[L * D, B, H]``; without B where the input has none.
        - output: as the input, with ``D * (P or H)`` features.
        - h_n, c_n: as h_0 and c_0.

        T may be 0: the output is then empty and the states come back as they went in.

    Attributes:
        weight_ih_l[k]: ``[4H, I]``, above the first layer ``[4H, D * (P or H)]``.
        weight_hh_l[k]: ``[4H, P or H]``.
        bias_ih_l[k], bias_hh_l[k]: ``[4H]``. Only with ``bias``.
        weight_hr_l[k]: ``[P, H]``. Only with ``proj_size > 0``.

        The backward direction's have the suffix ``_reverse``. Gates stand in the order i, f, g, o.

    Raises:
        TypeError: an argument of the wrong type; an ``hx`` that is not a pair of tensors; ``lengths``
            that are no integers; ``resets`` of another dtype or form than bools like the input.
        ValueError: an argument out of range; an input of the wrong rank, or of another dtype
            than the parameters; ``lengths`` out of range, of another number than B, or with input
            that is not padded; ``resets`` of another shape than the input's.
        RuntimeError: sizes that do not fit; ``hx`` of the wrong rank, size or dtype; tensors on
            different devices.

        Where nn.LSTM raises something else for an ``hx`` or an input that cannot be understood
        (IndexError, AttributeError), so does this.

    Example:
        >>> layer = ManualLSTM(10, 20, num_layers=2)
        >>> output, (h_n, c_n) = layer(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]), torch.Size([2, 3, 20]))
        >>> _ = nn.LSTM(10, 20, num_layers=2).load_state_dict(layer.state_dict())
        >>> output, _ = layer(torch.randn(5, 3, 10), lengths=[5, 2, 4])  # a padded batch
        >>> output[2:, 1].abs().max()
        tensor(0., grad_fn=<MaxBackward1>)
        >>> resets = torch.zeros(5, 3, dtype=torch.bool)
        >>> resets[2, 1] = True  # in the second row, another sequence begins at step 2
        >>> output, _ = layer(torch.randn(5, 3, 10), resets=resets)
    """

    # A new option needs: an argument of __init__, its check in engine/arguments.py, an attribute set
    # below, its part in extra_repr, and a default here in the class. A swap copies vars(lstm) of an
    # nn.LSTM and does not run __init__, so an attribute that only __init__ sets is missing after it.

    # Whether torch.compile and torch.export make torch's scan of the loop of a changed cell: one step,
    # whose compile time does not grow with the length. A class whose cell scan does not take (it writes
    # to a buffer, for one) sets this to False: its steps are then unrolled, for the example's length.
    compile_as_scan = True

    # The cell's own parameters of each direction: their names in w, and the names of the parameters.
    _own_names: Sequence[dict[str, str]] = ()
    # What _flat_weights was assigned, if that is not the layer's weights.
    _assigned: Assigned | None = None
    # The objects of Opacus whose hooks were registered, by the ids of their handles.
    _sample_hooks: dict[int, Any] | None = None

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_arguments(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
        )
        self._assigned = None
        self.mode = "LSTM"
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers = operator.index(num_layers)  # numpy's integers, for example
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = operator.index(proj_size)

        self._all_weights: list[list[str]] = []  # the names of the weights, L * D lists
        for layer in range(num_layers):
            for suffix in ["", "_reverse"] if bidirectional else [""]:
                shapes = weight_shapes(self, layer)
                names = {kind: f"{kind}_l{layer}{suffix}" for kind in shapes}
                self._all_weights.append(list(names.values()))
                for kind, shape in shapes.items():
                    weight = torch.empty(shape, device=device, dtype=dtype)
                    self.register_parameter(names[kind], Parameter(weight))
        self.reset_parameters()
        own_names, parameters = self._own_parameters()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        if parameters:
            self._own_names = own_names

    @classmethod
    def from_lstm(cls: type[_Layer], lstm: nn.LSTM) -> _Layer:
        """Make a layer that shares everything with ``lstm``.

        The Parameters are the same objects, with their gradients, and so are buffers, hooks, extra
        attributes and submodules. ``lstm`` stays as it is; what is registered on one of the two
        later, or removed from it by its handle, does not change the other. To change the layers of
        a model, see :func:`manual_lstm.replace_lstm`.

        Args:
            lstm (nn.LSTM): the layer to take over. In a subclass of ManualLSTM, ``__init__`` is not
                run, and a warning names what it sets and the class has no default for; a cell's own
                parameters (:meth:`cell_parameters`) get their initial values.

        Raises:
            TypeError: ``lstm`` is something else, or more: of a subclass, parametrized, quantized,
                or with a ``forward`` of its own.

        Example:
            >>> lstm = nn.LSTM(10, 20)
            >>> layer = ManualLSTM.from_lstm(lstm)
            >>> layer.weight_ih_l0 is lstm.weight_ih_l0
            True
        """
        reason = why_not(lstm, nn.LSTM)
        if reason:
            raise TypeError(f"lstm should be an nn.LSTM and nothing more, but {reason}")
        layer, state = cls.__new__(cls), cls._state_from(lstm)
        missing = cls._missing_after_swap(state)
        if missing:
            warnings.warn(missing, stacklevel=2)
        install_state(layer, state, lstm)
        return layer

    @classmethod
    def _missing_after_swap(cls, state: dict[str, Any]) -> str | None:
        """What a layer with this ``__dict__`` lacks because ``__init__`` has not run, in words."""
        there = {*state, *(name for part in _PARTS for name in state[part])}
        names = [
            name
            for name in set_by_init(cls, ManualLSTM)
            if name not in there and inspect.getattr_static(cls, name, None) is None
        ]
        if not names:
            return None
        return (
            f"a swap to {cls.__qualname__} does not run its __init__, so the layers lack "
            f"{', '.join(names)}: set them afterwards, or give the class defaults for them"
        )

    @classmethod
    def _state_from(cls, lstm: Any) -> dict[str, Any]:
        """The ``__dict__`` that makes a layer of this class of ``lstm``, which may be a ManualLSTM."""
        state = dict(vars(lstm)) if isinstance(lstm, ManualLSTM) else manual_state(lstm)
        layer = cls.__new__(cls)
        object.__setattr__(layer, "__dict__", state)
        own_names, parameters = layer._own_parameters()
        if parameters:
            state["_own_names"] = own_names
            state["_parameters"] = {**state["_parameters"], **parameters}
        return state

    def to_lstm(self) -> nn.LSTM:
        """Make an nn.LSTM that shares everything with this layer: the way back from :meth:`from_lstm`.

        Raises:
            TypeError: the layer is of a subclass, parametrized, or with a ``forward`` of its own.
        """
        reason = why_not(self, ManualLSTM)
        if reason:
            raise TypeError(f"only a ManualLSTM and nothing more becomes an nn.LSTM, but {reason}")
        lstm = nn.LSTM.__new__(nn.LSTM)
        install_state(lstm, official_state(self), self)
        return lstm

    def reset_parameters(self) -> None:
        r"""Draw every parameter from :math:`U(-1/\sqrt{H}, 1/\sqrt{H})`, in nn.LSTM's order."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        own = {id(getattr(self, name)) for names in self._own_names for name in names.values()}
        for weight in self.parameters():
            if id(weight) not in own:
                nn.init.uniform_(weight, -bound, bound)
        for names in self._own_names:
            values = self.cell_parameters()
            with torch.no_grad():
                for kind, name in names.items():
                    getattr(self, name).copy_(values[kind])

    @property
    def all_weights(self) -> list[list[Parameter]]:
        """The weights, one list for each layer and direction."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @property
    def _flat_weights_names(self) -> list[str]:
        return flat_names(self)

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return FlatWeights(self)

    @_flat_weights.setter
    def _flat_weights(self, weights: Iterable[Tensor | None]) -> None:
        assign_flat_weights(self, weights)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._assigned = None  # as nn.LSTM
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {**state, "_assigned": None}  # as nn.LSTM
        if "_weight_names" in state:  # an older version has saved the layer
            state["_all_weights"] = state.pop("_weight_names")
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def flatten_parameters(self) -> None:
        """Do nothing. nn.LSTM makes its weights contiguous for cuDNN; this layer does not need that."""

    def extra_repr(self) -> str:
        s = f"{self.input_size}, {self.hidden_size}"
        if self.proj_size != 0:
            s += f", proj_size={self.proj_size}"
        if self.num_layers != 1:
            s += f", num_layers={self.num_layers}"
        if self.bias is not True:
            s += f", bias={self.bias}"
        if self.batch_first is not False:
            s += f", batch_first={self.batch_first}"
        if self.dropout != 0:
            s += f", dropout={self.dropout}"
        if self.bidirectional is not False:
            s += f", bidirectional={self.bidirectional}"
        return s

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        resets: PackedSequence | None = None,
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *nothing: None,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | PackedSequence | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run the layer; see the class for shapes and for what is raised."""
        # torch's older ONNX exporter gives the defaults of all arguments by position.
        if any(argument is not None for argument in nothing):
            raise TypeError(
                f"forward takes input and hx by position, but got {2 + len(nothing)} arguments: "
                "give lengths and resets by name"
            )
        request = request_of(self)
        keep = request is not None
        inputs = enter(self, input, hx, self._weights(), lengths, resets)
        with inputs.without_autocast():
            answer = run_stack(
                inputs.x,
                inputs.batch_sizes,
                inputs.h_0,
                inputs.c_0,
                inputs.weights,
                D=2 if self.bidirectional else 1,
                dropout=self.dropout if self.training else 0.0,
                options=self._options(inputs, keep),
            )
        output, states = inputs.leave(answer)
        if request is None:
            return output, states
        return request.keep(output, states, inputs.leave_steps(answer, self.bidirectional))

    def register_forward_hook(self, hook: Any, **options: Any) -> RemovableHandle:
        """As :meth:`torch.nn.Module.register_forward_hook`; for Opacus' hooks see ``opacus.py``."""
        owner = opacus_owner(hook)
        if owner is None:
            return super().register_forward_hook(hook, **options)
        return attach(self, owner)

    def register_full_backward_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """As :meth:`torch.nn.Module.register_full_backward_hook`; for Opacus' see ``opacus.py``."""
        if opacus_owner(hook) is None:
            return super().register_full_backward_hook(hook, prepend)
        return RemovableHandle(OrderedDict())  # register_forward_hook has noted its owner already

    def unroll(self, *args: Any, **kwargs: Any) -> Unrolled:
        """Call the layer, and return its gates and states at every step with its answer.

        This calls the layer as ``layer(...)`` does: all hooks run, and so does a ``forward`` that a
        subclass or a tool has put in the place of this class's. Where one of them changes the answer,
        ``output`` and ``states`` are what they returned, and the gates are what the loop computed.

        Everything is differentiable. The numbers are those of :meth:`forward` to the last digit or two:
        with gradients, :meth:`forward` may take the fused operator, and this takes the plain loop. A
        ``forward`` that runs this class's several times gives the gates of the first.

        Args:
            input, hx, lengths, resets: as for :meth:`forward`. All arguments are passed on as they are.

        Returns:
            The output, (h_n, c_n), and for every layer and direction i, f, g, o, c, m and h. See
            :class:`manual_lstm.Unrolled`.

        Raises:
            TypeError: a hook has made something else of the answer than ``(output, (h_n, c_n))``.
            RuntimeError: the ``forward`` of a subclass has not called that of this class.
            NotImplementedError: Opacus has taken the layer.

            And what :meth:`forward` raises.

        Example:
            >>> layer = ManualLSTM(10, 20)
            >>> unrolled = layer.unroll(torch.randn(5, 3, 10))
            >>> unrolled.f[0].shape  # the forget gate of the first layer
            torch.Size([5, 3, 20])
            >>> torch.equal(unrolled.c[0][-1], unrolled.states[1][0])
            True
        """
        with Request(self) as request:
            answer = self(*args, **kwargs)
        return request.unrolled(answer)

    def _weights(self) -> list[dict[str, Tensor]]:
        """The weights of each direction by kind, and the cell's own parameters."""
        weights = read_weights(self, check_shapes=not self._cell_is_changed())
        for w, own in zip(weights, self._own_names):
            w.update((kind, getattr(self, name)) for kind, name in own.items())
        return weights

    def _options(self, inputs: Inputs, keep: bool) -> CallOptions:
        """The options of a call: a changed cell, kept steps, Opacus."""
        changed = self._cell_is_changed()
        owner = None if self._sample_hooks is None else active_owner(self)
        if owner is not None:
            if changed or keep:
                raise NotImplementedError(
                    "under Opacus the layer should run forward with the cell of nn.LSTM, but got "
                    f"{'a changed cell' if changed else 'unroll'}; vmap(grad(...)) takes both"
                )
            parameters = [
                {kind_of(name): self._parameters.get(name) for name in names}
                for names in self._all_weights
            ]
            call = OpacusCall(owner, parameters, inputs.sample_of, inputs.batch_size())
            return CallOptions(opacus=call, lengths=inputs.lengths, resets=inputs.resets)
        if not changed:
            if not keep and inputs.lengths is None and inputs.resets is None:
                return DEFAULT_OPTIONS
            return CallOptions(keep=keep, lengths=inputs.lengths, resets=inputs.resets)
        own_names = self._own_names or [{} for _ in inputs.weights]
        own = [{kind: w[kind] for kind in names} for w, names in zip(inputs.weights, own_names)]
        x = inputs.x if inputs.lengths is None else fill(inputs.x, inputs.lengths)
        of_steps = of_each_step(self, x, inputs.batch_sizes, own[0])
        cells = [prepare_custom(self, parameters, of_steps) for parameters in own]
        return CallOptions(
            cells, self.compile_as_scan, keep, lengths=inputs.lengths, resets=inputs.resets
        )

    # What a subclass with a cell of its own may override.

    def cell(self, x_t: Tensor, h: Tensor, c: Tensor, w: CellWeights) -> Step:
        """Take one step: override this to change the equations, and keep everything else.

        A layer whose cell is changed runs the plain loop, or under ``torch.export`` a scan. Tensors are
        on the layer's device and of its dtype, but for bfloat16 and float16 of float32.

        Args:
            x_t: the projected input of this step, ``[b, 4H]``: what :meth:`project` returned.
            h: the hidden state before this step, ``[b, P or H]``.
            c: the cell state before this step, ``[b, H]``.
            w: this direction's weights, and the cell's own parameters, by their names.

        Returns:
            The gates and the states after the step, a :class:`manual_lstm.Step`.
            :func:`manual_lstm.gates` and :func:`manual_lstm.output_step` do what has not changed.

        Raises:
            TypeError: raised by the layer's call where an override returns something else.

        Example:
            The coupled gates of Greff et al. 2017 (https://arxiv.org/abs/1503.04069):

            >>> from manual_lstm import ManualLSTM, gates, output_step
            >>> class Coupled(ManualLSTM):  # f = 1 - i
            ...     def cell(self, x_t, h, c, w):
            ...         i, _, g, o = gates(x_t + h @ w.weight_hh.t())
            ...         return output_step(i, 1 - i, g, o, (1 - i) * c + i * g, w.weight_hr)
            >>> output, _ = Coupled(10, 20, num_layers=2, bidirectional=True)(torch.randn(5, 3, 10))
            >>> output.shape
            torch.Size([5, 3, 40])
        """
        return lstm_cell(x_t, h, c, w.weight_hh, w.weight_hr)

    def cell_parameters(self) -> dict[str, Tensor]:
        """Return the parameters that the cell has of its own, by name, with their initial values.

        Called once for each layer and direction, each of which gets its own; ``diagonal`` becomes
        ``diagonal_l0``, ``diagonal_l0_reverse``, ``diagonal_l1`` and so on, after nn.LSTM's parameters.
        :meth:`reset_parameters` and a swap call it anew. The sizes (``self.hidden_size``, ...) are
        known when it is called; what a subclass sets after ``super().__init__()`` is not, and a swap
        does not run ``__init__``: numbers that it needs are best attributes of the class.

        Returns:
            Tensors of any shape. They are copied to the device and dtype of the layer.

        Raises:
            TypeError: raised by the constructor, and by a swap, for what is no tensor.
            ValueError: likewise for a name that the layer or :class:`manual_lstm.CellWeights` has.

        Example:
            >>> from manual_lstm import ManualLSTM
            >>> class Peephole(ManualLSTM):
            ...     def cell_parameters(self):
            ...         return {"peephole": torch.zeros(3, self.hidden_size)}
            >>> Peephole(10, 20, bidirectional=True).peephole_l0_reverse.shape
            torch.Size([3, 20])
        """
        return {}

    def per_sequence(self, h_0: Tensor, c_0: Tensor) -> dict[str, Tensor]:
        """Return what stays the same for a whole sequence, such as a dropout mask, by name.

        Called once a call for each layer and direction.

        Args:
            h_0: the initial hidden states, ``[B, P or H]``.
            c_0: the initial cell states, ``[B, H]``.

        Returns:
            Tensors ``[B, ...]``. Each step finds in ``w`` the rows of the sequences that have it.

        Raises:
            TypeError, ValueError: raised by the layer's call for what is no tensor, for other sizes,
                and for a name that ``w`` has already.
        """
        return {}

    def per_step(self, x: Tensor) -> dict[str, Tensor]:
        """Return what the cell needs to know of each step, such as the time since the last, by name.

        Called once a call; all layers and directions get the same.

        Args:
            x: the input of the layer as steps, ``[T, B, I]``, or packed ``[N, I]``, in the dtype in
                which the loop computes.

        Returns:
            Tensors ``[T, B, ...]``, or packed ``[N, ...]``. The cell finds in ``w`` its step's rows,
            ``[b, ...]``, and in ``w.t`` the step's index, ``[b]``, int64.

        Raises:
            TypeError, ValueError: as for :meth:`per_sequence`.

        Example:
            The last feature of the input is the time since the step before, and the cell state decays
            with it (after Baytas et al. 2017, https://doi.org/10.1145/3097983.3097997):

            >>> from manual_lstm import ManualLSTM
            >>> class TimeAware(ManualLSTM):
            ...     def per_step(self, x):
            ...         return {"gap": x[..., -1:]}
            ...     def cell(self, x_t, h, c, w):
            ...         return super().cell(x_t, h, c / (1 + w.gap), w)
            >>> gaps = torch.rand(5, 3, 1)
            >>> output, _ = TimeAware(10, 20, num_layers=2)(torch.cat([torch.randn(5, 3, 9), gaps], -1))
        """
        return {}

    def project(self, x: Tensor, w: CellWeights) -> Tensor:
        """Return the input's part of the gates, of which :meth:`cell` gets one step at a time.

        Args:
            x: the input of all steps, ``[T, B, I]``, or packed ``[N, I]``.
            w: this direction's weights, and the cell's own parameters, by their names.

        Returns:
            ``[T, B, 4H]``, or packed ``[N, 4H]``. What :meth:`cell` takes may have another last size.

        Raises:
            TypeError, ValueError: raised by the layer's call for other leading sizes.
        """
        return project(x, w.weight_ih, w.bias)

    def _cell_is_changed(self) -> bool:
        cls = type(self)
        return (
            cls.cell is not _CELL
            or cls.project is not _PROJECT
            or cls.per_sequence is not _PER_SEQUENCE
            or cls.per_step is not _PER_STEP
            or any(name in self.__dict__ for name in _OVERRIDABLE)
        )

    def _own_parameters(self) -> tuple[list[dict[str, str]], dict[str, Parameter]]:
        """The names of the cell's own parameters for each direction, and the parameters."""
        own_names: list[dict[str, str]] = []
        parameters: dict[str, Parameter] = {}
        for weight_names in self._all_weights:
            suffix = weight_names[0].removeprefix("weight_ih")  # _l0, _l0_reverse, ...
            values = self.cell_parameters()
            own_names.append({kind: kind + suffix for kind in values})
            for kind, value in values.items():
                if not isinstance(value, Tensor):
                    raise TypeError(
                        f"cell_parameters should return tensors, but {kind} is {type(value).__name__}"
                    )
                if hasattr(self, kind + suffix) or kind in _RESERVED_NAMES:
                    raise ValueError(f"cell_parameters should return new names, but got {kind!r}")
                like = getattr(self, weight_names[0])
                value = value.detach().clone().to(device=like.device, dtype=like.dtype)
                parameters[kind + suffix] = Parameter(value)
        return own_names, parameters

    # nn.LSTM's own checks, by its names: subclasses call and override them.

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise unless the input has the rank and the features that the layer takes."""
        rank = 3 if batch_sizes is None else 2
        if input.dim() != rank:
            raise RuntimeError(
                f"input should have {rank} dimensions, but got {input.dim()}: {list(input.shape)}"
            )
        if not is_tracing() and input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) should be input_size, {self.input_size}, but got {input.size(-1)}: "
                f"{list(input.shape)}"
            )

    def get_expected_hidden_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """Return the shape that h_0 should have, ``(L * D, B, P or H)``."""
        B = self._batch_size(input, batch_sizes)
        return count_directions(self), B, self.proj_size or self.hidden_size

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """Return the shape that c_0 should have, ``(L * D, B, H)``.

        A cell that keeps more in its state overrides this. The states that it returns, and those of
        zeros where the caller gives none, are of the size that this returns.

        Example:
            >>> from manual_lstm import ManualLSTM
            >>> class TwoStates(ManualLSTM):
            ...     def get_expected_cell_size(self, input, batch_sizes):
            ...         L, B, H = super().get_expected_cell_size(input, batch_sizes)
            ...         return L, B, 2 * H
            ...     def cell(self, x_t, h, c, w):
            ...         c, mean = c.chunk(2, dim=-1)
            ...         step = super().cell(x_t, h, c, w)
            ...         return step._replace(c=torch.cat([step.c, 0.9 * mean + 0.1 * step.c], dim=-1))
            >>> output, (h_n, c_n) = TwoStates(10, 20)(torch.randn(5, 3, 10))
            >>> c_n.shape
            torch.Size([1, 3, 40])
        """
        return count_directions(self), self._batch_size(input, batch_sizes), self.hidden_size

    def _batch_size(self, input: Tensor, batch_sizes: Tensor | None) -> int:
        if batch_sizes is None:
            return input.size(0 if self.batch_first else 1)
        if is_tracing():
            return cast(int, batch_sizes[0])  # int() would freeze it
        if is_compiling():
            (B,) = batch_sizes[:1].tolist()  # whether it is empty is not known while compiling
            torch._check(B >= 1)  # type: ignore[no-untyped-call]  # some operations ask
            return cast(int, B)
        return batch_sizes.tolist()[0] if batch_sizes.numel() else 0

    def check_hidden_size(
        self,
        hx: Tensor,
        expected_hidden_size: tuple[int, int, int],
        msg: str = "Expected hidden size {}, got {}",
    ) -> None:
        """Raise unless ``hx`` has the expected shape."""
        if tuple(hx.shape) != tuple(expected_hidden_size):
            raise RuntimeError(msg.format(tuple(expected_hidden_size), list(hx.shape)))

    def check_forward_args(
        self, input: Tensor, hidden: tuple[Tensor, Tensor], batch_sizes: Tensor | None
    ) -> None:
        """Raise unless the input and both states have the shapes that the layer takes."""
        self.check_input(input, batch_sizes)
        if is_tracing():
            return
        hidden_size = self.get_expected_hidden_size(input, batch_sizes)
        cell_size = self.get_expected_cell_size(input, batch_sizes)
        if batch_sizes is not None and is_compiling():
            # B is an element of batch_sizes, not known yet: the compiled program checks it at run time.
            torch._check(hidden[0].size(1) == hidden_size[1])  # type: ignore[no-untyped-call]
            torch._check(hidden[1].size(1) == cell_size[1])  # type: ignore[no-untyped-call]
        self.check_hidden_size(hidden[0], hidden_size, "Expected h_0 of size {}, got {}")
        self.check_hidden_size(hidden[1], cell_size, "Expected c_0 of size {}, got {}")

    def permute_hidden(
        self, hx: tuple[Tensor, Tensor], permutation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return both states with their sequences in another order."""
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)


# A subclass that overrides one of these, or an object that replaces one, has a changed cell.
_CELL, _PROJECT = ManualLSTM.cell, ManualLSTM.project
_PER_SEQUENCE, _PER_STEP = ManualLSTM.per_sequence, ManualLSTM.per_step
_PARTS = ("_parameters", "_buffers", "_modules")  # where a module keeps what has names of its own
_OVERRIDABLE = ("cell", "project", "per_sequence", "per_step")
_RESERVED_NAMES = frozenset(CellWeights.__annotations__)
