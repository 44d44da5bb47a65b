"""The options of a load."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeAlias

from weightlift.core.dtypes import TORCH_NAMES
from weightlift.core.errors import ArgumentError
from weightlift.core.given import check_flag
from weightlift.core.requirements import require
from weightlift.core.settings import Settings

if TYPE_CHECKING:
    import torch


__all__ = ["Backend", "LoadOptions", "Mode", "Progress", "mode_of_backend"]

# Called with the bytes done and the total.
Progress: TypeAlias = Callable[[int, int], None]
Mode: TypeAlias = Literal["auto", "map", "read"]
# The reference's names for its two I/O paths.
Backend: TypeAlias = Literal["mmap", "pread"]


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """How bytes move.

    Attributes:
        mode: ``"map"`` returns mappings of the files, ``"read"`` own memory; ``"auto"`` maps where
            nothing is cast, pinned or moved.
        pin_memory: use page-locked host memory.
        verify: compare the SHA-256 of the files with the known ones while they are read.
        progress: ``True`` for a progress bar, or a function of bytes done and total.
        settings: replaces the settings in effect when the load is planned.
        caller: the name of the load in ``stats().by_caller``.
        background: return modules before their tensors have arrived (``module/fill``).

    Raises:
        ArgumentError: an unknown mode, or a flag that is neither ``True`` nor ``False``.
        MissingLibraryError: a progress bar needs rich.
    """

    mode: Mode = "auto"
    pin_memory: bool = False
    verify: bool = False
    progress: bool | Progress = False
    settings: Settings | None = None
    caller: str = "weightlift"
    background: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "map", "read"):
            raise ArgumentError(f"mode is {self.mode!r}; it can be 'auto', 'map' or 'read'")
        if not isinstance(self.progress, bool) and not callable(self.progress):
            raise ArgumentError(
                f"progress is {self.progress!r}; it can be True, False, or a function of the bytes "
                "done and in all"
            )
        check_flag("pin_memory", self.pin_memory)
        check_flag("verify", self.verify)
        check_flag("background", self.background)
        if self.progress is True:
            require("rich", "progress=True")

    def check_target(self, device: torch.device, dtype: str | None) -> None:
        """Raises an ``ArgumentError`` if these options do not allow loads to ``device`` with a cast
        to ``dtype``."""
        if self.mode == "map":
            conflicts = [
                text
                for text, given in (
                    (f"dtype={TORCH_NAMES.get(dtype or '')}", dtype is not None),
                    ("pin_memory=True", self.pin_memory),
                    (f"device={str(device)!r}", device.type != "cpu"),
                )
                if given
            ]
            if conflicts:
                raise ArgumentError(
                    f"mode='map' returns the file's own bytes and cannot be combined with "
                    f"{' and '.join(conflicts)}; use mode='auto'"
                )
        if self.pin_memory and device.type != "cpu":
            raise ArgumentError(
                f"pin_memory=True is for the CPU, not for {device}: leave out one of them"
            )


def mode_of_backend(mode: Mode, backend: Backend | None) -> Mode:
    """The mode for the reference's ``backend``.

    Raises:
        ArgumentError: the backend is unknown, or contradicts the mode.
    """
    if backend is None:
        return mode
    modes: dict[str, Mode] = {"mmap": "map", "pread": "read"}
    if backend not in modes:
        raise ArgumentError(f"backend {backend!r} is invalid (expected one of: 'mmap', 'pread')")
    if mode not in ("auto", modes[backend]):
        raise ArgumentError(
            f"backend={backend!r} and mode={mode!r} contradict each other: leave out one of them"
        )
    if mode == "auto" and backend == "pread":
        return "read"
    return mode
