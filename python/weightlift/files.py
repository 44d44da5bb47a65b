"""Files in, tensors out: ``load_file``, ``safe_open``, ``load_checkpoint``; and ``save_file``."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
from collections.abc import Callable, Mapping
from types import EllipsisType, TracebackType
from typing import TYPE_CHECKING, Any

from weightlift import _native, dtypes
from weightlift.allocation import TorchAllocator, from_dlpack
from weightlift.atomic import atomic_file
from weightlift.checkpoint import Checkpoint, open_checkpoint
from weightlift.errors import ArgumentError, FormatError, ReadError
from weightlift.materialize import Loading, load_tensors
from weightlift.placement import DeviceMap, assign, parse_device, parse_device_map
from weightlift.plans import Progress, new_plan, run_plan
from weightlift.report import record
from weightlift.settings import Settings

if TYPE_CHECKING:
    import torch

__all__ = [
    "TensorSlice",
    "load_checkpoint",
    "load_file",
    "load_state_dict",
    "safe_open",
    "save_file",
]

# What the reference calls its two ways to the bytes.
_BACKENDS = {"mmap": "map", "pread": "read"}


def load_file(
    filename: str | os.PathLike[str],
    device: torch.device | str | int = "cpu",
    *,
    dtype: torch.dtype | str | None = None,
    mode: str = "auto",
    pin_memory: bool = False,
    verify: bool = False,
    progress: bool | Callable[[int, int], None] = False,
    backend: str | None = None,
) -> dict[str, torch.Tensor]:
    """Loads all tensors of a ``.safetensors`` file.

    Args:
        filename: the file.
        device: where the tensors go: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``1`` or a
            ``torch.device``.
        dtype: cast floating-point tensors to this while loading: a torch dtype or its name.
            ``None`` and ``"auto"`` keep the file's. Bit-identical to ``tensor.to(dtype)`` for all
            numbers; a NaN becomes the quiet NaN with the same sign.
        mode: ``"map"`` hands out a private, writable mapping of the file; ``"read"`` reads into
            memory of its own (take it for files that others may truncate: a mapping then raises
            SIGBUS when touched); ``"auto"`` maps where nothing is cast, pinned or moved.
        pin_memory: page-locked host memory, for later asynchronous copies.
        verify: compare the file's SHA-256 with what the Hub cache or a ``SHA256SUMS`` file beside
            it says; without either that is an error.
        progress: ``True`` for a bar, or a function called with the bytes done and in all.
        backend: the reference's name for the mode, ``"mmap"`` or ``"pread"``.

    Returns:
        Name -> tensor, in the order of the file.

    Raises:
        FormatError: the file breaks the format (also a ``safetensors.SafetensorError``).
        ReadError: it cannot be read (also an ``OSError``), or changes while it is.
        DeviceError: there is no such device, or its driver fails.
        ArgumentError: arguments that do not go together (also a ``ValueError``).
        OutOfMemoryError: also a ``MemoryError``.
    """
    checkpoint = Checkpoint.of_file(filename)
    return load_tensors(
        checkpoint,
        parse_device(device),
        dtype=dtypes.parse_dtype(dtype),
        mode=_mode(mode, backend),
        pin_memory=pin_memory,
        verify=verify,
        progress=progress,
    )


def load_checkpoint(
    path_or_repo_or_checkpoint: str | os.PathLike[str] | Checkpoint,
    device_map: DeviceMap = "cpu",
    *,
    dtype: torch.dtype | str | None = None,
    mode: str = "auto",
    pin_memory: bool = False,
    verify: bool = False,
    progress: bool | Progress = False,
    **open_arguments: Any,
) -> dict[str, torch.Tensor]:
    """Loads all tensors of a checkpoint of any form.

    Args:
        path_or_repo_or_checkpoint: a ``Checkpoint``, or what ``open_checkpoint`` takes.
        device_map: a device, or a dict from the beginnings of names (whole components, ``""`` for
            all) to devices. Maps that need a model (``"auto"``, ``"disk"``) are for ``load_into``.
        dtype, mode, pin_memory, verify, progress: as in ``load_file``. ``mode="auto"`` reads torch
            files into memory of their own: people save back onto the file they loaded.
        open_arguments: of ``open_checkpoint``.

    Returns:
        Name -> tensor. Tensors that share memory in a torch file share it here too.

    Raises:
        CheckpointError: there is no such checkpoint, or its index contradicts its files.
        FormatError, ReadError, DeviceError, ArgumentError, OutOfMemoryError: as ``load_file``.
    """
    if isinstance(path_or_repo_or_checkpoint, Checkpoint):
        checkpoint = path_or_repo_or_checkpoint
        if open_arguments:
            raise ArgumentError(f"{sorted(open_arguments)}: this checkpoint is open already")
    else:
        checkpoint = open_checkpoint(path_or_repo_or_checkpoint, **open_arguments)
    loading = Loading(
        checkpoint, mode=mode, pin_memory=pin_memory, verify=verify, progress=progress
    )
    name = dtypes.parse_dtype(dtype)
    devices = parse_device_map(device_map)
    if len(set(devices.values())) == 1 and "" in devices:
        loading.add(devices[""], name)
    else:
        for device, names in assign(checkpoint, devices).items():
            loading.add(device, name, names)
    loading.start()
    return loading.result()


def load_state_dict(
    checkpoint_file: str | os.PathLike[str] | dict[str, torch.Tensor],
    variant: str | None = None,
    *,
    map_location: torch.device | str | int = "cpu",
    disable_mmap: bool = False,
) -> dict[str, torch.Tensor]:
    """The tensors of one weights file, under the name and with the arguments that diffusers has.

    Args:
        checkpoint_file: a ``.safetensors`` or torch file; a state dict is handed back.
        variant: taken, and not used: the file is named.
        map_location: where the tensors go; ``"meta"`` reads none.
        disable_mmap: read into memory of its own.
    """
    import torch

    if isinstance(checkpoint_file, dict):
        return checkpoint_file
    if str(map_location) == "meta":
        headers = open_checkpoint(checkpoint_file).headers()
        return {
            name: torch.empty(
                (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape,
                dtype=dtypes.to_torch(dtype),
                device="meta",
            )
            for name, (dtype, shape) in headers.items()
        }
    return load_checkpoint(
        checkpoint_file, parse_device(map_location), mode="read" if disable_mmap else "auto"
    )


def save_file(
    tensors: Mapping[str, torch.Tensor],
    filename: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
) -> None:
    """Saves tensors as a ``.safetensors`` file, all of it or nothing.

    The file is written under a temporary name in the same folder, flushed to the disk, given the
    mode that the umask allows, and renamed; the folder is flushed too. Killed anywhere, the old
    file or the new one is there. Saving over a file whose mapping is in use is safe: the mapping
    keeps the old one.

    Args:
        tensors: contiguous tensors that share no memory, as ``safetensors.torch.save_file`` wants.
        filename: the file.
        metadata: text for the header.
    """
    from safetensors.torch import save_file as reference_save_file

    with atomic_file(filename) as temporary:
        reference_save_file(dict(tensors), temporary, metadata=metadata)


class safe_open:
    """Opens a ``.safetensors`` file and loads tensors as they are asked for.

    A context manager; outside ``with`` the file stays open as long as the object. Tensors outlive
    it. On the CPU they are parts of one mapping: asked for twice, a tensor shares its memory, as in
    the reference.

    Args:
        filename: the file.
        framework: ``"pt"``; for the others use ``safetensors.safe_open``.
        device: as in ``load_file``.
        backend: ``"mmap"`` (the default) or ``"pread"``, which reads into memory of its own.
    """

    # Whom `stats()` books the loads on.
    _caller = "weightlift"

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str = "pt",
        device: torch.device | str | int = "cpu",
        *,
        backend: str | None = None,
    ) -> None:
        if framework not in ("pt", "torch", "pytorch"):
            raise ArgumentError(
                f"framework is {framework!r}; weightlift opens files for 'pt', "
                "safetensors.safe_open for the others"
            )
        self._mode = _mode("auto", backend)
        self._device = parse_device(device)
        self._settings = Settings.current()
        # A part of a mapping: the pages of the whole tensor are not read in for it, unless asked.
        self._slice_settings = dataclasses.replace(
            self._settings, populate=bool(self._settings.populate)
        )
        self._checkpoint: Checkpoint | None = Checkpoint.of_file(filename)

    def __enter__(self) -> safe_open:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._checkpoint = None

    def _open(self) -> Checkpoint:
        if self._checkpoint is None:
            raise FormatError("file_closed", "the file is closed: its `with` block has ended")
        return self._checkpoint

    def _find(self, name: str) -> tuple[_native.IndexedFile, int]:
        checkpoint = self._open()
        if not isinstance(name, str):
            raise TypeError(f"the name of a tensor is text, not {name!r}")
        place = checkpoint.find(name)
        if place is None:
            raise FormatError(
                "no_such_tensor",
                f"the file does not contain it; it holds {len(checkpoint)} tensors, see keys()",
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
        return self._open().parts[0].metadata()

    def get_tensor(self, name: str) -> torch.Tensor:
        """Loads one tensor.

        Raises:
            FormatError: there is none of that name, or torch has no dtype for it.
        """
        return self._get(self._open(), name, self._find(name), self._settings)

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """Loads all tensors, in the order of the file."""
        return self._load(self._open(), None, self._settings)

    def _load(
        self, checkpoint: Checkpoint, names: list[str] | None, settings: Settings
    ) -> dict[str, Any]:
        return load_tensors(
            checkpoint,
            self._device,
            mode=self._mode,
            names=names,
            shared=True,
            settings=settings,
            caller=self._caller,
        )

    def _get(
        self,
        checkpoint: Checkpoint,
        name: str,
        place: tuple[_native.IndexedFile, int],
        settings: Settings,
    ) -> torch.Tensor:
        tensor: torch.Tensor
        if self._device.type == "cpu" and self._mode == "auto":
            # As load_tensors does it, whose generality takes as long as the rest of a small tensor.
            plan = new_plan(settings)
            with contextlib.suppress(ReadError):  # mapping refused: load_tensors reads
                plan.map(place[0], [place[1]], True)
                native = run_plan(plan, None)
                (tensor,) = plan.tensors(from_dlpack())
                record(native, caller=self._caller)
                return tensor
        tensor = self._load(checkpoint, [name], settings)[name]
        return tensor

    def get_slice(self, name: str) -> TensorSlice:
        """A view of a tensor that loads what it is indexed with."""
        return TensorSlice(self, name, *self._find(name))


class TensorSlice:
    """A tensor in a file, to be indexed: ``f.get_slice("w")[:, :128]`` loads those bytes alone."""

    def __init__(
        self, opened: safe_open, name: str, part: _native.IndexedFile, position: int
    ) -> None:
        self._opened = opened
        self._name = name
        self._part = part
        self._position = position
        self._checkpoint = opened._open()

    def get_shape(self) -> list[int]:
        """In elements."""
        return list(self._part.shape(self._position))

    def get_dtype(self) -> str:
        """The file's name of the dtype, such as ``"BF16"``."""
        return self._part.dtype(self._position)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Indexes as numpy does with integers, slices (steps of either sign) and ``...``.

        Other indices (``None``, lists, tensors) load the whole tensor and let torch index it.
        """
        device, mode = self._opened._device, self._opened._mode
        shape = self._part.shape(self._position)
        parts = _parse_index(index, shape)
        backwards = parts is not None and any(step < 0 for _, step, _, _ in parts)
        in_place = device.type == "cpu" and mode != "read" and not backwards
        if parts is None or in_place or device.type not in ("cpu", "cuda"):
            place, settings = (self._part, self._position), self._opened._slice_settings
            whole = self._opened._get(self._checkpoint, self._name, place, settings)
            return whole[_flat(index)]
        return self._read(parts, device)

    def _read(self, parts: list[tuple[int, int, int, bool]], device: torch.device) -> torch.Tensor:
        plan = new_plan(self._opened._settings)
        if device.type == "cpu":
            ranges = [(start, step, count) for start, step, count, _ in parts]
            plan.slice(self._part, self._position, ranges, None, -1, 0)
            native = run_plan(plan, None)
            (tensor,) = plan.tensors(from_dlpack())
            turned: list[int] = []
        else:
            # Forwards on the device, turned around there.
            ranges = [
                (start, step, count) if step > 0 else (start + step * (count - 1), -step, count)
                for start, step, count, _ in parts
            ]
            turned = [i for i, (_, step, _, _) in enumerate(parts) if step < 0]
            allocator = TorchAllocator()
            counts = [count for _, _, count in ranges]
            address, tensor = allocator.empty(device.index, counts, self.get_dtype())
            plan.use_stream(device.index, allocator.stream(device.index))
            plan.slice(self._part, self._position, ranges, None, device.index, address)
            native = run_plan(plan, allocator)
        record(native, caller=self._opened._caller)
        if turned:
            tensor = tensor.flip(turned)
        kept = [count for _, _, count, dropped in parts if not dropped]
        result: torch.Tensor = tensor.reshape(kept)
        return result


def _flat(index: Any) -> Any:
    # A list is a sequence of indices to numpy and to torch from 2.9 on; a tuple is one index.
    return tuple(index) if isinstance(index, tuple) else index


def _parse_index(index: Any, shape: tuple[int, ...]) -> list[tuple[int, int, int, bool]] | None:
    """(start, step, count, dropped) for each dimension; ``None`` for indices that are torch's."""
    items: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    plain: list[int | slice | EllipsisType] = []
    for item in items:
        if isinstance(item, slice) or item is Ellipsis:
            plain.append(item)
        elif isinstance(item, bool) or hasattr(item, "dim"):
            return None
        else:
            try:
                plain.append(operator.index(item))
            except TypeError:  # an array of numpy has the method too
                return None
    given = sum(item is not Ellipsis for item in plain)
    if given > len(shape):
        raise IndexError(f"too many indices for tensor of dimension {len(shape)}")
    if len(plain) - given > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    if len(plain) == given:
        plain.append(Ellipsis)
    at = next(i for i, item in enumerate(plain) if item is Ellipsis)
    full: list[Any] = [slice(None)] * (len(shape) - given)
    plain[at : at + 1] = full
    parts = []
    for dimension, (item, extent) in enumerate(zip(plain, shape, strict=True)):
        if isinstance(item, slice):
            start, stop, step = item.indices(extent)
            count = len(range(start, stop, step))
            # Over nothing, backwards, Python's start may be -1.
            parts.append((start if count else 0, step, count, False))
            continue
        assert isinstance(item, int)
        if not -extent <= item < extent:
            raise IndexError(
                f"index {item} is out of bounds for dimension {dimension} with size {extent}"
            )
        parts.append((item % extent, 1, 1, True))
    return parts


def _mode(mode: str, backend: str | None) -> str:
    if backend is None:
        return mode
    if backend not in _BACKENDS:
        raise ArgumentError(f"backend {backend!r} is invalid (expected one of: 'mmap', 'pread')")
    named = "auto" if backend == "mmap" else _BACKENDS[backend]
    if mode not in ("auto", _BACKENDS[backend]):
        raise ArgumentError(f"backend={backend!r} and mode={mode!r} contradict each other")
    return named if mode == "auto" else mode
