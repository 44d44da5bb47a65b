"""What the parts share: the name of the library, and how long something is under way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

__all__ = ["NAME", "temporary_value"]

NAME = "diffusers"


@contextlib.contextmanager
def temporary_value(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
