"""The weights of a pipeline on their way into the page cache while its modules are built."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path

import weightlift._native as _native
from weightlift.checkpoint.resolve import resolve
from weightlift.core.errors import WeightliftError
from weightlift.core.settings import Settings
from weightlift.load.plans import cancel_plan, new_plan, start_plan

__all__ = ["prefetch"]

# How often it is looked whether they are still wanted.
_POLL_SECONDS = 0.05


def prefetch(
    jobs: Sequence[tuple[Path, str | None]], use_safetensors: bool | None, ended: threading.Event
) -> None:
    """Reads the weights of all components into the page cache, in the order in which they are
    loaded: while modules are built, and between components, the disk would be idle."""
    components: list[list[_native.IndexedFile]] = []
    for folder, variant in jobs:
        with contextlib.suppress(WeightliftError):  # it has no weights, or broken ones
            found = resolve(folder, variant=variant, use_safetensors=use_safetensors)
            if found.format == "safetensors":
                components.append([_native.IndexedFile.open(file.path) for file in found.files])
    total = sum(part.size for parts in components for part in parts)
    if total > _native.machine()["memory_headroom"] // 2:
        return
    for parts in components:
        if ended.is_set() or not _populate(parts, ended):
            return


def _populate(parts: Sequence[_native.IndexedFile], ended: threading.Event) -> bool:
    """Has the engine read what it would map, and map it for nobody. Not posix_fadvise(2): pages
    that are on their way count as resident, and are then waited for one by one."""
    plan = new_plan(Settings.current())
    try:
        for part in parts:
            plan.map(part, None, False)
        start_plan(plan, None)
        while not plan.wait(_POLL_SECONDS):
            if ended.is_set():
                cancel_plan(plan)
    except WeightliftError:
        return False  # whoever loads the file meets it
    return True
