"""Which tensor lives where: a path or a Hub id becomes a Checkpoint, which is an index."""

from __future__ import annotations

import fnmatch
import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from weightlift import _native
from weightlift.errors import ArgumentError, CheckpointError
from weightlift.hub import HubArguments
from weightlift.integrity import Identity
from weightlift.resolve import CheckpointFiles, resolve
from weightlift.torch_file import LoadedTorchFile, View, open_torch_file

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("weightlift")

__all__ = ["Checkpoint", "open_checkpoint", "place_of"]

# (part, position in it, how the tensor looks at what lies there)
Place = tuple[int, int, "View | None"]


class Checkpoint(Mapping[str, "tuple[str, tuple[int, ...]]"]):
    """The index of a checkpoint, over all its files: names, dtypes, shapes, and whose bytes they
    are. Holds no tensor data, and keeps its files open. As a mapping: name -> (dtype, shape).

    Attributes:
        parts: the indexed files, in the order in which they are read.
        formats: of each part, ``"safetensors"`` or ``"torch"``.
        metadata: text that the files carry about themselves; ``"not_tensors"`` names what a torch
            file holds besides tensors.
        in_memory: tensors of files that only torch can read, which are loaded when it is opened.
        loaded: those files, with their identities.
        fallbacks: what could not be done the fast way, and why.
    """

    def __init__(
        self,
        parts: Sequence[_native.IndexedFile],
        *,
        formats: Sequence[str] | None = None,
        views: Sequence[Mapping[str, View]] | None = None,
        in_memory: Mapping[str, torch.Tensor] | None = None,
        loaded: Sequence[tuple[str, Identity]] = (),
        metadata: Mapping[str, str] | None = None,
        fallbacks: Sequence[str] = (),
        names: Mapping[str, Place | None] | None = None,
    ) -> None:
        self.parts = list(parts)
        self.formats = list(formats) if formats is not None else ["safetensors"] * len(parts)
        self.in_memory = dict(in_memory or {})
        self.loaded = list(loaded)
        self.metadata = dict(metadata or {})
        self.fallbacks = list(fallbacks)
        self._views = list(views) if views is not None else [{} for _ in parts]
        # Whether the tensors are those of the parts, under their own names.
        self.is_plain = names is None and not any(self._views) and not self.in_memory
        self._names = names

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """The checkpoint in one ``.safetensors`` file.

        Raises:
            FormatError: the file breaks the format.
            ReadError: it cannot be read; a missing file is a ``FileNotFoundError`` too.
        """
        return cls([_native.IndexedFile.open(_text(path))])

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.files]

    @property
    def files(self) -> list[tuple[str, Identity]]:
        """All there are, with their identities."""
        return [*((part.path, part.identity) for part in self.parts), *self.loaded]

    @functools.cached_property
    def _places(self) -> Mapping[str, Place | None]:
        if self._names is not None:
            return self._names
        places: dict[str, Place | None] = {}
        for number, part in enumerate(self.parts):
            views = self._views[number]
            for position, name in enumerate(part.names()):
                if name not in views:
                    places[name] = (number, position, None)
            for name, view in views.items():
                base = part.find(view.base)
                assert base is not None
                places[name] = (number, base, view)
        places.update(dict.fromkeys(self.in_memory))
        return places

    def place(self, name: str) -> Place | None:
        """Where a tensor lies; ``None`` for one that is in memory.

        Raises:
            KeyError: there is none of that name.
        """
        return self._places[name]

    def is_view(self, name: str) -> bool:
        """Whether a tensor shares its bytes with others, or does not lie in their order."""
        if self.is_plain:
            return False
        place = self._places[name]
        return place is not None and place[2] is not None

    def find(self, name: str) -> tuple[_native.IndexedFile, int] | None:
        """The part that holds a tensor as it is, and its position there."""
        if self.is_plain and len(self.parts) == 1:
            position = self.parts[0].find(name)
            return None if position is None else (self.parts[0], position)
        place = self._places.get(name)
        if place is None or place[2] is not None:
            return None
        return self.parts[place[0]], place[1]

    def __getitem__(self, name: str) -> tuple[str, tuple[int, ...]]:
        place = self._places[name]
        if place is None:
            from weightlift import dtypes

            tensor = self.in_memory[name]
            return dtypes.file_name(tensor.dtype) or str(tensor.dtype), tuple(tensor.shape)
        part, position, view = place
        if view is not None:
            if view.dtype == "F4":  # a view counts in torch's elements, which are pairs
                return "F4", (*view.shape[:-1], view.shape[-1] * 2)
            return view.dtype, view.shape
        return self.parts[part].dtype(position), self.parts[part].shape(position)

    def __iter__(self) -> Iterator[str]:
        if self.is_plain:
            for part in self.parts:
                yield from part.names()
        else:
            yield from self._places

    def __len__(self) -> int:
        if self.is_plain:
            return sum(len(part) for part in self.parts)
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        if self.is_plain and len(self.parts) == 1:
            return isinstance(name, str) and self.parts[0].find(name) is not None
        return name in self._places

    # As an object, not by its contents: two handles on equal files are not one checkpoint.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        where = self.paths[0] if len(self.files) == 1 else f"{len(self.files)} files"
        return f"<Checkpoint of {len(self)} tensors in {where}>"

    def headers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of all tensors at once: faster than one by one."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        if not self.is_plain:
            return {name: self[name] for name in self._places}
        for part in self.parts:
            found.update(
                zip(part.names(), zip(part.dtypes(), part.shapes(), strict=True), strict=True)
            )
        return found

    def renamed(self, rename: Callable[[str], str | None]) -> Checkpoint:
        """The same tensors under other names; those that become ``None`` are left out.

        Raises:
            CheckpointError: two tensors get one name.
        """
        names: dict[str, Place | None] = {}
        in_memory: dict[str, torch.Tensor] = {}
        origin: dict[str, str] = {}
        for name, place in self._places.items():
            new = rename(name)
            if new is None:
                continue
            if new in names:
                raise CheckpointError(
                    f"{place_of(self)}: tensors {origin[new]!r} and {name!r} would both be called "
                    f"{new!r}; the renaming must keep them apart"
                )
            names[new], origin[new] = place, name
            if place is None:
                in_memory[new] = self.in_memory[name]
        return self._with_names(names, in_memory)

    def ordered(self, names: Sequence[str]) -> Checkpoint:
        """The same tensors in this order."""
        places = self._places
        return self._with_names({name: places[name] for name in names}, self.in_memory)

    def _with_names(
        self, names: Mapping[str, Place | None], in_memory: Mapping[str, torch.Tensor]
    ) -> Checkpoint:
        return Checkpoint(
            self.parts,
            formats=self.formats,
            views=self._views,
            in_memory=in_memory,
            loaded=self.loaded,
            metadata=self.metadata,
            fallbacks=self.fallbacks,
            names=names,
        )


def place_of(checkpoint: Checkpoint) -> str:
    """For messages."""
    paths = checkpoint.paths
    if len(paths) == 1:
        return paths[0]
    return f"the {len(paths)} files from {paths[0]} on" if paths else "the checkpoint"


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
    checkpoint = _open_files(files, state_dict_key)
    if prefix is not None or ignore is not None:
        checkpoint = checkpoint.renamed(_renaming(prefix, ignore))
        if not checkpoint:
            raise CheckpointError(
                f"{path_or_repo}: no tensor is left with prefix={prefix!r} and ignore={ignore!r}"
            )
    return checkpoint


def _open_files(files: CheckpointFiles, state_dict_key: str | None) -> Checkpoint:
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


def _text(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    if not isinstance(text, str):
        raise ArgumentError(f"the path is {path!r}; it must be text, not bytes")
    return text
