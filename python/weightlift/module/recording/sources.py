"""What the recorder is given: tensors of a checkpoint without their bytes, and who has these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core.report import LoadReport
from weightlift.load.copies import Copy, RunningCopies

__all__ = ["Reader", "Source", "form_of"]

_META = torch.device("meta")


class Source(NamedTuple):
    """A tensor of a checkpoint, for the recorder.

    Attributes:
        dtype: of its elements.
        shape: of it.
        strides: where torch would load it with other than contiguous ones.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None


class Reader(Protocol):
    """Where bytes come from.

    Attributes:
        checkpoint: if there is one.
        report: of all reads so far.
    """

    @property
    def checkpoint(self) -> Checkpoint | None: ...

    @property
    def report(self) -> LoadReport: ...

    def tensors(self, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """Whole tensors, in memory that nobody else has."""

    def copy(self, copies: Sequence[Copy]) -> None:
        """Does these at once; no two write the same byte."""

    def start(self, copies: Sequence[Copy]) -> RunningCopies:
        """Starts what ``copy`` does."""

    def ended(self, report: LoadReport) -> None:
        """Hears of the end of what was started."""


def form_of(source: Source) -> torch.Tensor:
    """A tensor on ``meta`` like it."""
    if source.strides is None:
        return torch.empty(source.shape, dtype=source.dtype, device=_META)
    return torch.empty_strided(source.shape, source.strides, dtype=source.dtype, device=_META)
