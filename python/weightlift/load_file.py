"""Files in, tensors out: ``load_file``, ``load_checkpoint``, ``load_state_dict``."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.open_checkpoint import open_checkpoint, open_file
from weightlift.core import dtypes
from weightlift.core.devices import loadable_device, parse_device
from weightlift.core.errors import ArgumentError, FormatError
from weightlift.core.requirements import require
from weightlift.load.load_plan import LoadPlan
from weightlift.load.load_tensors import load_tensors
from weightlift.load.options import Backend, LoadOptions, Mode, Progress, mode_of_backend
from weightlift.module.device_map import DeviceMap, assign, parse_device_map

if TYPE_CHECKING:
    import torch

__all__ = [
    "load",
    "load_checkpoint",
    "load_file",
    "load_model",
    "load_state_dict",
]


def load_file(
    filename: str | os.PathLike[str],
    device: torch.device | str | int = "cpu",
    *,
    dtype: torch.dtype | str | None = None,
    mode: Mode = "auto",
    pin_memory: bool = False,
    verify: bool = False,
    progress: bool | Progress = False,
    backend: Backend | None = None,
) -> dict[str, torch.Tensor]:
    """Loads all tensors of a file: ``.safetensors``, or what ``torch.save`` wrote.

    Args:
        filename: the file; what it holds decides where its name says nothing.
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
    require("torch", "load_file")
    checkpoint = open_file(filename)
    return load_tensors(
        checkpoint,
        loadable_device(device),
        LoadOptions(mode_of_backend(mode, backend), pin_memory, verify, progress),
        dtype=dtypes.parse_dtype(dtype),
    )


def load(data: bytes) -> dict[str, torch.Tensor]:
    """Loads all tensors of a safetensors file that is in memory.

    Args:
        data: the content of the file.

    Returns:
        Name -> tensor on the CPU, in memory of its own, in the order of the file.

    Raises:
        FormatError: it breaks the format (also a ``safetensors.SafetensorError``).
        OutOfMemoryError: also a ``MemoryError``.
    """
    require("torch", "load")
    if isinstance(data, (str, os.PathLike)):
        raise TypeError(f"load takes the bytes of a file, not {type(data).__name__}: load_file")
    try:
        with _as_file(memoryview(data).cast("B")) as path:
            checkpoint = Checkpoint.from_file(path)
            return load_tensors(checkpoint, parse_device("cpu"), LoadOptions("read"))
    except FormatError as error:
        raise FormatError(
            error.code, error.message, "the bytes given to load", error.offset, error.tensor
        ) from None


@contextlib.contextmanager
def _as_file(view: memoryview) -> Iterator[str]:
    """The path of a file with these bytes: one in memory, where it can be opened by proc(5)."""
    try:
        descriptor = os.memfd_create("weightlift-load", os.MFD_CLOEXEC)
    except OSError:
        descriptor = None
    path = f"/proc/self/fd/{descriptor}"
    if descriptor is not None and not os.path.lexists(path):
        os.close(descriptor)
        descriptor = None
    if descriptor is None:
        with tempfile.NamedTemporaryFile(prefix="weightlift-load-") as file:
            file.write(view)
            file.flush()
            yield file.name
        return
    try:
        while view:
            view = view[os.write(descriptor, view) :]
        yield path
    finally:
        os.close(descriptor)


def load_model(
    model: torch.nn.Module,
    filename: str | os.PathLike[str],
    strict: bool = True,
    device: torch.device | str | int = "cpu",
    *,
    backend: Backend | None = None,
) -> tuple[set[str], list[str]]:
    """Loads a file of ``save_model`` into a model, as ``safetensors.torch.load_model`` does.

    Names that share memory in the model (tied weights) are in the file once, under any of them.

    Args:
        model: its parameters are filled in place.
        filename: the file.
        strict: missing and unexpected names are an error.
        device: where the tensors are loaded before they are copied into the model.
        backend: as in ``load_file``.

    Returns:
        The names that are missing in the file, and those that are not expected in it.

    Raises:
        RuntimeError: with ``strict``, names that are missing or not expected; or a shape that is
            another.
        FormatError, ReadError: as ``load_file``.
    """
    tensors = load_file(filename, device, backend=backend)
    own = model.state_dict()
    tied = _tied_groups(own)
    lacking, unexpected = model.load_state_dict(tensors, strict=False)
    missing = set(lacking)
    for group in tied:
        if here := [name for name in group if name in tensors]:
            missing -= set(group)
            unexpected += here[1:]
    if strict and (missing or unexpected):
        text = f"{os.fspath(filename)}: error(s) in loading state_dict for {type(model).__name__}:"
        for what, names in (("Missing", missing), ("Unexpected", unexpected)):
            if names:
                listed = ", ".join(f'"{name}"' for name in sorted(names))
                text += f"\n    {what} key(s) in state_dict: {listed}"
        raise RuntimeError(text)
    return missing, unexpected


def _tied_groups(state_dict: dict[str, torch.Tensor]) -> list[list[str]]:
    """Names whose tensors are the same elements of the same memory."""
    groups: dict[object, list[str]] = {}
    for name, tensor in state_dict.items():
        if tensor.device.type != "meta" and tensor.numel():
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            groups.setdefault(place, []).append(name)
    return [sorted(names) for names in groups.values() if len(names) > 1]


def load_checkpoint(
    path_or_repo_or_checkpoint: str | os.PathLike[str] | Checkpoint,
    device_map: DeviceMap = "cpu",
    *,
    dtype: torch.dtype | str | None = None,
    mode: Mode = "auto",
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
    require("torch", "load_checkpoint")
    if isinstance(path_or_repo_or_checkpoint, Checkpoint):
        checkpoint = path_or_repo_or_checkpoint
        if open_arguments:
            raise ArgumentError(f"{sorted(open_arguments)}: this checkpoint is open already")
    else:
        checkpoint = open_checkpoint(path_or_repo_or_checkpoint, **open_arguments)
    plan = LoadPlan(checkpoint, LoadOptions(mode, pin_memory, verify, progress))
    name = dtypes.parse_dtype(dtype)
    devices = parse_device_map(device_map)
    if len(set(devices.values())) == 1 and "" in devices:
        plan.add(devices[""], name)
    else:
        for device, names in assign(checkpoint, devices).items():
            plan.add(device, name, names)
    return plan.start().result()


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
    require("torch", "load_state_dict")
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
        checkpoint_file, loadable_device(map_location), mode="read" if disable_mmap else "auto"
    )
