"""safetensors: ``safe_open`` for torch, and so ``load_file`` and ``load_model``.

``safetensors.torch.load_model``, and every ``load_file`` that a module imported before, call the
``safe_open`` of ``safetensors.torch``. ``load_file`` is also replaced, so that each of its tensors
owns its memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from weightlift.backends import is_enabled
from weightlift.backends.fallback import FallbackToLibrary, fall_back, report_fallback, torch_errors
from weightlift.backends.hooks import Hook
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core.devices import parse_device
from weightlift.core.errors import WeightliftError
from weightlift.load.load_tensors import load_tensors
from weightlift.load.options import Backend, LoadOptions, mode_of_backend
from weightlift.load.slots_ahead import slots_ahead
from weightlift.safe_open import safe_open

if TYPE_CHECKING:
    import torch

__all__ = ["HOOKS", "load_file_adapters", "open_adapters", "usable_device"]


def open_adapters(library: str) -> dict[str, Callable[[Any], Any]]:
    """For a hook on a name that is ``safetensors.safe_open``, by the backend of ``library``."""
    adapter = functools.partial(_safe_open, library)
    return {
        "(filename, framework, device=...)": adapter,  # 0.7
        "(filename, framework, device=..., *, backend=...)": adapter,
    }


def load_file_adapters(library: str) -> dict[str, Callable[[Any], Any]]:
    """For a hook on a name that is ``safetensors.torch.load_file``."""
    return {
        "(filename, device='cpu')": functools.partial(_load_file_0_7, library),
        "(filename, device='cpu', *, backend='mmap')": functools.partial(_load_file, library),
    }


def usable_device(device: Any) -> torch.device:
    """The device, if the engine can load to it; ``None`` means the CPU in the reference.

    Raises:
        DeviceError: the device does not exist.
        FallbackToLibrary: the engine does not support it.
    """
    import torch

    parsed = parse_device("cpu" if device is None else device)
    if parsed.type not in ("cpu", "cuda"):
        raise FallbackToLibrary(f"weightlift does not load to {parsed.type}", warn=False)
    if parsed.type == "cuda" and not (torch.version.cuda and torch.cuda.is_available()):
        raise FallbackToLibrary("torch has no CUDA device", warn=False)
    return parsed


class _Opened(safe_open):
    """The result of ``safe_open`` while the backend is on."""

    def __init__(
        self,
        library: str,
        reference: Any,
        filename: Any,
        framework: str,
        device: Any = "cpu",
        *,
        backend: Backend | None = None,  # from safetensors 0.8 on
    ) -> None:
        self._caller = library
        given = {} if backend is None else {"backend": backend}
        self._reference = functools.partial(reference, filename, framework, device, **given)
        super().__init__(filename, framework, usable_device(device), backend=backend)

    # For isinstance() with the reference's own class, in modules that imported it.
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self._reference.func

    def __getattr__(self, name: str) -> Any:
        # Additional methods of newer versions.
        if name.startswith("_") or not hasattr(self._reference.func, name):
            raise AttributeError(f"'safe_open' object has no attribute {name!r}")
        self._open()
        if name == "prefetch":
            report_fallback(self._caller, "safe_open.prefetch", warn=False)
        return getattr(self._handle, name)

    @functools.cached_property
    def _handle(self) -> Any:
        return self._reference()

    def _load(self, *args: Any) -> dict[str, Any]:
        with torch_errors():
            return super()._load(*args)


@functools.cache  # `safetensors.torch.safe_open is safetensors.safe_open`
def _safe_open(library: str, reference: Any) -> type:
    import inspect

    signature = inspect.signature(reference)

    def opened(*args: Any, **kwargs: Any) -> Any:
        original_call = functools.partial(reference, *args, **kwargs)
        try:
            given = signature.bind(*args, **kwargs).arguments
            if given["framework"] not in ("pt", "torch", "pytorch"):
                return original_call()
            return _Opened(library, reference, **given)
        except (FallbackToLibrary, WeightliftError, TypeError) as error:
            return fall_back(library, error, original_call)

    class Either(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return (opened if is_enabled(library) else reference)(*args, **kwargs)

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, reference)

    class safe_open(metaclass=Either):
        __doc__ = reference.__doc__
        __module__ = reference.__module__
        __wrapped__ = reference

    return safe_open


def _load_file(library: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    def load_file(filename: Any, device: Any = "cpu", *, backend: Backend = "mmap") -> Any:
        try:
            target = usable_device(device)
            mode = mode_of_backend("auto", backend)
            with slots_ahead([target]):
                checkpoint = Checkpoint.from_file(filename)
        except (FallbackToLibrary, WeightliftError, TypeError) as error:
            options = {} if backend == "mmap" else {"backend": backend}
            return fall_back(library, error, lambda: reference(filename, device, **options))
        return load_tensors(checkpoint, target, LoadOptions(mode, caller=library))

    return load_file


def _load_file_0_7(library: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    newer = _load_file(library, reference)
    return lambda filename, device="cpu": newer(filename, device)


HOOKS = (
    Hook("safetensors", "safe_open", open_adapters("safetensors")),
    Hook("safetensors.torch", "safe_open", open_adapters("safetensors")),
    Hook("safetensors.torch", "load_file", load_file_adapters("safetensors")),
)
