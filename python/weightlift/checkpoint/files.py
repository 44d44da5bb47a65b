"""The files of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

__all__ = ["CheckpointFiles", "Format", "ShardFile"]

Format = Literal["safetensors", "torch"]


class ShardFile(NamedTuple):
    """One file of a checkpoint, or one entry of an archive.

    Attributes:
        name: the name in the index, without a folder.
        path: the file on the disk.
        format: ``"safetensors"`` or ``"torch"``.
        begin: the first byte in ``path``; 0, unless it is an entry of an archive.
        bytes: the number of bytes; ``None`` for the whole file.
    """

    name: str
    path: str
    format: Format
    begin: int = 0
    bytes: int | None = None


class CheckpointFiles(NamedTuple):
    """The files of one checkpoint.

    Attributes:
        files: the files, in the order of their names.
        format: their format.
        folder: their folder.
        weight_map: tensor -> ``ShardFile.name``, if there is an index.
        index_path: the index; the archive, if the index is an entry of one.
        index_metadata: the index's ``metadata``.
        unlisted: files that are named like shards of the index but not listed in it.
        notes: warnings for the user.
        is_given: the user has named the only file, not its folder.
    """

    files: tuple[ShardFile, ...]
    format: Literal["safetensors", "torch", "dduf-safetensors"]
    folder: str
    weight_map: Mapping[str, str] | None = None
    index_path: str | None = None
    index_metadata: Mapping[str, Any] = MappingProxyType({})
    unlisted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    is_given: bool = False

    @property
    def place(self) -> str:
        """What warnings name."""
        return self.files[0].path if self.is_given else self.folder
