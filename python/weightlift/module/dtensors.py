"""DTensors: this rank's part of the whole tensor, and the local tensor."""

from __future__ import annotations

import functools

import torch
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

from weightlift.core.errors import ArgumentError
from weightlift.load.destination import SliceRange

__all__ = ["device_of", "from_local", "initialized", "local_of", "local_part"]


def local_part(tensor: DTensor) -> list[SliceRange] | None:
    """This rank's part of the whole tensor; ``None`` if every rank holds all of it.

    Raises:
        ArgumentError: the local tensor is not a regular part of the whole.
    """
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank is not in the mesh
        return [(0, 1, 0) for _ in tensor.shape]
    if all(placement.is_replicate() for placement in tensor.placements):
        return None
    local = local_of(tensor).shape
    ranges = []
    for dimension, extent in enumerate(tensor.shape):
        rows = _rows(extent, dimension, tensor.placements, tuple(mesh.shape), tuple(coordinate))
        if rows is None or rows[2] != local[dimension]:
            raise ArgumentError(
                f"a DTensor of shape {tuple(tensor.shape)} placed {tensor.placements} on {mesh}: "
                f"a rank's rows of dimension {dimension} are not evenly spaced; shard it evenly, "
                "with Shard and Replicate, before the load"
            )
        ranges.append(rows)
    return ranges


@functools.lru_cache(4096)
def _rows(
    extent: int,
    dimension: int,
    placements: tuple[Placement, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
) -> tuple[int, int, int] | None:
    """(start, step, count) of a dimension on a rank; ``None`` if the rows are not evenly spaced."""
    # Applies torch's cuts to the row numbers, from left to right (see
    # torch.distributed.tensor._utils.compute_local_shape_and_global_offset).
    index = torch.arange(extent).reshape([1] * dimension + [extent])
    for placement, size, place in zip(placements, mesh_shape, coordinate, strict=True):
        if placement.is_replicate():
            continue
        split = getattr(placement, "_split_tensor", None)
        if split is None:  # Partial
            return None
        if placement.dim == dimension:  # type: ignore[attr-defined]
            index = split(index, size, with_padding=False)[0][place]
    rows = index.flatten()
    steps = set(rows.diff().tolist())
    if len(steps) > 1:
        return None
    return int(rows[0]) if len(rows) else 0, steps.pop() if steps else 1, len(rows)


def local_of(tensor: DTensor) -> torch.Tensor:
    """The local tensor, outside autograd."""
    with torch.no_grad():
        return tensor.to_local()


def device_of(tensor: DTensor) -> torch.device:
    """The device of the local tensor."""
    if tensor.device.type != "meta":
        return tensor.device
    kind = tensor.device_mesh.device_type
    if kind == "cuda":
        return torch.device(kind, torch.cuda.current_device())
    return torch.device(kind)


def from_local(local: torch.Tensor, like: DTensor) -> DTensor:
    """A DTensor with this local tensor and the placement of ``like``."""
    made: DTensor = DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return made


def initialized(value: torch.Tensor, like: DTensor) -> torch.Tensor:
    """The local tensor of a value that no checkpoint has: all ranks use the first rank's value."""
    value = value.to(device_of(like))
    return local_of(distribute_tensor(value, like.device_mesh, like.placements))
