"""The phases of a load, for whoever measures them."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Literal, TypeAlias

__all__ = ["Phase", "enter_phase", "observe_phases"]

# A plan is made, and memory allocated; the engine runs while the caller does something else; the
# caller waits for it; tensors are made of what it has moved.
Phase: TypeAlias = Literal["plan", "run", "wait", "deliver"]

_observer: ContextVar[Callable[[Phase], None] | None] = ContextVar(
    "weightlift_phases", default=None
)


def observe_phases(observer: Callable[[Phase], None] | None) -> None:
    """Calls ``observer`` with each phase that a load of this thread (or asyncio task) enters, from
    now on; ``None`` ends that."""
    _observer.set(observer)


def enter_phase(phase: Phase) -> None:
    observer = _observer.get()
    if observer is not None:
        observer(phase)
