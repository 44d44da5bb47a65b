"""Files recognised by their content, not by their names; and the errors for other files."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file as reference_load_file
from safetensors.torch import save_file as reference_save_file

import weightlift as wl

W = torch.arange(2.0)


def padded(length: int, blanks: bytes = b" ") -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return struct.pack("<Q", length) + header.ljust(length, blanks) + struct.pack("<2f", 0, 1)


# Lengths whose first bytes are those of pickles, zip files and other things.
@pytest.mark.parametrize(
    "length",
    [120, 128, 136, 640, 0x380, 0x480, 0x2880, 0x8B1F, 0x5080, 0x4B50],
)
@pytest.mark.parametrize("name", ["m.sft", "blob", "m.bin", "m.pt", "m.ckpt", "m.unknown"])
def test_safetensors_under_any_name(tmp_path: Path, length: int, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(padded(length))
    assert torch.equal(wl.load_checkpoint(path)["w"], reference_load_file(path)["w"])


@pytest.mark.parametrize("name", ["m.sft", "blob", "m.safetensors.part", "m.model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_under_any_name(tmp_path: Path, name: str, zipped: bool) -> None:
    torch.save({"w": W}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert torch.equal(wl.load_checkpoint(tmp_path / name)["w"], W)


def tar_of_torch(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            data = pickle.dumps({}, 2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def tar_of_others(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("model.safetensors")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"data"))


def python_2(path: Path) -> None:
    torch.save({"w": W, "note": "X"}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes().replace(b"X\x01\x00\x00\x00X", b"U\x03\x8c\x00\xff")
    path.write_bytes(data)


def dtensor(path: Path) -> None:
    code = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
mesh = init_device_mesh("cpu", (1,))
torch.save({"w": distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])}, sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True)


def written(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def zip_of(*names: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(name, b"x" * 100)

    return write


def script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)


def of_numpy(save: Callable[..., None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            save(file, np.ones(2))

    return write


def with_protocol(protocol: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.save({"w": W}, path, pickle_protocol=protocol)

    return write


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "tar of torch": (tar_of_torch, r"tar format .*before 2017.*weights_only=False"),
    "tar": (tar_of_others, "tar archive: unpack it"),
    "protocol 4": (with_protocol(4), "pickle_protocol=4.*reads protocol 2"),
    "protocol 5": (with_protocol(5), "pickle_protocol=5.*reads protocol 2"),
    "protocol 0": (with_protocol(0), "protocol 0 or 1"),
    "GGUF": (written(b"GGUF\3\0\0\0" + b"\0" * 99), "GGUF file.*gguf_file="),
    "GGML": (written(b"lmgg" + b"\0" * 99), "GGML file"),
    "GGJT": (written(b"tjgg\3\0\0\0" + b"\0" * 99), "GGML file"),
    "Xet": (written(b"# xet version 0\nfilesize = 1\n"), "Xet pointer"),
    "LFS": (written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "git lfs pull"),
    "HTML": (written(b"\n<!DOCTYPE html><html>"), "web page"),
    "XML": (written(b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>'), "server"),
    "error": (written(b'{"error":"Repository not found"}'), "server's error message"),
    "JSON": (written(b'{"metadata": {}, "weight_map": {}}'), "JSON"),
    "text of the Hub": (written(b"Entry not found"), "error message of the Hub"),
    "gzip": (written(gzip.compress(b"x" * 1000)), "compressed file: unpack it"),
    "HDF5": (written(b"\x89HDF\r\n\x1a\n" + b"\0" * 99), "HDF5"),
    "TorchScript": (script, "TorchScript.*torch.jit"),
    "npz": (of_numpy(np.savez), "numpy.load"),
    "npy": (of_numpy(np.save), "numpy.load"),
    "zip": (zip_of("config.json", "weights"), "zip"),
    "text of Python 2": (python_2, r"Python 2 text.*encoding="),
    "DTensors": (dtensor, "DTensor.*(torch.distributed.tensor|save plain tensors)"),
    "whole module": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "whole object"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1}, 2)), "did not write"),
    "noise": (written(bytes(range(1, 255))), r"not a file of torch.save: it begins with b'\\x01"),
    "nothing": (written(b""), "empty"),
    "zeros": (written(bytes(4096)), "zeros only.*incomplete"),
    "LFS, with a mark": (written(b"\xef\xbb\xbfversion https://git-lfs"), "git lfs"),
    "LFS of 2014": (written(b"version https://hawser.github.com/spec/v1\noid"), "git lfs pull"),
    "HTML comment": (written(b"<!-- a --><html>"), "web page"),
    "JSON list": (written(b'[{"error": "x"}]'), "JSON"),
    "lz4": (written(b"\x04\x22\x4d\x18" + bytes(99)), "compressed file: unpack it"),
    "compress": (written(b"\x1f\x9d\x90" + bytes(99)), "compressed file: unpack it"),
    "empty zip": (lambda path: zipfile.ZipFile(path, "w").close(), "empty zip archive"),
    "ONNX": (written(b"\x08\x07\x12\x07pytorch\x1a\x052.0.0" + bytes(99)), "ONNX"),
    "msgpack": (written(b"\x82\xa6params\x81\xa1a\xc4\x01\0" + bytes(99)), "msgpack.*Flax"),
    "picture": (written(b"\x89PNG\r\n\x1a\n" + bytes(99)), "picture"),
    "Parquet": (written(b"PAR1" + bytes(99)), "Parquet"),
    "other text": (written(b"model:\n  hidden: 4\n"), 'text, not weights; it begins with "model:"'),
    "headers of HTTP": (written(b"HTTP/1.1 200 OK\r\n\r\n"), 'text.*"HTTP/1.1 200 OK"'),
    "meta": (lambda path: torch.save({"w": W.to("meta")}, path), "meta device.*before it is saved"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_says_what_it_is(tmp_path: Path, kind: str) -> None:
    write, said = FILES[kind]
    path = tmp_path / "weights.bin"
    write(path)
    with pytest.raises(wl.FormatError, match=f"(?s){said}") as caught:
        wl.load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "add_safe_globals" not in str(caught.value) or kind == "whole module"
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [
        "GGUF",
        "GGML",
        "Xet",
        "LFS",
        "HTML",
        "error",
        "tar",
        "gzip",
        "zeros",
        "ONNX",
        "msgpack",
        "lz4",
        "other text",
    ],
)
@pytest.mark.parametrize("name", ["weights.safetensors", "weights", "weights.gguf"])
def test_under_names_of_safetensors(tmp_path: Path, kind: str, name: str) -> None:
    write, said = FILES[kind]
    write(tmp_path / name)
    with pytest.raises(wl.FormatError, match=f"(?s){said}"):
        wl.load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16])
def test_young_dtypes_in_the_old_format_are_not_called_damaged(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensor = torch.arange(4).to(dtype)
    torch.save({"w": tensor}, tmp_path / "f.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(wl.FormatError, match=r"before 1\.6.*newer dtypes") as caught:
        wl.load_checkpoint(tmp_path / "f.pth")
    assert "damaged" not in str(caught.value)


def test_folders_of_other_formats(tmp_path: Path) -> None:
    (tmp_path / ".metadata").touch()
    (tmp_path / "__0_0.distcp").touch()
    with pytest.raises(wl.CheckpointError, match="dcp_to_torch"):
        wl.open_checkpoint(tmp_path)
    (tmp_path / ".metadata").unlink()
    (tmp_path / "model.Q4_K_M.gguf").touch()
    with pytest.raises(wl.CheckpointError, match="gguf_file="):
        wl.open_checkpoint(tmp_path)


def test_a_file_of_safetensors_is_read_by_its_name(tmp_path: Path) -> None:
    """Its padding may be any white space that JSON allows."""
    reference_save_file({"w": W}, tmp_path / "f.safetensors")
    assert torch.equal(wl.load_checkpoint(tmp_path / "f.safetensors")["w"], W)
    (tmp_path / "g.sft").write_bytes(padded(200, b"\n"))
    assert torch.equal(wl.load_checkpoint(tmp_path / "g.sft")["w"], W)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_under_the_name_of_safetensors(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"w": W}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(wl.FormatError, match=r"rename it to \.bin or \.pt"):
        wl.load_file(path)
