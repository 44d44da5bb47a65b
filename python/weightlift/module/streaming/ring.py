"""The ring: assigns blocks to buffers, chooses the next read, and lets uses wait."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from weightlift.module.learned_order import LONGEST, LearnedOrder
from weightlift.module.streaming.device_side import DeviceSide, Mark, Transfer

__all__ = ["Block", "Ring", "Slot", "Trace"]

# ("read", "wait" or "use", the block's name, begin, end)
Trace: TypeAlias = Callable[[str, str, float, float], None]

# How often a waiting thread checks for Ctrl-C.
_POLL_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Block:
    """Weights that are read together.

    Attributes:
        number: its number, in the order of the modules.
        name: its name, for messages.
        bytes: bytes that it takes in a buffer.
        fill: writes its weights to a buffer.
        begin: begins that, on a CUDA device; returns what waits for the end.
    """

    number: int
    name: str
    bytes: int
    fill: Callable[[torch.Tensor], None]
    begin: Callable[[torch.Tensor], Callable[[], None]] | None = None

    def into(self, buffer: torch.Tensor) -> Transfer:
        def run() -> None:
            self.fill(buffer)

        def begin() -> Callable[[], None]:
            if self.begin is not None:
                return self.begin(buffer)
            run()
            return _nothing

        return Transfer(self.number, buffer, self.bytes, run, begin)


def _nothing() -> None:
    pass


class Slot:
    """A buffer.

    Attributes:
        block: the block in it, or being read into it.
        is_ready: the copy was queued on the device; ``arrival`` is its end.
        pins: the number of running uses.
        marks: thread -> mark after its last use.
    """

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self.block: int | None = None
        self.is_ready = False
        self.arrival: Any = None
        self.pins = 0
        self.marks: dict[int, Mark] = {}


class _Cursor(threading.local):
    """The last blocks that one thread used."""

    def __init__(self) -> None:
        self.last: list[int] = []


class Ring:
    """Buffers that are filled ahead of their use.

    A use pins the buffer of its block. A buffer gets another block only if no use pins it and no
    thread waits for it, and the copy into it comes after the marks of its uses. Reads ahead follow
    a prediction; requested blocks come before predicted ones.

    Args:
        blocks: the blocks, in the order of the modules.
        device: the device of the buffers.
        buffers: the number of buffers, each as large as the largest block.
        lookahead: the largest number of blocks to read ahead.
        threaded: ``False`` reads within ``pin``, for devices whose ``copy`` only begins a copy.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        device: DeviceSide,
        buffers: Sequence[torch.Tensor],
        lookahead: int,
        *,
        threaded: bool = True,
    ) -> None:
        self.device = device
        self.blocks = {block.number: block for block in blocks}
        self._slots = [Slot(buffer) for buffer in buffers]
        for slot in self._slots:  # queued work may still use the memory
            slot.marks[threading.get_ident()] = device.mark()
        self._slot_of: dict[int, Slot] = {}
        self._lookahead = min(lookahead, len(buffers) - 1)
        self._order = LearnedOrder(block.number for block in blocks)
        self._cursor = _Cursor()
        self._current: int | None = None
        self._ahead = [block.number for block in blocks[: len(buffers)]] if lookahead else []
        # Block -> number of waiting threads; the first request is read first.
        self._waiting: Counter[int] = Counter()
        self._errors: dict[int, Exception] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._lacks_buffer = False  # the thread waits for a buffer, and not for something to read
        self.uses: Counter[int] = Counter()
        self.waits = 0
        # Receives the begin and end of reads, waits and uses, by time.perf_counter.
        self.trace: Trace | None = None
        self._since = 0.0
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(
                target=self._work, name="weightlift-stream", daemon=True
            )
            self._thread.start()
        else:
            self._read_what_is_wanted()

    def pin(self, number: int, *, may_wait: bool) -> Slot | None:
        """The buffer with a block, until ``unpin``; ``None`` if the ring has stopped, or if the
        caller has another buffer pinned and would have to wait.

        Raises:
            Exception: the error of the read; the next use reads the block again.
        """
        with self._changed:
            if self._stopped:
                return None
            self._go_to(number)
            slot = self._slot_of.get(number)
            if slot is None or not slot.is_ready:
                if not may_wait:
                    return None
                slot = self._wait_for(number)
                if slot is None:
                    return None
            slot.pins += 1
            arrival = slot.arrival
        self.device.wait(arrival)
        return slot

    def unpin(self, slot: Slot) -> None:
        """Ends the use that ``pin`` began; its work is queued on the device."""
        with self._changed:
            slot.marks[threading.get_ident()] = self.device.mark()
            slot.pins -= 1
            # Each waking costs a switch of threads: only where this is the buffer that is needed.
            if self._lacks_buffer or self._thread is None or self._stopped:
                self._notify()

    def stop(self) -> None:
        """Ends the reads. Waiting threads get no buffer; pinned buffers stay valid."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def join(self) -> None:
        """After ``stop``, waits for the end of the thread and for the device."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._changed:
            while any(slot.pins for slot in self._slots):
                self._changed.wait(_POLL_SECONDS)
        self.device.finish()
        self._slot_of.clear()
        self._slots.clear()

    def _go_to(self, number: int) -> None:
        """Records the use of a block, and predicts the next ones."""
        last = self._cursor.last
        if last and last[-1] == number:
            return
        if last:
            self._order.note(last, number)
        last.append(number)
        del last[:-LONGEST]
        self.uses[number] += 1
        now = time.perf_counter()
        if self.trace is not None and self._current is not None:
            self.trace("use", self.blocks[self._current].name, self._since, now)
        self._since = now
        self._current = number
        self._ahead = self._order.predict(last, self._lookahead)
        self._notify()

    def _wait_for(self, number: int) -> Slot | None:
        self.waits += 1
        begin = time.perf_counter()
        self._waiting[number] += 1
        try:
            if self._waiting[number] == 1:  # try again after an earlier error
                self._errors.pop(number, None)
            while not self._stopped:
                self._notify()
                slot = self._slot_of.get(number)
                if slot is not None and slot.is_ready:
                    return slot
                if number in self._errors:
                    raise self._errors[number].with_traceback(None)
                self._changed.wait(_POLL_SECONDS)
            return None
        finally:
            if self.trace is not None:
                self.trace("wait", self.blocks[number].name, begin, time.perf_counter())
            self._waiting[number] -= 1
            if not self._waiting[number]:
                del self._waiting[number]

    def _notify(self) -> None:
        if self._thread is None:
            self._read_what_is_wanted()
        else:
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                job = self._next_job()
                while job is None and not self._stopped:
                    self._lacks_buffer = bool(self._wanted())
                    self._changed.wait()
                    job = self._next_job()
                stopped = self._stopped or job is None
                if job is not None and not stopped:
                    slot, block, marks = self._begin(*job)
            if stopped:
                # Where nobody closes the stream, this thread is the last to hold the buffers.
                self.device.finish()
                return
            self._read(slot, block, marks)

    def _read_what_is_wanted(self) -> None:
        while (job := self._next_job()) is not None:
            self._read(*self._begin(*job))

    def _next_job(self) -> tuple[Slot, Block] | None:
        """The next block to read, and its buffer."""
        for number in self._wanted():
            slot = self._free_slot(is_guess=number not in self._waiting)
            if slot is not None:
                return slot, self.blocks[number]
        return None

    def _wanted(self) -> list[int]:
        """The blocks that are not on their way: asked for first, then what is read ahead."""
        asked = list(self._waiting)
        held, failed = self._slot_of, self._errors
        return [n for n in [*asked, *self._ahead] if n not in held and n not in failed]

    def _free_slot(self, *, is_guess: bool) -> Slot | None:
        """A buffer for another block: the one that is needed last."""
        found, worst = None, 3
        for slot in self._slots:
            number = slot.block
            if number is None:
                return slot
            if slot.pins or not slot.is_ready or number in self._waiting:
                continue
            cost = 2 if number == self._current else 1 if number in self._ahead else 0
            if cost < worst and not (is_guess and cost):
                found, worst = slot, cost
        return found

    def _begin(self, slot: Slot, block: Block) -> tuple[Slot, Block, dict[int, Mark]]:
        if slot.block is not None:
            del self._slot_of[slot.block]
        slot.block, slot.is_ready = block.number, False
        self._slot_of[block.number] = slot
        marks, slot.marks = slot.marks, {}
        return slot, block, marks

    def _read(self, slot: Slot, block: Block, marks: dict[int, Mark]) -> None:
        failed: Exception | None = None
        arrival = None
        begin = time.perf_counter()
        try:
            arrival = self.device.copy(block.into(slot.buffer), list(marks.values()))
        except Exception as error:  # raised by the thread that waits for the block
            failed = error
        if self.trace is not None:
            self.trace("read", block.name, begin, time.perf_counter())
        with self._changed:
            if failed is None:
                slot.is_ready, slot.arrival = True, arrival
            else:
                slot.block = None
                slot.marks = marks  # the copy may not have waited for them
                del self._slot_of[block.number]
                self._errors[block.number] = failed
            self._changed.notify_all()
