"""Building a module without its weights."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch

from weightlift.core import gc_pause

__all__ = ["Builder"]

_Module = TypeVar("_Module", bound=torch.nn.Module)

# A build changes what holds for the whole process: the default dtype and how parameters register.
_one_at_a_time = threading.RLock()


class Builder(Generic[_Module]):
    """Makes a module without its weights, and afterwards those of its weights that no file has.

    Args:
        make: the constructor, with all its arguments.
        dtype: of new floating-point tensors; ``None`` for the one that holds.
    """

    def __init__(self, make: Callable[[], _Module], dtype: torch.dtype | None) -> None:
        self._make = make
        self._dtype = dtype
        self._registered: list[torch.nn.Parameter] = []

    def build(self, empty: bool) -> _Module:
        """The module; its parameters are on ``meta`` if ``empty``, its buffers are real."""
        with _default_dtype(self._dtype), gc_pause.paused():
            if not empty:
                return self._make()
            with _on_meta() as self._registered:
                return self._make()

    def initialized(self, model: _Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tensors as the constructor initializes them, made by a second call of it in which all
        others are on ``meta`` again.

        Args:
            model: from ``build(empty=True)``, with these parameters as they were.
            names: of the tensors.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        position = {id(parameter): n for n, parameter in enumerate(self._registered)}
        wanted = {position.get(id(parameters.get(name)), -1) for name in names}
        if -1 not in wanted:
            # A constructor may register other parameters each time, or make one of another.
            with contextlib.suppress(Exception), _default_dtype(self._dtype), _on_meta(wanted):
                found = _tensors(self._make(), names)
                if all(
                    tensor.device.type != "meta" and tensor.shape == parameters[name].shape
                    for name, tensor in found.items()
                ):
                    return found
        return _tensors(self.build(empty=False), names)


def _tensors(model: torch.nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: held[name].detach() for name in names}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    with _one_at_a_time:
        before = torch.get_default_dtype()
        if dtype is not None and dtype.itemsize > 1:  # torch refuses 8-bit types as the default
            torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextlib.contextmanager
def _on_meta(real: Collection[int] = ()) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters of modules that this thread makes go to ``meta`` as they are registered; one that
    is registered twice stays one.

    ``accelerate.init_empty_weights`` makes a new parameter at each registration, which unties tied
    weights: they would be initialised, moved and saved apart.

    Args:
        real: which stay as they are, by the order in which they are registered.

    Yields:
        Those that were registered, in this order.
    """
    register = torch.nn.Module.register_parameter
    thread = threading.get_ident()
    registered: list[torch.nn.Parameter] = []
    made: dict[int, tuple[weakref.ref[torch.nn.Parameter], torch.nn.Parameter]] = {}

    def register_empty(
        module: torch.nn.Module, name: str, param: torch.nn.Parameter | None
    ) -> None:
        register(module, name, param)
        if param is None or param.device.type == "meta" or threading.get_ident() != thread:
            return
        known = made.get(id(param))
        if known is None or known[0]() is not param:  # an id may be another's by now
            held = param if len(registered) in real else _empty(param)
            known = made[id(param)] = (weakref.ref(param), held)
            registered.append(held)
        module._parameters[name] = known[1]

    initializers = {
        name: function
        for name, function in vars(torch.nn.init).items()
        if name.endswith("_") and not name.startswith("_")
    }
    with _one_at_a_time:
        torch.nn.Module.register_parameter = register_empty  # type: ignore
        vars(torch.nn.init).update({n: _past_meta(f) for n, f in initializers.items()})
        try:
            yield registered
        finally:
            torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
            vars(torch.nn.init).update(initializers)


def _past_meta(initialize: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same without the tensors on ``meta``: what does nothing there takes torch as long as the
    rest of the construction."""

    @functools.wraps(initialize)
    def skip(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor: torch.Tensor = args[0] if args else kwargs["tensor"]
        return tensor if tensor.device.type == "meta" else initialize(*args, **kwargs)

    return skip


def _empty(param: torch.nn.Parameter) -> torch.nn.Parameter:
    data = torch.empty_like(param, device="meta")
    if type(param) is not torch.nn.Parameter:
        return type(param)(data, requires_grad=param.requires_grad, **param.__dict__)
    empty = torch.nn.Parameter(data, requires_grad=param.requires_grad)
    empty.__dict__.update(param.__dict__)
    return empty
