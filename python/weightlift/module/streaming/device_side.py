"""The device of a stream: its buffers, and the order of its copies and its computing.

This is all that the ring knows of a device. The tests have another one, with a clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch

from weightlift.core.errors import DeviceError
from weightlift.load.allocation import empty_on_host

__all__ = ["CudaSide", "DeviceSide", "HostSide", "Mark", "Transfer", "device_side"]

# A point in what the device has been given to compute.
Mark: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class Transfer:
    """The weights of one block on their way into a buffer.

    Attributes:
        block: its number.
        buffer: that is written to.
        bytes: of the weights.
        run: reads and copies; returns when all is in the buffer.
    """

    block: int
    buffer: torch.Tensor
    bytes: int
    run: Callable[[], None]


class DeviceSide(Protocol):
    """Buffers of a device, and what comes before what on it."""

    device: torch.device

    def allocate(self, count: int) -> torch.Tensor:
        """A buffer of ``count`` bytes."""

    def copy(self, transfer: Transfer, after: Sequence[Mark]) -> Any:
        """Begins, or does, a transfer, not before the marks have passed. Called by one thread.

        Returns:
            What ``wait`` takes.
        """

    def wait(self, arrival: Any) -> None:
        """What the calling thread gives the device from now on runs after this transfer."""

    def mark(self) -> Mark:
        """What the calling thread has given the device until now: the last use of a buffer."""

    def finish(self) -> None:
        """Waits until nothing that was given to the device uses a buffer."""


class HostSide:
    """The CPU: what was called has computed when it returns."""

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
    """A CUDA device. The engine's copies wait for a stream of our own, which waits for the marks; a
    transfer has ended on the device when ``copy`` returns, because the host has waited for it."""

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise DeviceError(f"cannot stream to {device}: torch sees no GPU")
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def allocate(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.uint8, device=self.device)

    def copy(self, transfer: Transfer, after: Sequence[Mark]) -> None:
        with contextlib.ExitStack() as inside:
            inside.enter_context(torch.cuda.device(self.device))
            inside.enter_context(torch.cuda.stream(self._stream))
            for mark in after:
                self._stream.wait_event(mark)
            transfer.run()
            self._stream.synchronize()  # what torch copied, where the engine could not

    def wait(self, arrival: None) -> None:
        pass

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)


def device_side(device: torch.device) -> DeviceSide:
    """Raises a ``DeviceError`` for devices that weights cannot be streamed to."""
    if device.type == "cpu":
        return HostSide(device)
    if device.type == "cuda":
        return CudaSide(device)
    raise DeviceError(f"cannot stream to {device}: weights are streamed to 'cpu' and 'cuda'")
