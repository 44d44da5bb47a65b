"""Arguments that diffusers documents but ignores or refuses."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from weightlift.backends.diffusers.context import temporary_value
from weightlift.checkpoint.hub import HubArguments

__all__ = ["corrected_arguments", "from_mirror"]

_mirror: ContextVar[str | None] = ContextVar("weightlift_diffusers_mirror", default=None)


@contextlib.contextmanager
def corrected_arguments(path: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """Implements documented arguments that diffusers ignores or refuses: GPU names as text in
    ``max_memory``, and ``mirror``."""
    if isinstance(kwargs.get("max_memory"), Mapping):
        kwargs["max_memory"] = {_gpu(k): size for k, size in kwargs["max_memory"].items()}
    mirror = kwargs.pop("mirror", None)
    if mirror is None or Path(path).exists():
        yield
        return
    hub = HubArguments(
        cache_dir=kwargs.get("cache_dir"),
        local_files_only=bool(kwargs.get("local_files_only")),
        token=kwargs.get("token"),
        revision=kwargs.get("revision"),
        mirror=mirror,
    )
    # A commit, for which diffusers makes no request.
    kwargs["revision"] = hub.pinned(str(path)).revision
    with temporary_value(_mirror, mirror.rstrip("/")):
        yield


def _gpu(key: Any) -> Any:
    number = re.fullmatch(r"(?:cuda:)?(\d+)", key) if isinstance(key, str) else None
    return key if number is None else int(number[1])


def from_mirror(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function of huggingface_hub that uses the mirror, if given, without the stored token."""
    of_api = "endpoint" not in inspect.signature(original).parameters

    def ask(*args: Any, **kwargs: Any) -> Any:
        endpoint = _mirror.get()
        if endpoint is None:
            return original(*args, **kwargs)
        if kwargs.get("token") is None:
            kwargs["token"] = False
        if not of_api:
            return original(*args, **kwargs, endpoint=endpoint)
        from huggingface_hub import HfApi

        return getattr(HfApi(endpoint=endpoint), original.__name__)(*args, **kwargs)

    return ask
