"""The phases of a load, for measurements."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Literal, TypeAlias

__all__ = ["Phase", "enter_phase", "observe_phases"]

# plan: make the plan and allocate memory. run: the engine runs while the caller does other work.
# wait: the caller waits for the engine. deliver: make tensors of the moved bytes.
Phase: TypeAlias = Literal["plan", "run", "wait", "deliver"]

_observer: ContextVar[Callable[[Phase], None] | None] = ContextVar(
    "weightlift_phases", default=None
)


def observe_phases(observer: Callable[[Phase], None] | None) -> None:
    """From now on calls ``observer`` with each phase that a load of this thread (or asyncio task)
    enters; ``None`` ends this."""
    _observer.set(observer)


def enter_phase(phase: Phase) -> None:
    observer = _observer.get()
    if observer is not None:
        observer(phase)
