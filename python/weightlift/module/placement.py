"""Where the tensors of a model are to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from weightlift.module.device_map import DeviceMap
from weightlift.module.offload import Dispatch, dispatch

if TYPE_CHECKING:
    import torch

__all__ = ["PlacementPolicy"]


@dataclasses.dataclass(frozen=True)
class PlacementPolicy:
    """What a caller says of where a model's tensors go, and in which dtype.

    Attributes:
        device_map: ``None`` leaves each tensor where it is (``meta``: the CPU).
        max_memory: device -> bytes, for automatic maps.
        offload: an automatic map may leave on the disk what does not fit.
        dtype: of the floating-point tensors; ``None``: each parameter's own; ``"auto"``: the
            checkpoint's.
        keep_in_fp32: path components whose tensors stay in float32; ``None``: the model's
            ``_keep_in_fp32_modules``.
        memory_format: of 4-D tensors, such as ``torch.channels_last``.
        dispatch: gives the model the hooks that bring tensors to where they are used; who has
            hooks of its own takes what stays on the disk here.
    """

    device_map: DeviceMap | None = None
    max_memory: Mapping[int | str, int | str] | None = None
    offload: bool = False
    dtype: torch.dtype | str | None = None
    keep_in_fp32: Sequence[str] | None = None
    memory_format: torch.memory_format | None = None
    dispatch: Dispatch = dispatch
