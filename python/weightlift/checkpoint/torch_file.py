"""Indexes torch's own checkpoint files. Runs no code of a pickle that torch's weights-only
unpickler would not run."""

from __future__ import annotations

import functools
import io
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import weightlift._native as _native
from weightlift.checkpoint.first_bytes import FirstBytes
from weightlift.checkpoint.integrity import Identity, identity_of
from weightlift.checkpoint.state_dicts import (
    Found,
    find_state_dict,
    key_text,
    type_name,
)
from weightlift.checkpoint.state_dicts import StoredTensor as _Tensor
from weightlift.checkpoint.torch_errors import errors_of_torch, explained
from weightlift.core import dtypes
from weightlift.core.errors import FormatError
from weightlift.core.report import format_count
from weightlift.core.requirements import require

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("weightlift")

__all__ = ["LoadedTorchFile", "TorchFile", "View", "open_torch_file"]


class View(NamedTuple):
    """A tensor that shares bytes with others, or is not contiguous.

    Attributes:
        base: the flat tensor of the index, of the same dtype, that holds its elements.
        dtype: the file's name of its dtype, such as ``"BF16"``.
        shape: its shape, in elements of the torch dtype (pairs for ``float4_e2m1fn_x2``).
        stride: its strides, in the same elements.
        offset: its offset into the base, in the same elements: the tensor is
            ``base.as_strided(shape, stride, offset)``.
    """

    base: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class TorchFile(NamedTuple):
    """The index of a state dict in a file of ``torch.save``; no tensor is read.

    Attributes:
        part: the byte runs to read: each contiguous tensor with bytes of its own, under its name;
            the common range of tensors that overlap or have strides, flat, under the first name.
        views: the tensors that overlap or have strides.
        names: the names of all tensors, in the order of the state dict.
        not_tensors: key -> type name of all other objects in the state dict and beside it (dotted
            keys if nested).
        left_out: key -> number of tensors, for those of ``not_tensors`` that hold tensors.
    """

    part: _native.IndexedFile
    views: dict[str, View]
    names: list[str]
    not_tensors: dict[str, str]
    left_out: dict[str, int]


class LoadedTorchFile(NamedTuple):
    """A state dict that torch loaded.

    Attributes:
        tensors: CPU tensors, in the order of the state dict.
        not_tensors, left_out: as in ``TorchFile``.
        reason: why torch loaded it, for the report.
        identity: the identity of the file.
    """

    tensors: dict[str, torch.Tensor]
    not_tensors: dict[str, str]
    left_out: dict[str, int]
    reason: str
    identity: Identity


def open_torch_file(
    path: str | os.PathLike[str], *, state_dict_key: str | None = None
) -> TorchFile | LoadedTorchFile:
    """Opens a ``.bin``, ``.pt``, ``.pth`` or ``.ckpt`` file that ``torch.save`` wrote.

    Args:
        path: the file.
        state_dict_key: the dotted key of the state dict, such as ``"state_dict"`` or
            ``"model.ema"``, or ``""`` for the top level. By default the only plausible dict;
            numbers and states of random generators beside it do not count. A warning names tensors
            that are left out.

    Raises:
        FormatError: the file is damaged, not from torch, or refused by the weights-only unpickler.
            It is never loaded with weaker checks. Codes besides those of ``csrc/result.h``:
            ``"unsafe_pickle"`` (refused by the unpickler), ``"malformed_pickle"``,
            ``"torchscript"``, ``"big_endian"`` and ``"unsupported_tensor"`` (sparse, quantized,
            conjugated, of a subclass, without data).
        CheckpointError: there is no state dict, or several, or none under ``state_dict_key``.
        ReadError: the file cannot be read; for a missing file also a ``FileNotFoundError``.
    """
    require("torch", "a file of torch.save")
    path = os.fspath(path)
    try:
        archive = _native.Archive.open(path)
    except FormatError as error:
        if error.code == "not_archive":
            if FirstBytes.of(path).is_safetensors:
                raise FormatError(
                    "not_weights", "this is a safetensors file: rename it to .safetensors", path
                ) from None
            return _loaded(path, state_dict_key, "torch's format from before 1.6", mmap=False)
        raise explained(error, path) from None
    try:
        data = _pickle_of(archive)
    except FormatError as error:
        raise (explained(error, path) if error.code == "not_weights" else error) from None
    with errors_of_torch(path, data):
        if state_dict_key is None and (plain := _plain(archive, data)) is not None:
            return plain
        places = _places(archive)
        value = _value_of(data, places)
    describe: _Describe = _described
    if value is None:
        if not _unpickles():
            reason = "this torch has an unknown unpickler"
            return _loaded(path, state_dict_key, reason, mmap=True)
        with errors_of_torch(path, data):
            unpickled = _Unpickled(data, places, path)
        value, describe = unpickled.value, unpickled.describe
    found = _find(value, state_dict_key, path)
    file = _Indexer(archive, places, describe).index(found.state_dict)
    return file._replace(not_tensors=found.beside | file.not_tensors, left_out=found.left_out)


def _plain(archive: _native.Archive, data: bytes) -> TorchFile | None:
    """The index without a Python object for each tensor, which takes longer; ``None`` for a state
    dict that needs them."""
    found = archive.index_of_plain(data)
    if found is None:
        return None
    index, names, ties = found
    views = {name: View(base, dtype, shape, stride, 0) for name, base, dtype, shape, stride in ties}
    return TorchFile(index, views, names, {}, {})


def _find(value: Any, state_dict_key: str | None, path: str) -> Found:
    found = find_state_dict(value, state_dict_key, path)
    if note := found.note():
        _log.warning("%s: %s", path, note)
    return found


# --- The file ------------------------------------------------------------------------------------

# kMaxSupportedFileFormatVersion of torch's caffe2/serialize/versions.h.
_LATEST_VERSION = 10

# Record -> (begin, number of bytes).
_Places = dict[str, tuple[int, int]]


def _places(archive: _native.Archive) -> _Places:
    """The records, without their common folder."""
    records = archive.records()
    begin = records[0][0].index("/") + 1
    return {name[begin:]: (first, count) for name, first, count, _, _ in records}


def _pickle_of(archive: _native.Archive) -> bytes:
    """The pickle of a file of torch.save.

    Raises a ``FormatError`` for other archives, and for files of other versions of the format.
    """
    places = archive.find([".data/version", "version", "data.pkl", "constants.pkl", "byteorder"])
    number = next((name for name in (".data/version", "version") if name in places), None)
    if "data.pkl" not in places or number is None:
        raise FormatError(
            "not_weights", "this is a zip file, but not a checkpoint of torch.save", archive.path
        )
    if "constants.pkl" in places:
        raise FormatError(
            "torchscript",
            "this is a TorchScript archive, which holds code: if you trust it, load it with "
            "torch.jit.load and save its state_dict()",
            archive.path,
        )
    version = archive.read(*places[number]).strip()
    if not version.isdigit() or not 1 <= int(version[:9]) <= _LATEST_VERSION:
        raise FormatError(
            "archive_unsupported",
            f"it has version {version[:16]!r} of torch's format; weightlift reads versions 1 to "
            f"{_LATEST_VERSION}: update weightlift, or save it again with an older torch",
            archive.path,
        )
    order = archive.read(*places["byteorder"]) if "byteorder" in places else b"little"
    if order != b"little":
        raise FormatError(
            "big_endian",
            f"its byte order is {order[:16]!r}; save it again on a little-endian machine",
            archive.path,
        )
    return archive.read(*places["data.pkl"])


# Describes a tensor of the unpickled value.
_Describe = Callable[[str, Any], _Tensor]


def _value_of(data: bytes, places: _Places) -> dict[Any, Any] | None:
    """The content of the pickle, read without torch's unpickler, which takes longer (`make
    check-perf` counts it); ``None`` if the pickle needs torch's unpickler."""
    known = _native.torch_pickle(data, _Tensor)
    if known is None:
        return None
    value, storages = known
    sound = all(places.get(f"data/{key}", (0, -1))[1] == size for key, size in storages.items())
    return value if sound else None


def _described(name: str, tensor: _Tensor) -> _Tensor:
    return tensor


class _Unpickled:
    """The object that ``torch.load(map_location="meta", weights_only=True)`` returns, with tensors
    without data, and the places of their storages.

    This uses torch's unpickler but not its loader. The loader reads the archive by other rules than
    the checks here. With a ``.format_version`` it computes the places of storages from their order
    in the pickle, which an archive need not have. It also drops the sizes in the pickle: on meta, a
    tensor that exceeds its storage enlarges the storage.

    Attributes:
        value: the object.
    """

    def __init__(self, data: bytes, places: _Places, path: str = "") -> None:
        from torch import _utils, _weights_only_unpickler, serialization

        self._places = places
        self._path = path
        self._storages: dict[str, Any] = {}
        self._records: dict[int, str] = {}  # address of the storage -> record
        unpickler: Any = _weights_only_unpickler.Unpickler(io.BytesIO(data), encoding="utf-8")
        unpickler.persistent_load = self._storage
        # The device for tensors whose pickle names a device.
        serialization._serialization_tls.map_location = "meta"
        try:
            self.value = unpickler.load()
        finally:
            serialization._serialization_tls.map_location = None
            _utils._sparse_tensors_to_validate.clear()

    def _storage(self, saved: Any) -> Any:
        import torch

        _, kind, key, _, count = saved
        name = f"data/{key}"
        known = self._storages.get(name)
        if known is not None:
            return known
        begin, stored = self._places[name]
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        if type(count) is not int or count * dtype.itemsize != stored:
            raise FormatError(
                "size_mismatch",
                f"its pickle gives {count!r:.30} elements of {dtype} for the record {name!r}, "
                f"which has {format_count(stored, 'byte')}; the file is damaged: download it or "
                "save it again",
                self._path,
                begin,
            )
        of_torch: Any = torch.storage
        untyped = of_torch.UntypedStorage(stored, device="meta")
        storage = of_torch.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
        self._records[untyped._cdata] = key
        # Kept alive, so that no other storage gets its address.
        self._storages[name] = storage
        return storage

    def describe(self, name: str, tensor: torch.Tensor) -> _Tensor:
        import torch

        methods = torch.Tensor
        dtype = dtypes.file_name(tensor.dtype)
        if (
            dtype is None
            or type(tensor) not in (torch.Tensor, torch.nn.Parameter)
            or tensor.layout is not torch.strided
            or methods.is_conj(tensor)
            or methods.is_neg(tensor)
        ):
            raise _unsupported(self._path, name, _kind(tensor))
        record = self._records.get(methods.untyped_storage(tensor)._cdata)
        if record is None:
            raise FormatError(
                "unsupported_tensor",
                "it has no data in the file, as a tensor that was on the meta device when it was "
                "saved: load the model's weights before it is saved",
                self._path,
                tensor=name,
            )
        return _Tensor(
            record, dtype, int(methods.storage_offset(tensor)), tuple(tensor.shape),
            methods.stride(tensor), methods.is_contiguous(tensor),
        )  # fmt: skip


# data.pkl of {"probe": torch.zeros(3)}, as torch writes it since 1.6. A call of torch.save would
# take longer than opening a checkpoint.
_PROBE = (
    b"\x80\x02}X\x05\x00\x00\x00probectorch._utils\n_rebuild_tensor_v2\n"
    b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    b"K\x03tQK\x00K\x03\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtRs."
)


@functools.cache
def _unpickles() -> bool:
    """Whether the installed torch has the private interfaces that this class uses."""
    try:
        unpickled = _Unpickled(_PROBE, {"data/0": (4096, 12)})
        tensor = unpickled.value["probe"]
        return bool(tensor.is_meta and unpickled.describe("probe", tensor).record == "0")
    except Exception:
        return False


def _loaded(path: str, state_dict_key: str | None, reason: str, mmap: bool) -> LoadedTorchFile:
    import torch

    with errors_of_torch(path):
        identity = identity_of(os.stat(path))  # noqa: PTH116
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    tensors = {}
    found = _find(loaded, state_dict_key, path)
    not_tensors = found.beside
    for name, value in dict.items(found.state_dict):
        if isinstance(value, torch.Tensor):
            tensors[_name(name, path)] = torch.Tensor.detach(value)
        else:
            not_tensors[key_text(name)] = type_name(value)
    return LoadedTorchFile(tensors, not_tensors, found.left_out, reason, identity)


# --- The tensors ---------------------------------------------------------------------------------


def _name(name: object, path: str) -> str:
    if not isinstance(name, str):
        raise FormatError(
            "tensor_invalid", f"the key of a tensor is {key_text(name)}, not text", path
        )
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            message = f"a tensor's name is not UTF-8: {name[:60]!r}"
            raise FormatError("tensor_invalid", message, path) from None
    return name


class _Span(NamedTuple):
    """The byte range of a tensor in its storage."""

    name: str
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    begin: int
    end: int
    contiguous: bool
    order: int  # in the state dict


class _Indexer:
    def __init__(self, archive: _native.Archive, places: _Places, describe: _Describe) -> None:
        self._archive = archive
        self._path = archive.path
        self._places = places
        self._describe = describe
        # (name, dtype, shape, begin) of the entries of the index.
        self._bases: list[tuple[str, str, tuple[int, ...], int]] = []
        self._views: dict[str, View] = {}

    def index(self, state_dict: dict[Any, Any]) -> TorchFile:
        import torch

        names: list[str] = []
        not_tensors: dict[str, str] = {}
        spans: dict[int, list[_Span]] = {}
        for key, value in dict.items(state_dict):
            if isinstance(value, (_Tensor, torch.Tensor)):
                name = _name(key, self._path)
                begin, span = self._span(name, self._describe(name, value), len(names))
                spans.setdefault(begin, []).append(span)
                names.append(name)
            else:
                not_tensors[key_text(key)] = type_name(value)
        for begin, sharing in spans.items():
            self._add(begin, sharing)
        index = self._archive.index(self._bases)
        return TorchFile(index, self._views, names, not_tensors, {})

    def _span(self, name: str, tensor: _Tensor, order: int) -> tuple[int, _Span]:
        """The begin of a tensor's storage in the file, and the tensor's range in it."""
        record, dtype, first, shape, stride, contiguous = tensor
        begin, stored = self._places[f"data/{record}"]
        itemsize = _itemsize(dtype)
        last = first
        for extent, step in zip(shape, stride, strict=True):
            last += (extent - 1) * step
        if 0 in shape:
            first, last = 0, -1
        elif first < 0 or min(stride, default=0) < 0 or (last + 1) * itemsize > stored:
            raise FormatError(
                "offsets_invalid",
                f"it ends at byte {(last + 1) * itemsize} of its storage, which has {stored} "
                "bytes; the file is damaged: download it or save it again",
                self._path,
                begin,
                name,
            )
        return begin, _Span(
            name, dtype, itemsize, shape, stride, first * itemsize, (last + 1) * itemsize,
            contiguous, order,
        )  # fmt: skip

    def _add(self, storage: int, spans: list[_Span]) -> None:
        """Adds the tensors of one storage: singly if they do not overlap, else their common
        range."""
        if len(spans) > 1:
            spans = sorted(spans, key=lambda span: (span.begin, span.end))
        first, end = 0, -1
        for i, span in enumerate(spans):
            if i > first and span.begin >= end:
                self._add_overlapping(storage, spans[first:i])
                first = i
            end = max(end, span.end)
        self._add_overlapping(storage, spans[first:])

    def _add_overlapping(self, storage: int, spans: list[_Span]) -> None:
        packed = 2 if spans[0].dtype == "F4" else 1  # the format's elements per torch element
        if len(spans) == 1 and spans[0].contiguous and (packed == 1 or spans[0].shape):
            (span,) = spans
            shape = span.shape
            if packed != 1:
                shape = (*shape[:-1], shape[-1] * packed)
            self._add_base(span, shape, storage + span.begin)
            return
        base = min(spans, key=lambda span: span.order)
        begin = spans[0].begin
        count = (max(span.end for span in spans) - begin) // base.itemsize
        for span in spans:
            if span.dtype != base.dtype:
                raise _unsupported(
                    self._path,
                    span.name,
                    f"shares bytes with tensor {base.name!r} of another dtype",
                )
            offset = (span.begin - begin) // span.itemsize
            self._views[span.name] = View(base.name, span.dtype, span.shape, span.stride, offset)
        self._add_base(base, (count * packed,), storage + begin)

    def _add_base(self, span: _Span, shape: tuple[int, ...], begin: int) -> None:
        self._bases.append((span.name, span.dtype, shape, begin))


@functools.cache
def _itemsize(dtype: str) -> int:
    return dtypes.to_torch(dtype).itemsize


def _unsupported(path: str, name: str, what: str) -> FormatError:
    return FormatError(
        "unsupported_tensor",
        f"it {what}: load the file with torch.load(weights_only=True), and save plain tensors",
        path,
        tensor=name,
    )


def _kind(tensor: torch.Tensor) -> str:
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"is a {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"is sparse ({tensor.layout})"
    if torch.Tensor.is_conj(tensor) or torch.Tensor.is_neg(tensor):
        return "is a conjugated or negated view"
    return f"has dtype {tensor.dtype}, which weight files do not support"
