"""Copies parts of a checkpoint's tensors to parts of other tensors, with any strides."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import weightlift._native as _native
from weightlift.checkpoint.checkpoint import Checkpoint, indexed_files
from weightlift.core import dtypes
from weightlift.core.errors import CheckpointError
from weightlift.core.report import LoadReport, format_count, record
from weightlift.core.settings import Settings
from weightlift.load.allocation import Allocator, TorchAllocator
from weightlift.load.options import LoadOptions
from weightlift.load.plans import cancel_plan, finish_plan, new_plan, start_plan

if TYPE_CHECKING:
    import torch

__all__ = ["Copy", "RunningCopies", "copy_parts", "start_parts"]


@dataclasses.dataclass(slots=True)
class Copy:
    """A copy of elements of a checkpoint's tensor to a part of a target.

    Attributes:
        name: the checkpoint's tensor.
        offset: the first element to copy, in elements.
        shape: the shape of the copy, in elements.
        strides: strides in the checkpoint's tensor, in elements.
        target: the part to write, of this shape; the copy casts to its dtype.
        as_bits: reinterpret the elements as another dtype of the same size instead of a cast.
    """

    name: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    target: torch.Tensor
    as_bits: bool = False


def copy_parts(
    checkpoint: Checkpoint, copies: Sequence[Copy], options: LoadOptions = LoadOptions()
) -> LoadReport:
    """Copies parts of tensors to their targets, all files and all devices at once.

    Args:
        checkpoint: the checkpoint.
        copies: the copies; no two may write the same byte.
        options: how to load; the targets define the memory.
    """
    return start_parts(checkpoint, copies, options).result()


def start_parts(
    checkpoint: Checkpoint, copies: Sequence[Copy], options: LoadOptions = LoadOptions()
) -> RunningCopies:
    """As ``copy_parts``, but returns when the engine has begun. The targets must not be read until
    ``result`` or ``cancel`` has returned."""
    narrow = {dtypes.file_name(copy.target.dtype) for copy in copies} & {"F8_E4M3", "F8_E5M2"}
    plan = new_plan(options.settings or Settings.current(), next(iter(narrow), None))
    devices = {copy.target.device for copy in copies}
    allocator: Allocator | None = None
    if any(device.type == "cuda" for device in devices):
        allocator = TorchAllocator()
    later: list[tuple[torch.Tensor, torch.Tensor]] = []
    for copy in copies:
        _add(plan, checkpoint, copy, later)
    for device in devices:
        if device.type == "cuda" and allocator is not None:
            plan.use_stream(device.index, allocator.stream(device.index))
    start_plan(plan, allocator)
    return RunningCopies(plan, options, later, [copy.target for copy in copies])


class RunningCopies:
    """Copies in progress.

    Args:
        plan: the started plan.
        options: its options.
        later: (target, value) pairs that torch copies afterwards.
        targets: tensors to keep alive until the end.
    """

    def __init__(
        self,
        plan: _native.Plan,
        options: LoadOptions,
        later: Sequence[tuple[torch.Tensor, torch.Tensor]],
        targets: Sequence[torch.Tensor],
    ) -> None:
        self._plan = plan
        self._options = options
        self._later = later
        self._targets = targets

    def is_done(self) -> bool:
        """Whether the engine has ended, with or without an error."""
        return self._plan.wait(0)

    def result(self) -> LoadReport:
        """Waits for the end."""
        import torch

        native = finish_plan(self._plan, self._options.progress)
        fallbacks = []
        if self._later:
            fallbacks.append(
                f"torch copied {format_count(len(self._later), 'part')} to targets that are not "
                "contiguous"
            )
        with torch.no_grad():
            for target, value in self._later:
                target.copy_(value)
        return LoadReport.from_native(record(native, fallbacks, self._options.caller))

    def cancel(self) -> None:
        """Stops the copies and waits until nothing is in flight."""
        cancel_plan(self._plan)


def _add(
    plan: _native.Plan,
    checkpoint: Checkpoint,
    copy: Copy,
    later: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    import torch

    place = checkpoint.place(copy.name)
    if place is None:
        raise CheckpointError(f"tensor {copy.name!r} is in memory and cannot be recorded")
    part, position, view = place
    file = indexed_files(checkpoint)[part]
    target = copy.target.detach()
    own = file.dtype(position)
    wanted = own if copy.as_bits else dtypes.file_name(target.dtype) or own
    on_host = target.device.type != "cuda"
    if target.device.type not in ("cpu", "cuda") or (not on_host and not _runs(copy)):
        order = sorted(range(target.dim()), key=lambda i: -copy.strides[i])
        device = "cpu" if on_host else target.device
        dense = torch.empty([target.shape[i] for i in order], dtype=target.dtype, device=device)
        made = dense.permute([order.index(i) for i in range(target.dim())])
        later.append((target, made))
        target = made
    offset = copy.offset + (0 if view is None else view.offset)
    dimensions = list(zip(copy.shape, copy.strides, target.stride(), strict=True))
    index = -1 if on_host else target.device.index
    place_of_target = _native.Targets(index, [target.data_ptr()], [wanted])
    plan.copy_strided(file, position, offset, dimensions, place_of_target)


def _runs(copy: Copy) -> bool:
    """Whether the copy fills the target contiguously, in the order of the source."""
    expected = 1
    dimensions = zip(copy.strides, copy.shape, copy.target.stride(), strict=True)
    for _, count, stride in sorted(dimensions, key=lambda d: d[0]):
        if count == 1:
            continue
        if stride != expected:
            return False
        expected *= count
    return True
