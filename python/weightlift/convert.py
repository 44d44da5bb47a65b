"""A checkpoint of any form becomes safetensors files, in bounded memory."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core import dtypes
from weightlift.core.atomic import flush_file, flush_folder, temporary_beside, umask
from weightlift.core.devices import parse_device
from weightlift.core.errors import ArgumentError, CheckpointError
from weightlift.core.requirements import require
from weightlift.load.load_tensors import load_tensors
from weightlift.load.options import LoadOptions

if TYPE_CHECKING:
    import torch

__all__ = ["convert_checkpoint"]

# Tensor bytes that are in memory at once, if no tensor alone has more.
_AT_ONCE = 256 << 20
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
# Shards are named so by transformers, diffusers and huggingface_hub.
_SHARD = "{stem}{variant}-{number:05}-of-{count:05}.safetensors"


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor as it will be in the new file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def convert_checkpoint(
    checkpoint: Checkpoint,
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "10GB",
    stem: str = "model",
    variant: str | None = None,
    companions: Mapping[str, bytes] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Writes a checkpoint as one ``.safetensors`` file, or as a folder of shards with an index.

    Everything is written under a temporary name, flushed, and renamed at the end: on an error, or
    killed, there is no target. Tensors that are one in the checkpoint (tied weights) are written
    once; the metadata says ``{dropped name: kept name}``, as huggingface_hub's does.

    Args:
        checkpoint: any form.
        target: a file that ends in ``.safetensors``, or a folder; neither may be there already.
        dtype: cast floating-point tensors to this.
        max_shard_size: largest number of tensor bytes in one file of a folder, if no tensor alone
            has more: bytes, or text such as ``"5GB"`` (10^9 bytes).
        stem: what the names in a folder begin with.
        variant: ``"fp16"`` gives ``model.fp16.safetensors``.
        companions: file name -> content, of files that go into the folder too.
        progress: called with the bytes done and in all.

    Returns:
        The names of the files that were written.

    Raises:
        ArgumentError: the target is there, or a size or name is none.
        CheckpointError: a tensor that safetensors has no dtype for.
    """
    require("torch", "convert")
    target = Path(target)
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise ArgumentError(f"{target} is there already: remove it, or name another target")
    for part in (stem, variant or ""):
        if "/" in part or "\0" in part:
            raise ArgumentError(f"{part!r} must be a part of a file name")
    name = dtypes.parse_dtype(dtype)
    entries, tied = _entries(checkpoint, name)
    header = {"format": "pt", **_texts(checkpoint.metadata), **tied}
    done = 0
    total = sum(entry.bytes for entry in entries)

    def show(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    show(0)
    if target.suffix == ".safetensors":
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(target)
        try:
            _write(checkpoint, entries, name, header, temporary, show)
            flush_file(temporary)
            temporary.rename(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush_folder(target.parent)
        return [target.name]

    shards = list(_split(entries, _bytes(max_shard_size)))
    files = _names(stem, variant, len(shards))
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_beside(target)
    folder.mkdir()
    try:
        for file, shard in zip(files, shards, strict=True):
            alone = header if len(shards) == 1 else {"format": "pt"}
            _write(checkpoint, shard, name, alone, folder / file, show)
            flush_file(folder / file)
        if len(shards) > 1:
            index = {
                "metadata": {**{k: v for k, v in header.items() if k != "format"},
                             "total_size": total},
                "weight_map": {
                    entry.name: file
                    for file, shard in zip(files, shards, strict=True)
                    for entry in shard
                },
            }  # fmt: skip
            of_variant = f".{variant}" if variant else ""
            files.append(f"{stem}.safetensors.index{of_variant}.json")
            (folder / files[-1]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for file, content in (companions or {}).items():
            (folder / file).write_bytes(content)
            files.append(file)
        for file in files[len(shards) :]:
            flush_file(folder / file)
        flush_folder(folder)
        folder.chmod(0o777 & ~umask())
        folder.rename(target)  # over an empty folder too: rename(2)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    flush_folder(target.parent)
    return files


def _texts(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key != "not_tensors"}


def _entries(checkpoint: Checkpoint, dtype: str | None) -> tuple[list[_Entry], dict[str, str]]:
    """In the order of the reference's writer: by alignment, then by name; and what is tied."""
    kept: dict[object, str] = {}
    tied: dict[str, str] = {}
    entries = []
    for name, (own, shape) in checkpoint.headers().items():
        place = None if checkpoint.is_plain else checkpoint.place(name)
        view = None if place is None else place[2]
        if place is not None and view is not None:
            part, position, _ = place
            key = (part, position, view.shape, view.stride, view.offset)
            first = kept.setdefault(key, name)
            if first != name:
                tied[name] = first
                continue
        if own in ("C32", "C128"):
            raise CheckpointError(
                f"{checkpoint}: tensor {name!r}: safetensors has no dtype for {own}; leave it out"
            )
        target = dtype if dtype and own in dtypes.FLOATING and own != "F4" else own
        size = math.prod(shape) * dtypes.bits(target) // 8
        entries.append(_Entry(name, target, shape, size))
    entries.sort(key=lambda entry: (-dtypes.bits(entry.dtype), entry.name))
    return entries, tied


def _split(entries: Sequence[_Entry], largest: int) -> Iterator[list[_Entry]]:
    shard: list[_Entry] = []
    held = 0
    for entry in entries:
        if shard and held + entry.bytes > largest:
            yield shard
            shard, held = [], 0
        shard.append(entry)
        held += entry.bytes
    yield shard


def _names(stem: str, variant: str | None, count: int) -> list[str]:
    of_variant = f".{variant}" if variant else ""
    if count == 1:
        return [f"{stem}{of_variant}.safetensors"]
    return [
        _SHARD.format(stem=stem, variant=of_variant, number=number, count=count)
        for number in range(1, count + 1)
    ]


def _bytes(size: int | str) -> int:
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    if found is None or found[2].lower() not in _UNITS or not float(found[1]):
        raise ArgumentError(f"max_shard_size is {size!r}; write bytes, or text such as '5GB'")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def _write(
    checkpoint: Checkpoint,
    entries: Sequence[_Entry],
    dtype: str | None,
    metadata: Mapping[str, str],
    path: Path,
    show: Callable[[int], None],
) -> None:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.bytes],
        }
        end += entry.bytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        _write_all(file, struct.pack("<Q", len(text)) + text)
        for batch in _batches(entries):
            names = [entry.name for entry in batch]
            tensors = load_tensors(
                checkpoint, parse_device("cpu"), LoadOptions("read"), dtype=dtype, names=names
            )
            for entry in batch:
                _write_all(file, _data(tensors.pop(entry.name)))
                show(entry.bytes)


def _batches(entries: Iterable[_Entry]) -> Iterator[list[_Entry]]:
    yield from _split(list(entries), _AT_ONCE)


def _data(tensor: torch.Tensor) -> memoryview:
    import torch

    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def _write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:  # write(2) moves at most 2 GiB a call
        left = left[file.write(left) :]
