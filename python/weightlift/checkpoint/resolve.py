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
from weightlift.checkpoint.torch_errors import is_safetensors
from weightlift.core.errors import ArgumentError, CheckpointError, ReadError, read_error

__all__ = ["CheckpointFiles", "ShardFile", "resolve", "torch_format_of"]

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


def resolve(
    path_or_repo: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    hub: HubArguments | None = None,
    strict_index: bool = False,
) -> CheckpointFiles:
    """The files of a checkpoint; those of a repository are downloaded, and no others of it.

    In a folder, any safetensors go before ``.bin``, and ``diffusion_pytorch_model`` before
    ``model``. Where there are an index and a single file of one name, the one is taken that the
    library takes whose name it is, with a warning: of diffusers' names the index, of others the
    single file.

    Args:
        path_or_repo: a file, an index, a ``.dduf`` file, a folder, or, where there is no such path,
            the id of a repository on the Hub.
        subfolder: a folder in it; of a pipeline, the component. ``hub.subfolder`` by default.
        variant: such as ``"fp16"`` for ``model.fp16.safetensors``. Nothing stands in for a variant
            that is not there.
        use_safetensors: ``None`` takes safetensors where there are some, else ``.bin``; ``True``
            takes nothing but safetensors, ``False`` nothing but ``.bin``.
        hub: how to get at the repository.
        strict_index: an index that names a tensor twice is an error.

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
    wish = _Wish(variant, use_safetensors, strict_index)
    path = Path(text)
    try:
        exists = text != "" and path.exists()
    except OSError as error:
        raise _os_error(error, text) from None
    if not exists:
        if path.suffix.lower() in (*_FILE_FORMATS, ".dduf", ".json"):
            raise read_error("not_found", "there is no such file", text)
        return _of_source(_Repository(text, hub, folder, wish), folder, wish)
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
    strict_index: bool = False

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

    def has(self, folder: str, name: str) -> bool:
        """Whether there is a file, perhaps in a folder of the folder."""

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


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle, or to where one may not look
        return False


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
                    (folders if _is_folder(entry) else files).add(entry.name)
        except OSError as error:
            if folder and isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise self.no_folder(folder) from None
            raise _os_error(error, self.place(folder)) from None
        return files, folders

    def find(self, folder: str, names: Sequence[str], format: Format) -> list[ShardFile]:
        found = [(name, self.root / folder / name) for name in names]
        for _, path in found:
            if not _exists(path):
                raise CheckpointError(
                    f"{path}: is a link to {path.readlink()}, which is not there; download it again"
                    if path.is_symlink()
                    else f"{path}: is not there; {self.incomplete}"
                )
        return [ShardFile(name, str(path), format) for name, path in found]

    def has(self, folder: str, name: str) -> bool:
        return os.path.lexists(self.root / folder / name)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


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

    def has(self, folder: str, name: str) -> bool:
        return posixpath.join(folder, name) in self.paths


class _Repository(_Listed):
    incomplete = "neither the Hub, if it may be asked, nor the cache has them"

    def __init__(self, repo_id: str, hub: HubArguments, folder: str, wish: _Wish) -> None:
        # One commit for the list and for every download, whatever is pushed meanwhile.
        self.hub = dataclasses.replace(hub, subfolder=None).pinned(repo_id)
        self.repo_id = repo_id
        if not hub.force_download:
            # What a commit holds does not change: with all of it here, nobody need be asked.
            self.paths = _hub.cached_files(repo_id, self.hub) or []
            if self._is_complete(folder, wish):
                self.hub = dataclasses.replace(self.hub, local_files_only=True)
                return
        self.paths = _hub.list_files(repo_id, self.hub)

    def _is_complete(self, folder: str, wish: _Wish) -> bool:
        """Whether the weights that are wanted are here, and not only others."""
        try:
            names = self.entries(folder)[0]
        except CheckpointError:
            return False
        known = [found for name in sorted(names) if (found := _parse(name))]
        models = [one for one in known if (one.format, one.stem) in _MODELS]
        chosen = _choose(models, wish)
        if chosen is None or (chosen.format != "safetensors" and wish.use_safetensors is not False):
            return False
        if chosen.kind == "single":
            return True
        place = f"{self.place(folder)}/{chosen.name}"
        hub = dataclasses.replace(self.hub, local_files_only=True)
        try:
            path = _hub.download(self.repo_id, posixpath.join(folder, chosen.name), hub)
            text = path.read_bytes()
            weight_map, _, _ = _parse_index(text, place, chosen.format, wish.strict_index)
        except (OSError, CheckpointError):
            return False
        return all(self.has(folder, name) for name in set(weight_map.values()))

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
        indexed = _of_index(source, folder, names, chosen.name, chosen.format, wish)
        return indexed._replace(notes=(*_other_forms(weights, chosen), *indexed.notes))
    files = source.find(folder, [chosen.name], chosen.format)
    return CheckpointFiles(
        tuple(files),
        source.format or chosen.format,
        _folder_of(files),
        notes=_other_forms(weights, chosen),
    )


def _choose(weights: Sequence[_Weights], wish: _Wish) -> _Weights | None:
    order = (*_MODELS, *_ADAPTERS)
    fit = [
        (order.index((found.format, found.stem)), _later(found), found.spelling, found)
        for found in weights
        if found.kind != "shard" and found.variant == wish.variant and wish.takes(found.format)
    ]
    return min(fit, key=lambda item: item[:3])[3] if fit else None


def _later(weights: _Weights) -> bool:
    """diffusers looks for an index first, transformers and accelerate for a single file."""
    first = "index" if weights.stem == "diffusion_pytorch_model" else "single"
    return weights.kind != first


def _other_forms(weights: Sequence[_Weights], chosen: _Weights) -> tuple[str, ...]:
    """What to say where the same weights are there in the other form."""
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
        f"{chosen.name} is taken, as by {library}, and {_listed(others)} beside it is not: remove "
        "one of them",
    )


def _of_index(
    source: _Source,
    folder: str,
    names: set[str],
    index_name: str,
    format: Format,
    wish: _Wish,
) -> CheckpointFiles:
    place = f"{source.place(folder)}/{index_name}"
    index = source.find(folder, [index_name], format)
    text = source.read(folder, index[0])
    weight_map, metadata, notes = _parse_index(text, place, format, wish.strict_index)
    shards = sorted(set(weight_map.values()))
    missing = [
        name for name in shards if not (source.has(folder, name) if "/" in name else name in names)
    ]
    if missing:
        raise CheckpointError(
            f"{place}: {len(missing)} of the {len(shards)} files that it lists are missing: "
            f"{_listed(missing)}; {source.incomplete}"
        )
    files = source.find(folder, shards, format)
    parsed = {name: _parse(name) for name in names if name.endswith(_EXTENSIONS[format])}
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


def _series(weights: _Weights | None) -> tuple[str, str | None, int] | None:
    if weights is None or weights.kind != "shard":
        return None
    return weights.stem, weights.variant, weights.shards


def _parse_index(
    text: bytes, place: str, format: Format, strict: bool
) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
    """(tensor -> file, what the index says besides, what to warn of)"""
    if len(text) > _LARGEST_INDEX:
        raise CheckpointError(f"{place}: has more than {_LARGEST_INDEX} bytes, as no index has")
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{place}: is a git-lfs pointer: fetch the file with `git lfs pull`")
    twice: list[str] = []
    try:
        found = json.loads(
            text.decode(), object_pairs_hook=lambda pairs: _object(pairs, twice, strict)
        )
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
        _check_shard_name(name, place, format)
    metadata = found.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{place}: its metadata is {metadata!r}; it must be an object")
    notes = (f"{twice[0]!r} is in it twice; the last entry holds",) if twice else ()
    return weight_map, metadata, notes


def _check_shard_name(name: str, place: str, format: Format) -> None:
    """Refuses what leads out of the index's folder, or is of another format."""
    # Knows both kinds of separators, and drives, on every system.
    windows = PureWindowsPath(name)
    if (
        "\\" in name
        or "\0" in name
        or windows.drive
        or any(part in ("", ".", "..") for part in name.split("/"))
    ):
        raise CheckpointError(
            f"{place}: lists the file {name!r}; it must be the plain name of a file beside it, or "
            "of one in a folder beside it"
        )
    if not name.endswith(_EXTENSIONS[format]):
        raise CheckpointError(
            f"{place}: lists the file {name!r}; those of this index end in {_EXTENSIONS[format]!r}"
        )


def _object(pairs: list[tuple[str, Any]], twice: list[str], strict: bool) -> dict[str, Any]:
    """A JSON object; of a key that is there twice the last value holds, as in Python's own."""
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice += [a for a, b in itertools.pairwise(keys) if a == b]
        if strict:
            raise ValueError(f"{twice[0]!r} is in it twice")
    return made


def _of_file(path: Path, wish: _Wish) -> CheckpointFiles:
    if path.suffix == ".json":
        format = _format_of_index(path)
        _check_format(path, format, wish)
        source = _Folder(path.parent)
        return _of_index(source, "", source.entries("")[0], path.name, format, wish)
    if path.name.startswith(_FLAX):
        raise CheckpointError(f"{path}: holds Flax weights, which are read with from_flax=True")
    named = _FILE_FORMATS.get(path.suffix.lower())
    format = named if named == "safetensors" else _format_of_bytes(path, named)
    _check_format(path, format, wish)
    files = [ShardFile(path.name, str(path), format)]
    notes: tuple[str, ...] = ()
    if named is not None and format != named:
        notes = (f"{path.name} holds safetensors, and is read as that whatever its name says",)
    return CheckpointFiles(tuple(files), format, _folder_of(files), notes=notes)


def _format_of_index(path: Path) -> Format:
    for format, extension in _EXTENSIONS.items():
        if f"{extension}." in path.name:
            return format
    raise CheckpointError(
        f"{path}: is no index by its name, which has '.safetensors.' or '.bin.' in it, as "
        "'model.safetensors.index.json' has"
    )


def _format_of_bytes(path: Path, named: Format | None) -> Format:
    """Of a file whose name does not tell, such as a blob of a Hub cache; or whose name says torch,
    where it is no safetensors."""
    if not path.is_file():  # opening a pipe would wait for its writer
        raise CheckpointError(f"{path}: is no regular file")
    try:
        if is_safetensors(str(path)):
            return "safetensors"
        if named is not None:
            return named
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise _os_error(error, str(path)) from None
    # What else it may be, the reader of safetensors can tell.
    return "torch" if _is_of_torch(head) else "safetensors"


def torch_format_of(path: str) -> Literal["torch"] | None:
    """``"torch"`` for a file that torch.save wrote, by its name and its bytes, or by its bytes
    alone where its name does not tell; ``None`` for what the reader of safetensors shall judge."""
    named = _FILE_FORMATS.get(Path(path).suffix.lower())
    if named == "safetensors":
        return None
    try:
        if not Path(path).is_file() or is_safetensors(path):
            return None
        with Path(path).open("rb") as file:
            head = file.read(4)
    except (OSError, ValueError):
        return None
    return "torch" if named is not None or _is_of_torch(head) else None


def _is_of_torch(head: bytes) -> bool:
    # Zip's magic, and the pickles of all protocols.
    pickled = head[:1] == b"\x80" or head[:2] in (b"(d", b"(l", b"(c", b"cc", b"cr", b"ct")
    return head == b"PK\x03\x04" or pickled


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
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        return (
            "is a checkpoint of torch.distributed.checkpoint: make one file of it with "
            "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE`"
        )
    looked_for = ", ".join(_looked_for(wish))
    if not names and not folders:
        return f"the folder is empty; looked for {looked_for}"
    there = _listed([*sorted(names), *(f"{name}/" for name in sorted(folders))])
    other = any(Path(name).suffix in _FILE_FORMATS for name in names)
    hint = "; a file of another name is opened by its own path" if other else ""
    gguf = ""
    if any(name.lower().endswith(".gguf") for name in names):
        gguf = (
            " (GGUF is not read here: transformers' from_pretrained(gguf_file=...) and diffusers' "
            "from_single_file read it)"
        )
    return f"there are no weights: looked for {looked_for}{gguf}; there is: {there}{hint}"


def _has_weights(source: _Source, folder: str) -> bool:
    try:
        names = source.entries(folder)[0]
    except (ReadError, CheckpointError):  # a folder that may not be read
        return False
    return any(_parse(name) or name in _FLAX for name in names)


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
