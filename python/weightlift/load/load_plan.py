"""The plan of a load: which tensors go where."""

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
    """A running load, of one process or shared by several."""

    def result(self) -> dict[str, Any]: ...
    def cancel(self) -> None: ...
    @property
    def report(self) -> LoadReport: ...


class Planned(Protocol):
    """A planned load, of one process or shared by several."""

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
    """A plan; ``add`` destinations, then ``start`` it.

    One plan has all files and all devices, so that every link stays busy until the end.

    Args:
        checkpoint: the checkpoint.
        options: how to load.
        shared: other loads may map the same tensors of ``checkpoint`` while these are alive.
        allocator: allocates memory on CUDA devices; torch by default.
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
            device: the device, with its index filled in.
            dtype: the file's name of the dtype to cast floating-point tensors to.
            names: the tensors; all by default. A name is added at most once for a device.
            targets: tensors of the names' shapes on ``device`` to write to; they give the dtypes.
            parts: the part of each tensor to load, into own memory; steps are positive.

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
        """Allocates memory and starts the engine; small loads run in ``RunningLoad.result``."""
        writer = self._written(in_order=False)
        running = writer.start(HashCheck(self._checkpoint.files) if self._options.verify else None)
        enter_phase("run")
        return running

    @gc_pause.paused()
    def start_in_order(self, order: Sequence[str]) -> ArrivingLoad:
        """As ``start``, for tensors that the caller takes one by one.

        Args:
            order: the names of all tensors of the plan, in the order in which they are used.

        Raises:
            ArgumentError: ``verify=True``, whose result is known only at the end.
        """
        if self._options.verify:
            raise ArgumentError(
                "verify=True checks the files at the end of a load, but background=True uses the "
                "tensors earlier: leave out one of them, or run `weightlift verify` first"
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
