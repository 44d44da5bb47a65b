"""Destinations of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import torch

__all__ = ["Destination", "SliceRange"]

# (start, step, count) of one dimension. One per dimension gives a part of a tensor.
SliceRange: TypeAlias = "tuple[int, int, int]"


class Destination(NamedTuple):
    """Tensors with the same device and dtype.

    Attributes:
        device: the device, with its index filled in.
        dtype: the file's name of the dtype to cast floating-point tensors to.
        names: the tensors; ``None`` for all.
        targets: the tensor to write to for each name, which gives the dtype. ``None`` makes new
            tensors.
        parts: the part to load for each name; ``None`` for whole tensors.
    """

    device: torch.device
    dtype: str | None = None
    names: Sequence[str] | None = None
    targets: Sequence[torch.Tensor] | None = None
    parts: Sequence[Sequence[SliceRange]] | None = None

    @property
    def on_host(self) -> bool:
        """Whether the engine delivers to host memory, from where torch may copy on."""
        return self.device.type != "cuda"

    @property
    def is_native(self) -> bool:
        """Whether the engine can write to the device."""
        return self.device.type in ("cpu", "cuda")

    @property
    def device_index(self) -> int:
        """The engine's number of the device."""
        return -1 if self.on_host else self.device.index
