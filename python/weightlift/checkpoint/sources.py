"""Sources of files: a folder, a Hub repository, a DDUF archive."""

from __future__ import annotations

import dataclasses
import errno
import glob
import os
import posixpath
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, Protocol

from weightlift.checkpoint import hub as _hub
from weightlift.checkpoint.file_names import MODELS, Selection, choose, listed, parse_name
from weightlift.checkpoint.files import Format, ShardFile
from weightlift.checkpoint.hub import HubArguments
from weightlift.checkpoint.shard_index import LARGEST_INDEX, parse_index
from weightlift.core.errors import CheckpointError, ReadError, read_error

__all__ = ["DdufFile", "Folder", "Repository", "Source", "as_read_error"]


class Source(Protocol):
    """A source of files, organized in folders."""

    format: Literal["dduf-safetensors"] | None = None
    incomplete: str  # the probable reason if a file is missing

    def place(self, folder: str) -> str:
        """The folder's name in messages."""

    def entries(self, folder: str) -> tuple[set[str], set[str]]:
        """The files and the folders directly in a folder."""

    def find(self, folder: str, names: Sequence[str], format: Format) -> list[ShardFile]:
        """Files of a folder, downloaded if necessary."""

    def has(self, folder: str, name: str) -> bool:
        """Whether the file exists, in the folder or in a sub-folder."""

    def is_gone(self, folder: str, name: str) -> bool:
        """Whether an entry is a link to what is not there."""
        return False

    def read(self, folder: str, file: ShardFile) -> bytes:
        """Reads a file up to the size limit of an index."""
        try:
            with Path(file.path).open("rb") as opened:
                return opened.read(LARGEST_INDEX + 1)
        except OSError as error:
            raise as_read_error(error, file.path) from None

    def no_folder(self, folder: str) -> CheckpointError:
        there = listed(map(repr, sorted(self.entries("")[1]))) or "none"
        return CheckpointError(
            f"{self.place('')}: there is no subfolder {folder!r}; there is: {there}"
        )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # circular links, or links into a folder without permission
        return False


class Folder(Source):
    incomplete = "the download or the copy is incomplete"

    def __init__(self, root: Path) -> None:
        self.root = root

    def place(self, folder: str) -> str:
        return str(self.root / folder)

    def entries(self, folder: str) -> tuple[set[str], set[str]]:
        files: set[str] = set()
        folders: set[str] = set()
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    (folders if _is_folder(entry) else files).add(entry.name)
        except OSError as error:
            if folder and isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise self.no_folder(folder) from None
            raise as_read_error(error, self.place(folder)) from None
        return files, folders

    def find(self, folder: str, names: Sequence[str], format: Format) -> list[ShardFile]:
        found = [(name, self.root / folder / name) for name in names]
        for _, path in found:
            if not _exists(path):
                raise CheckpointError(
                    f"{path}: is a link to {path.readlink()}, which is missing; download it again"
                    if path.is_symlink()
                    else f"{path}: is missing; {self.incomplete}"
                )
        return [ShardFile(name, str(path), format) for name, path in found]

    def has(self, folder: str, name: str) -> bool:
        return os.path.lexists(self.root / folder / name)

    def is_gone(self, folder: str, name: str) -> bool:
        return not _exists(self.root / folder / name)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


class _Listed(Source, Protocol):
    """A source whose paths are all known in advance."""

    paths: Collection[str]

    def entries(self, folder: str) -> tuple[set[str], set[str]]:
        prefix = f"{folder}/" if folder else ""
        inside = [path[len(prefix) :] for path in self.paths if path.startswith(prefix)]
        if folder and not inside:
            raise self.no_folder(folder)
        split = [path.partition("/") for path in inside]
        return {name for name, slash, _ in split if not slash}, {
            name for name, slash, _ in split if slash
        }

    def has(self, folder: str, name: str) -> bool:
        return posixpath.join(folder, name) in self.paths


class Repository(_Listed):
    incomplete = "neither the Hub (if requests are allowed) nor the cache has them"

    def __init__(self, repo_id: str, hub: HubArguments, folder: str, selection: Selection) -> None:
        # One commit for the list and all downloads, whatever is pushed meanwhile.
        self.hub = dataclasses.replace(hub, subfolder=None).pinned(repo_id)
        self.repo_id = repo_id
        if not hub.force_download:
            # A commit does not change: if the cache has all of it, no request is needed.
            self.paths = _hub.cached_files(repo_id, self.hub) or []
            if self._is_complete(folder, selection):
                self.hub = dataclasses.replace(self.hub, local_files_only=True)
                return
        self.paths = _hub.list_files(repo_id, self.hub)

    def _is_complete(self, folder: str, selection: Selection) -> bool:
        """Whether the cache has the requested weights, and not only others."""
        try:
            names = self.entries(folder)[0]
        except CheckpointError:
            return False
        known = [found for name in sorted(names) if (found := parse_name(name))]
        models = [one for one in known if (one.format, one.stem) in MODELS]
        chosen = choose(models, selection)
        if chosen is None or (
            chosen.format != "safetensors" and selection.use_safetensors is not False
        ):
            return False
        if chosen.kind == "single":
            return True
        place = f"{self.place(folder)}/{chosen.name}"
        hub = dataclasses.replace(self.hub, local_files_only=True)
        try:
            path = _hub.download(self.repo_id, posixpath.join(folder, chosen.name), hub)
            text = path.read_bytes()
            weight_map, _, _ = parse_index(text, place, selection.strict_index)
        except (OSError, CheckpointError):
            return False
        return all(self.has(folder, name) for name in set(weight_map.values()))

    def place(self, folder: str) -> str:
        return f"{self.repo_id}/{folder}" if folder else self.repo_id

    def find(self, folder: str, names: Sequence[str], format: Format) -> list[ShardFile]:
        paths = [posixpath.join(folder, name) for name in names]
        hub = self.hub
        if len(paths) > 1:  # downloads several at a time; no error if the Hub does not answer
            _hub.snapshot(self.repo_id, [glob.escape(path) for path in paths], hub)
            hub = dataclasses.replace(hub, force_download=False)
        here = [_hub.download(self.repo_id, path, hub) for path in paths]
        return [ShardFile(name, str(path), format) for name, path in zip(names, here, strict=True)]


class DdufFile(_Listed):
    format = "dduf-safetensors"
    incomplete = "the archive is incomplete"

    def __init__(self, path: Path) -> None:
        from weightlift.checkpoint.dduf import open_dduf

        self.archive = open_dduf(path)
        self.paths = self.archive.entries.keys()

    def place(self, folder: str) -> str:
        return f"{self.archive.path}/{folder}" if folder else self.archive.path

    def find(self, folder: str, names: Sequence[str], format: Format) -> list[ShardFile]:
        return [
            ShardFile(
                name,
                self.archive.path,
                format,
                *self.archive.entries[posixpath.join(folder, name)],
            )
            for name in names
        ]

    def read(self, folder: str, file: ShardFile) -> bytes:
        return self.archive.read(posixpath.join(folder, file.name))


def as_read_error(error: OSError, path: str) -> ReadError:
    codes = {errno.ENOENT: "not_found", errno.EACCES: "permission_denied"}
    number = error.errno or errno.EIO
    return read_error(codes.get(number, "read_failed"), error.strerror or str(error), path, number)
