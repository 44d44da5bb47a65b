"""A path or a Hub id becomes a Checkpoint."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import weightlift._native as _native
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.hub import HubArguments
from weightlift.checkpoint.integrity import Identity
from weightlift.checkpoint.resolve import CheckpointFiles, resolve
from weightlift.checkpoint.torch_file import LoadedTorchFile, View, open_torch_file
from weightlift.core.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    import torch


__all__ = ["open_checkpoint", "open_files"]

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
) -> Checkpoint:
    """Opens a checkpoint of any form: reads its index, not its tensors.

    Args:
        path_or_repo: a ``.safetensors``, ``.bin``, ``.pt``, ``.pth``, ``.ckpt`` or ``.dduf`` file,
            a folder with weights under one of their usual names (sharded or not), or the id of a
            repository on the Hub, of which only the files that are needed are downloaded.
        subfolder: within the folder or repository; of a ``.dduf`` file, the component.
        variant: such as ``"fp16"``, for ``model.fp16.safetensors``.
        use_safetensors: ``None`` takes ``.bin`` where there is no safetensors, ``True`` does not,
            ``False`` takes ``.bin``.
        state_dict_key: where in a torch file the tensors are; ``None`` finds the only place.
        prefix: of the names that are wanted; it is stripped, tensors without it are left out.
        ignore: tensors to leave out: beginnings of their names, or patterns with ``*``.
        revision: a branch, tag or commit.
        token: for the Hub; ``False`` sends none.
        cache_dir: of the Hub.
        local_files_only: do not ask the Hub.
        force_download: again, whatever the cache holds.
        mirror: the endpoint to ask instead of the Hub; it gets no token but an explicit one.

    Raises:
        CheckpointError: there is no such checkpoint, or its index contradicts its files.
        FormatError: a file breaks its format.
        ReadError: a file cannot be read.
    """
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
    )
    checkpoint = open_files(files, state_dict_key)
    if prefix is not None or ignore is not None:
        checkpoint = checkpoint.renamed(_renaming(prefix, ignore))
        if not checkpoint:
            raise CheckpointError(
                f"{path_or_repo}: no tensor is left with prefix={prefix!r} and ignore={ignore!r}"
            )
    return checkpoint


def open_files(files: CheckpointFiles, state_dict_key: str | None) -> Checkpoint:
    parts: list[_native.IndexedFile] = []
    formats: list[str] = []
    views: list[Mapping[str, View]] = []
    in_memory: dict[str, torch.Tensor] = {}
    loaded: list[tuple[str, Identity]] = []
    metadata: dict[str, str] = {}
    not_tensors: dict[str, str] = {}
    fallbacks: list[str] = []
    holder: dict[str, str] = {}
    order: list[str] = []
    for shard in files.files:
        if shard.format == "safetensors":
            part = _native.IndexedFile.open(shard.path, shard.begin, shard.bytes)
            names = part.names()
            parts.append(part)
            views.append({})
            metadata.update(part.metadata() or {})
        else:
            opened = open_torch_file(shard.path, state_dict_key=state_dict_key)
            not_tensors.update(opened.not_tensors)
            if isinstance(opened, LoadedTorchFile):
                names = list(opened.tensors)
                in_memory.update(opened.tensors)
                loaded.append((shard.path, opened.identity))
                fallbacks.append(f"{shard.path}: loaded by torch: {opened.reason}")
            else:
                names = opened.names
                parts.append(opened.part)
                views.append(opened.views)
        if len(formats) < len(parts):
            formats.append(shard.format)
        order += names
        if not holder.keys().isdisjoint(names):
            name = next(name for name in names if name in holder)
            raise CheckpointError(
                f"{files.folder}: tensor {name!r} is in {holder[name]} and in {shard.name}: "
                "one of them is not of this checkpoint; save or download it again"
            )
        holder.update(dict.fromkeys(names, shard.name))
    _check_index(files, holder)
    if not_tensors:
        metadata["not_tensors"] = json.dumps(not_tensors)
    if state_dict_key is not None and files.format != "torch":
        raise ArgumentError(
            f"{files.folder}: state_dict_key={state_dict_key!r} is for torch files, and this "
            "checkpoint is safetensors"
        )
    checkpoint = Checkpoint(
        parts,
        formats=formats,
        views=views,
        in_memory=in_memory,
        loaded=loaded,
        metadata=metadata,
        fallbacks=fallbacks,
    )
    # A state dict has an order of its own, which its storages need not be in.
    return checkpoint if list(checkpoint) == order else checkpoint.ordered(order)


def _check_index(files: CheckpointFiles, holder: Mapping[str, str]) -> None:
    """Every tensor is where the index says."""
    if files.unlisted:
        _log.warning(
            "%s: %s not in the index %s, and left out",
            files.folder,
            ", ".join(files.unlisted) + (" is" if len(files.unlisted) == 1 else " are"),
            files.index_path,
        )
    wrong = [
        f"{name!r} in {shard}, and it is "
        + (f"in {holder[name]}" if name in holder else "in none of its files")
        for name, shard in (files.weight_map or {}).items()
        if holder.get(name) != shard
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more such" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{files.index_path}: the index says tensor {wrong[0]}{more}: index and shards are of "
            "different checkpoints; save or download it again"
        )


def _renaming(
    prefix: str | None, ignore: str | Iterable[str] | None
) -> Callable[[str], str | None]:
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
