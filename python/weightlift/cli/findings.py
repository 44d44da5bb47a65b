"""The findings of ``weightlift doctor``."""

from __future__ import annotations

import dataclasses

__all__ = ["Finding", "format_rate", "no_torch"]


@dataclasses.dataclass
class Finding:
    """One finding.

    Attributes:
        topic: the part of the machine, such as ``"disk"``.
        name: the property.
        state: ``"ok"``; ``"missing"`` if something useful is missing; ``"info"``.
        found: the finding in words.
        costs: what a missing part costs.
        remedy: what to do.
        value: the figure, in bytes or bytes/s, or ``None``.
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
