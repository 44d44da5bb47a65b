"""Writes a safetensors file in one pass."""

from __future__ import annotations

import ctypes
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from weightlift.core import dtypes
from weightlift.core.atomic import flush_descriptor, keep_mode
from weightlift.core.errors import ArgumentError

if TYPE_CHECKING:
    import torch

__all__ = [
    "Entry",
    "bytes_of",
    "check_metadata",
    "entry_of",
    "header_of",
    "in_order",
    "size_of",
    "write_safetensors",
]

# Bytes of one write(2), between which progress is shown.
_STEP = 16 << 20
# Smaller files are not allocated in advance.
_ALLOCATED = 1 << 20
_LARGEST_HEADER = 100_000_000  # MAX_HEADER_SIZE of the reference

# The reference's writer orders tensors by dtype, from the last in this list to the first, then by
# name.
_ORDER = {name: number for number, name in enumerate(dtypes.TORCH_NAMES)}


class Entry(NamedTuple):
    """A tensor of the file to write.

    Attributes:
        name: its name.
        dtype: the file's name of its dtype, such as ``"BF16"``.
        shape: its shape, in elements of that dtype.
        bytes: its number of bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def entry_of(name: str, tensor: torch.Tensor) -> Entry | None:
    """The entry for a strided tensor; ``None`` if safetensors does not have its dtype."""
    dtype = dtypes.file_name(tensor.dtype)
    if dtype is None or dtype in ("C32", "C128"):
        return None
    shape = tuple(tensor.shape)
    if dtype == "F4":  # a torch element is two elements of the format
        shape = (*shape[:-1], shape[-1] * 2)
    return Entry(name, dtype, shape, tensor.nbytes)


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """The entries in the order of the reference's writer."""
    return sorted(entries, key=lambda entry: (-_ORDER[entry.dtype], entry.name))


def size_of(entries: Iterable[Entry]) -> int:
    """The bytes of all tensors."""
    return sum(entry.bytes for entry in entries)


def check_metadata(metadata: Mapping[str, str] | None, where: str) -> None:
    """
    Raises:
        TypeError: not a dict of text for text; the message begins with ``where``.
    """
    if metadata is None:
        return
    if not isinstance(metadata, Mapping):
        raise TypeError(
            f"{where}metadata is a dict of text for text, not {type(metadata).__name__}"
        )
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"{where}metadata must map text to text, and {key!r} is {value!r}")


def header_of(
    entries: Sequence[Entry], metadata: Mapping[str, str] | None, where: str = ""
) -> bytes:
    """The first bytes of a file with these tensors in this order, padded to a multiple of eight.

    Args:
        entries: the tensors.
        metadata: text -> text.
        where: what the messages begin with, such as ``"model.safetensors: "``.

    Raises:
        ArgumentError: a name is forbidden, or the header is too large.
        TypeError: a name or metadata is not text.
    """
    header: dict[str, object] = {}
    check_metadata(metadata, where)
    if metadata:
        header["__metadata__"] = dict(metadata)
    end = 0
    for entry in entries:
        if not isinstance(entry.name, str):
            raise TypeError(f"{where}the name of a tensor must be text, not {entry.name!r}")
        if entry.name == "__metadata__":
            raise ArgumentError(
                f"{where}a tensor is called '__metadata__', the format's name of the metadata: "
                "rename it"
            )
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.bytes],
        }
        end += entry.bytes
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"{where}a name or the metadata cannot be written as UTF-8: {error}"
        ) from None
    if len(text) > _LARGEST_HEADER:
        raise ArgumentError(
            f"{where}the header has {len(text)} bytes, and loaders accept at most "
            f"{_LARGEST_HEADER}: save the tensors as several files"
        )
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_safetensors(
    path: Path,
    header: bytes,
    data: Iterable[memoryview],
    *,
    size: int,
    replaces: Path | None = None,
    show: Callable[[int], None] | None = None,
) -> None:
    """Writes a file and flushes it to the disk.

    The kernel decides when the write-back begins. To begin it early with sync_file_range(2) saves
    at most the time of the copy to the page cache, and it slows that copy down by more:
    ``benchmarks/saves.py`` shows it in a change of this function.

    Args:
        path: a file that does not exist.
        header: the bytes of ``header_of``.
        data: the tensors' bytes, in the order of the header.
        size: the number of bytes of ``data``.
        replaces: the file that it will replace and whose mode it gets.
        show: called with the tensor bytes of each write.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        if replaces is not None:
            keep_mode(descriptor, replaces)
        _allocate(descriptor, len(header) + size)
        for part, counted in _parts(header, data):
            _write_all(descriptor, part)
            if show is not None and counted:
                show(len(part))
        flush_descriptor(descriptor)
    finally:
        os.close(descriptor)


def _allocate(descriptor: int, size: int) -> None:
    """Allocates the blocks of a new file at once, so that the kernel need not reserve them page by
    page. A failure does not matter.

    Not on file systems without a block device, whose major number is 0: a save to tmpfs takes
    longer by it, and btrfs would not compress them. Not by posix_fallocate(3), which writes to
    each block where there is no fallocate(2).
    """
    if size >= _ALLOCATED and os.major(os.fstat(descriptor).st_dev) != 0:
        libc = ctypes.CDLL(None)
        libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size))


def _parts(header: bytes, data: Iterable[memoryview]) -> Iterator[tuple[memoryview, bool]]:
    """Yields (bytes, whether they belong to tensors)."""
    yield memoryview(header), False
    for whole in data:
        for begin in range(0, len(whole), _STEP):
            yield whole[begin : begin + _STEP], True


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, which must stay alive."""
    import torch

    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
