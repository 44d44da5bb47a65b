"""Finds the files of a checkpoint by a path or a Hub id. Reads only the index."""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from weightlift.checkpoint.file_names import (
    ADAPTERS,
    EXTENSIONS,
    FILE_FORMATS,
    FLAX_NAMES,
    MODELS,
    Selection,
    WeightsName,
    choose,
    listed,
    parse_name,
)
from weightlift.checkpoint.files import CheckpointFiles, Format, ShardFile
from weightlift.checkpoint.first_bytes import FirstBytes
from weightlift.checkpoint.hub import HubArguments, subfolder_text
from weightlift.checkpoint.shard_index import parse_index
from weightlift.checkpoint.sources import DdufFile, Folder, Repository, Source, as_read_error
from weightlift.core.errors import ArgumentError, CheckpointError, ReadError, read_error
from weightlift.core.given import check_flag, check_text
from weightlift.core.paths import path_text

__all__ = ["resolve", "torch_format_of"]


def resolve(
    path_or_repo: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    hub: HubArguments | None = None,
    strict_index: bool = False,
) -> CheckpointFiles:
    """Finds the files of a checkpoint, and downloads them from a repository (no others).

    In a folder, any safetensors are preferred to ``.bin``, and ``diffusion_pytorch_model`` to
    ``model``. If there are an index and a single file of one name, the choice is that of the
    library that uses the name, with a warning: the index for diffusers' names, else the single
        file.

    Args:
        path_or_repo: a file, an index, a ``.dduf`` file, a folder, or, if the path does not exist,
            the id of a Hub repository.
        subfolder: a folder in it; the component of a pipeline. ``hub.subfolder`` by default.
        variant: a variant such as ``"fp16"`` for ``model.fp16.safetensors``. A missing variant is
            an error.
        use_safetensors: ``None`` prefers safetensors to ``.bin``; ``True`` accepts only
            safetensors, ``False`` only ``.bin``.
        hub: the arguments for access to the repository.
        strict_index: an index that names a tensor twice is an error.

    Raises:
        CheckpointError: there are no such weights (the text lists those that exist), or an index is
            invalid.
        ReadError: neither the path nor the repository exists, or access fails (also a
            ``FileNotFoundError`` or ``PermissionError``); the text has the Hub's reason.
        FormatError: a ``.dduf`` file is invalid.
        ArgumentError: an argument is invalid, or two contradict each other.
    """
    text = path_text(path_or_repo)
    check_text("variant", variant, "fp16")
    if use_safetensors is not None:
        check_flag("use_safetensors", use_safetensors)
    if variant is not None and (not variant or "/" in variant or "\0" in variant):
        raise ArgumentError(
            f"variant is {variant!r}; it must be a part of a file name, such as 'fp16'"
        )
    hub = hub or HubArguments()
    subfolder = None if subfolder is None else subfolder_text(subfolder)
    folder = posixpath.normpath((hub.subfolder if subfolder is None else subfolder) or ".")
    folder = "" if folder == "." else folder
    selection = Selection(variant, use_safetensors, strict_index)
    path = Path(text)
    mode = _mode(text)
    if mode is None:
        if path.is_symlink():
            aim = path.readlink()
            raise read_error("not_found", f"it is a link to {aim}, which is not there", text)
        if path.suffix.lower() in (*FILE_FORMATS, ".dduf", ".json"):
            raise read_error("not_found", "no such file", text)
        return _of_source(Repository(text, hub, folder, selection), folder, selection)
    if stat.S_ISDIR(mode):
        return _of_source(Folder(path), folder, selection)
    if path.suffix.lower() == ".dduf":
        return _of_source(DdufFile(path), folder, selection)
    if folder or variant is not None:
        given = f"subfolder={folder!r}" if folder else f"variant={variant!r}"
        raise ArgumentError(f"{path} is a file; {given} needs a folder: leave it out")
    return _of_file(path, selection)


def _mode(path: str) -> int | None:
    """``st_mode`` of what is there; ``None`` where nothing is, as for ``Path.exists``."""
    try:
        return os.stat(path).st_mode  # noqa: PTH116 - of "", pathlib's is the current folder
    except ValueError:  # a null character
        return None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EBADF):
            return None
        raise as_read_error(error, path) from None


def _of_source(source: Source, folder: str, selection: Selection) -> CheckpointFiles:
    names, folders = source.entries(folder)
    known = [found for name in sorted(names) if (found := parse_name(name))]
    weights = [one for one in known if (one.format, one.stem) in MODELS] or known
    chosen, notes = _chosen(source, folder, weights, selection)
    if chosen is None:
        why = _why_nothing(source, folder, names, folders, weights, selection)
        raise CheckpointError(f"{source.place(folder)}: {why}")
    if chosen.kind == "index":
        indexed = _of_index(source, folder, names, chosen.name, chosen.format, selection)
        return indexed._replace(notes=(*notes, *_other_forms(weights, chosen), *indexed.notes))
    files = source.find(folder, [chosen.name], chosen.format)
    return CheckpointFiles(
        tuple(files),
        source.format or chosen.format,
        _folder_of(files),
        notes=(*notes, *_other_forms(weights, chosen)),
    )


def _chosen(
    source: Source, folder: str, weights: Sequence[WeightsName], selection: Selection
) -> tuple[WeightsName | None, tuple[str, ...]]:
    """What a library would load, and what to say. As for the libraries, a link to what is not there
    is no file where there are other weights."""
    first = chosen = choose(weights, selection)
    left = list(weights)
    while chosen is not None and source.is_gone(folder, chosen.name):
        left.remove(chosen)
        chosen = choose(left, selection)
    if chosen is None or first is None or chosen is first:
        return first, ()
    return chosen, (
        f"{first.name} is a link to what is not there, and {chosen.name} is taken in its place: "
        "download it again, or remove the link",
    )


def _other_forms(weights: Sequence[WeightsName], chosen: WeightsName) -> tuple[str, ...]:
    """The warning if both an index and a single file exist."""
    others = [
        one.name
        for one in weights
        if one.kind not in ("shard", chosen.kind)
        and (one.format, one.stem, one.variant) == (chosen.format, chosen.stem, chosen.variant)
    ]
    if not others:
        return ()
    library = "diffusers" if chosen.stem == "diffusion_pytorch_model" else "transformers"
    return (
        f"{chosen.name} is taken, as {library} does; {listed(others)} is ignored: remove one of "
        "them",
    )


def _of_index(
    source: Source,
    folder: str,
    names: set[str],
    index_name: str,
    format: Format,
    selection: Selection,
) -> CheckpointFiles:
    place = f"{source.place(folder)}/{index_name}"
    index = source.find(folder, [index_name], format)
    text = source.read(folder, index[0])
    weight_map, metadata, notes = parse_index(text, place, selection.strict_index)
    shards = sorted(set(weight_map.values()))
    listed_format = _format_of_shards(shards, place, format, selection.strict_index)
    if listed_format != format:
        _check_format(Path(place), listed_format, selection)
        notes = (*notes, f"{index_name} lists files of the other format, which are taken")
        format = listed_format
    missing = [
        name for name in shards if not (source.has(folder, name) if "/" in name else name in names)
    ]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        which = f"{len(missing)} of the {len(shards)} files that it lists {are}"
        if len(shards) == 1:
            which = "the file that it lists is"
        raise CheckpointError(f"{place}: {which} missing: {listed(missing)}; {source.incomplete}")
    files = source.find(folder, shards, format)
    parsed = {name: parse_name(name) for name in names if name.endswith(EXTENSIONS[format])}
    series = {_series(parsed.get(name)) for name in shards} - {None}
    unlisted = sorted(
        name for name in parsed.keys() - set(shards) if _series(parsed[name]) in series
    )
    return CheckpointFiles(
        tuple(files),
        source.format or format,
        _folder_of(index),
        weight_map,
        index[0].path,
        metadata,
        tuple(unlisted),
        notes,
    )


def _format_of_shards(shards: Sequence[str], place: str, format: Format, strict: bool) -> Format:
    """By the suffixes of what an index lists, as the libraries tell it."""
    allowed: tuple[Format, ...] = (format,) if strict else (format, *EXTENSIONS)
    for found in allowed:
        if all(name.endswith(EXTENSIONS[found]) for name in shards):
            return found
    others = [name for name in shards if not name.endswith(EXTENSIONS[format])]
    raise CheckpointError(
        f"{place}: lists the file {others[0]!r}; those of this index end in {EXTENSIONS[format]!r}"
    )


def _series(weights: WeightsName | None) -> tuple[str, str | None, int] | None:
    if weights is None or weights.kind != "shard":
        return None
    return weights.stem, weights.variant, weights.shards


def _of_file(path: Path, selection: Selection) -> CheckpointFiles:
    if path.suffix == ".json":
        format = _format_of_index(path)
        _check_format(path, format, selection)
        source = Folder(path.parent)
        return _of_index(source, "", source.entries("")[0], path.name, format, selection)
    if path.name.startswith(FLAX_NAMES):
        raise CheckpointError(f"{path}: holds Flax weights: read them with from_flax=True")
    named = FILE_FORMATS.get(path.suffix.lower())
    format = named if named == "safetensors" else _format_of_bytes(path, named)
    _check_format(path, format, selection)
    files = [ShardFile(path.name, str(path), format)]
    notes: tuple[str, ...] = ()
    if named is not None and format != named:
        notes = ("holds safetensors despite its name, and is read as safetensors",)
    return CheckpointFiles(tuple(files), format, _folder_of(files), notes=notes, is_given=True)


def _format_of_index(path: Path) -> Format:
    for format, extension in EXTENSIONS.items():
        if f"{extension}." in path.name:
            return format
    raise CheckpointError(
        f"{path}: is not the name of an index, which has '.safetensors.' or '.bin.' in it, such as "
        "'model.safetensors.index.json'"
    )


def _format_of_bytes(path: Path, named: Format | None) -> Format:
    """The format of a file whose name does not give it, such as a blob of a Hub cache, or whose
    name gives torch, which may still be safetensors."""
    if not path.is_file():  # to open a pipe would wait for its writer
        raise CheckpointError(f"{path}: is not a regular file")
    try:
        first = FirstBytes.of(str(path))
    except OSError as error:
        raise as_read_error(error, str(path)) from None
    if first.is_safetensors:
        return "safetensors"
    # The safetensors parser recognizes all other files.
    return named or ("torch" if first.is_torch else "safetensors")


def torch_format_of(path: str) -> Literal["torch"] | None:
    """``"torch"`` for a file of torch.save, by its name and bytes, or only by its bytes if the name
    gives no format; ``None`` for all other files, which the safetensors parser judges."""
    # Without pathlib, which takes longer than the file system.
    name = os.path.basename(path)  # noqa: PTH119
    dot = name.rfind(".")
    named = FILE_FORMATS.get(name[dot:].lower()) if dot > 0 else None
    if named == "safetensors":
        return None
    try:
        if not os.path.isfile(path):  # noqa: PTH113
            return None
        first = FirstBytes.of(path)
    except (OSError, ValueError):
        return None
    if first.is_safetensors:
        return None
    return "torch" if named is not None or first.is_torch else None


def _check_format(path: Path, format: Format, selection: Selection) -> None:
    if not selection.takes(format):
        raise CheckpointError(
            f"{path}: use_safetensors={selection.use_safetensors} does not allow this file"
        )


def _folder_of(files: Sequence[ShardFile]) -> str:
    return str(Path(files[0].path).parent)


def _why_nothing(
    source: Source,
    folder: str,
    names: set[str],
    folders: set[str],
    weights: Sequence[WeightsName],
    selection: Selection,
) -> str:
    whole = [found for found in weights if found.kind != "shard"]
    fit = [found.name for found in whole if found.variant == selection.variant]
    if fit:
        wanted = "safetensors" if selection.use_safetensors else ".bin"
        return (
            f"use_safetensors={selection.use_safetensors} needs {wanted}; there is: {listed(fit)}"
        )
    if whole:
        wanted = (
            "without a variant"
            if selection.variant is None
            else f"of variant {selection.variant!r}"
        )
        there = listed(sorted({f"variant={found.variant!r}" for found in whole}))
        return f"there are no weights {wanted}; there is: {there}"
    if weights:
        example = f"{weights[0].stem}{EXTENSIONS[weights[0].format]}.index.json"
        return (
            f"there are shards ({listed(found.name for found in weights)}), but no index such as "
            f"{example}; the download, the copy or the save is incomplete"
        )
    flax = sorted(name for name in names if name.startswith(FLAX_NAMES))
    if flax:
        return (
            f"there are only Flax weights ({listed(flax)}): use from_flax=True, or a Flax model "
            "without from_pt"
        )
    if "model_index.json" in names:
        components = (
            name for name in sorted(folders) if _has_weights(source, posixpath.join(folder, name))
        )
        there = listed(f"subfolder={name!r}" for name in components)
        return f"is a whole pipeline; name a component of it: {there or 'none has weights'}"
    if {"refs", "snapshots"} <= folders:
        commits = sorted(source.entries(posixpath.join(folder, "snapshots"))[1])
        there = listed(f"snapshots/{commit}" for commit in commits)
        return f"is a repository of a Hub cache; open one of its snapshots: {there or 'none'}"
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        return (
            "is a checkpoint of torch.distributed.checkpoint: convert it to one file with "
            "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE`"
        )
    return _no_weights(names, folders, selection)


def _no_weights(names: set[str], folders: set[str], selection: Selection) -> str:
    """The message for a folder without weights: what it has instead."""
    looked_for = ", ".join(_looked_for(selection))
    if not names and not folders:
        return f"the folder is empty; expected {looked_for}"
    there = listed([*sorted(names), *(f"{name}/" for name in sorted(folders))])
    other = any(Path(name).suffix in FILE_FORMATS for name in names)
    hint = "; to open a file of another name, give its own path" if other else ""
    gguf = ""
    if any(name.lower().endswith(".gguf") for name in names):
        gguf = (
            " (for GGUF use transformers' from_pretrained(gguf_file=...) or diffusers' "
            "from_single_file)"
        )
    return f"there are no weights: expected {looked_for}{gguf}; there is: {there}{hint}"


def _has_weights(source: Source, folder: str) -> bool:
    try:
        names = source.entries(folder)[0]
    except (ReadError, CheckpointError):  # a folder without read permission
        return False
    return any(parse_name(name) or name in FLAX_NAMES for name in names)


def _looked_for(selection: Selection) -> Iterable[str]:
    variant = "" if selection.variant is None else f".{selection.variant}"
    for format, stem in (*MODELS, *ADAPTERS):
        if selection.takes(format):
            yield f"{stem}{variant}{EXTENSIONS[format]}"
    yield "or the .index.json of one"
