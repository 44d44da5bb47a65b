"""Prepares CUDA devices for a load while its files are opened and parsed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import weightlift._native as _native
from weightlift.checkpoint.files import ShardFile
from weightlift.checkpoint.opening import OpenedFile, watching
from weightlift.core import dtypes
from weightlift.core.settings import Settings

if TYPE_CHECKING:
    import torch

__all__ = ["slots_ahead"]


@contextlib.contextmanager
def slots_ahead(devices: Iterable[torch.device], *, casts: bool = False) -> Iterator[None]:
    """For a load that opens its files within. Once the files are found, threads pin staging slots
    until the files are open; the plan then pins its own. The end waits for the slot that is being
    pinned: a load that starts within need not.

    Args:
        devices: the devices that get the tensors. Nothing is pinned unless all are CUDA devices:
            how much of the files the others get is not known yet.
        casts: the load may cast, so that fewer bytes go to the devices than the files have.
    """
    targets = set(devices)
    if not targets or any(device.type != "cuda" for device in targets):
        yield
        return
    pinning = _Pinning(sorted(device.index for device in targets), casts)
    try:
        with watching(pinning):
            yield
    finally:
        pinning.wait()


class _Pinning:
    """Pins slots while the first checkpoint is opened."""

    def __init__(self, devices: Sequence[int], casts: bool) -> None:
        self._devices = devices
        self._casts = casts
        self._begun: list[_native.SlotsAhead] | None = None

    @contextlib.contextmanager
    def __call__(self, files: Sequence[OpenedFile]) -> Iterator[None]:
        if self._begun is not None:
            yield
            return
        self._begun = self._begin(files)
        try:
            yield
        finally:
            for ahead in self._begun:
                ahead.stop()

    def wait(self) -> None:
        """Waits for the slots that are being pinned. The traceback of an error keeps this object,
        so that its end would come after that of the devices."""
        if self._begun:
            self._begun.clear()

    def _begin(self, files: Sequence[OpenedFile]) -> list[_native.SlotsAhead]:
        try:
            count = sum(map(_size, files))
        except (OSError, TypeError, ValueError):
            return []  # opening the files gives the error
        # Devices of one NUMA node share the slots. They may get unequal parts of the files, and a
        # cast on the host leaves an eighth at least.
        share = count // len(self._devices)
        if self._casts or len(self._devices) > 1:
            share //= 8
        settings = Settings.current().native(dtypes.fp8_rules(None))
        return [_native.SlotsAhead(device, share, settings) for device in self._devices]


def _size(file: OpenedFile) -> int:
    if isinstance(file, ShardFile):
        if file.bytes is not None:
            return file.bytes
        file = file.path
    return Path(os.fspath(file)).stat().st_size
