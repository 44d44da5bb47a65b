"""Reads checkpoints into the page cache for a later load."""

from __future__ import annotations

import threading

import weightlift._native as _native
from weightlift.checkpoint.checkpoint import Checkpoint, indexed_files
from weightlift.core.errors import WeightliftError
from weightlift.core.settings import Settings
from weightlift.load.plans import cancel_plan, new_plan, start_plan

__all__ = ["memory_headroom", "populate"]

# How often the loop checks ``ended``.
_POLL_SECONDS = 0.05


def memory_headroom() -> int:
    """Bytes that this process can still allocate, by its cgroup and the machine's free memory."""
    return int(_native.machine()["memory_headroom"])


def populate(checkpoint: Checkpoint, ended: threading.Event) -> bool:
    """Reads the byte ranges that a load would map into the page cache; ``False`` if a file cannot
    be read. posix_fadvise(2) would mark pages as resident before their read ends, and a load would
    then wait for them one by one.

    Args:
        ended: set it to stop.
    """
    plan = new_plan(Settings.current())
    try:
        for file in indexed_files(checkpoint):
            plan.map(file, None, False)
        start_plan(plan, None)
        while not plan.wait(_POLL_SECONDS):
            if ended.is_set():
                cancel_plan(plan)
    except WeightliftError:
        return False  # the load will raise the error
    return True
