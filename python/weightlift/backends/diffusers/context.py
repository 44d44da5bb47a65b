"""Shared by the modules of the backend: the library's name, and running calls."""

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
