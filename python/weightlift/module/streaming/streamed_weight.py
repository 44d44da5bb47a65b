"""The tensor that replaces a streamed weight in a module."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

from weightlift.core.errors import WeightliftError

__all__ = [
    "Lease",
    "MoveError",
    "Stored",
    "StreamedWeight",
    "TrainingError",
    "Weights",
    "streamed_parameter",
]


_AS_IT_IS: contextlib.nullcontext[None] = contextlib.nullcontext()


class TrainingError(WeightliftError, RuntimeError):
    """A streamed weight would be written to, or needs a gradient."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A streamed weight.

    Attributes:
        name: its name in the model.
        shape, dtype: its shape and dtype in the model; it is contiguous.
        block: the number of its block.
        offset: its first byte in the block's buffer.
        key: its name in its source.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int
    offset: int
    key: str

    def view_of(self, buffer: torch.Tensor) -> torch.Tensor:
        """The weight in its block's buffer."""
        count = self.dtype.itemsize * _elements(self.shape)
        part = buffer.narrow(0, self.offset, count)
        return part.view(self.dtype).view(self.shape)


def _elements(shape: Sequence[int]) -> int:
    return functools.reduce(lambda count, size: count * size, shape, 1)


class Lease(Protocol):
    """A weight that is in use."""

    @property
    def tensor(self) -> torch.Tensor: ...
    @property
    def in_buffer(self) -> bool:
        """Whether its memory is reused when the lease ends."""

    def end(self) -> None: ...


class Weights(Protocol):
    """Lends the weights; implemented by ``executor.Executor``."""

    device: torch.device

    def lease(self, stored: Stored, *, may_wait: bool) -> Lease: ...
    def pickled(self, stored: Stored) -> tuple[Callable[..., torch.Tensor], Any] | None: ...


class MoveError(WeightliftError, RuntimeError):
    """A streamed model cannot be moved or cast."""


class StreamedWeight(torch.Tensor):
    """A tensor without memory: each operation on it runs with the weight, which is read for it.
    Views of it, and the tensors that autograd saves for the backward pass, are such tensors too, so
    that nothing holds a buffer.

    It has the shape, the dtype and the device of the weight in use. It is read-only. A deep copy
    reads the same source; a pickle has the values.
    """

    _weights: Weights
    _stored: Stored
    _shadow: torch.Tensor  # on meta: the sizes, strides and offset of this view

    @staticmethod
    def __new__(
        cls,
        weights: Weights,
        stored: Stored | None = None,
        shadow: torch.Tensor | None = None,
        requires_grad: bool = True,
    ) -> StreamedWeight:
        if isinstance(weights, torch.Tensor) or stored is None:
            # As libraries do it that put a value in a parameter's place: type(old)(value, ...).
            value: Any = weights
            return torch.nn.Parameter(value, requires_grad)  # type: ignore[return-value]
        if shadow is None:
            shadow = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        made: StreamedWeight = torch.Tensor._make_wrapper_subclass(
            cls,
            shadow.size(),
            strides=shadow.stride(),
            storage_offset=shadow.storage_offset(),
            dtype=shadow.dtype,
            device=weights.device,
        )
        made._weights, made._stored, made._shadow = weights, stored, shadow
        return made

    def __init__(self, *_: object) -> None:
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            # torch keeps version counters only for views of tensors made outside inference mode.
            with torch.inference_mode(False) if torch.is_inference_mode_enabled() else _AS_IT_IS:
                view = _view(func, args, kwargs)
            if view is not None:
                return view
        elif func._schema.is_mutable:
            _check_written(func, args, kwargs)
        if func in _MOVES:
            _refuse_move(args[0])
        leases = _Leases()
        try:
            real_args = tuple(_map(StreamedWeight, leases.tensor, value) for value in args)
            real_kwargs = {
                key: _map(StreamedWeight, leases.tensor, value) for key, value in kwargs.items()
            }
            return leases.without_buffers(func(*real_args, **real_kwargs))
        finally:
            leases.end()

    @property
    def stored(self) -> Stored:
        return self._stored

    def read(self) -> torch.Tensor:
        """Its values, in own memory."""
        with torch.no_grad():
            return self.detach().clone()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return (
            f"StreamedWeight({self._stored.name!r}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={str(self.device)!r})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedWeight:
        if id(self) not in memo:
            copied = StreamedWeight(self._weights, self._stored, self._shadow)
            if isinstance(self, torch.nn.Parameter):
                copied = streamed_parameter(copied, self.requires_grad, vars(self))
            memo[id(self)] = copied
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        is_whole = self._shadow.shape == self._stored.shape and self._shadow.is_contiguous()
        how = self._weights.pickled(self._stored) if is_whole else None
        if how is not None:
            return _unpickled, (*how, isinstance(self, torch.nn.Parameter), self.requires_grad)
        value = self.read()
        if isinstance(self, torch.nn.Parameter):
            value = torch.nn.Parameter(value, self.requires_grad)
        return value.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _keep_dynamo_out(function: Any) -> None:
    """Makes torch.compile run this function as it is, outside its graphs, like
    ``torch._dynamo.eval_frame.skip_code`` but without that import."""
    with contextlib.suppress(ImportError, AttributeError, TypeError):  # not a public name
        from torch._C._dynamo import eval_frame

        action = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(action, action)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)


_keep_dynamo_out(StreamedWeight.__torch_dispatch__.__func__)  # type: ignore[attr-defined]


def _unpickled(
    make: Callable[..., torch.Tensor], given: Any, is_parameter: bool, requires_grad: bool
) -> torch.Tensor:
    made = make(*given)
    return torch.nn.Parameter(made, requires_grad) if is_parameter else made


def streamed_parameter(
    weight: StreamedWeight, requires_grad: bool, attributes: dict[str, Any]
) -> Any:
    """A parameter without gradient, with the attributes of another parameter."""
    made = torch.nn.Parameter(weight, requires_grad)
    vars(made).update({key: value for key, value in attributes.items() if key not in vars(made)})
    made._weights, made._stored = weight._weights, weight._stored  # type: ignore[attr-defined]
    made._shadow = weight._shadow  # type: ignore[attr-defined]
    if requires_grad:
        hook = functools.partial(_refuse_gradient, weight._stored.name)
        made.register_hook(hook)  # type: ignore[no-untyped-call]
    return made


def _refuse_gradient(name: str, _gradient: torch.Tensor) -> None:
    raise TrainingError(
        f"tensor {name!r} is streamed and cannot be trained: call requires_grad_(False) on the "
        "model before the stream and train adapters, or close the stream first"
    )


def _map(kind: type[Any], change: Callable[[Any], Any], value: Any) -> Any:
    """An argument or a result of an operation with each tensor of a kind changed. torch's
    ``tree_map_only`` leaves a reference cycle at each call, which stays until the garbage collector
    runs."""
    if isinstance(value, kind):
        return change(value)
    if type(value) is list:
        return [_map(kind, change, item) for item in value]
    if type(value) is tuple:
        return tuple(_map(kind, change, item) for item in value)
    if isinstance(value, (list, tuple, dict)):  # named tuples and the like
        return tree_map_only(kind, change, value)
    return value


class _Leases:
    """The weights of one operation."""

    def __init__(self) -> None:
        self._held: dict[Stored, Lease] = {}

    def tensor(self, weight: StreamedWeight) -> torch.Tensor:
        lease = self._held.get(weight._stored)
        if lease is None:
            lease = weight._weights.lease(weight._stored, may_wait=not self._held)
            self._held[weight._stored] = lease
        shadow, whole = weight._shadow, lease.tensor
        if shadow.shape == whole.shape and shadow.stride() == whole.stride():
            return whole
        offset = whole.storage_offset() + shadow.storage_offset()
        return whole.as_strided(shadow.size(), shadow.stride(), offset)

    def without_buffers(self, result: Any) -> Any:
        """The result of an operation, with copies of tensors that lie in a buffer."""
        buffers = {
            lease.tensor.untyped_storage().data_ptr()
            for lease in self._held.values()
            if lease.in_buffer
        }

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone() if tensor.untyped_storage().data_ptr() in buffers else tensor

        return _map(torch.Tensor, own, result)

    def end(self) -> None:
        for lease in self._held.values():
            lease.end()


_aten = torch.ops.aten
_MOVES = {
    _aten._to_copy.default,
    _aten.empty_like.default,
    _aten.to.device,
    _aten.to.dtype,
    _aten.to.other,
    _aten.to.dtype_layout,
}
_APPLY = torch.nn.Module._apply.__code__
_FRAMES = 12


def _refuse_move(weight: Any) -> None:
    """Refuses ``torch.nn.Module.to``, ``half``, ``cuda`` and others that use ``_apply``, which
    would read the whole model into its parameters. ``weight.to(...)`` in a ``forward`` is
    allowed."""
    frame: types.FrameType | None = sys._getframe(2)
    for _ in range(_FRAMES):
        if frame is None:
            return
        if frame.f_code is _APPLY:
            raise MoveError(
                f"{type(frame.f_locals['self']).__name__} streams {weight._stored.name!r} and "
                "cannot be moved or cast: close the stream first, or stream it to that device, in "
                "that dtype"
            )
        frame = frame.f_back


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    """A view of a weight; ``None`` if sizes and strides do not describe it."""
    base = args[0]
    rest = (args[1:], kwargs)
    if not isinstance(base, StreamedWeight) or _has_streamed(rest):
        return None
    weights, stored = base._weights, base._stored
    if func is torch.ops.aten.detach.default:
        return StreamedWeight(weights, stored, base._shadow)
    made = func(base._shadow, *args[1:], **kwargs)

    def like(shadow: torch.Tensor) -> StreamedWeight:
        return StreamedWeight(weights, stored, shadow)

    shadows = [made] if isinstance(made, torch.Tensor) else list(made)
    if not all(_is_view_of(base._shadow, shadow) for shadow in shadows):
        return None
    return like(made) if isinstance(made, torch.Tensor) else [like(shadow) for shadow in made]


def _is_view_of(base: torch.Tensor, shadow: torch.Tensor) -> bool:
    """Whether it views the same memory and elements: ``reshape`` may have copied."""
    return (
        shadow.untyped_storage()._cdata == base.untyped_storage()._cdata
        and shadow.dtype == base.dtype
        and not shadow.is_conj()
        and not shadow.is_neg()
    )


def _has_streamed(values: Any) -> bool:
    if isinstance(values, (list, tuple)):
        return any(map(_has_streamed, values))
    if isinstance(values, dict):
        return any(map(_has_streamed, values.values()))
    return isinstance(values, StreamedWeight)


@functools.cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """The positions and names of the arguments that an operation writes to."""
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _check_written(func: Any, args: Any, kwargs: Any) -> None:
    for position, name in _written(func):
        value = args[position] if position < len(args) else kwargs.get(name)
        found: list[StreamedWeight] = []
        _map(StreamedWeight, found.append, value)
        if found:
            raise TrainingError(
                f"{func} would write to tensor {found[0]._stored.name!r}, which is streamed and "
                "read-only: close the stream first"
            )
