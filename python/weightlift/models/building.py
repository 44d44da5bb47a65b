"""Building a module without its weights."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch

__all__ = ["building", "empty_weights"]

# A build changes what holds for the whole process: the default dtype and how parameters register.
_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def building(dtype: torch.dtype | None, empty: bool) -> Iterator[None]:
    """For the construction of one module: the default dtype, and whether parameters go to ``meta``.

    Args:
        dtype: of new floating-point tensors; ``None`` for the one that holds.
        empty: on ``meta``; buffers are real in any case.
    """
    before = torch.get_default_dtype()
    with _one_at_a_time, contextlib.ExitStack() as stack:
        if dtype is not None and dtype.itemsize > 1:  # torch refuses 8-bit types as the default
            stack.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(dtype)
        if empty:
            stack.enter_context(empty_weights())
        yield


@contextlib.contextmanager
def empty_weights() -> Iterator[None]:
    """Parameters go to ``meta`` as they are registered; one that is registered twice stays one.

    ``accelerate.init_empty_weights`` makes a new parameter at each registration, which unties tied
    weights: they would be initialised, moved and saved apart.
    """
    register = torch.nn.Module.register_parameter
    made: dict[int, tuple[weakref.ref[torch.nn.Parameter], torch.nn.Parameter]] = {}

    def register_empty(
        module: torch.nn.Module, name: str, param: torch.nn.Parameter | None
    ) -> None:
        register(module, name, param)
        if param is None or param.device.type == "meta":
            return
        known = made.get(id(param))
        if known is not None and known[0]() is param:  # an id may be another's by now
            module._parameters[name] = known[1]
            return
        held = module._parameters[name]
        assert held is not None
        kind = type(held)
        if kind is torch.nn.Parameter:
            empty = torch.nn.Parameter(held.to("meta"), requires_grad=held.requires_grad)
        else:
            empty = kind(held.to("meta"), requires_grad=held.requires_grad, **held.__dict__)
        made[id(param)] = (weakref.ref(param), empty)
        module._parameters[name] = empty

    with _one_at_a_time:
        torch.nn.Module.register_parameter = register_empty  # type: ignore
        try:
            yield
        finally:
            torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
