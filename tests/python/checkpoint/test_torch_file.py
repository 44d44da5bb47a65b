"""torch's own files: their content and the refused ones, compared with ``torch.load``."""

from __future__ import annotations

import collections
import contextlib
import gc
import io
import itertools
import json
import os
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import malformed_archives as hand_made
import weightlift as wl
from support import open_files
from weightlift import _native
from weightlift.checkpoint import torch_file
from weightlift.checkpoint.torch_file import LoadedTorchFile, TorchFile, View, open_torch_file
from weightlift.core import dtypes
from weightlift.load.load_tensors import load_tensors
from weightlift.load.options import LoadOptions

# Some of these tensors are of kinds that torch calls a prototype, or deprecated.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    CASES = hand_made.torch_cases()


def contents(path: Path, file: TorchFile) -> dict[str, torch.Tensor]:
    """The tensors, whose bytes numpy reads from the places in the index."""
    bases = {}
    for i, (name, dtype, shape) in enumerate(
        zip(file.part.names(), file.part.dtypes(), file.part.shapes(), strict=True)
    ):
        begin, end = file.part.range(i)
        assert end - begin == file.part.sizes()[i]
        if dtype == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        empty = torch.empty(shape, dtype=dtypes.to_torch(dtype))
        raw = np.fromfile(path, np.uint8, end - begin, offset=begin)
        if end > begin:
            empty.view(-1).view(torch.uint8).copy_(torch.from_numpy(raw))
        bases[name] = empty
    result = {}
    for name in file.names:
        view = file.views.get(name)
        if view is None:
            result[name] = bases[name]
        else:
            base = bases[view.base]
            assert base.dim() == 1
            assert base.dtype == dtypes.to_torch(view.dtype)
            result[name] = base.as_strided(view.shape, view.stride, view.offset)
    return result


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        other = theirs[name].detach()
        assert tensor.dtype == other.dtype
        assert tensor.shape == other.shape
        if tensor.numel():
            assert strides(tensor) == strides(other)
            # An expanded tensor may be larger than memory.
            ours_bytes = tensor.as_strided(
                (tensor.shape[-1:] or (1,)), (tensor.stride()[-1:] or (1,))
            )
            other_bytes = other.as_strided(ours_bytes.shape, ours_bytes.stride())
            assert bits(ours_bytes) == bits(other_bytes)
            if tensor.numel() < 1 << 16:
                assert bits(tensor) == bits(other)


def strides(tensor: torch.Tensor) -> list[int]:
    """Messages with a text."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [step for extent, step in pairs if extent > 1]


def bits(tensor: torch.Tensor) -> bytes:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return copy.view(-1).view(torch.uint8).numpy().tobytes()


def tensors_of(state: dict[Any, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def by_torch(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def check(path: Path, state: dict[str, Any], **options: Any) -> TorchFile:
    """Saves, opens and reads: the same tensors as torch's."""
    torch.save(state, path, **options)
    file = open_torch_file(path)
    assert isinstance(file, TorchFile)
    loaded = by_torch(path)
    assert_equal(contents(path, file), tensors_of(loaded))
    assert file.not_tensors == {
        name: type(value).__name__
        for name, value in loaded.items()
        if not isinstance(value, torch.Tensor)
    }
    return file


# --- What torch writes ---------------------------------------------------------------------------


def test_kinds_of_tensors(tmp_path: Path) -> None:
    rows = torch.randn(10, 12)
    line = torch.randn(100)
    file = check(
        tmp_path / "f.bin",
        {
            "plain": rows,
            "tied": rows,
            "parameter": torch.nn.Parameter(rows),
            "transposed": rows.t(),
            "rows": rows[2:5],
            "column": rows[:, 3],
            "steps": rows[::2, ::3],
            "scalar": torch.tensor(3),
            "no elements": torch.zeros(0, 5),
            "none of a storage": rows[3:3],
            "overlap 1": line[10:20],
            "overlap 2": line[15:30],
            "apart": line[40:50],
            "apart and strided": line[60:70:3],
            "end": line[99],
            "expanded": torch.ones(1).expand(7),
            "only transposed": torch.randn(3, 4).t(),
            "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "leaf": torch.randn(3, requires_grad=True),
            "epoch": 7,
            "config": {"a": 1},
            "note": "text",
            "nothing": None,
        },
    )
    assert file.views["tied"] == file.views["plain"] == View("plain", "F32", (10, 12), (12, 1), 0)
    assert file.views["transposed"] == View("plain", "F32", (12, 10), (1, 12), 0)
    assert file.views["overlap 2"] == View("overlap 1", "F32", (15,), (1,), 5)
    assert not {"apart", "end", "leaf", "scalar", "no elements"} & file.views.keys()
    # Only the part of a storage that its tensors cover.
    sizes = dict(zip(file.part.names(), file.part.sizes(), strict=True))
    assert sizes["overlap 1"] == 80
    assert sizes["apart"] == 40
    assert sizes["apart and strided"] == 40
    assert sizes["plain"] == 480


@pytest.mark.parametrize("mode", ["map", "read"])
def test_the_engine_reads_it(tmp_path: Path, mode: str) -> None:
    state = {"a": torch.randn(40, 30), "b": torch.arange(7), "c": torch.randn(5).bfloat16()}
    state |= {"turned": torch.randn(6, 4).t(), "none": torch.zeros(0)}
    torch.save(state, tmp_path / "f")
    index = opened(tmp_path / "f").part
    loaded = load_tensors(wl.Checkpoint([index]), torch.device("cpu"), LoadOptions(mode))
    turned = loaded.pop("turned")
    assert_equal(loaded, {name: state[name] for name in loaded})
    assert torch.equal(turned.view(6, 4).t(), state["turned"])


@pytest.mark.parametrize("name", sorted(dtypes.TORCH_NAMES))
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_dtypes(tmp_path: Path, name: str) -> None:
    dtype = dtypes.to_torch(name)
    values = torch.randint(0, 2 if name == "BOOL" else 256, (64 * dtype.itemsize,))
    raw = values.to(torch.uint8).view(dtype)
    file = check(
        tmp_path / "f",
        {
            "flat": raw,
            "matrix": raw.clone().view(8, 8),
            "few": raw[:4],
            "turned": raw.view(8, 8).t(),
        },
    )
    assert set(file.part.dtypes()) == {name}
    own = file.part.find("matrix")
    assert own is not None
    assert file.part.shape(own) == ((8, 16) if name == "F4" else (8, 8))


@pytest.mark.parametrize("dtype", [torch.float4_e2m1fn_x2, torch.uint8])
def test_scalars_and_empties_of_small_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.tensor([0x21, 0x43], dtype=torch.uint8).view(dtype)
    check(tmp_path / "f", {"scalar": raw[1], "empty": raw[:0], "none": raw.view(2, 1)[:, :0]})


def test_writers(tmp_path: Path) -> None:
    """Options of torch.save, and names of files, which become the name of the archive's folder."""
    state = {f"layer.{i}": torch.randn(i, 3) for i in range(20)}
    check(tmp_path / "plain.bin", state)
    check(tmp_path / "no ending", state)
    check(tmp_path / "\u00e9\u4e2d.pt", state)
    check(tmp_path / "a.b.c.pth", state)
    check(tmp_path / "older.pt", state, _disable_byteorder_record=True)
    out = io.BytesIO()
    torch.save(state, out)
    (tmp_path / "buffer.pt").write_bytes(out.getvalue())
    assert_equal(contents(tmp_path / "buffer.pt", opened(tmp_path / "buffer.pt")), state)
    for option, value in (("use_pinned_memory_for_d2h", False), ("storage_alignment", 4096)):
        assert hasattr(torch.utils.serialization.config.save, option)
        with torch.utils.serialization.config.patch({f"save.{option}": value}):
            check(tmp_path / "aligned.pt", state)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        check(tmp_path / "crc.pt", state)
    finally:
        torch.serialization.set_crc32_options(before)
    assert all(
        record[3] == 0 for record in _native.Archive.open(str(tmp_path / "crc.pt")).records()
    )


def opened(path: Path, **options: Any) -> TorchFile:
    file = open_torch_file(path, **options)
    assert isinstance(file, TorchFile)
    return file


def test_packed_again(tmp_path: Path) -> None:
    """Repacked by a zip tool with other padding, so that torch's computed places are wrong."""
    state = {f"{i}": torch.randn(5, 7) for i in range(12)}
    torch.save(state, tmp_path / "f.pt")
    with (
        zipfile.ZipFile(tmp_path / "f.pt") as source,
        zipfile.ZipFile(tmp_path / "g.pt", "w") as target,
    ):
        for name in sorted(source.namelist()):
            target.writestr(name, source.read(name))
    on_meta = torch.load(tmp_path / "g.pt", map_location="meta", weights_only=True)
    places = dict(zip(opened(tmp_path / "g.pt").part.names(), range(12), strict=True))
    file = opened(tmp_path / "g.pt")
    assert any(
        tensor.untyped_storage()._checkpoint_offset != file.part.range(places[name])[0]
        for name, tensor in on_meta.items()
    )
    assert_equal(contents(tmp_path / "g.pt", file), state)


def test_behind_four_gibibytes(tmp_path: Path) -> None:
    """The ZIP64 forms of torch's writer, made by hand because the file is sparse."""
    path = tmp_path / "f.pt"
    big = (1 << 32) + 64
    small = struct.pack("<4f", 1, 2, 3, 4)
    state = {
        "big": hand_made.tensor(hand_made.Storage("0", big, torch.ByteStorage), (big,)),
        "small": hand_made.tensor(hand_made.Storage("1", 4), (4,)),
        "none": hand_made.tensor(hand_made.Storage("2", 0), (0,)),
    }
    entries: list[tuple[bytes, int, int, int, int]] = []
    with path.open("wb") as file:
        for name, size, data in (
            ("data.pkl", None, hand_made.pickled(state)),
            ("byteorder", None, b"little"),
            ("data/0", big, b""),
            ("data/1", None, small),
            ("data/2", None, b""),
            ("version", None, b"3\n"),
        ):
            place, count = file.tell(), len(data) if size is None else size
            wide = struct.pack("<Q", place) if place >= 0xFFFFFFFF else b""
            if count >= 0xFFFFFFFF:
                wide = struct.pack("<2Q", count, count) + wide
            extra = (struct.pack("<2H", 1, len(wide)) + wide if wide else b"") + b"FB\3\0ZZZ"
            flags = 0x808 if count else 0x800
            full = b"f/" + name.encode()
            header = struct.pack(
                "<4s5H3I2H", b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(full), len(extra)
            )
            file.write(header + full + extra + data)
            if size is not None:
                file.seek(size, os.SEEK_CUR)
            if count:
                long = "Q" if place >= 0xFFFFFFFF or count >= 0xFFFFFFFF else "I"
                file.write(b"PK\7\x08" + struct.pack(f"<I2{long}", 0, count, count))
            entries.append((full, flags, count, place, 0))
        directory = file.tell()
        for full, flags, count, place, _ in entries:
            wide = b"".join(
                struct.pack("<Q", value) for value in (count, count, place) if value >= 0xFFFFFFFF
            )
            extra = struct.pack("<2H", 1, len(wide)) + wide if wide else b""
            narrow = [min(value, 0xFFFFFFFF) for value in (count, count, place)]
            fields = (*narrow[:2], len(full), len(extra), 0, 0, 0, 0, narrow[2])
            file.write(struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, flags, 0, 0, 0, 0, *fields))
            file.write(full + extra)
        end = file.tell()
        file.write(
            struct.pack(
                "<4sQ2H2I4Q", b"PK\6\6", 44, 0x31E, 45, 0, 0, 6, 6, end - directory, directory
            )
        )
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 6, 6, end - directory, 0xFFFFFFFF, 0))
    assert path.stat().st_blocks * 512 < 1 << 20
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("f/data/0").file_size == big
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded["big"].shape == (big,)
    found = opened(path)
    ranges = {name: found.part.range(i) for i, name in enumerate(found.part.names())}
    assert ranges["big"][1] - ranges["big"][0] == big
    assert ranges["small"][0] > 1 << 32
    with path.open("rb") as file:
        file.seek(ranges["small"][0])
        assert file.read(16) == small
    assert torch.equal(loaded["small"], torch.tensor([1.0, 2, 3, 4]))
    assert ranges["none"][1] == ranges["none"][0]


@pytest.mark.deep
def test_torch_writes_four_gibibytes(tmp_path: Path) -> None:
    state = {
        "big": torch.empty((1 << 32) + 8, dtype=torch.uint8),
        "w": torch.randn(3),
        "e": torch.ones(0),
    }
    path = tmp_path / "f.pt"
    torch.save(state, path)
    file = opened(path)
    position = file.part.find("w")
    assert position is not None
    begin, end = file.part.range(position)
    raw = np.fromfile(path, np.float32, 3, offset=begin)
    assert end - begin == 12
    assert raw.tolist() == state["w"].tolist()
    path.unlink()


_VIEWS = st.lists(
    st.tuples(
        st.integers(0, 2),  # of which storage
        st.integers(0, 30),  # offset
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=3),
    ),
    max_size=8,
)


@hypothesis.settings(max_examples=40)
@hypothesis.given(_VIEWS)
def test_any_views(tmp_path_factory: pytest.TempPathFactory, views: Any) -> None:
    storages = [torch.randn(40), torch.randint(0, 99, (40,)), torch.randn(40).half()]
    state = {}
    for number, (which, offset, dimensions) in enumerate(views):
        shape, stride = [d[0] for d in dimensions], [d[1] for d in dimensions]
        last = offset + sum((extent - 1) * step for extent, step in dimensions)
        if last < 40 or 0 in shape:
            state[str(number)] = storages[which].as_strided(shape, stride, offset)
    path = tmp_path_factory.mktemp("any") / "f.pt"
    file = check(path, state)
    # Nothing is read twice, and nothing between tensors is read.
    ranges = sorted(file.part.range(i) for i in range(len(file.part)))
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))


W, V = torch.arange(6.0), torch.ones(2)
# State dicts of contiguous tensors that are alone in their storages or tied, and all others.
PLAIN: dict[str, dict[Any, Any]] = {
    "vectors": {"b": torch.arange(3.0), "a": torch.arange(5)},
    "ordered": collections.OrderedDict(w=torch.ones(2, 3, dtype=torch.bfloat16)),
    "module": torch.nn.BatchNorm1d(2).state_dict(),
    "parameters": dict(torch.nn.Linear(3, 2).named_parameters()),
    "scalar_and_empty": {"s": torch.tensor(2.0), "z": torch.zeros(0, 3), "y": torch.zeros(0)},
    "part_of_a_storage": {"w": torch.arange(8)[2:5], "v": torch.arange(4)[:1]},
    "ones_in_the_shape": {"w": torch.ones(3, 1).t(), "v": torch.ones(1, 4, 1)},
    "many": {f"layer.{number}": torch.full((2,), number) for number in range(300)},
    "tied": {"a": W, "w": torch.ones(2), "b": W, "c": W.detach()},
    "tied_parts": {"b": W[1:3], "a": W[1:3]},
    "tied_scalars": {"s": W[0], "t": W[0], "u": torch.tensor(2.0)},
    "tied_strides": {"w": W.view(6, 1), "v": torch.as_strided(W, (6, 1), (1, 7))},
}
_SQUARE = torch.ones(2, 2)
_EMPTY = torch.ones(2)[:0]
NOT_PLAIN: dict[str, dict[Any, Any]] = {
    "two_shapes": {"a": W, "b": W.view(2, 3)},
    "two_lengths": {"a": W, "b": W[:5]},
    "tied_and_another": {"a": W, "b": W, "c": W[1:]},
    "tied_and_transposed": {"a": _SQUARE, "b": _SQUARE.t()},
    "tied_without_bytes": {"a": _EMPTY, "b": _EMPTY},
    "two_parts": {"a": W[:2], "b": W[2:]},
    "transposed": {"w": torch.ones(2, 3).t()},
    "a_number": {"w": torch.ones(2), "step": 3},
    "nested": {"state_dict": {"w": torch.ones(2)}},
    "a_list": {"w": torch.ones(2), "l": [torch.ones(1)]},
    "a_number_as_key": {"w": torch.ones(2), 3: torch.ones(2)},
    "not_ascii": {"gewicht_\xe4": torch.ones(2)},
    "no_tensors": {},
}


def places_of(file: TorchFile) -> dict[str, Any]:
    part = file.part
    headers = part.headers()
    return {name: (headers[name], part.range(i)) for i, name in enumerate(part.names())}


def quickly(path: Path, pickle: bytes) -> TorchFile | None:
    """The index without Python objects for the tensors."""
    return torch_file._plain(_native.Archive.open(str(path)), pickle)


def step_by_step(path: Path, pickle: bytes) -> TorchFile:
    archive = _native.Archive.open(str(path))
    places = torch_file._places(archive)
    value = torch_file._value_of(pickle, places)
    assert value
    return torch_file._Indexer(archive, places, torch_file._described).index(value)


def pickle_in(path: Path) -> bytes:
    return torch_file._pickle_of(_native.Archive.open(str(path)))


@pytest.mark.parametrize("case", PLAIN)
def test_plain_state_dicts(tmp_path: Path, case: str) -> None:
    path = tmp_path / "f.bin"
    file = check(path, PLAIN[case])
    quick = quickly(path, pickle_in(path))
    slow = step_by_step(path, pickle_in(path))
    assert quick is not None
    assert places_of(quick) == places_of(slow) == places_of(file)
    assert quick.views == slow.views == file.views
    assert quick.names == slow.names == file.names == list(PLAIN[case])


def test_plain_state_dict_in_another_order_than_its_records(tmp_path: Path) -> None:
    path = tmp_path / "f.bin"
    check(path, PLAIN["vectors"])
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "g.bin", "w") as new:
        for record in reversed(old.namelist()):
            new.writestr(record, old.read(record))
    quick = quickly(tmp_path / "g.bin", pickle_in(path))
    assert quick is not None
    assert quick.names == ["b", "a"] == quick.part.names()[::-1]
    loaded = wl.load_file(tmp_path / "g.bin")
    assert_equal(loaded, PLAIN["vectors"])


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_other_state_dicts(tmp_path: Path, case: str) -> None:
    path = tmp_path / "f.bin"
    torch.save(NOT_PLAIN[case], path)
    assert quickly(path, pickle_in(path)) is None


def test_a_record_of_another_size_or_none_is_not_plain(tmp_path: Path) -> None:
    path = tmp_path / "f.bin"
    torch.save({"w": torch.ones(4)}, path)
    pickle = pickle_in(path)
    torch.save({"w": torch.ones(5)}, tmp_path / "longer.bin")
    torch.save({}, tmp_path / "none.bin")
    assert quickly(path, pickle)
    assert quickly(tmp_path / "longer.bin", pickle) is None
    assert quickly(tmp_path / "none.bin", pickle) is None


@pytest.mark.parametrize(
    "state", [{"a": torch.ones(1), "b": torch.zeros(1)}, {"a": W, "b": W, "c": torch.zeros(1)}]
)
def test_a_name_that_repeats_is_not_plain(tmp_path: Path, state: dict[str, Any]) -> None:
    path = tmp_path / "f.bin"
    torch.save(state, path)
    pickle = pickle_in(path)
    *others, last = state
    repeated = pickle.replace(*(b"X\x01\0\0\0" + name.encode() for name in (last, others[-1])))
    assert quickly(path, pickle)
    assert repeated != pickle
    assert quickly(path, repeated) is None
    assert step_by_step(path, repeated).names == others


@pytest.mark.parametrize(
    "state",
    [{"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int32)}, {"a": W, "b": W, "c": V}],
    ids=["alone", "tied"],
)
def test_changed_pickles_of_plain_state_dicts(tmp_path: Path, state: dict[str, Any]) -> None:
    path = tmp_path / "f.bin"
    torch.save(state, path)
    pickle = pickle_in(path)
    taken = 0
    for at in range(len(pickle)):
        for byte in range(256):
            changed = pickle[:at] + bytes([byte]) + pickle[at + 1 :]
            quick = quickly(path, changed)
            if quick is not None:
                slow = step_by_step(path, changed)
                assert (quick.names, quick.views) == (slow.names, slow.views)
                assert places_of(quick) == places_of(slow)
                taken += changed != pickle
    assert taken > 100  # both ways were compared, not only the unchanged pickle


def test_many_tensors(tmp_path: Path) -> None:
    state = {f"layers.{i}.weight": torch.full((3,), i) for i in range(3000)}
    check(tmp_path / "f", state)


# --- Where the state dict is ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "key", "names"),
    [
        ({"w": W}, None, ["w"]),
        (collections.OrderedDict(w=W), None, ["w"]),
        ({"state_dict": {"w": W}, "epoch": 3}, None, ["w"]),
        ({"model": {"w": W}, "optimizer": {"state": {0: {"exp": V}}, "groups": []}}, None, ["w"]),
        ({"anything": {"w": W}, "empty": {}}, None, ["w"]),
        ({"w": W, "ema": {"v": V}}, None, ["w"]),
        ({"w": W, "ema": {"v": V}}, "ema", ["v"]),
        ({"model": {"w": W}, "ema": {"v": V}}, "ema", ["v"]),
        ({"a": {"b": {"w": W}}, "c": {"v": V}}, "a.b", ["w"]),
        ({"a.b": {"w": W}, "a": {"b": {"v": V}}}, "a.b", ["w"]),
        ({"a.b": {"c.d": {"w": W}}}, "a.b.c.d", ["w"]),
        ({"a": {"": {"w": W}}}, "a", []),
        ({}, None, []),
        ({"a": {}}, "a", []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dict(
    tmp_path: Path, content: Any, key: str | None, names: list[str], zipped: bool
) -> None:
    torch.save(content, tmp_path / "f", _use_new_zipfile_serialization=zipped)
    file = open_torch_file(tmp_path / "f", state_dict_key=key)
    assert isinstance(file, TorchFile) == zipped
    assert (file.names if isinstance(file, TorchFile) else list(file.tensors)) == names


@pytest.mark.parametrize(
    ("content", "key", "beside"),
    [
        ({"w": W, "step": 1}, None, {"step": "int"}),
        ({"state_dict": {"w": W, "_n": 2}, "epoch": 3}, None, {"_n": "int", "epoch": "int"}),
        ({"m": {"w": W}, "opt": {"state": {0: W}}}, "m", {"opt": "dict"}),
        ({"a": {"b": {"w": W}, 7: "x"}, "c": V}, "a.b", {"a.7": "str", "c": "Tensor"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_no_tensor_of_the_checkpoint_is_named(
    tmp_path: Path, content: Any, key: str | None, beside: dict[str, str], zipped: bool
) -> None:
    torch.save(content, tmp_path / "f.bin", _use_new_zipfile_serialization=zipped)
    checkpoint = wl.open_checkpoint(tmp_path / "f.bin", state_dict_key=key)
    assert list(checkpoint) == ["w"]
    assert json.loads(checkpoint.metadata["not_tensors"]) == beside


@pytest.mark.parametrize(
    ("content", "key", "said"),
    [
        ({"model": {"w": W}, "ema": {"v": V}}, None, "'model', 'ema'"),
        ({"epoch": 3}, None, "'epoch'"),
        ({"a": {"b": {"w": W}}}, None, "state_dict_key"),
        (W, None, "Tensor"),
        ([W], None, "list"),
        (3, None, "int"),
        ({"a": {"w": W}}, "b", "'b'"),
        ({"a": {"w": W}}, "a.b", "'a.b'"),
        ({"a": {"w": W}}, "a.w", "Tensor"),
        ({"a": {"w": W}}, "a.w.x", "Tensor"),
        ({"a": 3}, "a", "int"),
        ({i: {"w": W} for i in range(100)}, None, "..."),
    ],
)
def test_no_state_dict(tmp_path: Path, content: Any, key: str | None, said: str) -> None:
    torch.save(content, tmp_path / "f")
    with pytest.raises(wl.CheckpointError, match=r"f: ") as caught:
        open_torch_file(tmp_path / "f", state_dict_key=key)
    assert said in str(caught.value)
    assert str(tmp_path / "f") in str(caught.value)
    assert len(str(caught.value)) < 1000


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*TorchScript archive")
def test_case(case: hand_made.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.bin"
    path.write_bytes(case.data)
    loaded = None
    try:
        loaded = by_torch(path)
        accepted = True
    except Exception:
        accepted = False
    if case.differs != hand_made.UNDEFINED:
        assert accepted == ((case.expected == hand_made.OK) != bool(case.differs))
    if case.expected == hand_made.OK:
        file = open_torch_file(path)
        if isinstance(file, LoadedTorchFile):
            assert_equal(file.tensors, tensors_of(loaded))
        elif loaded is not None:
            assert_equal(contents(path, file), tensors_of(loaded))
        return
    with pytest.raises(wl.FormatError) as caught:
        open_torch_file(path)
    assert caught.value.code == case.expected, str(caught.value)
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 700 + len(str(path))
    assert caught.value.offset is None or caught.value.offset <= len(case.data)
    if case.name.startswith("tensor_") and case.name not in NAMELESS:
        assert caught.value.tensor == "w"
    pickle.loads(pickle.dumps(caught.value))
    assert not (tmp_path / "hacked").exists()


# torch refuses to make these before their names are known.
NAMELESS = {"tensor_quantized", "tensor_quantized_by_channel"}


def test_enough_cases() -> None:
    refused = [case for case in CASES if case.expected != hand_made.OK]
    assert len(refused) >= 40
    assert {case.expected for case in CASES} >= {
        "ok", "empty_file", "git_lfs_pointer", "not_weights", "archive_incomplete",
        "archive_malformed", "archive_mismatch", "archive_unsupported", "trailing_bytes",
        "duplicate_name", "offsets_invalid", "size_mismatch", "tensor_invalid", "unsafe_pickle",
        "malformed_pickle", "unsupported_tensor", "torchscript", "big_endian",
    }  # fmt: skip


def test_nothing_is_left_open(tmp_path: Path) -> None:
    path = tmp_path / "f"
    gc.collect()
    before = open_files()
    for case in CASES[::5]:
        path.write_bytes(case.data)
        with contextlib.suppress(wl.WeightliftError):
            open_torch_file(path)
    gc.collect()
    assert open_files() == before


def test_missing_and_denied(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_torch_file(tmp_path / "nothing.bin")
    with pytest.raises(IsADirectoryError):
        open_torch_file(tmp_path)


def test_attributes_do_not_deceive(tmp_path: Path) -> None:
    """A pickle may set attributes with any name on tensors, dictionaries and storages."""
    pickled = hand_made.pickled
    floats, tensor = hand_made.FLOATS, hand_made.tensor(hand_made.Storage("0", 6), (2, 3))
    shadows = dict.fromkeys(
        ["stride", "storage_offset", "is_contiguous", "untyped_storage", "is_conj", "detach"],
        bytearray,
    )
    shadowed = hand_made.Call(
        torch._tensor._rebuild_from_type_v2,
        tensor.function,
        torch.Tensor,
        tensor.arguments,
        shadows,
    )
    path = tmp_path / "f.pt"
    path.write_bytes(hand_made.archive(hand_made.checkpoint(pickled({"w": shadowed}), floats)))
    values = contents(path, opened(path))["w"]
    assert values.tolist() == [[0, 1, 2], [3, 4, 5]]

    class Shadowing:
        def __reduce__(self) -> Any:
            attributes = dict.fromkeys(["items", "keys", "values", "__iter__"], bytearray)
            return collections.OrderedDict, (), attributes, None, iter([("w", tensor)])

    path.write_bytes(hand_made.archive(hand_made.checkpoint(pickled(Shadowing()), floats)))
    assert opened(path).names == ["w"]

    # A forged storage, which pretends to be one of the file's.
    forged = hand_made.Call(
        torch._tensor._rebuild_from_type_v2, torch.UntypedStorage, torch.UntypedStorage, (24,),
        {"_checkpoint_offset": 0},
    )  # fmt: skip
    typed = hand_made.Call(
        torch._utils._rebuild_tensor_v3, forged, 0, (6,), (1,), False, collections.OrderedDict(),
        torch.float32, {},
    )  # fmt: skip
    path.write_bytes(hand_made.archive(hand_made.checkpoint(pickled({"w": typed}), floats)))
    with pytest.raises(wl.FormatError) as caught:
        open_torch_file(path)
    assert caught.value.code in ("unsupported_tensor", "malformed_pickle")


# --- Files for which torch loads ---------------------------------------------------------------


def test_other_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own loader with weights_only, and a message with the reason."""
    from torch import _weights_only_unpickler

    state = {"w": W, "t": W.view(2, 3).t(), "p": torch.nn.Parameter(W), "epoch é": 3}
    path = tmp_path / "f.pt"
    torch.save(state, path)
    torch_file._unpickles.cache_clear()
    own = _weights_only_unpickler.Unpickler

    class Other(own):  # type: ignore[misc, valid-type]
        persistent_load = property(lambda self: own.persistent_load)

    monkeypatch.setattr(_weights_only_unpickler, "Unpickler", Other)
    try:
        assert not torch_file._unpickles()
        calls = []
        load = torch.load

        def recorded(*arguments: Any, **options: Any) -> Any:
            calls.append(options)
            monkeypatch.setattr(_weights_only_unpickler, "Unpickler", own)
            return load(*arguments, **options)

        monkeypatch.setattr(torch, "load", recorded)
        file = open_torch_file(path)
    finally:
        torch_file._unpickles.cache_clear()
    assert isinstance(file, LoadedTorchFile)
    assert [options["weights_only"] for options in calls] == [True]
    assert [options["mmap"] for options in calls] == [True]
    assert "torch" in file.reason
    assert_equal(file.tensors, {name: state[name] for name in ("w", "t", "p")})
    assert not any(tensor.requires_grad for tensor in file.tensors.values())
    assert file.not_tensors == {"epoch é": "int"}


def test_installed_torch_is_the_known_one() -> None:
    assert torch_file._unpickles()
