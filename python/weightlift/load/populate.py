"""Checkpoints on their way into the page cache, for a load that comes later."""

from __future__ import annotations

import threading

import weightlift._native as _native
from weightlift.checkpoint.checkpoint import Checkpoint, indexed_files
from weightlift.core.errors import WeightliftError
from weightlift.core.settings import Settings
from weightlift.load.plans import cancel_plan, new_plan, start_plan

__all__ = ["memory_headroom", "populate"]

# How often it is looked whether they are still wanted.
_POLL_SECONDS = 0.05


def memory_headroom() -> int:
    """Bytes that this process may still take, by its cgroup and by what the machine has free."""
    return int(_native.machine()["memory_headroom"])


def populate(checkpoint: Checkpoint, ended: threading.Event) -> bool:
    """Has the engine read what it would map, and map it for nobody; ``False`` where a file cannot
    be read. Not posix_fadvise(2): pages that are on their way count as resident, and are then
    waited for one by one.

    Args:
        ended: set once nobody wants them any more.
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
        return False  # whoever loads the file meets it
    return True
