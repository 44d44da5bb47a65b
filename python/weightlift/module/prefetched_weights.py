"""Reads weights ahead of hooks that request them one by one."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from weightlift.module.learned_order import LONGEST, LearnedOrder

__all__ = ["PrefetchedWeights"]

# Limits of reading ahead: tensors, and bytes of own memory.
_LOOKAHEAD = 6
_OWN_BYTES = 64 << 20
_POLL_SECONDS = 0.05


class PrefetchedWeights:
    """Reads the probable next weights in its own thread, in the learned order of requests. Other
    weights are read at their request.

    Args:
        names: all names, in the order of the modules.
        load: reads one weight; its second argument is ``True`` for a read ahead.
        own_bytes: bytes of own memory that a tensor takes; 0 for a mapping of its file.
    """

    def __init__(
        self,
        names: Iterable[Hashable],
        load: Callable[[Any, bool], Any],
        own_bytes: Callable[[Any], int],
    ) -> None:
        self._shared = _Shared([*names], load, own_bytes)
        self._finalizer = weakref.finalize(self, self._shared.stop)

    def get(self, name: Hashable) -> Any:
        return self._shared.get(name)


class _Shared:
    """The state shared by the thread and the requests. It has no reference to the requesting
    object, so that the thread ends when that is deleted."""

    def __init__(
        self,
        names: list[Hashable],
        load: Callable[[Any, bool], Any],
        own_bytes: Callable[[Any], int],
    ) -> None:
        self._names = names
        self._number = {name: number for number, name in enumerate(names)}
        self._load = load
        self._own_bytes = own_bytes
        self._order = LearnedOrder(range(len(names)))
        self._last: list[int] = []
        self._asked: set[int] = set()
        self._wanted: list[int] = []
        self._ready: dict[int, Any] = {}
        self._reading: int | None = None
        self._changed = threading.Condition()
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    def get(self, name: Hashable) -> Any:
        if os.getpid() != self._pid:  # a fork has no thread, and perhaps a lock held forever
            return self._load(name, False)
        number = self._number[name]
        with self._changed:
            while self._reading == number:
                self._changed.wait(_POLL_SECONDS)
            found = self._ready.pop(number, None)
            self._note(number)
        return self._load(name, False) if found is None else found

    def _note(self, number: int) -> None:
        last = self._last
        if last:
            self._order.note(last, number)
        last.append(number)
        del last[:-LONGEST]
        asked_before = number in self._asked
        self._asked.add(number)
        if not asked_before or len(self._names) < 2 or self._stopped:
            return  # a pass that requests each weight once, such as a save, needs no reads ahead
        self._wanted = self._order.predict(last, min(_LOOKAHEAD, len(self._names) - 1))
        for other in [*self._ready]:  # drop a wrong prediction
            if other not in self._wanted:
                del self._ready[other]
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="weightlift-ahead", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()

    def _next(self) -> int | None:
        taken = sum(self._own_bytes(self._names[number]) for number in self._ready)
        for number in self._wanted:
            if number in self._ready:
                continue
            more = self._own_bytes(self._names[number])
            return number if taken + more <= _OWN_BYTES else None
        return None

    def _work(self) -> None:
        while True:
            with self._changed:
                self._reading = None
                self._changed.notify_all()
                while not self._stopped and (found := self._next()) is None:
                    self._changed.wait()
                if self._stopped or found is None:
                    return
                self._reading = found
            tensor = None
            with contextlib.suppress(Exception):  # the request reads it again and raises
                tensor = self._load(self._names[found], True)
            with self._changed:
                self._reading = None
                if tensor is not None and found in self._wanted and not self._stopped:
                    self._ready[found] = tensor
                else:
                    self._wanted = [number for number in self._wanted if number != found]
                self._changed.notify_all()
