"""The files that a checkpoint consists of."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

__all__ = ["CheckpointFiles", "Format", "ShardFile"]

Format = Literal["safetensors", "torch"]


class ShardFile(NamedTuple):
    """One file of a checkpoint, or one entry of an archive.

    Attributes:
        name: as an index has it, without a folder.
        path: the file on the disk.
        format: of its bytes: ``"safetensors"`` or ``"torch"``.
        begin: byte of ``path`` where it begins; 0, unless it is an entry of an archive.
        bytes: how many; ``None`` for all of the file.
    """

    name: str
    path: str
    format: Format
    begin: int = 0
    bytes: int | None = None


class CheckpointFiles(NamedTuple):
    """The files of one checkpoint.

    Attributes:
        files: in the order of their names.
        format: of all of them.
        folder: where they are.
        weight_map: tensor -> ``ShardFile.name``, where there is an index.
        index_path: that index; the archive, if it is an entry of one.
        index_metadata: what it says besides.
        unlisted: files that are named like the index's shards, but are not listed in it.
        notes: what a user should be warned of.
    """

    files: tuple[ShardFile, ...]
    format: Literal["safetensors", "torch", "dduf-safetensors"]
    folder: str
    weight_map: Mapping[str, str] | None = None
    index_path: str | None = None
    index_metadata: Mapping[str, Any] = MappingProxyType({})
    unlisted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
