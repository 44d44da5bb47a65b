"""Small files cut at every byte and changed at every bit, compared with the formats' own readers.
Files that both accept must have the same content. Files that only weightlift refuses are in a table
with the reason. weightlift accepts no file that they refuse. Of archives ``make test`` changes
one bit of each byte, the deep tests all of them. Safetensors files are in ``test_malformed.py``.
"""

from __future__ import annotations

import collections
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import load_torch_model, read_dduf_file

import malformed
import malformed_archives as hand_made
import weightlift as wl
from support import assert_same_tensors, open_files
from weightlift.checkpoint.dduf import open_dduf

Tensors = dict[str, torch.Tensor]


def changes(data: bytes, all_bits: bool) -> Iterator[tuple[int, bytes]]:
    """A byte's place, and the data with one bit of it changed."""
    for at in range(len(data)):
        for bit in range(8) if all_bits else [at * 5 % 8]:
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            yield at, bytes(changed)


def ours(load: Callable[[], Tensors]) -> tuple[str, Tensors]:
    """A code or ``"ok"``, and the tensors."""
    try:
        return hand_made.OK, load()
    except wl.FormatError as error:
        return error.code, {}
    except wl.CheckpointError:
        return "checkpoint", {}


def theirs(load: Callable[[], Tensors]) -> Tensors | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load()
    except Exception:
        return None  # any error of a reader


# --- Archives ------------------------------------------------------------------------------------

# The headers' fields and their sizes (APPNOTE.TXT 4.3.7, 4.3.12, 4.3.14 to 4.3.16).
_LOCAL = "signature 4 version 2 flags 2 method 2 time 4 crc 4 stored 4 size 4 name# 2 extra# 2"
_CENTRAL = (
    "signature 4 made_by 2 version 2 flags 2 method 2 time 4 crc 4 stored 4 size 4 name# 2 "
    "extra# 2 comment# 2 disk 2 internal 2 attributes 4 offset 4"
)
_END64 = (
    "signature 4 bytes 8 made_by 2 version 2 disk 4 of_disk 4 here 8 count 8 directory# 8 begin 8"
)
_LOCATOR = "signature 4 disk 4 end64 8 disks 4"
_END = "signature 4 disk 2 of_disk 2 here 2 count 2 directory# 4 begin 4 comment# 2"


def fields_of(path: Path) -> list[str]:
    """The name of the field that each byte of an archive is in."""
    found: list[str] = []

    def add(header: str, layout: str, *parts: tuple[str, int]) -> None:
        words = layout.split()
        for name, size in zip(words[::2], words[1::2], strict=True):
            found.extend([f"{header}.{name}"] * int(size))
        for name, size in parts:
            found.extend([f"{header}.{name}"] * size)

    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        begin = archive.start_dir
    data = path.read_bytes()
    for record in records:
        at = record.header_offset
        assert at == len(found)
        extra = int.from_bytes(data[at + 28 : at + 30], "little")
        content = ("data", record.file_size)
        add("local", _LOCAL, ("name", len(record.filename)), ("extra", extra), content)
    assert len(found) == begin
    for record in records:
        at = len(found)
        extra = int.from_bytes(data[at + 30 : at + 32], "little")
        add("central", _CENTRAL, ("name", len(record.filename)), ("extra", extra))
    if b"PK\6\6" in data:
        add("end64", _END64)
        add("locator", _LOCATOR)
    add("end", _END)
    assert len(found) == len(data)
    return found


Divergences = dict[str, str]


def check_every_change(
    path: Path,
    load: Callable[[Path], Tensors],
    reference: Callable[[Path], Tensors],
    divergences: Divergences,
    all_bits: bool,
) -> collections.Counter[str]:
    data = path.read_bytes()
    fields = fields_of(path)
    outcomes: collections.Counter[str] = collections.Counter()
    unexplained: dict[str, set[str]] = {}
    before = open_files()
    for at, changed in changes(data, all_bits):
        path.write_bytes(changed)
        code, tensors = ours(lambda: load(path))
        expected = theirs(lambda: reference(path))
        outcomes[code] += 1
        if code == hand_made.OK:
            assert expected is not None, (at, fields[at])
            assert_same_tensors(tensors, expected)
        elif expected is not None and f"{fields[at]} {code}" not in divergences:
            unexplained.setdefault(f"{fields[at]} {code}", set()).add(str(at))
    assert not unexplained
    del tensors, expected
    # Fewer: garbage of earlier tests may have gone meanwhile.
    assert open_files() <= before
    return outcomes


BITS = [
    pytest.param(False, id="a_bit_of_every_byte"),
    pytest.param(True, id="every_bit", marks=pytest.mark.deep),
]


def load_checkpoint(path: Path) -> Tensors:
    return wl.load_checkpoint(path, mode="read")


def load_by_torch(path: Path) -> Tensors:
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def load_dduf(path: Path) -> Tensors:
    open_dduf(path).read_json("unet/config.json")
    return wl.load_checkpoint(path, subfolder="unet", mode="read")


def load_dduf_by_theirs(path: Path) -> Tensors:
    entries = read_dduf_file(path)
    json.loads(entries["unet/config.json"].read_text())
    with entries[WEIGHTS].as_mmap() as mapped:
        return safetensors.torch.load(bytes(mapped))


def table(places: dict[str, str]) -> Divergences:
    """Reads "field code, field code" -> reason."""
    return {place: reason for found, reason in places.items() for place in found.split(", ")}


OWN_HEADER = "they go by the directory, other readers by the record's own header"
UNSEEN = "they do not look at it; it says that the record is not what it is taken for"
SPLIT = "they do not look at it; it says that the archive is split over several files"
# Changes that torch or huggingface_hub accept and weightlift refuses: field and code -> reason.
TORCH_DIVERGENCES = table({
    "local.flags archive_mismatch, local.method archive_mismatch, local.crc archive_mismatch, "
    "local.stored archive_mismatch, local.size archive_mismatch, local.name archive_mismatch, "
    "local.name# archive_mismatch, local.name# offsets_invalid, local.extra# archive_malformed, "
    "local.extra# offsets_invalid, central.flags archive_mismatch, central.crc archive_mismatch, "
    "central.name archive_mismatch": OWN_HEADER,
    "central.version archive_unsupported, central.flags archive_unsupported, "
    "central.method archive_unsupported": UNSEEN,
    "central.disk archive_unsupported": SPLIT,
    "central.attributes archive_malformed": "a folder to torch, which leaves its bytes unread",
    "local.data archive_unsupported": "torch takes a version of 3* for 3",
    "end.directory# archive_malformed": "torch finds the directory by its begin alone",
    "end.comment# archive_malformed": "the comment is stated, and is not there",
})  # fmt: skip
DDUF_DIVERGENCES = table({
    "local.signature not_archive, local.signature archive_mismatch, local.flags archive_mismatch, "
    "local.method archive_mismatch, local.crc archive_mismatch, local.stored archive_mismatch, "
    "local.size archive_mismatch, local.name archive_mismatch, local.extra archive_mismatch, "
    "local.extra archive_malformed, central.flags archive_mismatch, central.crc archive_mismatch":
        OWN_HEADER,
    "local.data checksum_mismatch": "huggingface_hub checks no checksum",
    "central.version archive_unsupported, central.flags archive_unsupported": UNSEEN,
    "central.stored size_mismatch": "of the two sizes of a stored record they read one",
    "central.disk archive_unsupported, end64.disk archive_unsupported, "
    "end64.of_disk archive_unsupported, end64.here archive_unsupported, "
    "end64.count archive_unsupported, locator.disks archive_unsupported, "
    "end.disk archive_unsupported, end.of_disk archive_unsupported, "
    "end.here archive_unsupported, end.count archive_unsupported": SPLIT,
    "central.attributes archive_malformed": "a folder, and has bytes",
    "central.name# archive_malformed, central.extra# archive_malformed, "
    "central.comment# archive_malformed": "the last entry leaves the directory",
    "end64.bytes archive_malformed, locator.end64 archive_malformed, "
    "end.directory# archive_malformed, end.begin archive_malformed":
        "zipfile reads one of two places, other readers the other, and they contradict each other",
    "end.comment# archive_malformed": "the comment is stated, and is not there",
})  # fmt: skip


# torch warns once in a process when it names a storage in an error.
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("all_bits", BITS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_torch_file(tmp_path: Path, all_bits: bool) -> None:
    path = tmp_path / "f.bin"
    path.write_bytes(hand_made.archive(hand_made.small_checkpoint()))
    outcomes = check_every_change(path, load_checkpoint, load_by_torch, TORCH_DIVERGENCES, all_bits)
    assert outcomes.keys() >= {
        hand_made.OK, "unsafe_pickle", "malformed_pickle", "archive_mismatch", "archive_malformed",
        "archive_unsupported", "archive_incomplete", "offsets_invalid", "size_mismatch",
        "big_endian",
    }  # fmt: skip


@pytest.mark.parametrize("all_bits", BITS)
def test_dduf(tmp_path: Path, all_bits: bool) -> None:
    path = tmp_path / "f.dduf"
    path.write_bytes(hand_made.archive(hand_made.dduf_records(), zip64=True))
    outcomes = check_every_change(path, load_dduf, load_dduf_by_theirs, DDUF_DIVERGENCES, all_bits)
    assert outcomes.keys() >= {
        hand_made.OK, "not_archive", "archive_incomplete", "archive_malformed", "archive_mismatch",
        "archive_unsupported", "size_mismatch", "offsets_invalid", "checksum_mismatch",
    }  # fmt: skip


def test_torch_file_cut(tmp_path: Path) -> None:
    path = tmp_path / "f.bin"
    data = hand_made.archive(hand_made.small_checkpoint())
    codes = set()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        codes.add(ours(lambda: load_checkpoint(path))[0])
        assert theirs(lambda: load_by_torch(path)) is None
    assert codes == {"empty_file", "unsafe_pickle", "archive_incomplete"}


def test_dduf_cut(tmp_path: Path) -> None:
    path = tmp_path / "f.dduf"
    data = hand_made.archive(hand_made.dduf_records())
    codes = set()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        codes.add(ours(lambda: load_dduf(path))[0])
        assert theirs(lambda: load_dduf_by_theirs(path)) is None
    assert codes == {"empty_file", "not_archive", "archive_incomplete"}


# --- The index of shards -------------------------------------------------------------------------


class Model(torch.nn.Module):
    """An index of the tensors ``a`` and ``c``, whose names differ in one bit, like those of the
    shards."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(2))
        self.c = torch.nn.Parameter(torch.zeros(3))


INDEX = {
    "metadata": {"total_size": 20, "x": -1.5e3},
    "weight_map": {"a": "s1.safetensors", "c": "s3.safetensors"},
}
# Where huggingface_hub takes what is refused here: what the error says -> why it is one.
# An editor's mark at the start, which huggingface_hub refuses; it changes nothing that is read.
BYTE_ORDER_MARK = "read with its byte order mark"
INDEX_DIVERGENCES = {
    "from different checkpoints": "theirs loads the whole of each shard, whatever the index says",
    "is in it twice": "theirs takes the last one; another reader may take the first",
    "metadata is": "theirs does not look at it",
}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    safetensors.torch.save_file({"a": torch.tensor([1.0, 2])}, tmp_path / "s1.safetensors")
    safetensors.torch.save_file({"c": torch.tensor([3.0, 4, 5])}, tmp_path / "s3.safetensors")
    return tmp_path


def check_index(folder: Path, text: bytes) -> str:
    (folder / "model.safetensors.index.json").write_bytes(text)
    model = Model()

    def reference() -> Tensors:
        load_torch_model(model, folder, strict=True)
        return dict(model.state_dict())

    expected = theirs(reference)
    error = None
    try:
        tensors = wl.load_checkpoint(folder, mode="read", strict_index=True)
    except wl.CheckpointError as caught:
        error = str(caught)
    if error is None:
        if expected is None:
            return BYTE_ORDER_MARK
        assert_same_tensors(dict(sorted(tensors.items())), expected)
        return hand_made.OK
    assert str(folder) in error
    if expected is None:
        return "refused"
    (divergence,) = (said for said in INDEX_DIVERGENCES if said in error)
    return divergence


MAP = b'{"a":"s1.safetensors","c":"s3.safetensors"}'
INDEX_CASES = {
    "ok": (b'{"weight_map":%s}' % MAP, "ok"),
    "ok_metadata_null": (b'{"metadata":null,"weight_map":%s}' % MAP, "ok"),
    "ok_more": (b'{"x":[NaN,1e999],"weight_map":%s}' % MAP, "ok"),
    "ok_escaped": (b'{"weight_map":%s}' % MAP.replace(b"a", b"\\u0061", 1), "ok"),
    "ok_spaces": (b'\r\n\t {"weight_map":%s} \n' % MAP, "ok"),
    "empty": (b"", "refused"),
    "nul": (b"\0", "refused"),
    "number": (b"17", "refused"),
    "list": (b"[%s]" % MAP, "refused"),
    "byte_order_mark": (b'\xef\xbb\xbf{"weight_map":%s}' % MAP, BYTE_ORDER_MARK),
    "not_utf8": (b'{"x":"\xff","weight_map":%s}' % MAP, "refused"),
    "utf16": ((b'{"weight_map":%s}' % MAP).decode().encode("utf-16"), "refused"),
    "two_values": (b'{"weight_map":%s}{}' % MAP, "refused"),
    "trailing_comma": (b'{"weight_map":%s,}' % MAP, "refused"),
    "deep": (b"[" * 100_000, "refused"),
    "weight_map_null": (b'{"weight_map":null}', "refused"),
    "weight_map_of_numbers": (b'{"weight_map":{"a":1,"c":2}}', "refused"),
    "weight_map_empty": (b'{"weight_map":{}}', "refused"),
    "parent": (b'{"weight_map":{"a":"../s1.safetensors"}}', "refused"),
    "absolute": (b'{"weight_map":{"a":"/etc/s1.safetensors"}}', "refused"),
    "drive": (b'{"weight_map":{"a":"C:s1.safetensors"}}', "refused"),
    "nul_in_name": (b'{"weight_map":{"a":"s1\\u0000.safetensors"}}', "refused"),
    "no_such_shard": (MAP.replace(b"s3", b"s2").join([b'{"weight_map":', b"}"]), "refused"),
    "pickle": (b'{"weight_map":{"a":"s1.bin","c":"s3.safetensors"}}', "refused"),
    "folder": (MAP.replace(b"s1", b"./s1").join([b'{"weight_map":', b"}"]), "ok"),
    "swapped": (
        b'{"weight_map":{"c":"s1.safetensors","a":"s3.safetensors"}}', "from different checkpoints",
    ),
    "one_more": (
        b'{"weight_map":{"b":"s1.safetensors",%s}' % MAP[1:], "from different checkpoints",
    ),
    "name_twice": (b'{"weight_map":{"a":"s1.safetensors",%s}' % MAP[1:], "is in it twice"),
    "map_twice": (b'{"weight_map":{},"weight_map":%s}' % MAP, "is in it twice"),
    "metadata_list": (b'{"metadata":[1],"weight_map":%s}' % MAP, "metadata is"),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEX_CASES)
def test_index_case(shards: Path, name: str) -> None:
    text, expected = INDEX_CASES[name]
    assert check_index(shards, text) == expected


def test_every_divergence_of_indexes_has_a_case() -> None:
    assert {outcome for _, outcome in INDEX_CASES.values()} == {
        hand_made.OK, "refused", BYTE_ORDER_MARK, *INDEX_DIVERGENCES,
    }  # fmt: skip


def test_index_changed_at_every_bit(shards: Path) -> None:
    text = json.dumps(INDEX, separators=(",", ":")).encode()
    outcomes = collections.Counter(
        check_index(shards, changed) for _, changed in changes(text, all_bits=True)
    )
    assert outcomes.keys() == {hand_made.OK, "refused", "from different checkpoints"}


def test_index_cut_at_every_byte(shards: Path) -> None:
    text = json.dumps(INDEX).encode()
    assert check_index(shards, text) == hand_made.OK
    assert {check_index(shards, text[:size]) for size in range(len(text))} == {"refused"}


def test_the_counts_that_security_states() -> None:
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about the kinds of tensors that are refused
        archives = hand_made.torch_cases()
    for cases in (malformed.cases(), archives, hand_made.dduf_cases()):
        accepted = sum(case.expected == malformed.OK for case in cases)
        found += [len(cases) - accepted, accepted]
    loads = (malformed.OK, BYTE_ORDER_MARK)
    accepted = sum(outcome in loads for _, outcome in INDEX_CASES.values())
    found += [len(INDEX_CASES) - accepted, accepted]
    text = (Path(__file__).parents[3] / "SECURITY.md").read_text()
    (stated,) = re.findall(r"\| (safetensors:? \d+ refused, .*?) \|", text)
    assert [int(number) for number in re.findall(r"\d+", stated)] == found, stated
