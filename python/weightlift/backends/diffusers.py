"""diffusers: nothing is hooked yet."""

from __future__ import annotations

from weightlift.backends import Hook

__all__ = ["HOOKS"]

HOOKS: tuple[Hook, ...] = ()
