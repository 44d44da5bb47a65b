"""Checks of arguments as people give them."""

from __future__ import annotations

from weightlift.core.errors import ArgumentError

__all__ = ["check_flag", "check_text"]


def check_flag(name: str, value: object) -> None:
    """Checks an argument that is on or off: every text is true, ``"False"`` too.

    Raises:
        ArgumentError: ``value`` is neither ``True`` nor ``False``.
    """
    if value is True or value is False:
        return
    if value not in (True, False):
        raise ArgumentError(f"{name} is {value!r}; it must be True or False")


def check_text(name: str, value: object, example: str) -> None:
    """Checks an argument that is text or ``None``.

    Raises:
        ArgumentError: ``value`` is neither.
    """
    if value is not None and not isinstance(value, str):
        raise ArgumentError(f"{name} is {value!r}; it must be text, such as {example!r}")
