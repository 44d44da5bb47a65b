"""Yields tensors one by one and reads the next ones ahead."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core import dtypes
from weightlift.load.load_plan import LoadPlan
from weightlift.load.options import LoadOptions
from weightlift.load.running_load import RunningLoad

if TYPE_CHECKING:
    import torch

__all__ = ["read_ahead"]

# Bytes of one group. Two groups are in memory at a time, plus the tensors that the caller keeps.
_GROUP_BYTES = 256 << 20


def read_ahead(
    checkpoint: Checkpoint,
    names: Sequence[str],
    options: LoadOptions = LoadOptions(),
    *,
    group_bytes: int = _GROUP_BYTES,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, CPU tensor) in the order of ``names``; the engine reads the next group while
    the caller uses the current one. The caller owns each tensor.

    Args:
        checkpoint: the checkpoint.
        names: the tensors.
        options: how to load; tensors are read, never mapped.
        group_bytes: bytes of one group; a larger tensor is a group alone.
    """

    options = dataclasses.replace(options, mode="read")
    groups = _groups(checkpoint, names, group_bytes)
    running: RunningLoad | None = None
    try:
        for number, group in enumerate(groups):
            loading = running or _start(checkpoint, group, options)
            running = loading
            tensors = loading.result()
            running = None
            if number + 1 < len(groups):
                running = _start(checkpoint, groups[number + 1], options)
            for name in group:
                tensor: torch.Tensor = tensors.pop(name)
                yield name, tensor
    finally:
        if running is not None:
            running.cancel()


def _start(checkpoint: Checkpoint, names: Sequence[str], options: LoadOptions) -> RunningLoad:
    import torch

    plan = LoadPlan(checkpoint, options)
    plan.add(torch.device("cpu"), None, names)
    return plan.start()


def _groups(checkpoint: Checkpoint, names: Sequence[str], limit: int) -> list[list[str]]:
    groups: list[list[str]] = []
    size = limit
    for name in names:
        dtype, shape = checkpoint[name]
        count = dtypes.bits(dtype) // 8 or 1
        for extent in shape:
            count *= extent
        if size + count > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += count
    return groups
