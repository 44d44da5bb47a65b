"""The device of a stream: its buffers, and the order of its copies and its computation.

The ring uses only this interface; the tests have an implementation with a simulated clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch

from weightlift.core.errors import DeviceError, WeightliftError
from weightlift.load.allocation import empty_on_host

__all__ = ["CudaSide", "DeviceSide", "HostSide", "Mark", "Transfer", "device_side"]

# A point in the device's queue of work.
Mark: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class Transfer:
    """The transfer of one block's weights into a buffer.

    Attributes:
        block: the block's number.
        buffer: the buffer to write to.
        bytes: bytes of the weights.
        run: reads and copies; returns when the buffer is complete.
        begin: reads, and queues the copies; the current stream of the device then waits for them.
            Returns a function that waits for their end. Call it once.
    """

    block: int
    buffer: torch.Tensor
    bytes: int
    run: Callable[[], None]
    begin: Callable[[], Callable[[], None]]


class DeviceSide(Protocol):
    """Allocates buffers of a device, and orders its work."""

    device: torch.device

    def allocate(self, count: int) -> torch.Tensor:
        """A buffer of ``count`` bytes."""

    def copy(self, transfer: Transfer, after: Sequence[Mark]) -> Any:
        """Begins or runs a transfer after the marks have passed. Called by one thread.

        Returns:
            The argument for ``wait``.
        """

    def wait(self, arrival: Any) -> None:
        """Orders the calling thread's later work on the device after this transfer."""

    def mark(self) -> Mark:
        """A mark after the calling thread's work so far: the last use of a buffer."""

    def finish(self) -> None:
        """Waits until no work on the device uses a buffer."""


class HostSide:
    """The CPU: a call has finished when it returns."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocate(self, count: int) -> torch.Tensor:
        return empty_on_host((count,), torch.uint8)

    def copy(self, transfer: Transfer, after: Sequence[Mark]) -> None:
        transfer.run()

    def wait(self, arrival: None) -> None:
        pass

    def mark(self) -> None:
        return None

    def finish(self) -> None:
        pass


class CudaSide:
    """A CUDA device. The engine's copies wait for a stream of this object, which waits for the
    marks. That stream waits for the copies, and an event on it tells the computing streams that
    they have ended: no host thread waits for a copy before it queues what uses the copy."""

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise DeviceError(f"cannot stream to {device}: torch finds no GPU")
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        # Waits for the end of the transfer that was begun last.
        self._settle: Callable[[], None] | None = None

    def allocate(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.uint8, device=self.device)

    def copy(self, transfer: Transfer, after: Sequence[Mark]) -> torch.cuda.Event:
        with self._lock, contextlib.ExitStack() as inside:
            # Its staging memory is for the next one, and it may have failed after it was begun.
            self._end_last()
            inside.enter_context(torch.cuda.device(self.device))
            inside.enter_context(torch.cuda.stream(self._stream))
            for mark in after:
                self._stream.wait_event(mark)
            self._settle = transfer.begin()
            arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrival.record(self._stream)
            return arrival

    def wait(self, arrival: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(arrival)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def finish(self) -> None:
        with self._lock, contextlib.suppress(WeightliftError):  # whoever used it has heard of it
            self._end_last()
        torch.cuda.synchronize(self.device)

    def _end_last(self) -> None:
        settle, self._settle = self._settle, None
        if settle is not None:
            settle()


def device_side(device: torch.device) -> DeviceSide:
    """The device side of a device; raises ``DeviceError`` if it cannot be streamed to."""
    if device.type == "cpu":
        return HostSide(device)
    if device.type == "cuda":
        return CudaSide(device)
    raise DeviceError(f"cannot stream to {device}: use 'cpu' or 'cuda'")
