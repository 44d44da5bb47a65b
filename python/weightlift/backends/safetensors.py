"""safetensors: ``safe_open`` for torch, and so ``load_file`` and ``load_model``.

``safetensors.torch.load_model`` and every ``load_file`` that a module imported before go through
the ``safe_open`` of ``safetensors.torch``; ``load_file`` is replaced as well, for its tensors each
own their memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from weightlift import files
from weightlift.backends import Hook, StandAside, is_enabled, stand_aside, torch_errors
from weightlift.checkpoint import Checkpoint
from weightlift.errors import WeightliftError
from weightlift.materialize import load_tensors
from weightlift.placement import parse_device

if TYPE_CHECKING:
    import torch

__all__ = ["HOOKS"]

_NAME = "safetensors"


def _device(device: Any) -> torch.device:
    """The device, where the engine can load to it; ``None`` is the CPU to the reference."""
    import torch

    parsed = parse_device("cpu" if device is None else device)
    if parsed.type not in ("cpu", "cuda"):
        raise StandAside(f"weightlift does not load to {parsed.type}", warn=False)
    if parsed.type == "cuda" and not (torch.version.cuda and torch.cuda.is_available()):
        raise StandAside("torch has no CUDA device", warn=False)
    return parsed


class _Opened(files.safe_open):
    """What ``safe_open`` returns while the backend is on."""

    _caller = _NAME

    def __init__(
        self,
        reference: Any,
        filename: Any,
        framework: str,
        device: Any = "cpu",
        **options: Any,
    ) -> None:
        self._reference = functools.partial(reference, filename, framework, device, **options)
        super().__init__(filename, framework, _device(device), **options)

    # For isinstance() with the reference's own class, in modules that imported that.
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self._reference.func

    def __getattr__(self, name: str) -> Any:
        # What newer versions have on top.
        if name.startswith("_") or not hasattr(self._reference.func, name):
            raise AttributeError(
                f"'safe_open' object has no attribute {name!r}", name=name, obj=self
            )
        self._open()
        if name == "prefetch":
            stand_aside(_NAME, "safe_open.prefetch", warn=False)
        return getattr(self._handle, name)

    @functools.cached_property
    def _handle(self) -> Any:
        return self._reference()

    def _load(self, *args: Any) -> dict[str, Any]:
        with torch_errors():
            return super()._load(*args)


@functools.cache  # `safetensors.torch.safe_open is safetensors.safe_open`
def _safe_open(reference: Any) -> type:
    import inspect

    signature = inspect.signature(reference)

    def opened(*args: Any, **kwargs: Any) -> Any:
        cause: Exception | None
        try:
            given = signature.bind(*args, **kwargs).arguments
            if given["framework"] not in ("pt", "torch", "pytorch"):
                return reference(*args, **kwargs)
            return _Opened(reference, **given)
        except StandAside as aside:
            reason, warn, cause = aside.reason, aside.warn, None
        except (WeightliftError, TypeError) as error:
            reason, warn, cause = str(error), True, error
        try:
            handle = reference(*args, **kwargs)
        except Exception as own:
            raise own from cause
        stand_aside(_NAME, reason, warn=warn)
        return handle

    class Either(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return (opened if is_enabled(_NAME) else reference)(*args, **kwargs)

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, reference)

    class safe_open(metaclass=Either):
        __doc__ = reference.__doc__
        __module__ = reference.__module__
        __wrapped__ = reference

    return safe_open


def _load_file(reference: Callable[..., Any]) -> Callable[..., Any]:
    def load_file(filename: Any, device: Any = "cpu", *, backend: str = "mmap") -> Any:
        try:
            target = _device(device)
            mode = files._mode("auto", backend)
            checkpoint = Checkpoint.of_file(filename)
        except (StandAside, WeightliftError, TypeError):
            # Its own safe_open meets the same, and says so.
            options = {} if backend == "mmap" else {"backend": backend}
            return reference(filename, device, **options)
        return load_tensors(checkpoint, target, mode=mode, caller=_NAME)

    return load_file


def _load_file_0_7(reference: Callable[..., Any]) -> Callable[..., Any]:
    newer = _load_file(reference)
    return lambda filename, device="cpu": newer(filename, device)


_OPEN = {
    "(filename, framework, device=...)": _safe_open,  # 0.7
    "(filename, framework, device=..., *, backend=...)": _safe_open,
}
HOOKS = (
    Hook("safetensors", "safe_open", _OPEN),
    Hook("safetensors.torch", "safe_open", _OPEN),
    Hook(
        "safetensors.torch",
        "load_file",
        {
            "(filename, device='cpu')": _load_file_0_7,
            "(filename, device='cpu', *, backend='mmap')": _load_file,
        },
    ),
)
