"""The part of a tensor that a rank reads if transformers cuts the model: tensor parallel, expert
parallel and FSDP.

The library's own sharding operation runs over a tensor on ``meta`` that records its slices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from weightlift.load.destination import SliceRange

__all__ = ["Cut", "cutter"]


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """A part of a tensor.

    Attributes:
        pieces: the slices to read, concatenated along ``dimension``; ``None``: the whole tensor.
        dimension: the dimension of the cut.
        shape: the shape of the part.
    """

    pieces: tuple[Sequence[SliceRange], ...] | None
    dimension: int
    shape: tuple[int, ...]


class _Noted:
    """Replaces a tensor of this shape, and records its slices."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)
        self.taken: list[Sequence[SliceRange]] = []

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        import torch

        given = (slice(None),) * len(self._shape) if index is Ellipsis else index
        bounds = [
            part.indices(extent) for part, extent in zip(given, self._shape, strict=True)
        ]  # raises for other indices than slices
        self.taken.append([(begin, 1, max(end - begin, 0)) for begin, end, _ in bounds])
        return torch.empty(self._shape, device="meta")[index]


def cutter(
    core: Any, parameter: torch.Tensor, converter: Any
) -> Callable[[Sequence[int], int], Cut | None] | None:
    """For a DTensor of the model: (shape of a tensor of the checkpoint, its number among those of
    its pattern) -> this rank's part, ``None`` if it has none; ``None`` for any other tensor.

    Args:
        core: the library's ``core_model_loading``.
        parameter: of the model, on ``meta``.
        converter: the library's, that makes it.
    """
    if not core.is_dtensor(parameter):
        return None
    operation = core.DtensorShardOperation(parameter)
    steps = () if converter is None else converter.operations
    # From 5.21 on the operation says itself whether the number is that of an expert.
    counts = hasattr(operation, "_axis0_size") or any(
        isinstance(step, core.MergeModulelist) for step in steps
    )

    def cut(shape: Sequence[int], number: int) -> Cut | None:
        source = _Noted(shape)
        index = number if counts and converter is not None else None
        result = operation.shard_tensor(source, tensor_idx=index, device="meta", dtype=None)
        if result is None:
            return None
        taken = source.taken
        dimension = next(
            (i for i, parts in enumerate(zip(*taken, strict=True)) if len(set(parts)) > 1), 0
        )
        whole = len(taken) == 1 and math.prod(result.shape) == math.prod(shape)
        return Cut(None if whole else tuple(taken), dimension, tuple(result.shape))

    return cut
