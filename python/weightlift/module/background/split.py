"""Which tensors of a model can come later than its structure."""

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
    """Raises an ``ArgumentError`` where a device map has more than one, or the disk."""
    devices = sorted({str(device) for device in (by_prefix or {}).values()})
    if len(devices) > 1 or "disk" in devices:
        raise ArgumentError(
            f"background=True is for models on one device, and the device map has "
            f"{', '.join(devices)}: load without it, or with device_map= of one device"
        )


def split_by_meta(placed: Placement) -> tuple[Placement, Placement]:
    """What goes to tensors on ``meta``, and can come later; and what goes to real ones: buffers,
    which most modules make themselves.

    Raises:
        ArgumentError: of the parameters, some are real, stay on the disk, or are DTensors.
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
            f"background=True cannot be combined with DTensors such as {ref.name!r}: ranks that "
            "load together wait for each other"
        )
    if ref.is_parameter and not ref.tensor.is_meta:
        raise ArgumentError(
            f"background=True replaces parameters on meta, and {ref.name!r} is real: what it holds "
            "could be used before it is loaded. Build the model under torch.device('meta') or "
            "accelerate.init_empty_weights(), or load without background=True"
        )
