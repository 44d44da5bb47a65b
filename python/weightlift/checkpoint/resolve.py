"""A path or a Hub id becomes the list of a checkpoint's files. Of these, only an index is read."""

from __future__ import annotations

import dataclasses
import errno
import functools
import glob
import itertools
import json
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

from weightlift.checkpoint import hub as _hub
from weightlift.checkpoint.hub import HubArguments
from weightlift.core.errors import ArgumentError, CheckpointError, ReadError, read_error

__all__ = ["CheckpointFiles", "ShardFile", "resolve"]

Format = Literal["safetensors", "torch"]

# The names that diffusers and transformers give to weights, in the order in which they are looked
# for: any safetensors before .bin, diffusers' name before transformers'.
_MODELS: tuple[tuple[Format, str], ...] = (
    ("safetensors", "diffusion_pytorch_model"),
    ("safetensors", "model"),
    ("torch", "diffusion_pytorch_model"),
    ("torch", "pytorch_model"),
)
# peft's, and diffusers' for LoRA; where there is no model beside them.
_ADAPTERS: tuple[tuple[Format, str], ...] = (
    ("safetensors", "adapter_model"),
    ("safetensors", "pytorch_lora_weights"),
    ("torch", "adapter_model"),
    ("torch", "pytorch_lora_weights"),
)
_EXTENSIONS: dict[Format, str] = {"safetensors": ".safetensors", "torch": ".bin"}
# Of files that are named by their own path.
_FILE_FORMATS: dict[str, Format] = {
    ".safetensors": "safetensors",
    ".bin": "torch",
    ".pt": "torch",
    ".pth": "torch",
    ".ckpt": "torch",
}
_FLAX = ("diffusion_flax_model.msgpack", "flax_model.msgpack")
# As much as a safetensors header may have; an index of 92,000 tensors has 9 MB.
_LARGEST_INDEX = 100_000_000
# How many names an error lists before it only counts.
_LISTED = 20


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
    """

    files: tuple[ShardFile, ...]
    format: Literal["safetensors", "torch", "dduf-safetensors"]
    folder: str
    weight_map: Mapping[str, str] | None = None
    index_path: str | None = None
    index_metadata: Mapping[str, Any] = MappingProxyType({})
    unlisted: tuple[str, ...] = ()


def resolve(
    path_or_repo: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    hub: HubArguments | None = None,
) -> CheckpointFiles:
    """The files of a checkpoint; those of a repository are downloaded, and no others of it.

    In a folder, an index goes before a single file, ``diffusion_pytorch_model`` before ``model``,
    and any safetensors before ``.bin``.

    Args:
        path_or_repo: a file, an index, a ``.dduf`` file, a folder, or, where there is no such path,
            the id of a repository on the Hub.
        subfolder: a folder in it; of a pipeline, the component. ``hub.subfolder`` by default.
        variant: such as ``"fp16"`` for ``model.fp16.safetensors``. Nothing stands in for a variant
            that is not there.
        use_safetensors: ``None`` takes safetensors where there are some, else ``.bin``; ``True``
            takes nothing but safetensors, ``False`` nothing but ``.bin``.
        hub: how to get at the repository.

    Raises:
        CheckpointError: there are no such weights, and what there is; or an index is broken.
        ReadError: the path does not exist, nor does the repository, or it cannot be had (a
            ``FileNotFoundError`` or ``PermissionError`` too); the Hub's own reason is in it.
        FormatError: a ``.dduf`` file that is none.
        ArgumentError: arguments that do not go together.
    """
    text = os.fspath(path_or_repo)
    if not isinstance(text, str):
        raise ArgumentError(f"the path is {text!r}; it must be text, not bytes")
    if variant is not None and (not variant or "/" in variant or "\0" in variant):
        raise ArgumentError(f"variant is {variant!r}; it is a part of a file name, such as 'fp16'")
    hub = hub or HubArguments()
    folder = posixpath.normpath((hub.subfolder if subfolder is None else subfolder) or ".")
    folder = "" if folder == "." else folder
    wish = _Wish(variant, use_safetensors)
    path = Path(text)
    try:
        exists = text != "" and path.exists()
    except OSError as error:
        raise _os_error(error, text) from None
    if not exists:
        if path.suffix.lower() in (*_FILE_FORMATS, ".dduf", ".json"):
            raise read_error("not_found", "there is no such file", text)
        return _of_source(_Repository(text, hub), folder, wish)
    if path.is_dir():
        return _of_source(_Folder(path), folder, wish)
    if path.suffix.lower() == ".dduf":
        return _of_source(_Dduf(path), folder, wish)
    if folder or variant is not None:
        given = f"subfolder={folder!r}" if folder else f"variant={variant!r}"
        raise ArgumentError(f"{path} is a file; {given} goes with a folder")
    return _of_file(path, wish)


class _Wish(NamedTuple):
    variant: str | None
    use_safetensors: bool | None

    def takes(self, format: Format) -> bool:
        return self.use_safetensors in (None, format == "safetensors")


class _Source(Protocol):
    """What holds folders of files: a folder, a repository, an archive."""

    format: Literal["dduf-safetensors"] | None = None
    incomplete: str  # what has happened where a file is missing

    def place(self, folder: str) -> str:
        """For messages."""

    def entries(self, folder: str) -> tuple[set[str], set[str]]:
        """The files and the folders that are directly in a folder."""

    def find(self, folder: str, names: Sequence[str], format: Format) -> list[ShardFile]:
        """Files of a folder, downloaded if need be."""

    def read(self, folder: str, file: ShardFile) -> bytes:
        """The beginning of a file, or all that an index can have of it."""
        try:
            with Path(file.path).open("rb") as opened:
                return opened.read(_LARGEST_INDEX + 1)
        except OSError as error:
            raise _os_error(error, file.path) from None

    def no_folder(self, folder: str) -> CheckpointError:
        there = _listed(map(repr, sorted(self.entries("")[1]))) or "none"
        return CheckpointError(
            f"{self.place('')}: there is no subfolder {folder!r}; there is: {there}"
        )


class _Folder(_Source):
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
                    (folders if entry.is_dir() else files).add(entry.name)
        except OSError as error:
            if folder and isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise self.no_folder(folder) from None
            raise _os_error(error, self.place(folder)) from None
        return files, folders

    def find(self, folder: str, names: Sequence[str], format: Format) -> list[ShardFile]:
        found = [(name, self.root / folder / name) for name in names]
        for _, path in found:
            if not path.exists():
                raise CheckpointError(
                    f"{path}: is a link to {path.readlink()}, which is not there; download it again"
                )
        return [ShardFile(name, str(path), format) for name, path in found]


class _Listed(_Source, Protocol):
    """Where all paths are known beforehand."""

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


class _Repository(_Listed):
    incomplete = "neither the Hub, if it may be asked, nor the cache has them"

    def __init__(self, repo_id: str, hub: HubArguments) -> None:
        # One commit for the list and for every download, whatever is pushed meanwhile.
        self.hub = dataclasses.replace(hub, subfolder=None).pinned(repo_id)
        self.repo_id = repo_id
        self.paths = _hub.list_files(repo_id, self.hub)

    def place(self, folder: str) -> str:
        return f"{self.repo_id}/{folder}" if folder else self.repo_id

    def find(self, folder: str, names: Sequence[str], format: Format) -> list[ShardFile]:
        paths = [posixpath.join(folder, name) for name in names]
        hub = self.hub
        if len(paths) > 1:  # several at a time; it is silent where the Hub does not answer
            _hub.snapshot(self.repo_id, [glob.escape(path) for path in paths], hub)
            hub = dataclasses.replace(hub, force_download=False)
        here = [_hub.download(self.repo_id, path, hub) for path in paths]
        return [ShardFile(name, str(path), format) for name, path in zip(names, here, strict=True)]


class _Dduf(_Listed):
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


class _Weights(NamedTuple):
    """What the name of a file says."""

    name: str
    format: Format
    stem: str
    variant: str | None
    kind: Literal["index", "single", "shard"]
    spelling: int
    shards: int


# How the files of a checkpoint are called: @ is the stem, % the extension.
_SPELLINGS: tuple[tuple[Literal["index", "single", "shard"], str], ...] = (
    # diffusers and transformers
    ("index", r"@%\.index(?:\.(?P<variant>.+))?\.json"),
    # huggingface_hub's save_torch_state_dict
    ("index", r"@\.(?P<variant>.+)%\.index\.json"),
    # diffusers of 2024, which still reads them
    ("index", r"@%\.(?P<variant>.+)\.index\.json"),
    ("shard", r"@(?:\.(?P<variant>.+))?-\d{5,}-of-(?P<shards>\d{5,})%"),
    ("shard", r"@-\d{5,}-of-(?P<shards>\d{5,})\.(?P<variant>.+)%"),
    ("single", r"@(?:\.(?P<variant>.+))?%"),
)


# Each when it is first needed: to compile all of them takes longer than to open a checkpoint.
@functools.cache
def _pattern(format: Format, spelling: int) -> re.Pattern[str]:
    stems = "|".join(stem for own, stem in (*_MODELS, *_ADAPTERS) if own == format)
    pattern = _SPELLINGS[spelling][1].replace("@", f"(?P<stem>{stems})")
    return re.compile(pattern.replace("%", re.escape(_EXTENSIONS[format])), re.DOTALL)


def _parse(name: str) -> _Weights | None:
    is_index = name.endswith(".json")
    for format, extension in _EXTENSIONS.items():
        if extension not in name:
            continue
        for spelling, (kind, _) in enumerate(_SPELLINGS):
            if (kind == "index") != is_index:
                continue
            if found := _pattern(format, spelling).fullmatch(name):
                said = found.groupdict()
                shards = int(said.get("shards") or 0)
                return _Weights(name, format, said["stem"], said["variant"], kind, spelling, shards)
    return None


def _of_source(source: _Source, folder: str, wish: _Wish) -> CheckpointFiles:
    names, folders = source.entries(folder)
    known = [found for name in sorted(names) if (found := _parse(name))]
    weights = [one for one in known if (one.format, one.stem) in _MODELS] or known
    chosen = _choose(weights, wish)
    if chosen is None:
        raise CheckpointError(
            f"{source.place(folder)}: {_why_nothing(source, folder, names, folders, weights, wish)}"
        )
    if chosen.kind == "index":
        return _of_index(source, folder, names, chosen.name, chosen.format)
    files = source.find(folder, [chosen.name], chosen.format)
    return CheckpointFiles(tuple(files), source.format or chosen.format, _folder_of(files))


def _choose(weights: Sequence[_Weights], wish: _Wish) -> _Weights | None:
    order = (*_MODELS, *_ADAPTERS)
    fit = [
        (order.index((found.format, found.stem)), found.spelling, found)
        for found in weights
        if found.kind != "shard" and found.variant == wish.variant and wish.takes(found.format)
    ]
    return min(fit, key=lambda item: item[:2])[2] if fit else None


def _of_index(
    source: _Source, folder: str, names: set[str], index_name: str, format: Format
) -> CheckpointFiles:
    place = f"{source.place(folder)}/{index_name}"
    index = source.find(folder, [index_name], format)
    weight_map, metadata = _parse_index(source.read(folder, index[0]), place, format)
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if name not in names]
    if missing:
        raise CheckpointError(
            f"{place}: {len(missing)} of the {len(shards)} files that it lists are missing: "
            f"{_listed(missing)}; {source.incomplete}"
        )
    files = source.find(folder, shards, format)
    parsed = {name: _parse(name) for name in names if name.endswith(_EXTENSIONS[format])}
    series = {_series(parsed[name]) for name in shards} - {None}
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
    )


def _series(weights: _Weights | None) -> tuple[str, str | None, int] | None:
    if weights is None or weights.kind != "shard":
        return None
    return weights.stem, weights.variant, weights.shards


def _parse_index(text: bytes, place: str, format: Format) -> tuple[dict[str, str], dict[str, Any]]:
    if len(text) > _LARGEST_INDEX:
        raise CheckpointError(f"{place}: has more than {_LARGEST_INDEX} bytes, as no index has")
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{place}: is a git-lfs pointer: fetch the file with `git lfs pull`")
    try:
        found = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{place}: is no JSON that an index can be: {error}") from None
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{place}: is no index: it has no object 'weight_map'")
    if not weight_map:
        raise CheckpointError(f"{place}: is an index of nothing: its weight_map is empty")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{place}: tensor {tensor!r}: its file is {name!r}; it must be the name of one"
            )
    for name in sorted(set(weight_map.values())):
        # Knows both kinds of separators, and drives, on every system.
        if PureWindowsPath(name).name != name or name in ("", ".", "..") or "\0" in name:
            raise CheckpointError(
                f"{place}: lists the file {name!r}; it must be the plain name of a file beside it"
            )
        if not name.endswith(_EXTENSIONS[format]):
            raise CheckpointError(
                f"{place}: lists the file {name!r}; those of this index end in "
                f"{_EXTENSIONS[format]!r}"
            )
    metadata = found.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{place}: its metadata is {metadata!r}; it must be an object")
    return weight_map, metadata


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice = next(a for a, b in itertools.pairwise(keys) if a == b)
        raise ValueError(f"{twice!r} is in it twice")
    return made


def _of_file(path: Path, wish: _Wish) -> CheckpointFiles:
    if path.suffix == ".json":
        format = _format_of_index(path)
        _check_format(path, format, wish)
        source = _Folder(path.parent)
        return _of_index(source, "", source.entries("")[0], path.name, format)
    if path.name.startswith(_FLAX):
        raise CheckpointError(f"{path}: holds Flax weights, which are read with from_flax=True")
    format = _FILE_FORMATS.get(path.suffix.lower()) or _format_of_bytes(path)
    _check_format(path, format, wish)
    files = [ShardFile(path.name, str(path), format)]
    return CheckpointFiles(tuple(files), format, _folder_of(files))


def _format_of_index(path: Path) -> Format:
    for format, extension in _EXTENSIONS.items():
        if f"{extension}." in path.name:
            return format
    raise CheckpointError(
        f"{path}: is no index by its name, which has '.safetensors.' or '.bin.' in it, as "
        "'model.safetensors.index.json' has"
    )


def _format_of_bytes(path: Path) -> Format:
    """Of a file whose name does not tell, such as a blob of a Hub cache."""
    if not path.is_file():  # opening a pipe would wait for its writer
        raise CheckpointError(f"{path}: is no regular file")
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise _os_error(error, str(path)) from None
    # Zip's magic, and pickle's PROTO. What else it may be, the reader of safetensors can tell.
    return "torch" if head == b"PK\x03\x04" or head[:1] == b"\x80" else "safetensors"


def _check_format(path: Path, format: Format, wish: _Wish) -> None:
    if not wish.takes(format):
        raise CheckpointError(
            f"{path}: use_safetensors={wish.use_safetensors} does not allow this file"
        )


def _folder_of(files: Sequence[ShardFile]) -> str:
    return str(Path(files[0].path).parent)


def _why_nothing(
    source: _Source,
    folder: str,
    names: set[str],
    folders: set[str],
    weights: Sequence[_Weights],
    wish: _Wish,
) -> str:
    whole = [found for found in weights if found.kind != "shard"]
    fit = [found.name for found in whole if found.variant == wish.variant]
    if fit:
        wanted = "safetensors" if wish.use_safetensors else ".bin"
        return (
            f"use_safetensors={wish.use_safetensors} asks for {wanted}, and there is: "
            f"{_listed(fit)}"
        )
    if whole:
        wanted = "without a variant" if wish.variant is None else f"of variant {wish.variant!r}"
        there = _listed(sorted({f"variant={found.variant!r}" for found in whole}))
        return f"there are no weights {wanted}; there is: {there}"
    if weights:
        example = f"{weights[0].stem}{_EXTENSIONS[weights[0].format]}.index.json"
        return (
            f"there are shards ({_listed(found.name for found in weights)}), but no index such as "
            f"{example}; the download, the copy or the save is incomplete"
        )
    flax = sorted(name for name in names if name.startswith(_FLAX))
    if flax:
        return (
            f"there are only Flax weights ({_listed(flax)}): use from_flax=True, or a Flax model "
            "without from_pt"
        )
    if "model_index.json" in names:
        components = (
            name for name in sorted(folders) if _has_weights(source, posixpath.join(folder, name))
        )
        there = _listed(f"subfolder={name!r}" for name in components)
        return f"is a whole pipeline; name a component of it: {there or 'none has weights'}"
    if {"refs", "snapshots"} <= folders:
        commits = sorted(source.entries(posixpath.join(folder, "snapshots"))[1])
        there = _listed(f"snapshots/{commit}" for commit in commits)
        return f"is a repository of a Hub cache; open one of its snapshots: {there or 'none'}"
    looked_for = ", ".join(_looked_for(wish))
    if not names and not folders:
        return f"the folder is empty; looked for {looked_for}"
    there = _listed([*sorted(names), *(f"{name}/" for name in sorted(folders))])
    other = any(Path(name).suffix in _FILE_FORMATS for name in names)
    hint = "; a file of another name is opened by its own path" if other else ""
    return f"there are no weights: looked for {looked_for}; there is: {there}{hint}"


def _has_weights(source: _Source, folder: str) -> bool:
    return any(_parse(name) or name in _FLAX for name in source.entries(folder)[0])


def _looked_for(wish: _Wish) -> Iterable[str]:
    variant = "" if wish.variant is None else f".{wish.variant}"
    for format, stem in (*_MODELS, *_ADAPTERS):
        if wish.takes(format):
            yield f"{stem}{variant}{_EXTENSIONS[format]}"
    yield "or the .index.json of one"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _os_error(error: OSError, path: str) -> ReadError:
    codes = {errno.ENOENT: "not_found", errno.EACCES: "permission_denied"}
    number = error.errno or errno.EIO
    return read_error(codes.get(number, "read_failed"), error.strerror or str(error), path, number)
