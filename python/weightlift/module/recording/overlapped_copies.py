"""Runs recorded copies while the loading code still runs."""

from __future__ import annotations

from collections.abc import Sequence

from weightlift.load.copies import Copy, RunningCopies
from weightlift.module.recording.sources import Reader

__all__ = ["OverlappedCopies"]


class OverlappedCopies:
    """One group of copies at a time.

    Args:
        limit: bytes of waiting copies that start a group; 0: never.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting = 0
        self._running: RunningCopies | None = None
        self._reader: Reader | None = None
        self._touched: set[int] = set()

    def is_time(self, copy: Copy) -> bool:
        """Whether this copy completes a group."""
        if not self._limit:
            return False
        self._waiting += copy.target.numel() * copy.target.element_size()
        if self._waiting < self._limit or (self._running and not self._running.is_done()):
            return False
        self._waiting = 0
        return True

    def start(self, reader: Reader, copies: Sequence[Copy]) -> None:
        """Starts these copies, after the earlier ones have ended."""
        self.wait()
        self._running = reader.start(copies)
        self._reader = reader
        self._touched = {copy.target.untyped_storage()._cdata for copy in copies}

    def wait(self, storage: int | None = None) -> None:
        """Waits for running copies.

        Args:
            storage: wait only for copies to the storage at this address.
        """
        if self._running is None or (storage is not None and storage not in self._touched):
            return
        running, self._running = self._running, None
        self._touched = set()
        report = running.result()
        if self._reader is not None:
            self._reader.ended(report)

    def cancel(self) -> None:
        """Stops running copies."""
        if self._running is not None:
            running, self._running = self._running, None
            running.cancel()
