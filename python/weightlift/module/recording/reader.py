"""Reads the recorder's bytes from a checkpoint, through the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

import torch

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core import dtypes
from weightlift.core.errors import ArgumentError, CheckpointError
from weightlift.core.report import FileReport, LoadReport, last_report
from weightlift.load.copies import Copy, RunningCopies, start_parts
from weightlift.load.load_tensors import load_tensors
from weightlift.load.options import LoadOptions
from weightlift.module.recording.sources import Source

__all__ = ["CheckpointReader", "NoReader", "sources_of"]

_CPU = torch.device("cpu")


class CheckpointReader:
    """Reads whole tensors and parts of them.

    Attributes:
        report: of all reads so far.
    """

    def __init__(self, checkpoint: Checkpoint, options: LoadOptions = LoadOptions()) -> None:
        self.checkpoint = checkpoint
        self.report = LoadReport()
        self.options = options

    def tensors(self, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        found = load_tensors(self.checkpoint, _CPU, self.options, names=names)
        if report := last_report():
            self.ended(report)
        return found

    def copy(self, copies: Sequence[Copy]) -> None:
        if copies:
            self.ended(self.start(copies).result())

    def start(self, copies: Sequence[Copy]) -> RunningCopies:
        return start_parts(self.checkpoint, copies, self.options)

    def ended(self, report: LoadReport) -> None:
        self.report = self.report.plus(report)
        files: dict[tuple[str, str], FileReport] = {}  # one entry per file
        for file in self.report.files:
            known = files.get((file.path, file.io))
            count = file.bytes + (known.bytes if known else 0)
            files[file.path, file.io] = dataclasses.replace(known or file, bytes=count)
        self.report.files = list(files.values())


class NoReader:
    """The reader of a recording that has only headers."""

    checkpoint = None

    def __init__(self) -> None:
        self.report = LoadReport()

    def tensors(self, names: Sequence[str]) -> NoReturn:
        raise CheckpointError(
            f"tensor {names[0]!r}: the loading code needs its bytes, and record() has only "
            "headers: give it a Checkpoint"
        )

    def copy(self, copies: Sequence[Copy]) -> None:
        if copies:
            self.tensors([copies[0].name])

    def start(self, copies: Sequence[Copy]) -> NoReturn:
        self.tensors([copies[0].name])

    def ended(self, report: LoadReport) -> None:
        """Of nothing."""


def _checked(name: str, header: object) -> tuple[str, tuple[int, ...]]:
    """A header as the caller gave it.

    Raises:
        ArgumentError: it is not (dtype, shape), or no file has such a dtype.
    """
    if isinstance(header, (tuple, list)) and len(header) == 2:
        dtype, shape = header
        is_known = isinstance(dtype, str) and dtype in dtypes.TORCH_NAMES
        if is_known and isinstance(shape, (tuple, list)):
            return dtype, tuple(shape)
    raise ArgumentError(
        f"headers: tensor {name!r} has {_short(header)}; it must be a pair of a file's dtype and "
        "a shape, such as ('BF16', (2, 3))"
    )


def sources_of(
    headers: Mapping[str, tuple[str, tuple[int, ...]]], names: Iterable[str] | None = None
) -> dict[str, Source | None]:
    """The tensors of a checkpoint for the recorder; ``None`` for those that cannot be recorded:
    their elements share bytes, or they are already in memory."""
    found: dict[str, Source | None] = {}
    checkpoint = headers if isinstance(headers, Checkpoint) else None
    if checkpoint is not None and names is None:
        headers = checkpoint.headers()
    for name in headers if names is None else names:
        dtype, shape = headers[name] if checkpoint is not None else _checked(name, headers[name])
        strides = None
        if checkpoint is not None and not checkpoint.is_plain:
            place = checkpoint.place(name)
            if place is None:
                found[name] = None
                continue
            strides = None if place[2] is None else place[2].stride
        known = dtype in dtypes.TORCH_NAMES and dtypes.bits(dtype) % 8 == 0
        found[name] = Source(dtypes.to_torch(dtype), shape, strides) if known else None
    return found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"a {type(value).__name__}"
