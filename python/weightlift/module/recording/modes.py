"""The recorder's two torch modes, which observe the loading code in this thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from weightlift.module.recording.placeholder import TAKE_BYTES, Ledger, Placeholder, flat

__all__ = ["SeeFunctions", "SeeOperators"]

_Tensor = torch.Tensor

# Functions that use only the bytes of a real target, not its address.
_READ_TARGETS = TAKE_BYTES - {
    _Tensor.data_ptr,
    _Tensor.untyped_storage,
    _Tensor.storage,
    _Tensor._typed_storage,
    _Tensor.is_shared,
}
# Functions that change the shape in place, which is impossible for a tensor without storage.
_RESHAPE_IN_PLACE: frozenset[Any] = frozenset(
    getattr(_Tensor, name)
    for name in (
        "as_strided_",
        "resize_",
        "resize_as_",
        "set_",
        "squeeze_",
        "swapaxes_",
        "swapdims_",
        "t_",
        "transpose_",
        "unsqueeze_",
    )
)


def _accessor(name: str, which: str) -> Any:
    return getattr(getattr(_Tensor, name), which)


class SeeOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Observes every operator."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Avoids a wrapper around each call, which would double its cost.
        return False

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dispatch = ledger.dispatch

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return self._dispatch(func, args, kwargs or {})


class SeeFunctions(TorchFunctionMode):
    """Observes functions that read or swap a tensor's memory without an operator."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        known = _FUNCTIONS.get(func)
        if known is None:
            return func(*args, **(kwargs or {}))
        return known(self._ledger, func, args, kwargs or {})


def _read_targets(ledger: Ledger, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for tensor in flat(args):
        if not isinstance(tensor, Placeholder):
            ledger.expose(tensor)
    return func(*args, **kwargs)


def _is_meta(ledger: Ledger, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return False if ledger.is_target(args[0]) else func(*args, **kwargs)  # it will be real


def _set_data(ledger: Ledger, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    ledger.set_data(args[0], args[1])


def _reshape(ledger: Ledger, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0], Placeholder):
        ledger.materialize(args[0], f"{func.__name__}()")
    return func(*args, **kwargs)


_FUNCTIONS: dict[Any, Callable[[Ledger, Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    **dict.fromkeys(_READ_TARGETS, _read_targets),
    **dict.fromkeys(_RESHAPE_IN_PLACE, _reshape),
    _accessor("is_meta", "__get__"): _is_meta,
    _accessor("data", "__set__"): _set_data,
}
