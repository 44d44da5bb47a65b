"""Loads of files and checkpoints: ``load_file``, ``load_checkpoint``, ``load_state_dict``."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.open_checkpoint import (
    open_checkpoint,
    open_file,
    open_without_arguments,
)
from weightlift.core import dtypes
from weightlift.core.devices import loadable_device, parse_device
from weightlift.core.errors import ArgumentError, FormatError
from weightlift.core.given import check_flag
from weightlift.core.paths import path_text
from weightlift.core.requirements import require
from weightlift.load.load_plan import LoadPlan
from weightlift.load.load_tensors import load_tensors
from weightlift.load.options import Backend, LoadOptions, Mode, Progress, mode_of_backend
from weightlift.load.slots_ahead import slots_ahead
from weightlift.module.device_map import DeviceMap, assign, known_devices, parse_device_map
from weightlift.module.parameters import check_module

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
    """Loads all tensors of a ``.safetensors`` file or of a file that ``torch.save`` wrote.

    Args:
        filename: the file. Its content decides the format if its name does not.
        device: where the tensors go: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``1`` or a
            ``torch.device``.
        dtype: the dtype to cast floating-point tensors to while loading: a torch dtype or its name.
            ``None`` and ``"auto"`` keep the file's. The cast has the bits of ``tensor.to(dtype)``
            for all numbers; a NaN becomes the quiet NaN with the same sign.
        mode: ``"map"`` returns a private, writable mapping of the file; ``"read"`` reads into own
            memory (use it for files that others may truncate: access to a mapping of a truncated
            file raises SIGBUS); ``"auto"`` maps where nothing is cast, pinned or moved.
        pin_memory: use page-locked host memory, for later asynchronous copies.
        verify: compare the file's SHA-256 with the Hub cache or with a ``SHA256SUMS`` file beside
            it; it is an error if neither has the hash.
        progress: ``True`` for a progress bar, or a function of bytes done and total.
        backend: the reference's name for the mode, ``"mmap"`` or ``"pread"``.

    Returns:
        Name -> tensor, with the file's shapes, in the order of the file.

    Raises:
        FormatError: the file breaks its format (also a ``safetensors.SafetensorError``).
        ReadError: the file cannot be read (also an ``OSError``), or changes during the load.
        DeviceError: the device does not exist, or its driver failed.
        ArgumentError: an argument is invalid, or two contradict each other (also a ``ValueError``).
        OutOfMemoryError: the host or the device has too little memory (also a ``MemoryError``).
    """
    require("torch", "load_file")
    # The file is opened before the CPU asks for torch: a wrong path gets its error at once.
    devices = [] if device == "cpu" else [loadable_device(device)]
    with slots_ahead(devices, casts=dtype is not None):
        checkpoint = open_file(filename)
        return load_tensors(
            checkpoint,
            loadable_device(device),
            LoadOptions(mode_of_backend(mode, backend), pin_memory, verify, progress),
            dtype=dtypes.parse_dtype(dtype),
        )


def load(data: bytes) -> dict[str, torch.Tensor]:
    """Loads all tensors of a safetensors file from its bytes.

    Args:
        data: the content of the file.

    Returns:
        Name -> tensor on the CPU, in own memory, in the order of the file.

    Raises:
        FormatError: ``data`` breaks the format (also a ``safetensors.SafetensorError``).
        OutOfMemoryError: the host has too little memory (also a ``MemoryError``).
    """
    require("torch", "load")
    try:
        view = memoryview(data)
    except TypeError:
        hint = ""
        if isinstance(data, (str, os.PathLike)):
            hint = ": load_file takes a path"
        elif hasattr(data, "read"):
            hint = ": give its read(), or its name to load_file"
        raise TypeError(
            f"load takes the bytes of a file, not {type(data).__name__}{hint}"
        ) from None
    try:
        with _as_file(view.cast("B")) as path:
            checkpoint = Checkpoint.from_file(path)
            return load_tensors(checkpoint, parse_device("cpu"), LoadOptions("read"))
    except FormatError as error:
        message = error.message
        if bytes(view.cast("B")[:2]) == b"PK":
            message = (
                "this is a zip file, perhaps of torch.save: torch.load(io.BytesIO(data), "
                "weights_only=True) loads one"
            )
        raise FormatError(
            error.code, message, "the bytes given to load", error.offset, error.tensor
        ) from None


@contextlib.contextmanager
def _as_file(view: memoryview) -> Iterator[str]:
    """The path of a file with these bytes: a memfd if /proc is available (proc(5))."""
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

    The file has tied weights (names that share memory in the model) once, under any of the names.

    Args:
        model: the model, whose parameters are filled in place.
        filename: the file.
        strict: missing and unexpected names are an error.
        device: the device to load to before the copy into the model.
        backend: as in ``load_file``.

    Returns:
        The model's names that the file lacks, and the file's names that the model lacks.

    Raises:
        RuntimeError: with ``strict``, missing or unexpected names; or a shape differs.
        ArgumentError: the model is on ``meta`` (``load_into`` fills one), or an argument is of the
            wrong kind.
        FormatError, ReadError: as ``load_file``.
    """
    require("torch", "load_model")
    check_module(model, "load_model")
    check_flag("strict", strict)
    path = path_text(filename)
    own = model.state_dict()
    for name, tensor in own.items():
        if tensor.device.type == "meta":
            raise ArgumentError(
                f"{path}: {name!r} of the model is on meta, where nothing can be loaded in place: "
                "load_into(model, filename) gives it values"
            )
    tensors = load_file(filename, device, backend=backend)
    tied = _tied_groups(own)
    try:
        lacking, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise RuntimeError(f"{path}: {error}") from None
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
    """Groups of names whose tensors are the same elements of the same memory."""
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
        device_map: a device, or a dict of name prefix (whole components, ``""`` for all) ->
            device. ``load_into`` has the maps that need a model (``"auto"``, ``"disk"``).
        dtype, mode, pin_memory, verify, progress: as in ``load_file``. ``mode="auto"`` reads torch
            files into own memory, because users save back onto the file that they loaded.
        open_arguments: the keyword arguments of ``open_checkpoint``.

    Returns:
        Name -> tensor. Tensors that share memory in a torch file share memory here too.

    Raises:
        CheckpointError: the checkpoint does not exist, or its index contradicts its files.
        TypeError: there is no such argument.
        FormatError, ReadError, DeviceError, ArgumentError, OutOfMemoryError: as ``load_file``.
    """
    require("torch", "load_checkpoint")
    _check_names(open_arguments)
    with slots_ahead(known_devices(device_map), casts=dtype is not None):
        if isinstance(path_or_repo_or_checkpoint, Checkpoint):
            checkpoint = path_or_repo_or_checkpoint
            if open_arguments:
                raise ArgumentError(
                    f"{sorted(open_arguments)}: the checkpoint is already open; give a path, or "
                    "leave these arguments out"
                )
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


def _check_names(open_arguments: Mapping[str, Any]) -> None:
    """
    Raises:
        TypeError: neither ``load_checkpoint`` nor ``open_checkpoint`` has an argument of this name.
    """
    of_open = inspect.signature(open_checkpoint).parameters
    for name in open_arguments:
        if name not in of_open:
            known = [*inspect.signature(load_checkpoint).parameters, *of_open]
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"load_checkpoint() got an unexpected keyword argument {name!r}{hint}")


def load_state_dict(
    checkpoint_file: str | os.PathLike[str] | dict[str, torch.Tensor],
    variant: str | None = None,
    *,
    map_location: torch.device | str | int = "cpu",
    disable_mmap: bool = False,
) -> dict[str, torch.Tensor]:
    """Loads the tensors of one weights file; has the name and the arguments of diffusers' function.

    Args:
        checkpoint_file: a ``.safetensors`` or torch file. A dict is returned unchanged.
        variant: the variant in a folder; a file is given by its name.
        map_location: the device; ``"meta"`` reads no tensor data.
        disable_mmap: read into own memory instead of mapping.

    Returns:
        Name -> tensor.

    Raises:
        FormatError, ReadError, CheckpointError, DeviceError, OutOfMemoryError: as
            ``load_checkpoint``.
    """
    require("torch", "load_state_dict")
    import torch

    if isinstance(checkpoint_file, dict):
        return checkpoint_file
    on_meta = str(map_location) == "meta"
    with slots_ahead(known_devices("cpu" if on_meta else map_location)):
        if variant is not None and Path(path_text(checkpoint_file)).is_dir():
            checkpoint = open_checkpoint(checkpoint_file, variant=variant)
        else:
            checkpoint = open_without_arguments(checkpoint_file)
    if on_meta:
        headers = checkpoint.headers()
        return {
            name: torch.empty(
                (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape,
                dtype=dtypes.to_torch(dtype),
                device="meta",
            )
            for name, (dtype, shape) in headers.items()
        }
    return load_checkpoint(
        checkpoint, loadable_device(map_location), mode="read" if disable_mmap else "auto"
    )
