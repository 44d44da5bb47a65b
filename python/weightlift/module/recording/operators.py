"""Handles each operator as a view, a copy, a constant, or one that needs bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from weightlift.core.errors import CheckpointError
from weightlift.module.recording.casts import casts
from weightlift.module.recording.placeholder import (
    Geometry,
    Ledger,
    Placeholder,
    flat,
    geometry_of,
)

__all__ = ["handler_of", "run_on_real"]

Handler: TypeAlias = "Callable[[Ledger, Any, tuple[Any, ...], dict[str, Any]], Any]"

_aten: Any = torch.ops.aten
_META = torch.device("meta")
# Views with given strides; on a copy these refer to the copy's own memory.
_BY_STRIDES = (_aten.as_strided.default, _aten._reshape_alias.default)


def handler_of(func: Any) -> Handler:
    handler = _HANDLERS.get(func)
    if handler is None:
        handler = _view if func.is_view else run_on_real
        _HANDLERS[func] = handler
    return handler


def run_on_real(ledger: Ledger, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an unknown operator on real tensors, after the writes that wait for them."""
    tensors = flat(args, kwargs)
    if not tensors:
        return func(*args, **kwargs)
    ledger.read([t.memory for t in tensors if isinstance(t, Placeholder)], _name_of(func))
    written = _written(func, args, kwargs)
    back: dict[int, torch.Tensor] = {}
    real: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        if isinstance(tensor, Placeholder):
            if id(tensor) in written and torch.Tag.inplace_view in func.tags:
                raise CheckpointError(
                    f"tensor {tensor.memory.name!r}: {func} is impossible for a recorded tensor; "
                    "load whole tensors instead"
                )
            real[id(tensor)] = tensor.with_bytes()
        else:
            real[id(tensor)] = ledger.settle(tensor, write=id(tensor) in written)
        back[id(real[id(tensor)])] = tensor

    def exchange(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return real[id(value)]
        if isinstance(value, (list, tuple)):
            return type(value)(exchange(item) for item in value)
        return value

    result = func(
        *(exchange(arg) for arg in args), **{key: exchange(arg) for key, arg in kwargs.items()}
    )
    # What an operator writes to, it returns.
    return back.get(id(result), result) if isinstance(result, torch.Tensor) else result


def _view(ledger: Ledger, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    if not isinstance(tensor, Placeholder):
        return func(*args, **kwargs)
    if tensor.memory.value is not None:
        return func(tensor.with_bytes(), *args[1:], **kwargs)
    own, same = geometry_of(tensor), True
    if own != geometry_of(tensor.source):
        same = False
        if func in _BY_STRIDES:
            return run_on_real(ledger, func, args, kwargs)
    try:
        found = func(tensor.source, *args[1:], **kwargs)
    except RuntimeError:
        if same:
            raise
        return run_on_real(ledger, func, args, kwargs)  # a view only of the copy
    one = isinstance(found, torch.Tensor)
    sources = [found] if one else found
    if not all(_follows(tensor, source) for source in sources):
        return run_on_real(ledger, func, args, kwargs)
    shown = sources
    if not same:
        shown = func(_on_meta(own, tensor.dtype), *args[1:], **kwargs)
        shown = [shown] if one else shown
    views = []
    for source, view in zip(sources, shown, strict=True):
        dtype = source.dtype if tensor.dtype == tensor.source.dtype else tensor.dtype
        views.append(ledger.derive(tensor.memory, source, dtype, geometry_of(view)))
    return views[0] if one else views


def _follows(tensor: Placeholder, source: torch.Tensor) -> bool:
    """Whether a view has the same elements, in any dtype of the same size."""
    before = tensor.source
    if source.dtype != before.dtype:
        if tensor.dtype != before.dtype or source.dtype.itemsize != before.dtype.itemsize:
            return False
        return not (source.is_complex() or before.is_complex())
    return not (source.is_conj() or source.is_neg())


def _duplicate(ledger: Ledger, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``clone`` and ``to``: a copy of the elements, perhaps cast or on another device."""
    tensor = args[0]
    if not isinstance(tensor, Placeholder) or tensor.memory.value is not None:
        return run_on_real(ledger, func, args, kwargs)
    dtype = kwargs.get("dtype") or tensor.dtype
    layout = kwargs.get("layout")
    plain = layout in (None, torch.strided) and not kwargs.get("pin_memory")
    if not plain or not casts(tensor.source.dtype, tensor.dtype, dtype):
        return run_on_real(ledger, func, args, kwargs)
    device = kwargs.get("device") or tensor.memory.device
    options = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    made = func(_on_meta(geometry_of(tensor), tensor.dtype), *args[1:], **options)
    geometry = geometry_of(made)
    memory = tensor.memory.duplicate(tensor.source, dtype, geometry, device)
    return ledger.derive(memory, tensor.source, dtype, geometry)


def _copy(ledger: Ledger, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, source = args[0], args[1]
    if isinstance(target, Placeholder):
        return run_on_real(ledger, func, args, kwargs)
    if isinstance(source, Placeholder):
        if source.memory.value is None:
            why = ledger.record(target, source)
            if why is None:
                return target
            ledger.read([source.memory], why)
        source = source.with_bytes()
    else:
        source = ledger.settle(source)
        if source.is_meta:
            return func(target, source, *args[2:], **kwargs)
    rest = args[2:]
    ledger.overwrite(target, lambda part: func(part, source, *rest, **kwargs), constant=False)
    return target


def _copy_each(ledger: Ledger, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for target, source in zip(args[0], args[1], strict=True):
        _copy(ledger, _aten.copy_.default, (target, source, *args[2:]), kwargs)


def _fill(ledger: Ledger, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, rest = args[0], args[1:]
    if isinstance(target, Placeholder):
        return run_on_real(ledger, func, args, kwargs)
    ledger.overwrite(target, lambda part: func(part, *rest, **kwargs), constant=True)
    return target


def _like(ledger: Ledger, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """New tensors like another one, without its values."""
    tensor = args[0]
    if not isinstance(tensor, Placeholder):
        if tensor.is_meta and ledger.is_target(tensor):
            kwargs = {"device": "cpu", **{k: v for k, v in kwargs.items() if v is not None}}
        return func(*args, **kwargs)
    shape = _on_meta(geometry_of(tensor), tensor.dtype)
    device = kwargs.get("device") or tensor.memory.device
    return func(shape, *args[1:], **{**kwargs, "device": device})


def _on_meta(geometry: Geometry, dtype: torch.dtype) -> torch.Tensor:
    shape, strides, offset = geometry
    last = offset + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    flat_one = torch.empty(max(last + 1, 0), dtype=dtype, device=_META)
    return flat_one.as_strided(shape, strides, offset)


def _name_of(func: Any) -> str:
    """The operator's public name."""
    if func is _aten._local_scalar_dense.default:
        return "item()"
    return f"{str(func).removeprefix('aten.').partition('.')[0]}()"


@functools.cache
def _writes(func: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The arguments that an operator writes to: positions, names."""
    arguments = func._schema.arguments
    found = [(i, a.name) for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    return tuple(i for i, _ in found), tuple(name for _, name in found)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
    positions, names = _writes(func)
    chosen = [args[i] for i in positions if i < len(args)]
    chosen += [kwargs[name] for name in names if name in kwargs]
    return {id(tensor) for tensor in flat(tuple(chosen))}


def _overloads(name: str) -> list[Any]:
    packet = getattr(_aten, name, None)
    return [] if packet is None else [getattr(packet, o) for o in packet.overloads()]


_HANDLERS: dict[Any, Handler] = {
    _aten.copy_.default: _copy,
    _aten._foreach_copy_.default: _copy_each,
    _aten.fill_.Scalar: _fill,
    _aten.zero_.default: _fill,
    _aten.clone.default: _duplicate,
    _aten._to_copy.default: _duplicate,
    _aten._unsafe_view.default: _view,
    **{
        overload: _like
        for name in (
            "empty_like",
            "full_like",
            "new_empty",
            "new_empty_strided",
            "new_full",
            "new_ones",
            "new_zeros",
            "ones_like",
            "rand_like",
            "randn_like",
            "zeros_like",
        )
        for overload in _overloads(name)
        if "out" not in overload._overloadname
    },
}
