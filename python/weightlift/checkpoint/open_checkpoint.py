"""Opens a path or a Hub id as a Checkpoint."""

from __future__ import annotations

import fnmatch
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import weightlift._native as _native
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.files import CheckpointFiles, ShardFile
from weightlift.checkpoint.hub import HubArguments
from weightlift.checkpoint.integrity import Identity
from weightlift.checkpoint.opening import opening
from weightlift.checkpoint.resolve import resolve, torch_format_of
from weightlift.checkpoint.torch_file import LoadedTorchFile, View, open_torch_file
from weightlift.core.errors import ArgumentError, CheckpointError
from weightlift.core.given import check_flag
from weightlift.core.paths import path_text

if TYPE_CHECKING:
    import torch


__all__ = ["open_checkpoint", "open_file", "open_files", "open_without_arguments"]

_log = logging.getLogger("weightlift")


def open_checkpoint(
    path_or_repo: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    state_dict_key: str | None = None,
    prefix: str | None = None,
    ignore: str | Iterable[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    mirror: str | None = None,
    strict_index: bool = False,
) -> Checkpoint:
    """Opens a checkpoint of any form: reads its index, not its tensors.

    Args:
        path_or_repo: a ``.safetensors``, ``.bin``, ``.pt``, ``.pth``, ``.ckpt`` or ``.dduf`` file;
            a folder with weights under one of their usual names (sharded or not); or the id of a
            Hub repository, of which only the needed files are downloaded.
        subfolder: a folder within the folder or repository; the component of a ``.dduf`` file.
        variant: a variant such as ``"fp16"``, for ``model.fp16.safetensors``.
        use_safetensors: ``None`` prefers safetensors to ``.bin``, ``True`` accepts only
            safetensors, ``False`` only ``.bin``.
        state_dict_key: the dotted key of the tensors in a torch file; ``""`` is the top level.
            ``None`` takes the only plausible dictionary of tensors; if there are several, the error
            names them.
        prefix: selects the names with this prefix and strips it.
        ignore: tensors to leave out: name prefixes, or patterns with ``*``.
        revision: a branch, tag or commit of a repository; ``main`` by default. It has no effect on
            a path of this machine, which a warning says; nor have the arguments below, down to
            ``mirror``.
        token: the Hub token; ``None`` sends the stored token, ``False`` none.
        cache_dir: the Hub cache.
        local_files_only: make no request to the Hub.
        force_download: download files again that are in the cache.
        mirror: the endpoint to use instead of the Hub; it gets only an explicit token.
        strict_index: raise an error if the index contradicts its files, or a tensor is in two
            files. By default all tensors of the listed files are taken, the last of duplicates, as
            the files' own library does, with a warning.

    Returns:
        The checkpoint, a mapping of name -> (dtype, shape).

    Raises:
        CheckpointError: the checkpoint does not exist, or, with ``strict_index``, its index
            contradicts its files.
        FormatError: a file breaks its format.
        ReadError: a file cannot be read.
    """
    check_flag("strict_index", strict_index)
    files = resolve(
        path_or_repo,
        subfolder=subfolder,
        variant=variant,
        use_safetensors=use_safetensors,
        hub=HubArguments(
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            revision=revision,
            mirror=mirror,
        ),
        strict_index=strict_index,
    )
    if revision is not None and os.path.lexists(path_or_repo):
        _log.warning(
            "%s is on this machine, and revision=%r is for a repository: it has no effect",
            os.fspath(path_or_repo),
            revision,
        )
    if prefix is not None and not isinstance(prefix, str):
        raise ArgumentError(f"prefix is {prefix!r}; it must be text")
    checkpoint = open_files(files, state_dict_key, strict_index=strict_index)
    if prefix is not None or ignore is not None:
        checkpoint = checkpoint.renamed(_renaming(prefix, ignore))
        if not checkpoint:
            given = {"prefix": prefix, "ignore": ignore}
            told = " and ".join(f"{k}={v!r}" for k, v in given.items() if v is not None)
            raise CheckpointError(
                f"{path_or_repo}: {told} leaves no tensor: change or drop the argument"
            )
    return checkpoint


def open_without_arguments(path_or_repo: str | os.PathLike[str]) -> Checkpoint:
    """``open_checkpoint`` for a call that lacks its arguments: an error that advises one says whose
    it is."""
    try:
        return open_checkpoint(path_or_repo)
    except CheckpointError as error:
        if not re.search(r"\b(state_dict_key|subfolder|variant)=", str(error)):
            raise
        raise CheckpointError(f"{error} (an argument of open_checkpoint)") from None


def open_file(filename: str | os.PathLike[str]) -> Checkpoint:
    """Opens one file: safetensors by its name or its bytes, or a file of ``torch.save``.

    Raises:
        FormatError: the file is neither, or is damaged.
        ReadError: the file cannot be read; for a missing file also a ``FileNotFoundError``, for a
            folder an ``IsADirectoryError``.
        CheckpointError: a torch file has several plausible state dicts.
    """
    text = path_text(filename)
    format = torch_format_of(text)
    if format is None:
        return Checkpoint.from_file(text)
    folder, name = os.path.split(text)
    files = CheckpointFiles((ShardFile(name, text, format),), format, folder or ".")
    try:
        return open_files(files, None)
    except CheckpointError as error:
        if "state_dict_key" not in str(error):
            raise
        raise CheckpointError(f"{error}, an argument of load_checkpoint") from None


def open_files(
    files: CheckpointFiles, state_dict_key: str | None, *, strict_index: bool = False
) -> Checkpoint:
    """Opens the files of a checkpoint; see ``open_checkpoint``."""
    if state_dict_key is not None and not isinstance(state_dict_key, str):
        raise ArgumentError(f"state_dict_key is {state_dict_key!r}; it must be text")
    if state_dict_key is not None and files.format != "torch":
        raise ArgumentError(
            f"{files.files[0].path}: state_dict_key={state_dict_key!r} is for torch files, and "
            "this is safetensors: leave it out"
        )
    opened = _OpenedFiles()
    with opening(files.files):
        for shard in files.files:
            opened.add(shard, state_dict_key)
    notes = [*_duplicates(opened), *_misplaced(files, opened)]
    if notes and strict_index:
        place = files.index_path or files.folder
        raise CheckpointError(f"{place}: {notes[0]}; save or download it again")
    if files.unlisted:
        are = " is" if len(files.unlisted) == 1 else " are"
        _log.warning(
            "%s: %s not in the index %s, so left out",
            files.folder,
            ", ".join(files.unlisted) + are,
            files.index_path,
        )
    for note in (*files.notes, *notes):
        _log.warning("%s: %s", files.index_path or files.place, note)
    return opened.checkpoint()


class _Names(NamedTuple):
    """The tensors of a shard."""

    file: str
    names: dict[str, None]
    in_memory: bool


class _OpenedFiles:
    """Files that become one checkpoint. The last tensor of a name wins, as in a library that
    updates one dict with the tensors of file after file."""

    def __init__(self) -> None:
        self.parts: list[_native.IndexedFile] = []
        self.formats: list[str] = []
        self.views: list[Mapping[str, View]] = []
        self.in_memory: dict[str, torch.Tensor] = {}
        self.loaded: list[tuple[str, Identity]] = []
        self.metadata: dict[str, str] = {}
        self.not_tensors: dict[str, str] = {}
        self.left_out: dict[str, int] = {}
        self.fallbacks: list[str] = []
        self.shards: list[_Names] = []

    def add(self, shard: ShardFile, state_dict_key: str | None) -> None:
        if shard.format == "safetensors":
            part = _native.IndexedFile.open(shard.path, shard.begin, shard.bytes)
            self.metadata.update(part.metadata() or {})
            self._add_part(part, {}, shard.format)
            names = part.names()
        else:
            opened = open_torch_file(shard.path, state_dict_key=state_dict_key)
            self.not_tensors.update(opened.not_tensors)
            self.left_out.update(opened.left_out)
            if isinstance(opened, LoadedTorchFile):
                names = list(opened.tensors)
                self.in_memory.update(opened.tensors)
                self.loaded.append((shard.path, opened.identity))
                self.fallbacks.append(f"{shard.path}: loaded by torch: {opened.reason}")
            else:
                names = opened.names
                self._add_part(opened.part, opened.views, shard.format)
        in_memory = bool(self.loaded) and self.loaded[-1][0] == shard.path
        self.shards.append(_Names(shard.name, dict.fromkeys(names), in_memory))

    def _add_part(self, part: _native.IndexedFile, views: Mapping[str, View], format: str) -> None:
        self.parts.append(part)
        self.views.append(views)
        self.formats.append(format)

    def checkpoint(self) -> Checkpoint:
        if self.not_tensors:
            self.metadata["not_tensors"] = json.dumps(self.not_tensors)
        if self.in_memory:
            from_memory = {name: shard.in_memory for shard in self.shards for name in shard.names}
            for name in [name for name in self.in_memory if not from_memory[name]]:
                del self.in_memory[name]  # a later file has it
        checkpoint = Checkpoint(
            self.parts,
            formats=self.formats,
            views=self.views,
            in_memory=self.in_memory,
            loaded=self.loaded,
            metadata=self.metadata,
            fallbacks=self.fallbacks,
            left_out=self.left_out,
        )
        # The order of the state dict, which may differ from that of its storages.
        order = list(self.names())
        return checkpoint if list(checkpoint) == order else checkpoint.ordered(order)

    def names(self) -> dict[str, None]:
        """Of all files, each once."""
        if len(self.shards) == 1:
            return self.shards[0].names
        return dict.fromkeys(itertools.chain.from_iterable(s.names for s in self.shards))

    def holders(self, name: str) -> list[str]:
        """The shards that have a tensor, in their order."""
        return [shard.file for shard in self.shards if name in shard.names]


def _duplicates(opened: _OpenedFiles) -> list[str]:
    """The warning for tensors in several files."""
    names = opened.names()
    if len(names) == sum(len(shard.names) for shard in opened.shards):
        return []
    twice = [(name, files) for name in names if len(files := opened.holders(name)) > 1]
    name, files = twice[0]
    more = f" (and {len(twice) - 1} more tensors)" if len(twice) > 1 else ""
    return [
        f"tensor {name!r} is in {' and in '.join(files)}{more}; the last one is taken, as in "
        "libraries that load shard after shard"
    ]


def _misplaced(files: CheckpointFiles, opened: _OpenedFiles) -> list[str]:
    """The warnings for an index that contradicts its files."""
    absent = []
    elsewhere = []
    names = {shard.file: shard.names for shard in opened.shards}
    for name, shard in (files.weight_map or {}).items():
        if name in names.get(shard, ()):
            continue
        found = opened.holders(name)
        if not found:
            absent.append(f"{name!r} is in {shard}, but it is in none of its files")
        else:
            elsewhere.append(f"{name!r} is in {shard}, but it is in {found[-1]}")
    return [
        f"the index says tensor {wrong[0]}"
        + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
        + f": index and shards are from different checkpoints{consequence}"
        for wrong, consequence in (
            (elsewhere, "; the tensors in the files are taken"),
            (absent, "; these tensors are missing"),
        )
        if wrong
    ]


def _renaming(
    prefix: str | None, ignore: str | Iterable[str] | None
) -> Callable[[str], str | None]:
    if ignore is not None and not isinstance(ignore, Iterable):
        raise ArgumentError(f"ignore is {ignore!r}; it must be text, or several texts")
    ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore or ())
    plain = tuple(text for text in ignored if not any(c in text for c in "*?["))
    patterns = [text for text in ignored if text not in plain]

    def rename(name: str) -> str | None:
        if name.startswith(plain) or any(fnmatch.fnmatchcase(name, p) for p in patterns):
            return None
        if prefix is None:
            return name
        return name[len(prefix) :] if name.startswith(prefix) else None

    return rename
