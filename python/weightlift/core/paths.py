"""Paths as people give them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from weightlift.core.errors import ArgumentError

__all__ = ["path_text"]


def path_text(path: str | os.PathLike[str]) -> str:
    """The text of a path.

    Raises:
        ArgumentError: bytes: a path has to be text, and the content of a file is for ``load``.
        TypeError: it is no path; the text says what may have been meant.
    """
    if isinstance(path, (bytes, bytearray, memoryview)):
        given = repr(bytes(path)) if len(path) <= 100 else f"of {len(path):,} bytes"
        raise ArgumentError(
            f"the path is {given}; it must be text, not bytes (os.fsdecode makes text of it; what "
            "is in a file is loaded by weightlift.load)"
        )
    try:
        text = os.fspath(path)
    except TypeError:
        raise TypeError(f"the path is {type(path).__name__}; {_hint(path)}") from None
    return text if isinstance(text, str) else path_text(text)


def _hint(given: object) -> str:
    if isinstance(getattr(given, "name", None), str) and hasattr(given, "read"):
        return "it must be text, such as the name of that open file"
    if isinstance(given, Mapping) or hasattr(given, "state_dict"):
        return "it must be text: have two arguments changed places?"
    return "it must be text or a pathlib.Path"
