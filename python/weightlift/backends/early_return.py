"""The libraries whose ``from_pretrained`` returns while the model loads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

__all__ = ["ABLE", "is_enabled", "is_wanted", "returning_early", "set_libraries"]

# Libraries that support it; the others load single tensors on request.
ABLE = frozenset({"diffusers", "transformers"})

_libraries: frozenset[str] = frozenset()
# The library whose from_pretrained runs in this thread.
_current: ContextVar[str | None] = ContextVar("weightlift_early_return", default=None)


def set_libraries(libraries: frozenset[str]) -> None:
    """Sets the libraries that return early."""
    global _libraries
    _libraries = libraries & ABLE


@contextlib.contextmanager
def returning_early(library: str) -> Iterator[None]:
    """Surrounds a ``from_pretrained`` of the library: models whose load begins inside wait for
    their tensors only after its end, because the library reads all tensors before."""
    if not is_enabled(library):
        token = _current.set(None)
        try:
            yield
        finally:
            _current.reset(token)
        return
    from weightlift.module.background.holding_back import holding_back

    token = _current.set(library)
    try:
        with holding_back():
            yield
    finally:
        _current.reset(token)


def is_enabled(library: str) -> bool:
    """Whether its ``from_pretrained`` returns early."""
    return library in _libraries


def is_wanted(library: str) -> bool:
    """Whether a load inside this call continues after its return."""
    return _current.get() == library
