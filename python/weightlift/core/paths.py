"""Paths as people give them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from weightlift.core.errors import ArgumentError, read_error

__all__ = ["path_text", "target_text"]

_MISSING = "there is no such file or folder"


def path_text(path: str | os.PathLike[str]) -> str:
    """The text of a path.

    Raises:
        ArgumentError: bytes: a path has to be text, and the content of a file is for ``load``.
        ReadError: the path is empty, or begins with a ``~`` or as a URL and is no such file (also a
            ``FileNotFoundError``).
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
    if not isinstance(text, str):
        return path_text(text)
    if not text:
        raise read_error("not_found", f"{_MISSING}: the path is empty")
    if (text[0] == "~" or "://" in text) and not os.path.lexists(text.partition("/")[0]):
        home = "~ is not expanded: give os.path.expanduser(path)"
        if text[0] == "~":
            raise read_error("not_found", f"{_MISSING}; {home}", text)
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", text):
            raise read_error(
                "not_found",
                f"{_MISSING}; this is a URL: download the file first, or give the id of a Hub "
                "repository to load_checkpoint",
                text,
            )
    return text


def target_text(path: str | os.PathLike[str]) -> str:
    """The text of a path to write to.

    Raises:
        ArgumentError, ReadError, TypeError: as ``path_text``, or the path holds a NUL character.
    """
    text = path_text(path)
    if "\0" in text:
        raise ArgumentError(f"{text!r}: the path holds a NUL character")
    return text


def _hint(given: object) -> str:
    if isinstance(getattr(given, "name", None), str) and hasattr(given, "read"):
        return "it must be text, such as the name of that open file"
    if hasattr(given, "state_dict") and not isinstance(given, type):
        return "it must be text or a pathlib.Path; load_into fills a model from a path"
    if hasattr(given, "headers"):
        return "it must be text or a pathlib.Path; load_checkpoint and load_into take a Checkpoint"
    if isinstance(given, Mapping):
        return "it must be text or a pathlib.Path; what a dict has is in memory already"
    return "it must be text or a pathlib.Path"
