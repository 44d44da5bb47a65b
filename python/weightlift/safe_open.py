"""``safe_open``: single tensors and slices of a file."""

from __future__ import annotations

import operator
import os
from typing import TYPE_CHECKING, Any

import weightlift._native as _native
from weightlift.checkpoint.checkpoint import Checkpoint, indexed_files, locate, nearest
from weightlift.core import dtypes
from weightlift.core.closing import Closing
from weightlift.core.devices import loadable_device
from weightlift.core.errors import ArgumentError, FileClosedError, FormatError, ReadError
from weightlift.core.report import format_count, record
from weightlift.core.requirements import require
from weightlift.core.settings import Settings
from weightlift.load.allocation import TorchAllocator, from_dlpack
from weightlift.load.load_tensors import load_tensors
from weightlift.load.options import Backend, LoadOptions, mode_of_backend
from weightlift.load.plans import new_plan, run_plan

if TYPE_CHECKING:
    import torch


__all__ = ["TensorSlice", "safe_open"]


class safe_open(Closing):
    """Opens a ``.safetensors`` file and loads single tensors and slices.

    A context manager; outside ``with`` the file stays open as long as the object lives. Its tensors
    stay valid after that. On the CPU they are parts of one mapping: two loads of a tensor share
    memory, as in the reference.

    Args:
        filename: the file.
        framework: ``"pt"``; for other frameworks use ``safetensors.safe_open``.
        device: as in ``load_file``.
        backend: ``"mmap"`` (the default) or ``"pread"``, which reads into own memory.

    Raises:
        FormatError: the file breaks the format.
        ReadError: the file cannot be read; for a missing file also a ``FileNotFoundError``.
        DeviceError: the device does not exist.
        ArgumentError: the framework or the backend is invalid.
    """

    # The name of the loads in `stats().by_caller`.
    _caller = "weightlift"

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str = "pt",
        device: torch.device | str | int = "cpu",
        *,
        backend: Backend | None = None,
    ) -> None:
        if framework not in ("pt", "torch", "pytorch"):
            raise ArgumentError(
                f"framework is {framework!r}; weightlift opens files for 'pt', use "
                "safetensors.safe_open for the others"
            )
        require("torch", "safe_open")
        self._mode = mode_of_backend("auto", backend)
        self._device = loadable_device(device)
        self._settings = Settings.current()
        self._checkpoint: Checkpoint | None = Checkpoint.from_file(filename)
        self._path = self._checkpoint.paths[0]

    def close(self) -> None:
        """Closes the file. Tensors loaded from it stay valid."""
        self._checkpoint = None

    def __repr__(self) -> str:
        return f"<safe_open of {self._path}{', closed' if self._checkpoint is None else ''}>"

    def _open(self) -> Checkpoint:
        if self._checkpoint is None:
            raise FileClosedError(
                "file_closed",
                "the file is closed: its `with` block has ended, or close() was called",
                self._path,
            )
        return self._checkpoint

    def _find(self, name: str) -> tuple[_native.IndexedFile, int]:
        checkpoint = self._open()
        if not isinstance(name, str):
            raise TypeError(f"the name of a tensor must be text, not {name!r}")
        place = locate(checkpoint, name)
        if place is None:
            raise FormatError(
                "no_such_tensor",
                f"the file does not contain it; it holds "
                f"{format_count(len(checkpoint), 'tensor')}, see keys()"
                + nearest(name, checkpoint),
                checkpoint.paths[0],
                tensor=name,
            )
        return place

    def keys(self) -> list[str]:
        """The names, sorted."""
        return sorted(self._open())

    def offset_keys(self) -> list[str]:
        """The names in the order of the file."""
        return list(self._open())

    def metadata(self) -> dict[str, str] | None:
        """The header's ``__metadata__``, or ``None``."""
        return indexed_files(self._open())[0].metadata()

    def get_tensor(self, name: str) -> torch.Tensor:
        """Loads one tensor, with the file's dtype and shape.

        Raises:
            FormatError: the file has no tensor of this name, or torch has no dtype for it.
            ReadError: the file cannot be read.
        """
        return self._get(self._open(), name, self._find(name), self._settings)

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """Loads all tensors: name -> tensor, in the order of the file."""
        return self._load(self._open(), None, self._settings)

    def _load(
        self, checkpoint: Checkpoint, names: list[str] | None, settings: Settings
    ) -> dict[str, Any]:
        return load_tensors(
            checkpoint,
            self._device,
            LoadOptions(self._mode, settings=settings, caller=self._caller),
            names=names,
            shared=True,
        )

    def _get(
        self,
        checkpoint: Checkpoint,
        name: str,
        place: tuple[_native.IndexedFile, int],
        settings: Settings,
        windows: list[tuple[int, int]] | None = None,
    ) -> torch.Tensor:
        """One tensor; ``windows`` are its byte ranges that will be read, if not all."""
        tensor: torch.Tensor
        if self._device.type == "cpu" and self._mode == "auto":
            # A short form of load_tensors, which takes as long as the rest of a small load.
            plan = new_plan(settings)
            try:
                plan.map(place[0], [place[1]], True, windows)
                native = run_plan(plan, None)
                (tensor,) = plan.tensors(from_dlpack())
                record(native, caller=self._caller)
                return tensor
            except ReadError:
                if windows is not None:
                    raise
                # The file cannot be mapped: load_tensors reads it.
        tensor = self._load(checkpoint, [name], settings)[name]
        return tensor

    def get_slice(self, name: str) -> TensorSlice:
        """A lazy view of a tensor; indexing loads the selected elements.

        Raises:
            FormatError: the file has no tensor of this name.
        """
        return TensorSlice(self, name, *self._find(name))


class TensorSlice:
    """A tensor in a file: ``f.get_slice("w")[:, :128]`` loads only these elements."""

    def __init__(
        self, opened: safe_open, name: str, part: _native.IndexedFile, position: int
    ) -> None:
        self._opened = opened
        self._name = name
        self._part = part
        self._position = position
        self._checkpoint = opened._open()

    def __repr__(self) -> str:
        return f"<slice of {self._name!r}: {self.get_dtype()}, shape {self.get_shape()}>"

    def get_shape(self) -> list[int]:
        """The shape, in elements."""
        return list(self._part.shape(self._position))

    def get_dtype(self) -> str:
        """The file's name of the dtype, such as ``"BF16"``."""
        return self._part.dtype(self._position)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Indexes like numpy with integers, slices (steps of either sign) and ``...``.

        With other indices (``None``, lists, tensors) it loads the whole tensor, and torch indexes
        it.

        Raises:
            IndexError: an index is out of bounds, or there are too many.
            TypeError: an index is text or bytes.
        """
        device, mode = self._opened._device, self._opened._mode
        shape = self._part.shape(self._position)
        parts = _parse_index(index, shape)
        if parts is None:
            self._check_types(index)
        backwards = parts is not None and any(step < 0 for _, step, _, _ in parts)
        in_place = device.type == "cpu" and mode != "read" and not backwards
        if parts is None or in_place or device.type not in ("cpu", "cuda"):
            place, settings = (self._part, self._position), self._opened._settings
            windows = None
            if parts is not None and in_place and not settings.populate:
                windows = _windows(parts, shape, dtypes.bits(self.get_dtype()))
            # Populated now: a page that cannot be read is an error here, but SIGBUS later.
            try:
                whole = self._opened._get(self._checkpoint, self._name, place, settings, windows)
            except ReadError:
                if parts is None or windows is None:
                    raise
                return self._read(parts, device)  # names the place of the error, or succeeds
            return whole[_flat(index)]
        return self._read(parts, device)

    def _check_types(self, index: Any) -> None:
        for item in index if isinstance(index, tuple) else (index,):
            if isinstance(item, (str, bytes)):
                raise TypeError(
                    f"{self._opened._path}: tensor {self._name!r}: {item!r} is no index; give "
                    "integers, slices, ..., None, lists or tensors"
                )

    def _read(self, parts: list[tuple[int, int, int, bool]], device: torch.device) -> torch.Tensor:
        plan = new_plan(self._opened._settings)
        if device.type == "cpu":
            ranges = [(start, step, count) for start, step, count, _ in parts]
            plan.slice(self._part, self._position, ranges, None)
            native = run_plan(plan, None)
            (tensor,) = plan.tensors(from_dlpack())
            turned: list[int] = []
        else:
            # Read forwards, then flip on the device.
            ranges = [
                (start, step, count) if step > 0 else (start + step * (count - 1), -step, count)
                for start, step, count, _ in parts
            ]
            turned = [i for i, (_, step, _, _) in enumerate(parts) if step < 0]
            allocator = TorchAllocator()
            counts = [count for _, _, count in ranges]
            address, tensor = allocator.empty(device.index, counts, self.get_dtype())
            plan.use_stream(device.index, allocator.stream(device.index))
            target = _native.Targets(device.index, [address], [self.get_dtype()])
            plan.slice_to(self._part, self._position, ranges, target)
            native = run_plan(plan, allocator)
        record(native, caller=self._opened._caller)
        if turned:
            tensor = tensor.flip(turned)
        kept = [count for _, _, count, dropped in parts if not dropped]
        result: torch.Tensor = tensor.reshape(kept)
        return result


# Windows with smaller gaps are joined, and so are all windows if there are more than this many.
_GAP = 64 << 10
_MOST_WINDOWS = 1024


def _windows(
    parts: list[tuple[int, int, int, bool]], shape: tuple[int, ...], bits: int
) -> list[tuple[int, int]] | None:
    """The byte ranges [begin, end) of a part of a tensor; steps are positive."""
    if bits % 8:
        return None
    block = bits // 8
    windows = [(0, block)]
    for (start, step, count, _), extent in zip(reversed(parts), reversed(shape), strict=True):
        if count == 0:
            return []
        first, last = start * block, (start + step * (count - 1)) * block
        if count * len(windows) > _MOST_WINDOWS or (
            step * block - (windows[-1][1] - windows[0][0]) <= _GAP
        ):
            windows = [(first + windows[0][0], last + windows[-1][1])]
        else:
            windows = [
                (at + begin, at + end)
                for at in range(first, last + 1, step * block)
                for begin, end in windows
            ]
        block *= extent
    return windows


def _flat(index: Any) -> Any:
    # numpy, and torch from 2.9 on, treat a list as a sequence of indices, a tuple as one index.
    return tuple(index) if isinstance(index, tuple) else index


def _parse_index(index: Any, shape: tuple[int, ...]) -> list[tuple[int, int, int, bool]] | None:
    """(start, step, count, dropped) for each dimension; ``None`` for indices left to torch."""
    items: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    before: list[int | slice] = []  # indices before and after the ellipsis
    behind: list[int | slice] | None = None
    for item in items:
        if item is Ellipsis:
            if behind is not None:
                raise IndexError("an index can only have a single ellipsis ('...')")
            behind = []
        elif isinstance(item, bool) or hasattr(item, "dim"):
            return None
        else:
            try:
                entry = item if isinstance(item, slice) else operator.index(item)
            except TypeError:  # numpy arrays have the method but may refuse
                return None
            (before if behind is None else behind).append(entry)
    behind = behind or []
    left_out = len(shape) - len(before) - len(behind)
    if left_out < 0:
        raise IndexError(f"too many indices for tensor of dimension {len(shape)}")
    full = [*before, *[slice(None)] * left_out, *behind]
    parts = []
    for dimension, (item, extent) in enumerate(zip(full, shape, strict=True)):
        if isinstance(item, slice):
            start, stop, step = item.indices(extent)
            count = len(range(start, stop, step))
            # For an empty backward slice Python's start may be -1.
            parts.append((start if count else 0, step, count, False))
            continue
        if not -extent <= item < extent:
            raise IndexError(
                f"index {item} is out of bounds for dimension {dimension} with size {extent}"
            )
        parts.append((item % extent, 1, 1, True))
    return parts
