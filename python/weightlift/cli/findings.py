"""What ``weightlift doctor`` finds: one thing each."""

from __future__ import annotations

import dataclasses

__all__ = ["Finding", "format_rate", "no_torch"]


@dataclasses.dataclass
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: such as ``"disk"``.
        name: what of it.
        state: ``"ok"``; ``"missing"``, where something that would help is not there; ``"info"``.
        found: in words.
        costs: what is lost without it.
        remedy: what to do.
        value: the figure, in bytes or bytes a second, where it is one.
    """

    topic: str
    name: str
    state: str
    found: str
    costs: str = ""
    remedy: str = ""
    value: float | None = None


def format_rate(value: float) -> str:
    return f"{value / 1e9:.1f} GB/s" if value >= 1e9 else f"{value / 1e6:.0f} MB/s"


def no_torch(topic: str, name: str) -> Finding:
    return Finding(
        topic,
        name,
        "missing",
        "torch is not installed",
        "nothing can be loaded",
        "pip install torch",
    )
