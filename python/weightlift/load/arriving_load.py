"""A running load whose tensors are used as they arrive."""

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
    """The tensors that were given to the engine, in the order of the calls.

    Attributes:
        numbers: the tensors' numbers in the outputs.
        devices: the CUDA ordinal of each tensor; -1 is the host.
    """

    numbers: list[int]
    devices: list[int]

    def add(self, numbers: Sequence[int], device: int) -> None:
        self.numbers.extend(numbers)
        self.devices.extend([device] * len(numbers))


class ArrivingLoad:
    """A load started by ``LoadPlan.start_in_order``. Any thread may wait for its tensors and take
    them one by one.

    Args:
        native: the engine's plan, already started, in the order of use.
        outputs: turns the engine's tensors into those of the caller.
        told: the tensors whose arrival the engine reports.
        fallbacks: steps that do not take the fastest way, with reasons.
        options: the options of the load.
        allocator: allocates memory on CUDA devices and names the streams that use it.
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
        # Device tensors, kept until the copies to them have ended.
        self._handed_out: list[Any] = []
        _running.add(self)

    def wait_for(self, names: Sequence[str]) -> None:
        """Waits until these tensors can be taken. On a CUDA device it waits until their copies are
        queued, and the current stream then waits for the copies. Ctrl-C ends only the wait.

        Raises:
            LoadCancelledError: the load was cancelled.
            WeightliftError: the load failed before they arrived, or their file was written to.
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

    def has(self, names: Sequence[str]) -> bool:
        """Whether these can be taken, and are all on the host. Does not wait.

        Raises:
            WeightliftError: as ``wait_for``.
        """
        if os.getpid() != self._pid or self._is_cancelled:
            return False
        found = (self._told.get(self._outputs.number(name)) for name in names)
        positions = [position for position in found if position is not None]
        if any(self._devices[position] >= 0 for position in positions):
            return False
        return not positions or bool(self._native.wait_for(positions, 0))

    def take(self, name: str) -> Any:
        """The tensor, after ``wait_for``; each tensor can be taken once."""
        with self._lock:
            number = self._outputs.number(name)
            tensor = self._outputs.deliver_one(name)
            position = self._told.get(number)
            if position is not None and self._devices[position] >= 0:
                self._handed_out.append(tensor)
            return tensor

    def finish(self, progress: Progress | None = None) -> dict[str, Any]:
        """Waits for the end and returns the engine's report. Ctrl-C ends only the wait.

        Args:
            progress: called during the wait with the bytes done and the total.
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
        """Bytes that have arrived, and the total."""
        return self._native.progress()

    def cancel(self) -> None:
        """Stops the load, waits until nothing is in flight, and drops the tensors not taken."""
        if os.getpid() != self._pid or self._report is not None:
            return
        if self._native.wait(0):
            with contextlib.suppress(WeightliftError):  # the caller gave up the load
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
                "the parent process is still loading this model, and the load's threads exist only "
                "there: call wait() of the load's report before the fork"
            )


def ranks_of(told: Told, numbers: Mapping[str, int], order: Sequence[str]) -> list[int]:
    """The place in the order of use of each tensor given to the engine."""
    places: dict[int, int] = {}
    for place, name in enumerate(order):
        places.setdefault(numbers[name], place)
    return [places.get(number, len(order)) for number in told.numbers]


def _after_fork() -> None:
    """Drops the loads in a forked child: the engine's threads do not exist there, so ending a load
    would wait forever."""
    for load in _running:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(load._native))


os.register_at_fork(after_in_child=_after_fork)
