"""Sources of streamed weights: the files of a checkpoint, or host memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core import dtypes
from weightlift.core.report import disk_reads_of
from weightlift.core.settings import Settings
from weightlift.load.load_plan import LoadPlan
from weightlift.load.load_tensors import write_to_device
from weightlift.load.options import LoadOptions

__all__ = ["FileSource", "HostSource", "Source"]


class Source(Protocol):
    """Weights by name. A source returns the values from the start of the stream, or an error."""

    def fill(self, names: Sequence[str], targets: Sequence[torch.Tensor]) -> None:
        """Writes weights to contiguous memory, cast to the targets' dtypes; returns when all are
        written."""


class FileSource:
    """The tensors of a checkpoint, which stay in their files.

    Args:
        checkpoint: the checkpoint, which must stay open while this lives.
        settings: the settings of the reads; ``None``: those in effect when the stream begins.
        caller: the name in ``stats().by_caller``.
    """

    def __init__(
        self, checkpoint: Checkpoint, settings: Settings | None = None, caller: str = "weightlift"
    ) -> None:
        self._checkpoint = checkpoint
        self._options = LoadOptions(
            settings=settings or Settings.current(), caller=disk_reads_of(caller)
        )

    def fill(self, names: Sequence[str], targets: Sequence[torch.Tensor]) -> None:
        plan = LoadPlan(self._checkpoint, self._options)
        plan.add(targets[0].device, None, names, targets)
        plan.start().result()


class HostSource:
    """Tensors in host memory, which must not change during the stream."""

    def __init__(self, tensors: dict[str, torch.Tensor], caller: str = "weightlift") -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._caller = disk_reads_of(caller)

    def fill(self, names: Sequence[str], targets: Sequence[torch.Tensor]) -> None:
        by_engine: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name, target in zip(names, targets, strict=True):
            tensor = self._tensors[name]
            if _is_for_engine(tensor, target):
                by_engine.append((tensor, target))
            else:
                with torch.no_grad():
                    target.copy_(tensor)
        if by_engine:
            write_to_device(by_engine, caller=self._caller)


def _is_for_engine(tensor: torch.Tensor, target: torch.Tensor) -> bool:
    own, wanted = dtypes.file_name(tensor.dtype), dtypes.file_name(target.dtype)
    castable = own in dtypes.CASTABLE and wanted in dtypes.CASTABLE
    return (
        target.device.type == "cuda"
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and own not in (None, "F4")
        and (own == wanted or castable)
    )
