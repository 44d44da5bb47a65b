"""Pauses of Python's garbage collector."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

__all__ = ["paused", "resumed"]

_lock = threading.Lock()
_mine = threading.local()  # depth: nested pauses of this thread
_threads = 0  # threads in a pause
_was_enabled = False


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Pauses the collector while code makes many objects that all stay alive.

    The collector scans the young objects after every 700 or 2,000 new ones, and all objects when a
    quarter is new (https://docs.python.org/3/library/gc.html#gc.set_threshold). Nothing of a model
    under construction is garbage, and these scans take a third to a half of the time. ``resumed``
    lets other threads collect while such code waits.

    Afterwards the new objects count as old. If an error ends the pause they stay young, because
    the traceback may hold garbage.
    """
    depth = getattr(_mine, "depth", 0)
    if depth == 0:
        _pause()
    _mine.depth = depth + 1
    made = False
    try:
        yield
        made = True
    finally:
        _mine.depth = depth
        if depth == 0:
            _resume(made)


@contextlib.contextmanager
def resumed() -> Iterator[None]:
    """Suspends the pauses of this thread inside the block."""
    depth = getattr(_mine, "depth", 0)
    if depth == 0:
        yield
        return
    _mine.depth = 0
    _resume(made=True)
    try:
        yield
    finally:
        _pause()
        _mine.depth = depth


def _pause() -> None:
    global _threads, _was_enabled
    with _lock:
        if _threads == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _threads += 1


def _resume(made: bool) -> None:
    global _threads
    with _lock:
        _threads -= 1
        if _threads == 0 and _was_enabled:
            if made:
                _move_to_oldest()
            gc.enable()


def _move_to_oldest() -> None:
    """Makes all objects old without a scan, if the next collection would start at once.

    ``gc.unfreeze`` moves frozen objects to the oldest generation, so nothing is done if the program
    has frozen objects itself.
    """
    if gc.get_count()[0] > gc.get_threshold()[0] and gc.get_freeze_count() == 0:
        gc.freeze()
        gc.unfreeze()


def _after_fork() -> None:
    """A forked child has one thread: the pauses of other threads would never end in it."""
    global _lock, _threads
    _lock = threading.Lock()
    others = _threads - (getattr(_mine, "depth", 0) > 0)
    for _ in range(others):
        _resume(made=False)


os.register_at_fork(after_in_child=_after_fork)
