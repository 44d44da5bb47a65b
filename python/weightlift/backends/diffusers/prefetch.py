"""Reads the weights of a pipeline into the page cache while its modules are built."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.resolve import resolve
from weightlift.core.errors import WeightliftError
from weightlift.load.populate import memory_headroom, populate

__all__ = ["prefetch"]


def prefetch(
    jobs: Sequence[tuple[Path, str | None]], use_safetensors: bool | None, ended: threading.Event
) -> None:
    """Reads the weights of all components into the page cache, in their order of loading. Otherwise
    the disk would be idle while modules are built and between components."""
    components: list[Checkpoint] = []
    for folder, variant in jobs:
        with contextlib.suppress(WeightliftError):  # no weights, or damaged ones
            found = resolve(folder, variant=variant, use_safetensors=use_safetensors)
            if found.format == "safetensors":
                components.append(Checkpoint.from_files(found.files))
    if sum(sum(component.file_sizes) for component in components) > memory_headroom() // 2:
        return
    for component in components:
        if ended.is_set() or not populate(component, ended):
            return
