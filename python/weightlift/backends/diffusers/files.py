"""Decides which files the engine reads, and how."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlift.backends.diffusers.archive import current_archive
from weightlift.backends.diffusers.context import NAME
from weightlift.backends.fallback import FallbackToLibrary
from weightlift.backends.safetensors import usable_device
from weightlift.checkpoint import open_checkpoint
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.files import CheckpointFiles, ShardFile
from weightlift.core import dtypes
from weightlift.core.errors import DeviceError
from weightlift.load.load_tensors import load_tensors
from weightlift.load.options import LoadOptions, Mode

if TYPE_CHECKING:
    import torch

__all__ = ["arrives_as", "castable", "engine_device", "load_all", "mode_for", "open_files"]


def open_files(files: Sequence[Any], key: str | None = None) -> Checkpoint:
    """The checkpoint in these files; for a torch file the tensors at its top or at ``key``.

    Raises:
        FallbackToLibrary: diffusers must read these files.
        WeightliftError: a file is damaged.
    """
    formats = {Path(file).suffix for file in files}
    if formats == {".gguf"}:
        raise FallbackToLibrary("GGUF files are read by diffusers", warn=False)
    if formats == {".safetensors"}:
        opened = Checkpoint.from_files(map(_shard, files))
        if opened.has_duplicates():
            raise FallbackToLibrary(f"{Path(files[0]).parent}: several shards hold the same tensor")
    else:
        shards = [ShardFile(Path(file).name, str(file), "torch") for file in files]
        opened = open_checkpoint.open_files(
            # "" is the top of the file, where diffusers looks, and nowhere else.
            CheckpointFiles(tuple(shards), "torch", str(Path(files[0]).parent)),
            key or "",
        )
        if key is None and "not_tensors" in opened.metadata:
            raise FallbackToLibrary(f"{files[0]}: it holds more than tensors", warn=False)
    for name, (dtype, _) in opened.headers().items():
        if dtype not in dtypes.TORCH_NAMES:
            raise FallbackToLibrary(f"{opened.paths[0]}: torch has no dtype for {name!r}: {dtype}")
    return opened


def _shard(file: Any) -> ShardFile:
    """The file, or the entry of the archive that diffusers reads at this time."""
    archive = current_archive.get()
    entry = None if archive is None else archive.entry(file)
    if archive is None or entry is None:
        return ShardFile(Path(file).name, str(file), "safetensors")
    begin, count = archive.dduf.place(entry)
    return ShardFile(entry, archive.dduf.path, "safetensors", begin, count)


def load_all(opened: Checkpoint, device: torch.device, disable_mmap: bool) -> dict[str, Any]:
    mode: Mode = "read" if disable_mmap else mode_for(opened, device, False)
    return load_tensors(opened, device, LoadOptions(mode, caller=NAME))


def mode_for(opened: Checkpoint, device: torch.device | None, casts: bool) -> Mode:
    """The mode of the load: like diffusers it maps torch files, which ``"auto"`` reads."""
    on_cpu = device is not None and device.type == "cpu"
    return "map" if on_cpu and not casts and "torch" in opened.formats else "auto"


def engine_device(device: Any) -> torch.device | None:
    """The device, if the engine loads to it."""
    try:
        return usable_device(device)
    except (DeviceError, FallbackToLibrary):
        return None


def castable(dtype: torch.dtype) -> str | None:
    name = dtypes.file_name(dtype)
    return name if name in dtypes.CASTABLE else None


def arrives_as(
    stored: str, name: str, tensor: torch.Tensor, wanted: str | None, keep: frozenset[str]
) -> str | None:
    """The file's name of the dtype of a tensor in diffusers; ``None`` for casts that the engine
    does not do, such as from booleans to numbers."""
    own = dtypes.file_name(tensor.dtype)
    if stored not in dtypes.FLOATING:
        return own if stored == own else None
    if stored == "F4" or not tensor.is_floating_point():
        return None
    if wanted is not None and not keep.isdisjoint(name.split(".")):
        return "F32"
    return wanted or own
