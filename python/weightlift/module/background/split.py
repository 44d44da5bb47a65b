"""Selects the tensors that may arrive after the call returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from weightlift.core.errors import ArgumentError
from weightlift.module.parameters import ParameterRef, is_sharded
from weightlift.module.placement import Placement

if TYPE_CHECKING:
    import torch

__all__ = ["require_one_device", "split_by_meta"]


def require_one_device(by_prefix: Mapping[str, torch.device | str] | None) -> None:
    """Raises an ``ArgumentError`` if a device map has several devices or the disk."""
    devices = sorted({str(device) for device in (by_prefix or {}).values()})
    if len(devices) > 1 or "disk" in devices:
        raise ArgumentError(
            f"background=True needs one device, and the device map has {', '.join(devices)}: load "
            "without background=True, or with device_map= of one device"
        )


def split_by_meta(placed: Placement) -> tuple[Placement, Placement]:
    """Splits a placement into tensors on ``meta``, which may arrive later, and real ones: buffers,
    which most modules make themselves.

    Raises:
        ArgumentError: a parameter is real, stays on the disk, or is a DTensor.
    """
    later = placed._replace(groups={}, on_disk=[])
    now = placed._replace(groups={})
    for group, members in placed.groups.items():
        for name, ref in members:
            _check(ref)
            part = later if ref.tensor.is_meta else now
            part.groups.setdefault(group, []).append((name, ref))
    return later, now


def _check(ref: ParameterRef) -> None:
    if is_sharded(ref.tensor):
        raise ArgumentError(
            f"background=True cannot be combined with DTensors such as {ref.name!r}, because their "
            "ranks wait for each other: load without it"
        )
    if ref.is_parameter and not ref.tensor.is_meta:
        raise ArgumentError(
            f"background=True needs parameters on meta, and {ref.name!r} is real: its old values "
            "could be used before the load. Build the model under torch.device('meta') or "
            "accelerate.init_empty_weights(), or load without background=True"
        )
