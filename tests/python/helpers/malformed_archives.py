"""Generated archives that are malformed, or odd but accepted: torch's and DDUF files.
``torch_cases()`` and ``dduf_cases()`` give each with the code of the error that it must raise, or
``"ok"``, and with the reason if the format's own reader differs.
"""

from __future__ import annotations

import collections
import io
import json
import math
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

OK = "ok"


class Case(NamedTuple):
    name: str
    data: bytes
    expected: str
    differs: str = ""  # why the format's own reader accepts what is refused here, or the reverse


# --- Archives, field by field --------------------------------------------------------------------


class Record:
    """A record, by the fields of its two headers; ``local`` and ``central`` replace some."""

    def __init__(
        self,
        name: str | bytes,
        data: bytes = b"",
        *,
        local: dict[str, Any] | None = None,
        central: dict[str, Any] | None = None,
        zip64: bool = False,
        descriptor: bytes = b"",
        **both: Any,
    ) -> None:
        self.name = name if isinstance(name, bytes) else name.encode()
        self.data = data
        self.descriptor = descriptor
        fields = {
            "name": self.name, "version": 20, "flags": 0 if self.name.isascii() else 0x800,
            "method": 0, "crc": zlib.crc32(data), "stored": len(data), "size": len(data),
            "extra": b"",
        } | both  # fmt: skip
        wide = {
            "stored": 0xFFFFFFFF,
            "size": 0xFFFFFFFF,
            "extra": struct.pack("<HHQQ", 1, 16, len(data), len(data)),
            "version": 45,
        }
        self.local = fields | (wide if zip64 else {}) | (local or {})
        self.central = fields | (central or {})


def archive(records: list[Record], end: dict[str, int] | None = None, zip64: bool = False) -> bytes:
    """``end`` replaces fields of the end record; ``offset`` in a record's ``central`` its place."""
    data = b""
    directory = b""
    for record in records:
        field = record.local
        place = len(data)
        data += struct.pack(
            "<4s5H3I2H", field.get("signature", b"PK\3\4"), field["version"], field["flags"],
            field["method"], 0, 33, field["crc"], field["stored"], field["size"],
            len(field["name"]), len(field["extra"]),
        )  # fmt: skip
        data += field["name"] + field["extra"] + record.data + record.descriptor
        field = record.central
        directory += struct.pack(
            "<4s6H3I5H2I", field.get("signature", b"PK\1\2"), 20, field["version"], field["flags"],
            field["method"], 0, 33, field["crc"], field["stored"], field["size"],
            len(field["name"]), len(field["extra"]), 0, field.get("disk", 0), 0,
            field.get("attributes", 0), field.get("offset", place),
        )  # fmt: skip
        directory += field["name"] + field["extra"]
    values = {
        "disk": 0, "count": len(records), "bytes": len(directory), "begin": len(data),
        "comment": 0, "locator": len(data) + len(directory), "count64": len(records),
        "begin64": len(data),
    } | (end or {})  # fmt: skip
    ends = b""
    if zip64:
        ends += struct.pack(
            "<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, values["count64"], values["count64"],
            len(directory), values["begin64"],
        )  # fmt: skip
        ends += struct.pack("<4sIQI", b"PK\6\7", 0, values["locator"], 1)
    ends += struct.pack(
        "<4s4H2IH", b"PK\5\6", values["disk"], 0, values["count"], values["count"],
        values["bytes"], values["begin"], values["comment"],
    )  # fmt: skip
    return data + directory + ends


def descriptor(data: bytes, **other: int) -> bytes:
    value = {"crc": zlib.crc32(data), "stored": len(data), "size": len(data)} | other
    return struct.pack("<4s3I", b"PK\7\x08", value["crc"], value["stored"], value["size"])


# --- What is broken about any archive ------------------------------------------------------------

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
# torch's reader then uses uninitialised memory as content.
UNDEFINED = "undefined"
_LENIENT = (
    "its reader searches for the end record and trusts the directory; others find other content"
)


def _broken(make: Callable[..., list[Record]], accepted: str) -> list[Case]:
    """Faults of an archive of ``make()``, which gives its records, the last one changed so.

    ``accepted`` names those that the format's own reader accepts, with a question mark those where
    it depends on what lies in memory.
    """
    whole = archive(make())
    records = make()
    last = records[-1]
    place = whole.rindex(last.local["name"], 0, whole.index(b"PK\1\2")) - 30
    size = len(last.data)

    def changed(**changes: Any) -> bytes:
        return archive(make(**changes))

    def central(**changes: Any) -> bytes:
        return changed(central=changes)

    def local(**changes: Any) -> bytes:
        return changed(local=changes)

    found = {
        "cut_before_end": (whole[:-22], "archive_incomplete"),
        "cut_in_end": (whole[:-1], "archive_incomplete"),
        "cut_in_half": (whole[: len(whole) // 2], "archive_incomplete"),
        "start_alone": (whole[:40], "archive_incomplete"),
        "byte_behind": (whole + b"\n", "trailing_bytes"),
        "bytes_behind": (whole + bytes(1000), "trailing_bytes"),
        "comment": (archive(make(), {"comment": 4}) + b"note", "trailing_bytes"),
        "comment_missing": (archive(make(), {"comment": 4}), "archive_malformed"),
        "two_ends": (whole + whole[-22:], "archive_malformed"),
        "two_archives": (whole + whole, "archive_malformed"),
        "zeros_in_front": (b"PK\3\4" + bytes(96) + whole, "archive_malformed"),
        "second_disk": (archive(make(), {"disk": 1}), "archive_unsupported"),
        "on_second_disk": (central(disk=1), "archive_unsupported"),
        "one_entry_less": (archive(make(), {"count": len(records) - 1}), "archive_malformed"),
        "one_entry_more": (archive(make(), {"count": len(records) + 1}), "archive_malformed"),
        "directory_too_early": (archive(make(), {"begin": place}), "archive_malformed"),
        "directory_too_long": (archive(make(), {"bytes": 1 << 30}), "archive_malformed"),
        "locator_off": (archive(make(), {"locator": 0}, zip64=True), "archive_malformed"),
        "locator_past_end": (
            archive(make(), {"locator": 1 << 62}, zip64=True), "archive_malformed",
        ),
        "ends_disagree": (archive(make(), {"count64": 1}, zip64=True), "archive_malformed"),
        "begin64_off": (archive(make(), {"begin64": 5}, zip64=True), "archive_malformed"),
        "encrypted": (changed(flags=0x1), "archive_unsupported"),
        "strongly_encrypted": (changed(flags=0x41), "archive_unsupported"),
        "masked": (changed(flags=0x2000), "archive_unsupported"),
        "patch": (changed(flags=0x20), "archive_unsupported"),
        "encrypted_by_directory": (central(flags=0x1), "archive_unsupported"),
        "unknown_method": (changed(method=99), "archive_unsupported"),
        "method_by_directory": (central(method=8), "archive_unsupported"),
        "method_by_header": (local(method=8), "archive_mismatch"),
        "flags_by_header": (local(flags=0x1), "archive_mismatch"),
        "other_signature": (local(signature=b"PK\3\5"), "archive_mismatch"),
        "other_name": (local(name=bytes(len(last.name))), "archive_mismatch"),
        "other_name_length": (local(name=last.name[:-1]), "archive_mismatch"),
        "other_checksum": (local(crc=1), "archive_mismatch"),
        "other_size": (local(size=size + 1), "archive_mismatch"),
        "sizes_by_directory": (central(size=size + 1), "size_mismatch"),
        "size_past_end": (changed(size=1 << 20, stored=1 << 20), "offsets_invalid"),
        "size_one_over": (changed(size=size + 1, stored=size + 1), "offsets_invalid"),
        "size_one_under": (changed(size=size - 1, stored=size - 1), "offsets_invalid"),
        "size_in_no_field": (central(size=0xFFFFFFFF), "archive_malformed"),
        "offset_in_no_field": (central(offset=0xFFFFFFFF), "archive_malformed"),
        "zip64_field_short": (
            central(size=0xFFFFFFFF, extra=struct.pack("<HHI", 1, 4, size)), "archive_malformed",
        ),
        "zip64_field_past_end": (
            central(
                size=0xFFFFFFFF, stored=0xFFFFFFFF,
                extra=struct.pack("<HHQQ", 1, 16, 1 << 62, 1 << 62),
            ),
            "archive_mismatch",
        ),
        "offset_past_end": (central(offset=1 << 30), "offsets_invalid"),
        "offset_of_first": (central(offset=0), "offsets_invalid"),
        "offset_in_data": (central(offset=place + 8), "offsets_invalid"),
        "extra_broken": (central(extra=b"FB\x09\0Z"), "archive_malformed"),
        "extra_broken_by_header": (local(extra=b"FB\x09\0Z"), "archive_malformed"),
        "name_twice": (archive([*make(), *make()[-1:]]), "duplicate_name"),
        "two_on_one_record": (
            archive([*make(), Record(last.name + b"2", b"", central={"offset": place})]),
            "offsets_invalid",
        ),
        "name_with_nul": (changed(name=last.name + b"\0"), "archive_malformed"),
        "name_empty": (changed(name=b""), "archive_malformed"),
        "name_not_utf8": (changed(name=last.name + b"\xff", flags=0x800), "archive_malformed"),
        "name_of_no_encoding": (
            changed(name=last.name + "\u00e9".encode(), flags=0), "archive_malformed",
        ),
        "descriptor_stated": (changed(flags=0x8), "archive_mismatch"),
        "descriptor_not_stated": (
            changed(descriptor=descriptor(last.data)), "offsets_invalid",
        ),
        "descriptor_of_other_size": (
            changed(flags=0x8, descriptor=descriptor(last.data, size=size + 1)),
            "archive_mismatch",
        ),
        "later_version": (central(version=64), "archive_unsupported"),
        "folder_by_attribute": (central(attributes=0x10), "archive_malformed"),
        "hole": (changed(descriptor=bytes(7)), "offsets_invalid"),
    }  # fmt: skip
    differs = {
        name.rstrip("?"): UNDEFINED if name.endswith("?") else _LENIENT for name in accepted.split()
    }
    assert differs.keys() <= found.keys()
    return [
        Case(f"zip_{name}", data, expected, differs.get(name, ""))
        for name, (data, expected) in found.items()
    ]


# --- torch's files -------------------------------------------------------------------------------


class Storage:
    """The persistent id of a storage in a pickle."""

    def __init__(
        self, key: Any, numel: Any, kind: Any = torch.FloatStorage, *, tag: Any = "storage"
    ) -> None:
        self.persistent_id = (tag, kind, key, "cpu", numel)


class Call:
    """An object that is pickled as the call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def tensor(
    storage: object, shape: tuple[Any, ...], stride: tuple[int, ...] | None = None, offset: int = 0
) -> Call:
    if stride is None:
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    hooks: Any = collections.OrderedDict()
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, hooks)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> Any:
        return getattr(value, "persistent_id", None) if isinstance(value, Storage) else None


def pickled(value: object, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    _Pickler(out, protocol).dump(value)
    return out.getvalue()


FLOATS = struct.pack("<6f", *range(6))


def checkpoint(data: bytes, *storages: bytes, **records: bytes | None) -> list[Record]:
    """The records of a checkpoint; ``records`` replaces or drops some by name."""
    found: dict[str, bytes | None] = {"data.pkl": data, "byteorder": b"little"}
    found |= {f"data/{number}": storage for number, storage in enumerate(storages)}
    found |= {"version": b"3\n"} | records
    return [Record(f"x/{name}", content) for name, content in found.items() if content is not None]


def small_checkpoint() -> list[Record]:
    """A checkpoint of two storages and three tensors."""
    first, second = Storage("0", 6), Storage("1", 3, torch.ShortStorage)
    state = {
        "w": tensor(first, (2, 3)),
        "t": tensor(first, (3, 2), (1, 3)),
        "b": tensor(second, (3,)),
    }
    return checkpoint(pickled(state), FLOATS, struct.pack("<3h", 1, 2, 3))


def _with_last(**changes: Any) -> list[Record]:
    records = small_checkpoint()
    if changes:
        last = records[-1]
        name = changes.pop("name", last.name)
        records[-1] = Record(name, last.data, **changes)
    return records


def legacy(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def saved(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"\0"))
    return out.getvalue()


def of_pickle(data: bytes | object, *storages: bytes, **records: bytes | None) -> bytes:
    raw = data if isinstance(data, bytes) else pickled(data)
    return archive(checkpoint(raw, *storages, **records))


def one(
    shape: tuple[Any, ...], stride: tuple[int, ...] | None = None, offset: int = 0, **storage: Any
) -> bytes:
    """A checkpoint of one tensor over the six floats."""
    named = Storage(storage.pop("key", "0"), storage.pop("numel", 6), **storage)
    return of_pickle({"w": tensor(named, shape, stride, offset)}, FLOATS)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hacked",)


def _pickles() -> list[Case]:
    unsafe = {
        "os_system": pickled({"w": _Evil()}),
        "eval": pickled({"w": Call(eval, "1")}),
        "getattr": pickled({"w": Call(getattr, "a", "upper")}),
        "sys_modules": b"\x80\x02csys\nmodules\n.",
        "posix_system": b"\x80\x02cposix\nsystem\n.",
        "torch_load": pickled({"w": Call(torch.load, "x")}),
        "torch_hub": b"\x80\x02ctorch.hub\nload\n.",
        "numpy_load": b"\x80\x02cnumpy\nload\n.",
        "pickle_loads": pickled({"w": Call(pickle.loads, b"N.")}),
        "dotted_name": b"\x80\x02ctorch\nserialization.os.system\n.",
        "call_of_text": b"\x80\x02X\1\0\0\0a)R.",
        "call_of_a_tensor_method": b"\x80\x02ctorch\nTensor.tolist\n.",
        "new_object": b"\x80\x02X\1\0\0\0a)\x81.",
        "new_int": b"\x80\x02cbuiltins\nint\n)\x81.",
        "state_of_a_dict": b"\x80\x02}}b.",
        "item_of_a_list": b"\x80\x02]K\0K\0s.",
        "item_of_text": b"\x80\x02X\1\0\0\0aK\0K\0s.",
        "append_to_a_dict": b"\x80\x02}K\0a.",
        "instance": b"\x80\x02(ios\nsystem\n.",
        "object": b"\x80\x02(cos\nsystem\no.",
        "extension": b"\x80\x02\x82\x01.",
        "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        "protocol_4": pickled({"w": 1}, protocol=4),
        "protocol_0": pickled({"w": 1}, protocol=0),
        "text_persistent_id": b"\x80\x02Pstorage\n.",
        "persistent_id_of_text": b"\x80\x02X\7\0\0\0storageQ.",
        "persistent_id_of_a_module": b"\x80\x02X\6\0\0\0module\x85Q.",
        "other_tag": of_pickle({"w": tensor(Storage("0", 6, tag="module"), (6,))}, FLOATS),
        "global_cut": b"\x80\x02cos",
    }
    malformed = {
        "text": b"hello, this is no pickle",
        "empty": b"",
        "no_stop": b"\x80\x02}",
        "only_protocol": b"\x80\x02",
        "cut": pickled({"name": [1, 2, 3]})[:-9],
        "stack_empty": b"\x80\x02s.",
        "nothing_to_return": b"\x80\x02.",
        "no_mark": b"\x80\x02]u.",
        "memo_not_there": b"\x80\x02h\x07.",
        "text_past_end": b"\x80\x02X\xff\xff\xff\x7fa.",
        "text_not_utf8": b"\x80\x02X\1\0\0\0\xff.",
        "item_of_list_key": b"\x80\x02}]K\0s.",
        "persistent_id_number": b"\x80\x02K\1Q.",
        "persistent_id_empty": b"\x80\x02)Q.",
        "persistent_id_short": b"\x80\x02X\7\0\0\0storageK\1\x86Q.",
        "no_such_storage": of_pickle({"w": tensor(Storage("1", 6), (6,))}, FLOATS),
        "storage_by_number": of_pickle({"w": tensor(Storage(3, 6), (6,))}, FLOATS),
        "storage_outside": of_pickle({"w": tensor(Storage("../data.pkl", 6), (6,))}, FLOATS),
        "storage_of_no_type": of_pickle({"w": tensor(Storage("0", 6, torch.device), (6,))}, FLOATS),
        "negative_offset": one((1,), offset=-1),
        "negative_extent": one((-1,)),
        "stride_missing": one((2, 3), (1,)),
        "extent_of_text": one(("6",), (1,)),
        "no_storage": of_pickle({"w": tensor(None, (6,))}, FLOATS),
    }
    return [
        *(
            Case(f"unsafe_{name}", data if data[:2] == b"PK" else of_pickle(data, FLOATS),
                 "unsafe_pickle")
            for name, data in unsafe.items()
        ),
        *(
            Case(f"pickle_{name}", data if data[:2] == b"PK" else of_pickle(data, FLOATS),
                 "malformed_pickle")
            for name, data in malformed.items()
        ),
    ]  # fmt: skip


def _tensors() -> list[Case]:
    numbers = torch.arange(6.0)
    pairs = torch.ones(3, dtype=torch.complex64)
    plain = "torch has a kind of tensor for it, and the engine moves plain ones alone"
    invalid = {
        "one_over": one((7,)),
        "offset_over": one((6,), offset=1),
        "offset_far": one((1,), offset=1 << 40),
        "stride_over": one((2, 3), (4, 1)),
        "enormous_shape": one((1 << 40,)),
        "enormous_stride": one((2,), (1 << 60,)),
    }
    unsupported = {
        "sparse": numbers.to_sparse(),
        "sparse_rows": numbers.reshape(2, 3).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(numbers, 0.1, 0, torch.qint8),
        "quantized_by_channel": torch.quantize_per_channel(
            numbers.reshape(2, 3), torch.ones(2), torch.zeros(2, dtype=torch.int64), 0, torch.qint8
        ),
        "conjugated": pairs.conj(),
        "negated": pairs.conj().imag,
        "without_data": torch.empty(3, device="meta"),
        "bits": torch.ones(3, dtype=torch.uint8).view(torch.bits8),
    }
    first = Storage("0", 6)
    short = of_pickle({"w": tensor(Storage("0", 5), (5,))}, FLOATS)
    untyped = Storage("0", 24, torch.UntypedStorage)

    def typed(dtype: torch.dtype, count: int) -> Call:
        hooks: Any = collections.OrderedDict()
        function = torch._utils._rebuild_tensor_v3
        return Call(function, untyped, 0, (count,), (1,), False, hooks, dtype, {})

    mixed = {"w": typed(torch.float32, 6), "u": typed(torch.uint16, 12)}
    return [
        *(Case(f"tensor_{name}", data, "offsets_invalid") for name, data in invalid.items()),
        *(
            Case(f"tensor_{name}", saved({"a": numbers, "w": value}), "unsupported_tensor", plain)
            for name, value in unsupported.items()
        ),
        Case("storage_short", short, "size_mismatch"),
        Case("storage_long", of_pickle({"w": tensor(Storage("0", 7), (6,))}, FLOATS),
             "size_mismatch"),
        Case("storage_empty_record", of_pickle({"w": tensor(first, (6,))}, b""), "size_mismatch"),
        Case("storage_of_doubles", one((3,), kind=torch.DoubleStorage), "size_mismatch"),
        Case("storage_short_of_its_tensor", one((6,), numel=5), "size_mismatch"),
        Case("storage_negative", one((1,), numel=-1), "size_mismatch"),
        Case("storage_enormous", one((1,), numel=1 << 61), "size_mismatch"),
        Case("storage_past_64_bits", one((1,), numel=1 << 70), "size_mismatch"),
        Case("storage_of_text", one((1,), numel="6"), "size_mismatch"),
        Case("shared_by_dtypes", of_pickle(mixed, FLOATS), "unsupported_tensor",
             "views of one dtype each are all that has been seen"),
        Case("key_number", saved({7: numbers}), "tensor_invalid", "a state dict has names"),
        Case("key_surrogate", saved({"\ud800": numbers}), "tensor_invalid",
             "no other format can hold the name"),
    ]  # fmt: skip


def _forms() -> list[Case]:
    state = {"w": torch.arange(6.0)}
    weights = pickled({"w": tensor(Storage("0", 6), (6,))})
    safetensors = struct.pack("<Q", 2) + b"{}"
    tail = legacy(state)
    evil = io.BytesIO()
    torch.save({"w": _Evil()}, evil, _use_new_zipfile_serialization=False)
    records = checkpoint(weights, FLOATS)
    deflated = zlib.compressobj(wbits=-15)
    packed = deflated.compress(FLOATS) + deflated.flush()
    return [
        Case("form_empty", b"", "empty_file"),
        Case("form_lfs", LFS_POINTER, "git_lfs_pointer"),
        Case("form_web_page", b"<!DOCTYPE html><html></html>", "not_weights"),
        Case("form_safetensors", safetensors, "not_weights"),
        Case("form_text", b"weights", "unsafe_pickle"),
        Case("form_nul", bytes(100), "not_weights"),
        Case("form_tar", _tar(), "malformed_pickle"),
        Case("form_zip_of_text", archive([Record("a.txt", b"a")]), "not_weights"),
        Case("form_zip_of_folder", archive([Record("x/a.txt", b"a")]), "not_weights"),
        Case("form_zip_of_nothing", archive([]), "not_weights"),
        Case("form_no_pickle", archive(checkpoint(b"", **{"data.pkl": None})), "not_weights"),
        Case("form_no_version", of_pickle(weights, FLOATS, version=None), "not_weights"),
        Case("form_version_0", of_pickle(weights, FLOATS, version=b"0\n"), "archive_unsupported"),
        Case("form_version_11", of_pickle(weights, FLOATS, version=b"11\n"), "archive_unsupported"),
        Case("form_version_text", of_pickle(weights, FLOATS, version=b"x"), "archive_unsupported"),
        Case("form_two_folders", archive([*records, Record("y/a", b"a")]), "not_weights"),
        Case("form_other_first", archive([Record("a", b"a"), *records]), "not_weights"),
        Case("form_torchscript", of_pickle(weights, FLOATS, **{"constants.pkl": b"\x80\x02)."}),
             "torchscript"),
        Case("form_big_endian", of_pickle(weights, FLOATS, byteorder=b"big"), "big_endian",
             "torch turns the bytes around in memory; such machines are not built for"),
        Case("form_byte_order", of_pickle(weights, FLOATS, byteorder=b"pdp"), "big_endian"),
        Case("form_deflated",
             archive([*records[:2], Record("x/data/0", packed, method=8, size=24,
                                           crc=zlib.crc32(FLOATS)), *records[3:]]),
             "archive_unsupported", "torch unpacks it; it never writes it"),
        Case("legacy_cut", tail[:-1], "malformed_pickle"),
        Case("legacy_cut_in_pickle", tail[:60], "malformed_pickle"),
        Case("legacy_evil", evil.getvalue(), "unsafe_pickle"),
        # --- What is odd, and right.
        Case("ok", of_pickle(weights, FLOATS), OK),
        Case("ok_no_byte_order", of_pickle(weights, FLOATS, byteorder=None), OK),
        Case("ok_version_elsewhere",
             of_pickle(weights, FLOATS, version=None, **{".data/version": b"3\n"}), OK),
        Case("ok_other_records", of_pickle(weights, FLOATS, **{"extra/a": b"a"}), OK),
        Case("ok_unused_storage", of_pickle(weights, FLOATS, b"unused"), OK),
        Case("ok_wrong_checksums",
             archive([Record(r.name, r.data, crc=7) for r in records]), OK),
        Case("ok_zip64", archive([Record(r.name, r.data, zip64=True) for r in records], zip64=True),
             OK),
        # The places that torch computes from the order in the pickle belong to other storages.
        Case("ok_storages_out_of_order",
             of_pickle({"a": tensor(Storage("0", 6), (6,)), "b": tensor(Storage("2", 6), (6,)),
                        "c": tensor(Storage("1", 6), (6,))},
                       FLOATS, FLOATS[::-1], FLOATS[4:] + FLOATS[:4],
                       **{".format_version": b"1", ".storage_alignment": b"64"}), OK),
        Case("ok_zero_size", of_pickle({"w": tensor(Storage("0", 0), (0, 3))}, b""), OK),
        Case("ok_zero_size_of_something", one((0, 3), offset=2), OK),
        Case("ok_scalar", one((), offset=5), OK),
        Case("ok_negative_stride", one((2,), (-1,), 1), OK,
             "on meta, torch takes it for the stride of contiguous tensors"),
        Case("ok_expanded", one((1 << 20, 6), (0, 1)), OK),
        Case("ok_overlapping_rows", one((5, 2), (1, 1)), OK),
        Case("ok_not_tensors", of_pickle({"w": tensor(Storage("0", 6), (6,)), "n": 1, "t": "x",
                                          7: None}, FLOATS), OK),
        Case("ok_no_tensors", of_pickle({}), OK),
        Case("ok_legacy", tail, OK),
        Case("ok_legacy_shared", legacy({"a": state["w"], "b": state["w"][2:4]}), OK),
        Case("ok_zero_dots", of_pickle({"": tensor(Storage("0", 6), (6,)),
                                        "a.b": tensor(Storage("0", 6), (6,))}, FLOATS), OK),
    ]  # fmt: skip


_TORCH_ACCEPTS = """
    byte_behind bytes_behind comment comment_missing two_ends two_archives on_second_disk
    locator_off method_by_directory? method_by_header flags_by_header other_name other_name_length
    other_checksum other_size size_one_over size_one_under extra_broken extra_broken_by_header
    name_twice two_on_one_record descriptor_stated descriptor_not_stated
    descriptor_of_other_size hole later_version folder_by_attribute?
"""


def torch_cases() -> list[Case]:
    found = [*_broken(_with_last, _TORCH_ACCEPTS), *_pickles(), *_tensors(), *_forms()]
    assert len({case.name for case in found}) == len(found)
    return found


# --- DDUF ----------------------------------------------------------------------------------------


def dduf_records(**records: bytes | None) -> list[Record]:
    weights = struct.pack("<Q", 62) + json.dumps(
        {"w": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}
    ).encode().ljust(62)
    found: dict[str, bytes | None] = {
        "model_index.json": json.dumps({"_class_name": "P", "unet": ["diffusers", "U"]}).encode(),
        "unet/config.json": b'{"sample_size": 8}',
        "unet/diffusion_pytorch_model.safetensors": weights + FLOATS,
    } | records
    return [Record(name, data, zip64=True) for name, data in found.items() if data is not None]


def _dduf_with_last(**changes: Any) -> list[Record]:
    records = [*dduf_records(), Record("unet/notes.txt", b"notes", zip64=True)]
    if changes:
        last = records[-1]
        name = changes.pop("name", last.name)
        records[-1] = Record(name, last.data, **changes)
    return records


_DDUF_ACCEPTS = """
    byte_behind bytes_behind comment comment_missing two_archives zeros_in_front second_disk
    on_second_disk one_entry_less one_entry_more locator_off locator_past_end ends_disagree
    encrypted strongly_encrypted masked patch encrypted_by_directory method_by_header
    flags_by_header other_signature other_name other_name_length other_checksum other_size
    sizes_by_directory size_past_end size_one_over size_one_under size_in_no_field
    zip64_field_past_end offset_of_first offset_in_data extra_broken_by_header name_twice
    name_with_nul descriptor_stated descriptor_not_stated descriptor_of_other_size hole
    folder_by_attribute
"""


def dduf_cases() -> list[Case]:
    def dduf(**records: bytes | None) -> bytes:
        return archive(dduf_records(**records))

    def named(name: str) -> bytes:
        return archive([*dduf_records(), Record(name, b"{}", zip64=True)])

    index = {"_class_name": "P", "unet": ["diffusers", "U"]}
    invalid = {
        "no_index": dduf(**{"model_index.json": None}),
        "index_a_list": dduf(**{"model_index.json": b"[]"}),
        "index_empty": dduf(**{"model_index.json": b""}),
        "index_not_json": dduf(**{"model_index.json": b"{"}),
        "index_not_utf8": dduf(**{"model_index.json": b'{"\xff":1}'}),
        "index_deep": dduf(**{"model_index.json": b'{"unet":' + b"[" * 100_000}),
        "index_without_folder": dduf(**{"model_index.json": b"{}"}),
        "folder_not_named": named("vae/config.json"),
        "folder_without_config": dduf(**{"unet/config.json": None}),
        "two_levels": named("unet/deep/config.json"),
        "pickle": named("unet/weights.bin"),
        "python": named("unet/run.py"),
        "no_ending": named("README"),
        "folder_entry": archive([*dduf_records(), Record("unet/", zip64=True)]),
        "back_slash": named("unet\\x.json"),
        "leading_slash": named("/unet.json"),
    }
    names = "theirs takes off slashes or none, and such names lead out of a folder"
    odd = {
        "parent": archive([
            *dduf_records(**{"model_index.json": json.dumps(index | {"..": 1}).encode()}),
            Record("../config.json", b"{}", zip64=True),
        ]),
        "no_folder_name": archive([
            *dduf_records(**{"model_index.json": json.dumps(index | {"": 1}).encode()}),
            Record("/config.json", b"{}", zip64=True),
        ]),
    }  # fmt: skip
    plain = [Record(record.name, record.data) for record in dduf_records()]
    text = Record("unet/notes.txt", b"notes", zip64=True, crc=7)
    found = [
        *_broken(_dduf_with_last, _DDUF_ACCEPTS),
        *(Case(f"dduf_{name}", data, "dduf_invalid") for name, data in invalid.items()),
        *(Case(f"dduf_{name}", data, "dduf_invalid", names) for name, data in odd.items()),
        Case("dduf_not_zip64", archive(plain), "dduf_invalid",
             "the format asks for ZIP64, and theirs does not look"),
        Case("form_empty", b"", "empty_file"),
        Case("form_lfs", LFS_POINTER, "git_lfs_pointer"),
        Case("form_web_page", b"<html></html>", "not_weights"),
        Case("form_text", b"weights", "not_archive"),
        Case("form_zip_of_nothing", archive([]), "not_weights"),
        Case("ok", dduf(), OK),
        Case("ok_zip64_end", archive(dduf_records(), zip64=True), OK),
        Case("ok_more_in_index", dduf(**{"model_index.json": json.dumps(
            index | {"vae": [None, None]}).encode()}), OK),
        Case("ok_other_config", dduf(**{"unet/config.json": None,
                                        "unet/scheduler_config.json": b"{}"}), OK),
        Case("ok_top_level", named("notes.txt"), OK),
        Case("ok_odd_name", named("unet/\u00e9 .model"), OK),
        # Told when it is read.
        Case("ok_checksum_of_text", archive([*dduf_records(), text]), OK),
    ]  # fmt: skip
    assert len({case.name for case in found}) == len(found)
    return found
