"""Which libraries' ``from_pretrained`` return while the model loads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

__all__ = ["ABLE", "is_enabled", "is_wanted", "returning_early", "set_libraries"]

# That can: the others load what they are asked for one by one.
ABLE = frozenset({"diffusers", "transformers"})

_libraries: frozenset[str] = frozenset()
# Whose from_pretrained this thread is in.
_current: ContextVar[str | None] = ContextVar("weightlift_early_return", default=None)


def set_libraries(libraries: frozenset[str]) -> None:
    """From now on these return early."""
    global _libraries
    _libraries = libraries & ABLE


@contextlib.contextmanager
def returning_early(library: str) -> Iterator[None]:
    """Around a ``from_pretrained`` of the library: models that begin to load within it wait for
    their tensors from its end on, for until then the library looks at all of them."""
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
    """Whether a load within this call goes on when it has returned."""
    return _current.get() == library
