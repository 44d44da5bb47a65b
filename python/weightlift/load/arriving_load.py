"""A load that runs while some of its tensors are used already."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from weightlift.core.errors import LoadCancelledError, WeightliftError
from weightlift.core.report import record
from weightlift.load.allocation import Allocator, from_dlpack
from weightlift.load.plans import POLL_SECONDS, cancel_plan, require_untouched

if TYPE_CHECKING:
    import weightlift._native as _native
    from weightlift.load.options import LoadOptions, Progress
    from weightlift.load.outputs import Outputs

__all__ = ["ArrivingLoad", "Told"]

_running: weakref.WeakSet[ArrivingLoad] = weakref.WeakSet()


class Told(NamedTuple):
    """What the engine was told of, in the order of the calls.

    Attributes:
        numbers: of the tensors in the outputs.
        devices: where each goes: a CUDA ordinal; -1 is the host.
    """

    numbers: list[int]
    devices: list[int]

    def add(self, numbers: Sequence[int], device: int) -> None:
        self.numbers.extend(numbers)
        self.devices.extend([device] * len(numbers))


class ArrivingLoad:
    """What ``LoadPlan.start_in_order`` has started: its tensors are waited for and taken one by
    one. Any thread may do so.

    Args:
        native: the engine's plan, which has started, in an order of use.
        outputs: what becomes of the engine's tensors.
        told: which of them the engine tells of.
        fallbacks: what was planned another way than the fastest, and why.
        options: of the load.
        allocator: of memory on CUDA devices, and of the streams on which it is used.
    """

    def __init__(
        self,
        native: _native.Plan,
        outputs: Outputs,
        told: Told,
        fallbacks: list[str],
        options: LoadOptions,
        allocator: Allocator | None,
    ) -> None:
        self._native = native
        self._outputs = outputs
        outputs.take(native.tensors(from_dlpack()))
        self._told = {number: position for position, number in enumerate(told.numbers)}
        self._devices = told.devices
        self._fallbacks = fallbacks
        self._options = options
        self._allocator = allocator
        self._lock = threading.Lock()
        self._report: dict[str, Any] | None = None
        self._is_cancelled = False
        self._pid = os.getpid()
        # Of devices, until the copies that may still be on their way to them have ended.
        self._handed_out: list[Any] = []
        _running.add(self)

    def wait_for(self, names: Sequence[str]) -> None:
        """Until these can be taken. On a CUDA device that is when their copies are queued, behind
        which the current stream then waits. Ctrl-C ends the wait, and not the load.

        Raises:
            LoadCancelledError: the load was cancelled.
            WeightliftError: the load failed before these came, or their file was written to.
        """
        self._require_this_process()
        by_device: dict[int, list[int]] = {}
        for name in names:
            position = self._told.get(self._outputs.number(name))
            if position is not None:
                by_device.setdefault(self._devices[position], []).append(position)
        for device, positions in by_device.items():
            if device < 0 or self._allocator is None:
                while not self._native.wait_for(positions, POLL_SECONDS):
                    pass
                continue
            stream = self._allocator.stream(device)
            while not self._native.wait_for_on_stream(positions, device, stream, POLL_SECONDS):
                pass
        if self._is_cancelled:
            raise LoadCancelledError("the load of this model was cancelled")

    def take(self, name: str) -> Any:
        """A tensor that was waited for; once."""
        with self._lock:
            number = self._outputs.number(name)
            tensor = self._outputs.deliver_one(name)
            position = self._told.get(number)
            if position is not None and self._devices[position] >= 0:
                self._handed_out.append(tensor)
            return tensor

    def finish(self, progress: Progress | None = None) -> dict[str, Any]:
        """Waits for the end; what the engine reports. Ctrl-C ends the wait, and not the load.

        Args:
            progress: a function of bytes done and in all, that is called meanwhile.
        """
        self._require_this_process()
        while not self._native.wait(POLL_SECONDS if self._report is None else 0):
            if progress is not None:
                progress(*self.progress())
        with self._lock:
            if self._report is None:
                self._report = self._finished()
        if progress is not None:
            progress(*self.progress())
        return self._report

    def _finished(self) -> dict[str, Any]:
        self._handed_out.clear()
        report = self._native.finish()
        require_untouched(report)
        _running.discard(self)
        caller = self._options.caller
        return record(report, self._fallbacks, caller, is_last=False)

    def progress(self) -> tuple[int, int]:
        """Bytes that have arrived, and those in all."""
        return self._native.progress()

    def cancel(self) -> None:
        """Stops it, waits until nothing is in flight, and lets go of what was not taken."""
        if os.getpid() != self._pid or self._report is not None:
            return
        if self._native.wait(0):
            with contextlib.suppress(WeightliftError):  # nobody is left to hear it
                self.finish()
        else:
            cancel_plan(self._native)
        self._is_cancelled = True
        _running.discard(self)
        with self._lock:
            self._handed_out.clear()
            self._outputs.clear()

    def _require_this_process(self) -> None:
        if os.getpid() != self._pid:
            raise WeightliftError(
                "the model is still being loaded by the process that this one was forked from, and "
                "its threads are there: call wait() of the load's report before a fork"
            )


def ranks_of(told: Told, numbers: Mapping[str, int], order: Sequence[str]) -> list[int]:
    """Of each tensor that the engine was told of, its place in the order of use."""
    places: dict[int, int] = {}
    for place, name in enumerate(order):
        places.setdefault(numbers[name], place)
    return [places.get(number, len(order)) for number in told.numbers]


def _after_fork() -> None:
    """The engine's threads are not in the child: to end its loads would be to wait for them."""
    for load in _running:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(load._native))


os.register_at_fork(after_in_child=_after_fork)
