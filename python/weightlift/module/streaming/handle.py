"""The handle of a streamed model."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from weightlift.core.closing import Closing
from weightlift.core.errors import ArgumentError
from weightlift.core.report import format_bytes, format_count
from weightlift.module.streaming.originals import Originals
from weightlift.module.streaming.ring import Trace
from weightlift.module.streaming.streamed_weight import MoveError, StreamedWeight
from weightlift.module.streaming.task import Task
from weightlift.module.streaming.uses import Uses

__all__ = ["StreamHandle"]


class StreamHandle(Closing):
    """A streamed model; ``close`` ends the stream. A context manager.

    Attributes:
        device: the device of the computation.
        resident_bytes: bytes of the weights that stay on it.
        streamed_bytes: bytes of the weights that are read at each use.
        buffer_bytes: bytes of all buffers.
        blocks: the names of the blocks, which are read as a whole, in the order of the modules.
    """

    _instead = "call stream again where it is needed"

    def __init__(self, task: Task, restore: Originals) -> None:
        self._task = task
        self._restore: Originals | None = restore
        self._uses: Uses | None = None
        self._lock = threading.Lock()
        self.device = task.side.device
        if task.blocks:
            vars(task.model)["_apply"] = _Apply(task.model)
            self._uses = Uses(task.model, task.owners(), self._use_what_is_learned)

    @property
    def resident_bytes(self) -> int:
        task = self._task
        return sum(task.pieces[number].bytes for number in task.share.resident) + task.fixed

    @property
    def streamed_bytes(self) -> int:
        return sum(block.bytes for block in self._task.blocks)

    @property
    def buffer_bytes(self) -> int:
        return self._task.executor.buffer_bytes

    @property
    def blocks(self) -> list[str]:
        return [block.name for block in self._task.blocks]

    def _use_what_is_learned(self, uses: dict[int, int]) -> None:
        with self._lock:
            self._task.learn_order(uses)
            if self._restore is not None and max(uses.values(), default=0) > 1:
                trace = self._task.executor.ring.trace
                with torch.inference_mode(False):
                    self._task.share_again(uses)
                self._task.executor.ring.trace = trace

    @property
    def closed(self) -> bool:
        return self._restore is None

    @property
    def waits(self) -> int:
        """The number of operations so far that waited for their weights."""
        return self._task.executor.ring.waits

    def trace(self, tell: Trace | None) -> None:
        """From now on calls ``tell(kind, block, begin, end)`` for each ``"read"``, ``"wait"`` and
        ``"use"``, with times of ``time.perf_counter`` in seconds, in the thread that did it.
        ``None`` ends this.

        Raises:
            ArgumentError: ``tell`` is no function.
        """
        if tell is not None and not callable(tell):
            raise ArgumentError(f"trace takes a function or None, not {tell!r}")
        self._task.executor.ring.trace = tell

    def close(self) -> None:
        """Restores the model's tensors and frees the buffers. Waits for running reads. A second
        call has no effect."""
        with self._lock:
            restore, self._restore = self._restore, None
        if restore is None:
            return
        if self._uses is not None:
            self._uses.remove()
        attributes = vars(self._task.model)
        if isinstance(attributes.get("_apply"), _Apply):
            del attributes["_apply"]
        restore.put_back()
        self._task.executor.close()

    def __repr__(self) -> str:
        if self.closed:
            return "<StreamHandle, closed>"
        return (
            f"<StreamHandle on {self.device}: {format_bytes(self.resident_bytes)} stay, "
            f"{format_bytes(self.streamed_bytes)} in {format_count(len(self.blocks), 'block')} are "
            "streamed "
            f"through {format_bytes(self.buffer_bytes)}>"
        )


class _Apply:
    """``model._apply``, the base of ``to``, ``half``, ``cuda`` and others: it refuses to change a
    streamed weight before anything else changes. Weights refuse it too, if only a part of the model
    is moved.

    It has a weak reference to its module, so that a deleted model is freed at once. Copies and
    pickles of the module have their own.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = weakref.ref(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Apply, (self._module(),)

    def __call__(self, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        module = self._module()
        if module is None:
            return None
        for weight in module.parameters():
            if isinstance(weight, StreamedWeight):
                break
        else:
            return type(module)._apply(module, change, recurse)  # type: ignore[no-untyped-call]
        kinds = {(p.dtype, p.device) for p in module.parameters() if isinstance(p, StreamedWeight)}
        for dtype, device in kinds:
            before = torch.empty(2, 2, 2, 2, dtype=dtype, device=device)
            after = change(before)
            if (after.dtype, after.device, after.stride()) != (dtype, device, before.stride()):
                raise MoveError(
                    f"{type(module).__name__} is streamed and cannot be moved or cast: close the "
                    "stream first, or stream it to that device, in that dtype"
                )
        return module
