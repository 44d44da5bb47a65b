"""Tells whoever waits for a checkpoint which files are being opened for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TypeAlias

from weightlift.checkpoint.files import ShardFile

__all__ = ["OpenedFile", "Watcher", "opening", "watching"]

OpenedFile: TypeAlias = "str | os.PathLike[str] | ShardFile"
# Gets the files before any is opened; what it returns is entered while they are.
Watcher: TypeAlias = Callable[[Sequence[OpenedFile]], AbstractContextManager[None]]

_watcher: ContextVar[Watcher | None] = ContextVar("weightlift_opening", default=None)


def opening(files: Sequence[OpenedFile]) -> AbstractContextManager[None]:
    """Enter it to open all files of a checkpoint."""
    watcher = _watcher.get()
    return contextlib.nullcontext() if watcher is None else watcher(files)


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Calls ``watcher`` for each checkpoint that this thread (or asyncio task) opens within."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)
