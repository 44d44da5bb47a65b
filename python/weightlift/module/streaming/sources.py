"""Sources of streamed weights: the files of a checkpoint, or host memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

import weightlift._native as _native
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core import dtypes
from weightlift.core.report import disk_reads_of
from weightlift.core.settings import Settings
from weightlift.load.allocation import Allocator
from weightlift.load.arriving_load import ArrivingLoad
from weightlift.load.load_plan import LoadPlan
from weightlift.load.load_tensors import begin_writing_to_device
from weightlift.load.options import LoadOptions

__all__ = ["FileSource", "HostSource", "Source", "settings_for"]


class Source(Protocol):
    """Weights by name. A source returns the values from the start of the stream, or an error."""

    def fill(self, names: Sequence[str], targets: Sequence[torch.Tensor]) -> None:
        """Writes weights to contiguous memory, cast to the targets' dtypes; returns when all are
        written."""

    def begin(self, names: Sequence[str], targets: Sequence[torch.Tensor]) -> Callable[[], None]:
        """The same on a CUDA device; returns when all copies are queued, behind which the current
        stream of the device then waits.

        Returns:
            What waits for the end of the copies, and raises what became of them. It is called
            once, before the memory of the targets goes.
        """


class FileSource:
    """The tensors of a checkpoint, which stay in their files.

    Args:
        checkpoint: the checkpoint, which must stay open while this lives.
        settings: the settings of the reads; ``None``: those in effect when the stream begins.
        caller: the name in ``stats().by_caller``.
        allocator: allocates on CUDA devices and gives their current streams; torch's by default.
        device: the device of the targets, if they do not tell it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: Settings | None = None,
        caller: str = "weightlift",
        *,
        allocator: Allocator | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._allocator, self._device = allocator, device
        self._options = LoadOptions(
            settings=settings or Settings.current(), caller=disk_reads_of(caller)
        )

    def fill(self, names: Sequence[str], targets: Sequence[torch.Tensor]) -> None:
        self._plan(names, targets).start().result()

    def begin(self, names: Sequence[str], targets: Sequence[torch.Tensor]) -> Callable[[], None]:
        load = self._plan(names, targets).start_in_order(names)
        try:
            load.wait_for(names)
            for name, target in zip(names, targets, strict=True):
                arrived = load.take(name)
                if arrived is not target:  # what the engine cannot cast, or looks at others' bytes
                    with torch.no_grad():
                        target.copy_(arrived)
        except BaseException:
            load.cancel()
            raise
        return functools.partial(_finish, load)

    def _plan(self, names: Sequence[str], targets: Sequence[torch.Tensor]) -> LoadPlan:
        plan = LoadPlan(self._checkpoint, self._options, allocator=self._allocator)
        plan.add(self._device or targets[0].device, None, names, targets)
        return plan


def _finish(load: ArrivingLoad) -> None:
    load.finish()


class HostSource:
    """Tensors in host memory, which must not change during the stream.

    Args:
        tensors: by name.
        caller, allocator, device: as of ``FileSource``.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        caller: str = "weightlift",
        *,
        allocator: Allocator | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._caller = disk_reads_of(caller)
        self._allocator, self._device = allocator, device

    def fill(self, names: Sequence[str], targets: Sequence[torch.Tensor]) -> None:
        self.begin(names, targets)()

    def begin(self, names: Sequence[str], targets: Sequence[torch.Tensor]) -> Callable[[], None]:
        by_engine: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name, target in zip(names, targets, strict=True):
            tensor = self._tensors[name]
            if _is_for_engine(tensor, target, self._device or target.device):
                by_engine.append((tensor, target))
            else:
                with torch.no_grad():
                    target.copy_(tensor)
        if not by_engine:
            return _nothing
        index = (self._device or by_engine[0][1].device).index
        return begin_writing_to_device(
            by_engine, caller=self._caller, allocator=self._allocator, device=index
        )


def _nothing() -> None:
    pass


def _is_for_engine(tensor: torch.Tensor, target: torch.Tensor, device: torch.device) -> bool:
    own, wanted = dtypes.file_name(tensor.dtype), dtypes.file_name(target.dtype)
    castable = own in dtypes.CASTABLE and wanted in dtypes.CASTABLE
    return (
        device.type == "cuda"
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and own not in (None, "F4")
        and (own == wanted or castable)
    )


def settings_for(streamed_bytes: int) -> Settings:
    """Reads past the page cache what it could not keep from one step to the next: page by page it
    would throw out what is needed soonest."""
    settings = Settings.current()
    headroom: int = _native.machine()["memory_headroom"]
    if settings.io_path in (None, "auto") and streamed_bytes > headroom // 2:
        return dataclasses.replace(settings, io_path="direct")
    return settings
