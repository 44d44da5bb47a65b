"""A load while it is planned: which tensors go where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from weightlift.checkpoint.integrity import HashCheck
from weightlift.core import gc_pause
from weightlift.core.errors import ArgumentError
from weightlift.core.settings import Settings
from weightlift.load.arriving_load import ArrivingLoad
from weightlift.load.destination import Destination, SliceRange
from weightlift.load.options import LoadOptions
from weightlift.load.phases import enter_phase
from weightlift.load.plan_writer import PlanWriter
from weightlift.load.running_load import RunningLoad

if TYPE_CHECKING:
    import torch

    from weightlift.checkpoint.checkpoint import Checkpoint
    from weightlift.core.report import LoadReport
    from weightlift.load.allocation import Allocator

__all__ = ["LoadPlan", "Planned", "Running"]


class Running(Protocol):
    """A load that runs: of one process, or shared by several."""

    def result(self) -> dict[str, Any]: ...
    def cancel(self) -> None: ...
    @property
    def report(self) -> LoadReport: ...


class Planned(Protocol):
    """A load that is planned: of one process, or shared by several."""

    def add(
        self,
        device: torch.device,
        dtype: str | None = None,
        names: Sequence[str] | None = None,
        targets: Sequence[torch.Tensor] | None = None,
        parts: Sequence[Sequence[SliceRange]] | None = None,
    ) -> None: ...
    @property
    def is_empty(self) -> bool: ...
    def start(self) -> Running: ...


class LoadPlan:
    """What goes where; ``add`` it, then ``start`` it.

    All files and all devices are one plan, so that every link is busy to the end.

    Args:
        checkpoint: what there is.
        options: how it is loaded.
        shared: others may get the same tensors from ``checkpoint`` while these live.
        allocator: where memory on CUDA devices comes from; torch, by default.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: LoadOptions = LoadOptions(),
        *,
        shared: bool = False,
        allocator: Allocator | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._options = options
        self._settings = options.settings or Settings.current()
        self._shared = shared
        self._allocator = allocator
        self._destinations: list[Destination] = []

    def add(
        self,
        device: torch.device,
        dtype: str | None = None,
        names: Sequence[str] | None = None,
        targets: Sequence[torch.Tensor] | None = None,
        parts: Sequence[Sequence[SliceRange]] | None = None,
    ) -> None:
        """Adds tensors with one destination.

        Args:
            device: where to; its index is filled in.
            dtype: the file's name of a floating-point dtype to cast floating-point tensors to.
            names: which tensors; all by default. A name is added once for a device.
            targets: tensors of the names' shapes on ``device`` to write to; they give the dtypes.
            parts: of each of the names, what is loaded, in memory of its own; steps are positive.

        Raises:
            ArgumentError: the options forbid this device or dtype.
        """
        self._options.check_target(device, dtype)
        self._destinations.append(Destination(device, dtype, names, targets, parts))

    @property
    def is_empty(self) -> bool:
        return not self._destinations

    @gc_pause.paused()
    def start(self) -> RunningLoad:
        """Allocates, and starts the engine's threads; small loads run in ``RunningLoad.result``."""
        writer = self._written(in_order=False)
        running = writer.start(HashCheck(self._checkpoint.files) if self._options.verify else None)
        enter_phase("run")
        return running

    @gc_pause.paused()
    def start_in_order(self, order: Sequence[str]) -> ArrivingLoad:
        """The same for tensors that are waited for one by one.

        Args:
            order: the names of all tensors of the plan, in the order in which they are used.

        Raises:
            ArgumentError: hashes are to be compared, which are known at the end alone.
        """
        if self._options.verify:
            raise ArgumentError(
                "verify=True knows at the end of a load whether the files are what they should be, "
                "and background=True uses them before: load without one of them, or run "
                "`weightlift verify` first"
            )
        arriving = self._written(in_order=True).start_in_order(order)
        enter_phase("run")
        return arriving

    def _written(self, *, in_order: bool) -> PlanWriter:
        enter_phase("plan")
        writer = PlanWriter(
            self._checkpoint,
            self._options,
            self._settings,
            shared=self._shared,
            allocator=self._allocator,
            cast_to=[destination.dtype for destination in self._destinations],
            in_order=in_order,
        )
        for destination in self._destinations:
            writer.add(destination)
        return writer
