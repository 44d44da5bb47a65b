"""Builds a module without its weights."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch

from weightlift.core import gc_pause
from weightlift.core.errors import WeightliftError
from weightlift.models.build_context import BuildContext, KeepOffMeta

__all__ = ["Builder"]

_Module = TypeVar("_Module", bound=torch.nn.Module)

# Torch has one default dtype for the whole process.
_one_at_a_time = threading.RLock()


class Builder(Generic[_Module]):
    """Builds a module without its weights, and later the weights that no file has.

    During a build ``dtype`` is torch's default dtype of the whole process; builds wait for each
    other.

    Args:
        cls: the module's class, which has ``from_config``.
        config: its configuration.
        overrides: values that replace those of the configuration.
        dtype: the dtype of new floating-point tensors; ``None`` for the current default.
    """

    def __init__(
        self,
        cls: type[_Module],
        config: Mapping[str, Any],
        overrides: Mapping[str, Any],
        dtype: torch.dtype | None,
    ) -> None:
        self._cls: Any = cls
        self._config = config
        self._overrides = dict(overrides)
        self._dtype = dtype
        self._model: _Module
        self._parameters: list[torch.nn.Parameter] = []

    def build(self, empty: bool) -> _Module:
        """Builds the module; its parameters are on ``meta`` if ``empty``, its buffers are real.

        Raises:
            WeightliftError: another library's replacement of ``register_parameter`` prevents it.
        """
        model, build = self._construct(() if empty else None)
        self._model, self._parameters = model, build.parameters
        return model

    def initialized(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tensors of the last module with the values of its constructor, from a second call in
        which all other tensors are on ``meta``.

        Args:
            names: the tensors; parameters must still be those of ``build(empty=True)``.
        """
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        position = {id(parameter): n for n, parameter in enumerate(self._parameters)}
        wanted = {position.get(id(parameters.get(name)), -1) for name in names}
        if -1 not in wanted:
            # A constructor may register different parameters in each call.
            with contextlib.suppress(Exception):
                found = _tensors(self._construct(wanted)[0], names)
                if all(
                    tensor.device.type != "meta" and tensor.shape == parameters[name].shape
                    for name, tensor in found.items()
                ):
                    return found
        return _tensors(self._construct(None)[0], names)

    def _make(self) -> _Module:
        model: _Module = self._cls.from_config(self._config, **self._overrides)
        return model

    def _construct(self, real: Container[int] | None) -> tuple[_Module, BuildContext]:
        """The module, with the real parameters of ``BuildContext``."""
        with _default_dtype(self._dtype), gc_pause.paused():
            with BuildContext(real) as build:
                model = self._make()
            if build.ensure_registered(model) and not _has_meta(model, parameters=real is None):
                return model, build
            on_meta = torch.get_default_device().type == "meta"
            device = torch.device("cpu") if on_meta else contextlib.nullcontext()
            with device, KeepOffMeta(), BuildContext(real) as build:
                model = self._make()
            if build.ensure_registered(model):
                return model, build
        register = torch.nn.Module.register_parameter
        raise WeightliftError(
            f"{self._cls.__name__} cannot be built: {register.__module__}.{register.__qualname__} "
            "replaces torch.nn.Module.register_parameter and puts parameters on meta: build outside"
            " its context"
        )


def _tensors(model: torch.nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: held[name].detach() for name in names}


def _has_meta(model: torch.nn.Module, parameters: bool) -> bool:
    """Whether a tensor that is to be real is on ``meta``: by a default device, or as another
    library's replacement of ``register_buffer`` has it."""
    waiting, seen = [model], set[int]()
    while waiting:  # named_modules takes a generator step for every level above a module
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for held in (module._buffers, module._parameters if parameters else None):
            if held and any(tensor is not None and tensor.is_meta for tensor in held.values()):
                return True
        if children := module._modules:
            waiting += [child for child in children.values() if child is not None]
    return False


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    with _one_at_a_time:
        before = torch.get_default_dtype()
        if dtype is None or dtype == before or dtype.itemsize == 1:  # torch refuses 8-bit types
            yield
            return
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            if torch.get_default_dtype() == dtype:  # else another library has set its own
                torch.set_default_dtype(before)
