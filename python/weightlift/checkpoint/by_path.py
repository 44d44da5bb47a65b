"""A pickleable description of a checkpoint by the paths of its files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from weightlift.checkpoint.checkpoint import Checkpoint, Place, indexed_files
from weightlift.checkpoint.integrity import Identity
from weightlift.core.errors import CheckpointError, WeightliftError

__all__ = ["CheckpointByPath", "described_by_path"]


class CheckpointByPath(NamedTuple):
    """Safetensors files, and tensors in them.

    Attributes:
        files: the files, in the order of the checkpoint.
        places: name -> the tensor's place in the files.
    """

    files: tuple[_UnchangedFile, ...]
    places: Mapping[str, Place | None]

    def open(self) -> Checkpoint:
        """Raises:
        CheckpointError: a file has changed.
        ReadError: a file cannot be read.
        """
        opened = Checkpoint.from_files(file.path for file in self.files)
        for file, part in zip(self.files, indexed_files(opened), strict=True):
            file.check(part.identity, part.size)
        return opened.placed(self.places)


def described_by_path(checkpoint: Checkpoint, names: Iterable[str]) -> CheckpointByPath | None:
    """Describes these tensors of a checkpoint; ``None`` if the paths do not lead to its files: they
    are not whole safetensors files, or were replaced."""
    if checkpoint.formats != ["safetensors"] * len(checkpoint.files):
        return None
    with contextlib.suppress(OSError, WeightliftError):
        files = tuple(
            _UnchangedFile.of(checkpoint, number) for number in range(len(checkpoint.files))
        )
        return CheckpointByPath(files, {name: checkpoint.place(name) for name in names})
    return None


class _UnchangedFile(NamedTuple):
    """A safetensors file that can be opened again by its path.

    Attributes:
        identity: its device and inode; they differ if the file is mounted elsewhere.
        state: its size in bytes and the time of its last change in nanoseconds.
    """

    path: str
    identity: Identity
    state: tuple[int, int]

    @classmethod
    def of(cls, checkpoint: Checkpoint, number: int) -> _UnchangedFile:
        """Raises a ``CheckpointError`` if the path does not lead to the whole file."""
        part = indexed_files(checkpoint)[number]
        path = str(Path(part.path).absolute())
        (found,) = indexed_files(Checkpoint.from_file(path))
        last = len(part) - 1
        if found.identity != part.identity or len(found) != len(part):
            raise CheckpointError(f"{path}: was replaced by another file")
        if last >= 0 and found.range(last) != part.range(last):  # such as a file in an archive
            raise CheckpointError(f"{path}: the checkpoint is only a part of this file")
        return cls(path, part.identity, cls._state_of(path))

    @staticmethod
    def _state_of(path: str) -> tuple[int, int]:
        status = Path(path).stat()
        return status.st_size, status.st_mtime_ns

    def check(self, identity: Identity, size: int) -> None:
        """Raises a ``CheckpointError`` if the opened file has changed."""
        if self._state_of(self.path) != self.state and (
            identity != self.identity or size != self.state[0]
        ):
            raise CheckpointError(
                f"{self.path}: changed after the model was pickled; the model reads its weights "
                "from it: keep the file, or pickle a model without weights on the disk"
            )
