"""Which tensor lives where: a path becomes a Checkpoint, which never holds tensor data."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

from weightlift import _native
from weightlift.errors import ArgumentError

__all__ = ["Checkpoint"]


class Checkpoint:
    """The index of a checkpoint: names, dtypes, shapes, and the bytes of which file they are.

    Attributes:
        parts: the indexed files, in the order in which they are read.
    """

    def __init__(self, parts: list[_native.IndexedFile]) -> None:
        self.parts = parts

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """The checkpoint in one ``.safetensors`` file.

        Raises:
            FormatError: the file breaks the format.
            ReadError: it cannot be read; a missing file is a ``FileNotFoundError`` too.
        """
        return cls([_native.IndexedFile.open(_text(path))])

    @property
    def paths(self) -> list[str]:
        return [part.path for part in self.parts]

    @functools.cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Name -> (part, position in it)."""
        return {
            name: (number, position)
            for number, part in enumerate(self.parts)
            for position, name in enumerate(part.names())
        }

    def find(self, name: str) -> tuple[_native.IndexedFile, int] | None:
        """The part that holds a tensor, and its position there."""
        if len(self.parts) == 1:
            position = self.parts[0].find(name)
            return None if position is None else (self.parts[0], position)
        place = self._places.get(name)
        return None if place is None else (self.parts[place[0]], place[1])

    def __iter__(self) -> Iterator[str]:
        for part in self.parts:
            yield from part.names()

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.find(name) is not None


def _text(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    if not isinstance(text, str):
        raise ArgumentError(f"the path is {path!r}; it must be text, not bytes")
    return text
