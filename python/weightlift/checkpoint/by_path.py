"""A checkpoint written down as the paths of its files, for a pickle."""

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
    """Safetensors files and which tensors of them are meant.

    Attributes:
        files: in the order of the checkpoint.
        places: name -> where the tensor lies in them.
    """

    files: tuple[_UnchangedFile, ...]
    places: Mapping[str, Place | None]

    def open(self) -> Checkpoint:
        """Raises:
        CheckpointError: a file has changed since.
        ReadError: a file cannot be read.
        """
        opened = Checkpoint.from_files(file.path for file in self.files)
        for file, part in zip(self.files, indexed_files(opened), strict=True):
            file.check(part.identity, part.size)
        return opened.placed(self.places)


def described_by_path(checkpoint: Checkpoint, names: Iterable[str]) -> CheckpointByPath | None:
    """These tensors of a checkpoint; ``None`` where its files cannot be found again by their
    paths: they are not safetensors files of their own, or others have taken their place."""
    if checkpoint.formats != ["safetensors"] * len(checkpoint.files):
        return None
    with contextlib.suppress(OSError, WeightliftError):
        files = tuple(
            _UnchangedFile.of(checkpoint, number) for number in range(len(checkpoint.files))
        )
        return CheckpointByPath(files, {name: checkpoint.place(name) for name in names})
    return None


class _UnchangedFile(NamedTuple):
    """A safetensors file, to be found again by its path.

    Attributes:
        identity: its device and inode; of a file that is mounted elsewhere, another.
        state: its bytes and the time of its last change, in nanoseconds.
    """

    path: str
    identity: Identity
    state: tuple[int, int]

    @classmethod
    def of(cls, checkpoint: Checkpoint, number: int) -> _UnchangedFile:
        """Raises a ``CheckpointError`` where the path does not lead to the whole of the file."""
        part = indexed_files(checkpoint)[number]
        path = str(Path(part.path).absolute())
        (found,) = indexed_files(Checkpoint.from_file(path))
        last = len(part) - 1
        if found.identity != part.identity or len(found) != len(part):
            raise CheckpointError(f"{path}: is another file by now")
        if last >= 0 and found.range(last) != part.range(last):  # such as a file in an archive
            raise CheckpointError(f"{path}: is not only this checkpoint's")
        return cls(path, part.identity, cls._state_of(path))

    @staticmethod
    def _state_of(path: str) -> tuple[int, int]:
        status = Path(path).stat()
        return status.st_size, status.st_mtime_ns

    def check(self, identity: Identity, size: int) -> None:
        """Raises a ``CheckpointError`` if what was opened is a changed file."""
        if self._state_of(self.path) != self.state and (
            identity != self.identity or size != self.state[0]
        ):
            raise CheckpointError(
                f"{self.path}: is another file than the one from which the pickled model reads its "
                "weights: pickle a model without weights on the disk, or keep the file"
            )
