"""DDUF files, compared with ``huggingface_hub``, which writes and reads them, and ``zipfile``."""

from __future__ import annotations

import json
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import export_entries_as_dduf, export_folder_as_dduf, read_dduf_file

import malformed_archives as hand_made
import weightlift as wl
from support import assert_same_tensors, open_files
from weightlift import _native
from weightlift.checkpoint import dduf as dduf_module
from weightlift.checkpoint.checkpoint import indexed_files
from weightlift.checkpoint.dduf import Dduf, open_dduf
from weightlift.checkpoint.files import ShardFile
from weightlift.load.load_tensors import load_tensors
from weightlift.load.options import LoadOptions

CASES = hand_made.dduf_cases()


def index_of(dduf: Dduf, name: str) -> _native.IndexedFile:
    shard = ShardFile(name, dduf.path, "safetensors", *dduf.place(name))
    return indexed_files(wl.Checkpoint.from_files([shard]))[0]


def loaded(index: _native.IndexedFile, mode: str) -> dict[str, torch.Tensor]:
    return load_tensors(wl.Checkpoint([index]), torch.device("cpu"), LoadOptions(mode))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline of two models, an odd header length in the second."""
    root = tmp_path / "pipeline"
    files: dict[str, Any] = {
        "model_index.json": {
            "_class_name": "P", "unet": ["diffusers", "U"], "tokenizer": ["transformers", "T"],
            "vae": ["diffusers", "V"], "safety_checker": [None, None],
        },
        "unet/config.json": {"sample_size": 8},
        "vae/config.json": {},
        "tokenizer/tokenizer_config.json": {"a": "\u00e9"},
    }  # fmt: skip
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(content))
    (root / "tokenizer/merges.txt").write_text("a b\n" * 1000)
    (root / "tokenizer/spiece.model").write_bytes(bytes(range(256)))
    safetensors.torch.save_file(
        {"a": torch.randn(50, 7), "b": torch.arange(5), "c": torch.ones(3).bfloat16()},
        root / "unet/diffusion_pytorch_model.safetensors",
        metadata={"format": "pt"},
    )
    header = b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}} '
    (root / "vae/diffusion_pytorch_model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + struct.pack("<3f", 1, 2, 3)
    )
    return root


def assert_like_theirs(path: Path, dduf: Dduf) -> None:
    theirs = read_dduf_file(path)
    assert dduf.entries == {name: (entry.offset, entry.length) for name, entry in theirs.items()}
    with zipfile.ZipFile(path) as archive:
        for name in dduf.entries:
            assert dduf.read(name) == archive.read(name)
            assert dduf.checksums[name] == archive.getinfo(name).CRC


def test_folder(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "p.dduf"
    export_folder_as_dduf(path, folder)
    dduf = open_dduf(path)
    assert dduf.path == str(path)
    assert_like_theirs(path, dduf)
    assert dduf.folders() == ["unet", "tokenizer", "vae"]
    assert dduf.model_index == json.loads((folder / "model_index.json").read_text())
    assert dduf.read_json("tokenizer/tokenizer_config.json") == {"a": "\u00e9"}
    for mode in ("map", "read"):
        for model in ("unet", "vae"):
            name = f"{model}/diffusion_pytorch_model.safetensors"
            assert_same_tensors(
                loaded(index_of(dduf, name), mode),
                loaded(_native.IndexedFile.open(str(folder / name)), mode),
            )
    assert torch.equal(
        loaded(index_of(dduf, "unet/diffusion_pytorch_model.safetensors"), "map")["a"],
        safetensors.torch.load_file(folder / "unet/diffusion_pytorch_model.safetensors")["a"],
    )


def test_entries(tmp_path: Path) -> None:
    path = tmp_path / "p.dduf"
    weights = safetensors.torch.save({"w": torch.arange(6.0)})
    export_entries_as_dduf(
        path,
        [
            ("model_index.json", b'{"unet": ["a", "b"]}'),
            ("unet/config.json", b"{}"),
            ("notes.txt", b""),
            ("unet/\u4e2d.fp16.safetensors", weights),
            ("json", b"{}"),
        ],
    )
    dduf = open_dduf(path)
    assert_like_theirs(path, dduf)
    index = index_of(dduf, "unet/\u4e2d.fp16.safetensors")
    assert loaded(index, "read")["w"].tolist() == [0, 1, 2, 3, 4, 5]
    assert index.path == str(path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: hand_made.Case, tmp_path: Path) -> None:
    path = tmp_path / "p.dduf"
    path.write_bytes(case.data)
    before = open_files()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile warns of names that are there twice
            read_dduf_file(path)
        accepted = True
    except (Exception, RecursionError):
        accepted = False
    assert accepted == ((case.expected == hand_made.OK) != bool(case.differs))
    if case.expected == hand_made.OK:
        dduf = open_dduf(path)
        theirs = read_dduf_file(path).items()
        assert dduf.entries == {name: (entry.offset, entry.length) for name, entry in theirs}
        weights = index_of(dduf, "unet/diffusion_pytorch_model.safetensors")
        assert loaded(weights, "map")["w"].tolist() == [0, 1, 2, 3, 4, 5]
        return
    with pytest.raises(wl.FormatError) as caught:
        open_dduf(path)
    assert caught.value.code == case.expected, str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))
    del caught
    # There may be fewer, because garbage of earlier tests may have been collected.
    assert open_files() <= before


def test_enough_cases() -> None:
    refused = [case for case in CASES if case.expected != hand_made.OK]
    assert len(refused) >= 40
    # The reader of huggingface_hub accepts most of these.
    assert sum(bool(case.differs) for case in refused) >= 30


def test_what_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "p.dduf"
    path.write_bytes(hand_made.archive(hand_made.dduf_records()))
    dduf = open_dduf(path)
    with pytest.raises(wl.CheckpointError, match=r"unet/config\.json"):
        index_of(dduf, "unet/model.safetensors")
    with pytest.raises(wl.CheckpointError, match=r"model_index\.json"):
        dduf.read("vae/config.json")
    with pytest.raises(FileNotFoundError):
        open_dduf(tmp_path / "q.dduf")


def test_damage_in_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "p.dduf"
    odd = {"unet/x.safetensors": b"\x05\0\0\0\0\0\0\0null ", "unet/y.json": b"[" * 100_000}
    records = hand_made.dduf_records(**odd)
    records[1].local["crc"] = records[1].central["crc"] = 7
    path.write_bytes(hand_made.archive(records))
    dduf = open_dduf(path)
    with pytest.raises(wl.FormatError, match=r"unet/config\.json") as caught:
        dduf.read("unet/config.json")
    assert caught.value.code == "checksum_mismatch"
    with pytest.raises(wl.FormatError, match=r"unet/y\.json") as caught:
        dduf.read_json("unet/y.json")
    assert caught.value.code == "dduf_invalid"
    with pytest.raises(wl.FormatError, match=r"unet/x\.safetensors") as caught:
        index_of(dduf, "unet/x.safetensors")
    assert caught.value.code == "header_not_object"
    begin, count = dduf.entries["unet/x.safetensors"]
    assert caught.value.offset is not None
    assert begin <= caught.value.offset <= begin + count


def test_what_is_too_large_to_be_read_whole(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.dduf"
    export_folder_as_dduf(path, folder)
    dduf = open_dduf(path)
    name = "tokenizer/merges.txt"
    monkeypatch.setattr(dduf_module, "_MOST_BYTES", len(dduf.read(name)) - 1)
    with pytest.raises(wl.FormatError, match=rf"{name}' has 4000 bytes; the limit is 3999"):
        dduf.read(name)
    archive = _native.Archive.open(str(path))
    for begin, count in ((archive.size, 1), (archive.size - 1, 2), (0, 1 << 63)):
        with pytest.raises(IndexError, match="leave the file"):
            archive.read(begin, count)


def test_weights_do_not_leave_their_entry(tmp_path: Path) -> None:
    """Sizes are compared with the entry's, not with the file's."""
    path = tmp_path / "p.dduf"
    name = "unet/diffusion_pytorch_model.safetensors"
    (whole,) = (record.data for record in hand_made.dduf_records() if record.name == name.encode())
    for content, code in (
        (whole[:-1], "data_incomplete"),
        (whole + b"x", "trailing_bytes"),
        (whole[:8], "header_past_end"),
        (b"", "empty_file"),
    ):
        more = {name: content, "unet/zzz.txt": bytes(1000)}
        path.write_bytes(hand_made.archive(hand_made.dduf_records(**more)))
        dduf = open_dduf(path)
        with pytest.raises(wl.FormatError) as caught:
            index_of(dduf, name)
        assert caught.value.code == code
        # The same, opened by its place.
        with pytest.raises(wl.FormatError) as caught:
            _native.IndexedFile.open(str(path), *dduf.entries[name])
        assert caught.value.code == code
    with pytest.raises(wl.ArgumentError, match="leaves the file"):
        _native.IndexedFile.open(str(path), 5, path.stat().st_size)
    with pytest.raises(wl.ArgumentError, match="leaves the file"):
        _native.IndexedFile.open(str(path), 2**64 - 1, 2)
