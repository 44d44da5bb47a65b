"""Pauses of Python's garbage collector."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

__all__ = ["paused", "resumed"]

_lock = threading.Lock()
_mine = threading.local()  # depth: how many pauses this thread is in
_threads = 0  # that pause
_was_enabled = False


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """For code that makes many objects which all live on.

    The collector looks at the young objects whenever 700 or 2,000 have been made, and at all when
    a quarter is new (https://docs.python.org/3/library/gc.html#gc.set_threshold). Nothing of a
    model is garbage while it is made, and these looks take a third to a half of the time. Where
    such code waits, it lets others collect: ``resumed``.

    What was made counts as old afterwards, unless an error ends the pause: then the collector soon
    looks at all that is new, for what the error's traceback held.
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
    """Ends the pauses of this thread for a while."""
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
    """Makes all objects old, without a look at them, where the collector would look at once.

    ``gc.unfreeze`` gives what is frozen to the oldest generation; a program that has frozen objects
    of its own wants them kept out of all.
    """
    if gc.get_count()[0] > gc.get_threshold()[0] and gc.get_freeze_count() == 0:
        gc.freeze()
        gc.unfreeze()


def _after_fork() -> None:
    """A child has one thread, and of the others' pauses nobody ends."""
    global _lock, _threads
    _lock = threading.Lock()
    others = _threads - (getattr(_mine, "depth", 0) > 0)
    for _ in range(others):
        _resume(made=False)


os.register_at_fork(after_in_child=_after_fork)
