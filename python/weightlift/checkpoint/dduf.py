"""DDUF files: a diffusion pipeline in one archive, whose weights are read in place."""

from __future__ import annotations

import json
import os
import zlib
from typing import Any

import weightlift._native as _native
from weightlift.core.errors import CheckpointError, FormatError

__all__ = ["Dduf", "open_dduf"]

# https://huggingface.co/docs/hub/dduf
_ENDINGS = frozenset({"json", "model", "safetensors", "txt"})
_CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json",
            "scheduler_config.json")  # fmt: skip
_INDEX = "model_index.json"
# Limit for entries that are read whole: a tokenizer may have tens of megabytes.
_MOST_BYTES = 1 << 28


class Dduf:
    """An open DDUF file.

    Attributes:
        entries: name, such as ``"unet/config.json"``, -> (begin, size) in the file, in bytes, in
            the order of the file.
        checksums: name -> CRC-32. Loads of weights do not check it.
        model_index: the content of ``model_index.json``.
    """

    def __init__(self, archive: _native.Archive) -> None:
        self._archive = archive
        records = archive.records()
        self.entries = {name: (begin, count) for name, begin, count, _, _ in records}
        self.checksums = {name: crc32 for name, _, _, crc32, _ in records}
        for name, _, _, _, zip64 in records:
            self._check_name(name)
            if not zip64:
                raise self._invalid(f"{name!r} is not stored as ZIP64")
        if _INDEX not in self.entries:
            raise self._invalid(f"it has no {_INDEX}")
        index = self.read_json(_INDEX)
        if not isinstance(index, dict):
            raise self._invalid(f"its {_INDEX} is a {type(index).__name__}, not an object")
        self.model_index: dict[str, Any] = index
        for folder in {name.partition("/")[0] for name in self.entries if "/" in name}:
            if folder not in index:
                raise self._invalid(f"its {_INDEX} does not name the folder {folder!r}")
            if not any(f"{folder}/{config}" in self.entries for config in _CONFIGS):
                raise self._invalid(f"the folder {folder!r} has none of {', '.join(_CONFIGS)}")

    def _invalid(self, what: str) -> FormatError:
        return FormatError(
            "dduf_invalid",
            f"not a valid DDUF file: {what}; export it again with huggingface_hub",
            self.path,
        )

    def _check_name(self, name: str) -> None:
        parts = name.split("/")
        if (
            len(parts) > 2
            or "\\" in name
            or any(part in ("", ".", "..") for part in parts)
            or name.rpartition(".")[2] not in _ENDINGS
        ):
            raise self._invalid(
                f"{name!r} is not NAME or FOLDER/NAME that ends in one of "
                + ", ".join(f".{ending}" for ending in sorted(_ENDINGS))
            )

    @property
    def path(self) -> str:
        return self._archive.path

    def folders(self) -> list[str]:
        """The existing folders, in the order of ``model_index.json``."""
        there = {name.partition("/")[0] for name in self.entries if "/" in name}
        return [folder for folder in self.model_index if folder in there]

    def read(self, name: str) -> bytes:
        """Reads a whole entry, other than weights, and checks its checksum.

        Raises:
            CheckpointError: there is no entry of this name.
            FormatError: its checksum is wrong, or it is too large.
        """
        begin, count = self.place(name)
        if count > _MOST_BYTES:
            raise self._invalid(f"{name!r} has {count} bytes; the limit is {_MOST_BYTES}")
        content = self._archive.read(begin, count)
        if zlib.crc32(content) != self.checksums[name]:
            raise FormatError(
                "checksum_mismatch",
                f"{name!r} has a wrong checksum: the file is damaged; download it again",
                self.path,
                begin,
            )
        return content

    def read_json(self, name: str) -> Any:
        """The content of a ``.json`` entry.

        Raises:
            CheckpointError: there is no entry of this name.
            FormatError: it is not JSON, or as in ``read``.
        """
        try:
            return json.loads(self.read(name).decode())
        except (ValueError, RecursionError) as error:
            raise self._invalid(f"{name!r} is not JSON ({str(error)[:100]})") from error

    def place(self, name: str) -> tuple[int, int]:
        """(first byte, number of bytes) of an entry in the DDUF file.

        Raises:
            CheckpointError: there is no entry of this name.
        """
        if name not in self.entries:
            near = [
                other for other in self.entries if other.partition("/")[0] == name.partition("/")[0]
            ]
            listed = ", ".join((near or list(self.entries))[:20])
            raise CheckpointError(f"{self.path}: has no entry {name!r}; it has {listed}")
        return self.entries[name]


def open_dduf(path: str | os.PathLike[str]) -> Dduf:
    """Opens a ``.dduf`` file. Unlike ``huggingface_hub.read_dduf_file`` it also refuses entries
    that leave the file, overlap, are duplicates or contradict the archive's directory.

    Raises:
        FormatError: the file is damaged, or breaks the rules of DDUF (code ``"dduf_invalid"``).
        ReadError: the file cannot be read; for a missing file also a ``FileNotFoundError``.
    """
    return Dduf(_native.Archive.open(os.fspath(path)))
