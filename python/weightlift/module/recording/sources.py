"""The recorder's input: descriptions of a checkpoint's tensors, and the reader of their bytes."""

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
        dtype: its dtype.
        shape: its shape.
        strides: its strides, if torch would not load it contiguous.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None


class Reader(Protocol):
    """Reads bytes for the recorder.

    Attributes:
        checkpoint: the checkpoint, or ``None``.
        report: the report of all reads so far.
    """

    @property
    def checkpoint(self) -> Checkpoint | None: ...

    @property
    def report(self) -> LoadReport: ...

    def tensors(self, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """Whole tensors, in memory that no other object uses."""

    def copy(self, copies: Sequence[Copy]) -> None:
        """Runs these copies together; no two write the same byte."""

    def start(self, copies: Sequence[Copy]) -> RunningCopies:
        """Starts copies, as ``copy`` runs them."""

    def ended(self, report: LoadReport) -> None:
        """Called when started copies have ended."""


def form_of(source: Source) -> torch.Tensor:
    """A tensor on ``meta`` like it."""
    if source.strides is None:
        return torch.empty(source.shape, dtype=source.dtype, device=_META)
    return torch.empty_strided(source.shape, source.strides, dtype=source.dtype, device=_META)
