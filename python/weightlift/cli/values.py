"""Values of options: what they may be, and errors that say so in the command line's words."""

from __future__ import annotations

import difflib
import enum
from collections.abc import Callable
from typing import TypeVar

import typer

from weightlift.core.sizes import parse_size

__all__ = ["castable_dtype", "names_of", "one_of", "size_text", "whole_number"]

Choice = TypeVar("Choice", bound=enum.Enum)


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers from ``least`` to ``most``."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not a whole number") from None
        if number < least:
            raise typer.BadParameter(f"{number} is too small: the least is {least}")
        if most is not None and number > most:
            raise typer.BadParameter(f"{number} is too large: the most is {most}")
        return number

    return parse


def one_of(kind: type[Choice]) -> Callable[[str], Choice]:
    """A parser of the values of an enumeration."""
    names = [str(member.value) for member in kind]

    def parse(text: str) -> Choice:
        if isinstance(text, kind):
            return text
        if text in names:
            return kind(text)
        near = difflib.get_close_matches(text, names, 1, 0.7)
        hint = f": {near[0]!r} is meant?" if near else ""
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(names)}{hint}")

    return parse


def names_of(kind: type[enum.Enum]) -> Callable[[str], list[str]]:
    """For the shell's completion: the values of an enumeration that begin so."""

    def complete(incomplete: str) -> list[str]:
        return [str(one.value) for one in kind if str(one.value).startswith(incomplete)]

    return complete


def castable_dtype(text: str) -> str:
    """Checks the name of a dtype; the text itself is kept."""
    from weightlift.core import dtypes
    from weightlift.core.requirements import require

    require("torch", "--dtype")
    try:
        dtypes.parse_dtype(text)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("dtype is ")) from None
    return text


def size_text(text: str) -> str:
    """Checks a number of bytes, such as ``"5GB"``; the text itself is kept."""
    try:
        size = parse_size(text, "size")
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("size is ")) from None
    if size <= 0:
        raise typer.BadParameter(f"{text!r} is no room at all: write a size such as 5GB")
    return text
