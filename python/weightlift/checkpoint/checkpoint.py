"""Checkpoint, the index of the tensors in all files of a checkpoint."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import weightlift._native as _native
from weightlift.checkpoint.integrity import Identity
from weightlift.checkpoint.opening import opening
from weightlift.checkpoint.torch_errors import ONE_OF_A_PIPELINE
from weightlift.checkpoint.torch_file import View
from weightlift.core.closing import Closing
from weightlift.core.errors import (
    ArgumentError,
    CheckpointError,
    FileClosedError,
    FormatError,
)
from weightlift.core.paths import path_text

if TYPE_CHECKING:
    import torch

    from weightlift.checkpoint.files import ShardFile

_log = logging.getLogger("weightlift")

__all__ = ["Checkpoint", "Place", "describe_location", "indexed_files", "locate", "nearest"]

# (part, position in it, view of the tensor there)
Place = tuple[int, int, "View | None"]


class Checkpoint(Closing, Mapping[str, "tuple[str, tuple[int, ...]]"]):
    """The index of all files of a checkpoint: the name, dtype, shape and place of each tensor. It
    holds no tensor data. A context manager: ``close()`` closes the files. As a mapping: name ->
    (dtype, shape), with the file's name of the dtype, such as ``"BF16"``.

    Attributes:
        formats: the format of each indexed file, ``"safetensors"`` or ``"torch"``.
        metadata: the files' own metadata; ``"not_tensors"`` names other objects in a torch file.
        in_memory: tensors of files that only torch can read; they are loaded at open.
        loaded: these files, with their identities.
        fallbacks: steps that do not take the fastest way, with reasons.
        left_out: key of an object beside the state dict of a torch file -> how many tensors it
            holds.
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
        left_out: Mapping[str, int] | None = None,
    ) -> None:
        if isinstance(parts, (str, os.PathLike)):
            raise ArgumentError(f"{parts}: open_checkpoint opens a path, Checkpoint does not")
        self._closed = False
        self._parts = list(parts)
        self._where = self._parts[0].path if self._parts else ""
        self.formats = list(formats) if formats is not None else ["safetensors"] * len(parts)
        self.in_memory = dict(in_memory or {})
        self.loaded = list(loaded)
        self.metadata = dict(metadata or {})
        self.fallbacks = list(fallbacks)
        self.left_out = dict(left_out or {})
        self._views = list(views) if views is not None else [{} for _ in parts]
        # Whether the tensors are exactly those of the parts, under their own names.
        self.is_plain = names is None and not any(self._views) and not self.in_memory
        self._names = names

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Opens one ``.safetensors`` file.

        Args:
            path: the file; ``open_checkpoint`` takes every form of checkpoint.

        Raises:
            FormatError: the file breaks the format.
            ReadError: the file cannot be read; for a missing file also a ``FileNotFoundError``.
        """
        return cls.from_files([path])

    @classmethod
    def from_files(cls, files: Iterable[str | os.PathLike[str] | ShardFile]) -> Checkpoint:
        """Opens several safetensors files, or entries of archives, in this order.

        Raises:
            FormatError: a file breaks the format.
            ReadError: a file cannot be read; for a missing file also a ``FileNotFoundError``.
        """
        files = list(files)
        with opening(files):
            return cls([_open(file) for file in files])

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Deprecated: use ``from_file``."""
        warnings.warn(
            "Checkpoint.of_file is deprecated: use from_file", DeprecationWarning, stacklevel=2
        )
        return cls.from_file(path)

    def close(self) -> None:
        """Closes the files. Later calls raise ``FileClosedError``; running loads continue, and
        tensors stay valid."""
        self._closed = True
        self._parts.clear()
        self._views.clear()
        self.in_memory.clear()
        self._names = None
        self.__dict__.pop("_places", None)

    @property
    def closed(self) -> bool:
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise FileClosedError(
                "file_closed", "the checkpoint is closed: open it again", self._where
            )

    @classmethod
    def joined(cls, checkpoints: Iterable[tuple[Checkpoint, Mapping[str, str]]]) -> Checkpoint:
        """One index over several checkpoints.

        Args:
            checkpoints: pairs of a checkpoint and {name in it: name in the new index}.

        Raises:
            CheckpointError: two tensors would get one name.
        """
        parts: list[_native.IndexedFile] = []
        formats: list[str] = []
        in_memory: dict[str, torch.Tensor] = {}
        loaded: list[tuple[str, Identity]] = []
        fallbacks: list[str] = []
        names: dict[str, Place | None] = {}
        for checkpoint, wanted in checkpoints:
            for name, new in wanted.items():
                place = checkpoint.place(name)
                if new in names:
                    raise CheckpointError(
                        f"{describe_location(checkpoint)}: tensor {name!r} would get the name "
                        f"{new!r} of another tensor: rename one of them"
                    )
                if place is None:
                    names[new] = None
                    in_memory[new] = checkpoint.in_memory[name]
                else:
                    names[new] = place[0] + len(parts), place[1], place[2]
            parts += checkpoint._open_parts
            formats += checkpoint.formats
            loaded += checkpoint.loaded
            fallbacks += checkpoint.fallbacks
        return cls(
            parts,
            formats=formats,
            in_memory=in_memory,
            loaded=loaded,
            fallbacks=fallbacks,
            names=names,
        )

    @property
    def _open_parts(self) -> list[_native.IndexedFile]:
        self._check_open()
        return self._parts

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.files]

    @property
    def files(self) -> list[tuple[str, Identity]]:
        """All files, with their identities."""
        return [*((part.path, part.identity) for part in self._open_parts), *self.loaded]

    @property
    def file_sizes(self) -> list[int]:
        """The sizes of the indexed files, in bytes."""
        return [part.size for part in self._open_parts]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the indexed files, also of those without a name here."""
        return sum(sum(part.sizes()) for part in self._open_parts)

    def resident_bytes(self) -> int | None:
        """Bytes of the indexed files in the page cache; ``None`` if the system does not say."""
        found = [part.resident_bytes() for part in self._open_parts]
        return None if None in found else sum(filter(None, found))

    def file_metadata(self) -> list[dict[str, str]]:
        """``__metadata__`` of each indexed file."""
        return [part.metadata() or {} for part in self._open_parts]

    def byte_range(self, name: str) -> tuple[str, int, int] | None:
        """(path, begin, end) of a tensor, in bytes; for a view those of its base. ``None`` for a
        tensor in memory.

        Raises:
            KeyError: there is no tensor of this name.
        """
        place = self._lookup(name)
        if place is None:
            return None
        part = self._open_parts[place[0]]
        return part.path, *part.range(place[1])

    def has_duplicates(self) -> bool:
        """Whether several files hold tensors of one name."""
        return sum(map(len, self._open_parts)) > len(self.headers())

    def view(self, name: str) -> View | None:
        """The view of a tensor that uses another tensor's bytes; ``None`` for other tensors."""
        place = self._lookup(name)
        return None if place is None else place[2]

    @functools.cached_property
    def _places(self) -> Mapping[str, Place | None]:
        self._check_open()
        if self._names is not None:
            return self._names
        places: dict[str, Place | None] = {}
        for number, part in enumerate(self._open_parts):
            views = self._views[number]
            for position, name in enumerate(part.names()):
                if name not in views:
                    places[name] = (number, position, None)
            for name, view in views.items():
                base = part.find(view.base)
                if base is None:
                    raise KeyError(f"{part.path}: view {name!r}: there is no tensor {view.base!r}")
                places[name] = (number, base, view)
        places.update(dict.fromkeys(self.in_memory))
        return places

    def place(self, name: str) -> Place | None:
        """The place of a tensor; ``None`` for a tensor in memory.

        Raises:
            KeyError: there is no tensor of this name.
        """
        return self._lookup(name)

    def _lookup(self, name: str) -> Place | None:
        try:
            return self._places[name]
        except KeyError:
            similar = nearest(name, self._places) if isinstance(name, str) else ""
            where = describe_location(self)
            raise KeyError(f"{where}: there is no tensor {name!r}{similar}") from None

    def is_view(self, name: str) -> bool:
        """Whether a tensor shares bytes with others, or is not contiguous in the file."""
        if self.is_plain:
            return False
        place = self._places[name]
        return place is not None and place[2] is not None

    def __getitem__(self, name: str) -> tuple[str, tuple[int, ...]]:
        place = self._lookup(name)
        if place is None:
            from weightlift.core import dtypes

            tensor = self.in_memory[name]
            return dtypes.file_name(tensor.dtype) or str(tensor.dtype), tuple(tensor.shape)
        part, position, view = place
        if view is not None:
            if view.dtype == "F4":  # views count torch's elements, which are pairs
                return "F4", (*view.shape[:-1], view.shape[-1] * 2)
            return view.dtype, view.shape
        return self._open_parts[part].dtype(position), self._open_parts[part].shape(position)

    def __iter__(self) -> Iterator[str]:
        if not self.is_plain:
            return iter(self._places)
        return itertools.chain.from_iterable(part.names() for part in self._open_parts)

    def __len__(self) -> int:
        if self.is_plain:
            return sum(len(part) for part in self._open_parts)
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        if self.is_plain and len(self._open_parts) == 1:
            return isinstance(name, str) and self._open_parts[0].find(name) is not None
        return name in self._places

    # Compared by identity: two handles on equal files are different checkpoints.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        if self._closed:
            return "<Checkpoint, closed>"
        where = self.paths[0] if len(self.files) == 1 else f"{len(self.files)} files"
        tensors = "1 tensor" if len(self) == 1 else f"{len(self):,} tensors"
        return f"<Checkpoint of {tensors} in {where}>"

    def headers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of all tensors, faster than one by one."""
        if not self.is_plain:
            return {name: self[name] for name in self._places}
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for part in self._open_parts:
            found.update(part.headers())
        return found

    def renamed(self, rename: Callable[[str], str | None] | Mapping[str, str | None]) -> Checkpoint:
        """The same tensors under other names.

        Args:
            rename: a function from a tensor's name to its new name, or a dict, which leaves the
                names that it lacks as they are; ``None`` leaves the tensor out.

        Raises:
            ArgumentError: ``rename`` is neither, or a new name is not text.
            CheckpointError: two tensors would get one name.
        """
        if isinstance(rename, Mapping):
            given: Mapping[str, str | None] = rename
            return self.renamed(lambda name: given.get(name, name))
        if not callable(rename):
            raise ArgumentError(
                f"the renaming is {rename!r}; it must be a function of a name, or a dict of names"
            )
        names: dict[str, Place | None] = {}
        in_memory: dict[str, torch.Tensor] = {}
        origin: dict[str, str] = {}
        for name, place in self._places.items():
            new = rename(name)
            if new is None:
                continue
            if not isinstance(new, str):
                raise ArgumentError(
                    f"{describe_location(self)}: the renaming makes {new!r} of {name!r}; it must "
                    "be text, or None to leave the tensor out"
                )
            if new in names:
                raise CheckpointError(
                    f"{describe_location(self)}: tensors {origin[new]!r} and {name!r} would both "
                    f"be called {new!r}; the renaming must keep them apart"
                )
            names[new], origin[new] = place, name
            if place is None:
                in_memory[new] = self.in_memory[name]
        return self._with_names(names, in_memory)

    def placed(self, places: Mapping[str, Place | None]) -> Checkpoint:
        """The tensors at these places of the same files."""
        return self._with_names(places, self.in_memory)

    def ordered(self, names: Sequence[str]) -> Checkpoint:
        """The same tensors in this order."""
        places = self._places
        return self._with_names({name: places[name] for name in names}, self.in_memory)

    def _with_names(
        self, names: Mapping[str, Place | None], in_memory: Mapping[str, torch.Tensor]
    ) -> Checkpoint:
        return Checkpoint(
            self._open_parts,
            formats=self.formats,
            views=self._views,
            in_memory=in_memory,
            loaded=self.loaded,
            metadata=self.metadata,
            fallbacks=self.fallbacks,
            names=names,
            left_out=self.left_out,
        )


def indexed_files(checkpoint: Checkpoint) -> list[_native.IndexedFile]:
    """The engine's files, for ``load/``; ``Place`` has indices into this list."""
    return checkpoint._open_parts


def locate(checkpoint: Checkpoint, name: str) -> tuple[_native.IndexedFile, int] | None:
    """The file that holds a tensor contiguously, and its position there, for ``load/``."""
    parts = checkpoint._open_parts
    if checkpoint.is_plain and len(parts) == 1:
        position = parts[0].find(name)
        return None if position is None else (parts[0], position)
    place = checkpoint._places.get(name)
    if place is None or place[2] is not None:
        return None
    return parts[place[0]], place[1]


def _open(file: str | os.PathLike[str] | ShardFile) -> _native.IndexedFile:
    if not isinstance(file, tuple):
        path = _text(file)
        try:
            return _native.IndexedFile.open(path)
        except FormatError as error:
            raise _with_another_call(error, path) from None
    try:
        return _native.IndexedFile.open(file.path, file.begin, file.bytes)
    except FormatError as error:
        if file.bytes is None:
            raise
        message = f"in its entry {file.name!r}: {error.message}"
        raise FormatError(error.code, message, file.path, error.offset, error.tensor) from None


def _with_another_call(error: FormatError, path: str) -> FormatError:
    """The error of a file that another call reads: that call is named."""
    if path.lower().endswith(".index.json"):
        message = "this is an index of shards: load_checkpoint and open_checkpoint read them"
    elif path.lower().endswith(".dduf"):
        message = ONE_OF_A_PIPELINE
    elif "torch.save" in error.message and not path.lower().endswith(".safetensors"):
        message = "this is a file of torch.save: load_file and open_checkpoint read it"
    else:
        return error
    return FormatError(error.code, message, path)


def nearest(name: str, names: Iterable[str]) -> str:
    """For messages: the names most similar to a missing one."""
    import difflib

    # Over more names the search would take too long.
    found = difflib.get_close_matches(name, itertools.islice(names, 5_000), n=3, cutoff=0.7)
    return f"; similar are {', '.join(map(repr, found))}" if found else ""


def describe_location(checkpoint: Checkpoint) -> str:
    """The files of a checkpoint, for messages."""
    paths = checkpoint.paths
    if len(paths) == 1:
        return paths[0]
    return f"the {len(paths)} files from {paths[0]} on" if paths else "the checkpoint"


def _text(path: str | os.PathLike[str]) -> str:
    return path_text(path)
