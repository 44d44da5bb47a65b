"""Where tensors of a checkpoint go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import torch

__all__ = ["Destination", "SliceRange"]

# (start, step, count) of one dimension. One of each dimension: a part of a tensor.
SliceRange: TypeAlias = "tuple[int, int, int]"


class Destination(NamedTuple):
    """Tensors that go to one device, in one way.

    Attributes:
        device: with its index filled in.
        dtype: the file's name of a floating-point dtype to cast floating-point tensors to.
        names: which tensors; ``None`` for all.
        targets: of each name, the tensor that is written to; they give the dtypes. ``None`` makes
            new ones.
        parts: of each name, what is loaded of it; ``None`` for whole tensors.
    """

    device: torch.device
    dtype: str | None = None
    names: Sequence[str] | None = None
    targets: Sequence[torch.Tensor] | None = None
    parts: Sequence[Sequence[SliceRange]] | None = None

    @property
    def on_host(self) -> bool:
        """Whether the engine brings it to host memory, where torch may fetch it."""
        return self.device.type != "cuda"

    @property
    def is_native(self) -> bool:
        """Whether it is where the engine can write."""
        return self.device.type in ("cpu", "cuda")

    @property
    def device_index(self) -> int:
        """The engine's number of the device."""
        return -1 if self.on_host else self.device.index
