"""``weightlift convert`` and ``weightlift verify``, against the libraries that read the files."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch

import support
import weightlift as wl
from support import assert_same_tensors
from weightlift.checkpoint.checkpoint import indexed_files
from weightlift.cli.verify import _check
from weightlift.convert import convert_checkpoint


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weightlift", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 30, generator=random)
    return {
        "b.weight": weight,
        "a.weight": torch.randn(7, 3, generator=random).to(torch.bfloat16),
        "turned": torch.randn(5, 9, generator=random).t(),
        "tied": weight,
        "ids": torch.arange(11),
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 4),
        "f8": torch.randn(16, generator=random).to(torch.float8_e4m3fn),
    }


@pytest.fixture
def torch_file(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors, path)
    return path


def _expected(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, Any]:
    return {
        name: t.to(dtype).contiguous() if dtype and t.is_floating_point() else t.contiguous()
        for name, t in sorted(tensors.items())
        if name != "tied"
    }


@pytest.mark.parametrize("part", [{"stem": "sub/model"}, {"variant": "../fp16"}, {"stem": "a\0"}])
def test_names_that_leave_the_folder(
    torch_file: Path, tmp_path: Path, part: dict[str, str]
) -> None:
    with pytest.raises(wl.ArgumentError, match="must be a part of a file name"):
        convert_checkpoint(wl.open_checkpoint(torch_file), tmp_path / "new", **part)
    assert [path.name for path in tmp_path.iterdir()] == [torch_file.name]


def test_dtypes_that_safetensors_lacks(tmp_path: Path) -> None:
    torch.save(
        {"fine": torch.ones(2), "wide": torch.ones(2, dtype=torch.complex128)}, tmp_path / "f"
    )
    with pytest.raises(wl.CheckpointError, match="'wide': safetensors has no dtype for C128"):
        convert_checkpoint(wl.open_checkpoint(tmp_path / "f"), tmp_path / "new.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_one_file(
    tensors: dict[str, torch.Tensor], torch_file: Path, tmp_path: Path, dtype: Any
) -> None:
    target = tmp_path / "out" / "model.safetensors"
    seen: list[tuple[int, int]] = []
    convert_checkpoint(
        wl.open_checkpoint(torch_file), target, dtype=dtype, progress=lambda *at: seen.append(at)
    )
    expected = _expected(tensors, dtype)
    loaded = safetensors.torch.load_file(target)
    assert_same_tensors(dict(sorted(loaded.items())), expected)
    assert seen[0][0] == 0
    assert seen[-1] == (sum(t.nbytes for t in expected.values()),) * 2
    assert [at[0] for at in seen] == sorted(at[0] for at in seen)
    with safetensors.safe_open(target, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "tied": "b.weight"}
    # The same file that the reference's writer makes, but for the order of the metadata.
    reference = tmp_path / "reference.safetensors"
    metadata = {"format": "pt", "tied": "b.weight"}
    safetensors.torch.save_file(expected, reference, metadata=metadata)
    ours, theirs = (indexed_files(wl.open_checkpoint(path))[0] for path in (target, reference))
    assert ours.names() == theirs.names()
    where = [[part.range(i) for i in range(len(part))] for part in (ours, theirs)]
    assert where[0] == where[1]
    assert target.stat().st_mode & 0o777 == reference.stat().st_mode & 0o777 | 0o044


def test_shards(tensors: dict[str, torch.Tensor], torch_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "sharded"
    done = command("convert", torch_file, target, "--max-shard-size", "1KB", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in target.iterdir())
    assert files[-1] == "model.safetensors.index.json"
    assert all(name.startswith("model-0000") for name in files[:-1])
    assert len(files) > 2
    expected = _expected(tensors, torch.float32)
    assert_same_tensors(dict(sorted(wl.load_checkpoint(target).items())), expected)
    index = json.loads((target / files[-1]).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    loaded: dict[str, torch.Tensor] = {}
    for name in files[:-1]:
        part = safetensors.torch.load_file(target / name)
        assert {index["weight_map"][key] for key in part} == {name}
        loaded |= part
    assert_same_tensors(dict(sorted(loaded.items())), expected)

    again = command("convert", target, tmp_path / "whole.safetensors")
    assert again.returncode == 0, again.stderr
    whole = safetensors.torch.load_file(tmp_path / "whole.safetensors")
    assert_same_tensors(dict(sorted(whole.items())), expected)


def test_nothing_is_overwritten_and_nothing_left(torch_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "there.safetensors"
    target.write_bytes(b"precious")
    done = command("convert", torch_file, target)
    assert done.returncode == 1
    assert "exists: remove it" in done.stderr
    assert target.read_bytes() == b"precious"

    before = sorted(tmp_path.iterdir())

    def fail(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    for name in ("new", "new.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(
                wl.open_checkpoint(torch_file), tmp_path / name, max_shard_size=1, progress=fail
            )
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(wl.ArgumentError, match="max_shard_size"):
        convert_checkpoint(wl.open_checkpoint(torch_file), tmp_path / "new", max_shard_size="5XB")


def test_a_file_that_only_torch_can_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    source, target = tmp_path / "old.bin", tmp_path / "out"
    torch.save(tensors, source, _use_new_zipfile_serialization=False)
    done = command("convert", source, target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{target}: 2 tensors")
    assert [path.name for path in target.iterdir()] == ["model.safetensors"]
    loaded = safetensors.torch.load_file(target / "model.safetensors")
    assert_same_tensors(dict(sorted(loaded.items())), tensors)


@pytest.fixture
def dduf(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "P", "unet": ["diffusers", "U"]}')
    (folder / "unet" / "config.json").write_text('{"_class_name": "U"}')
    safetensors.torch.save_file(
        _expected(tensors, None), folder / "unet" / "diffusion_pytorch_model.safetensors"
    )
    path = tmp_path / "pipeline.dduf"
    huggingface_hub.export_folder_as_dduf(path, folder)
    return path


def test_a_component_of_a_dduf_file(
    tensors: dict[str, torch.Tensor], dduf: Path, tmp_path: Path
) -> None:
    target = tmp_path / "unet-out"
    done = command("convert", dduf, target, "--subfolder", "unet")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in target.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    loaded = safetensors.torch.load_file(target / "diffusion_pytorch_model.safetensors")
    assert_same_tensors(dict(sorted(loaded.items())), _expected(tensors, None))


def test_what_lies_beside_a_file_that_only_torch_can_read(tmp_path: Path) -> None:
    source = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(3)}, source, _use_new_zipfile_serialization=False)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    done = command("convert", source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/config.json").read_text() == '{"model_type": "bert"}'
    assert safetensors.torch.load_file(tmp_path / "out/model.safetensors")["w"].sum() == 3


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A file of 700 MB is converted in less: the two parts that are in memory have 256 MiB each."""
    path = tmp_path / "large.safetensors"
    count = 70
    header = {
        f"w{i:02}": {
            "dtype": "F32",
            "shape": [2_500_000],
            "data_offsets": [i * 10_000_000, (i + 1) * 10_000_000],
        }
        for i in range(count)
    }
    support.sparse_file(path, header, count * 10_000_000)
    done = support.run_python(
        "import sys, threading, time\n"
        "import torch, weightlift as wl\n"
        "from weightlift.convert import convert_checkpoint\n"
        "def anon():\n"
        "    text = open('/proc/self/status').read()\n"
        "    return int(text.split('RssAnon:')[1].split()[0]) * 1024\n"
        "convert_checkpoint\n"
        "before, peak = anon(), 0\n"
        "def look(done, total):\n"
        "    global peak\n"
        "    peak = max(peak, anon())\n"
        "convert_checkpoint(wl.open_checkpoint(sys.argv[1]), sys.argv[2], dtype=torch.bfloat16,\n"
        "                   progress=look)\n"
        "print(peak - before)",
        path,
        tmp_path / "small.safetensors",
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400 << 20
    assert (tmp_path / "small.safetensors").stat().st_size > 350_000_000


class TestVerify:
    def _sums(self, folder: Path, *paths: Path) -> None:
        lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in paths]
        (folder / "SHA256SUMS").write_text("".join(lines))

    def test_hashes(self, torch_file: Path, tmp_path: Path) -> None:
        done = command("verify", torch_file)
        assert done.returncode == 0, done.stderr
        assert "SHA-256 not known" in done.stdout
        assert command("verify", torch_file, "--require-hashes").returncode == 1
        self._sums(tmp_path, torch_file)
        done = command("verify", torch_file, "--require-hashes")
        assert done.returncode == 0, done.stdout
        assert "as SHA256SUMS says" in done.stdout

    def test_a_file_that_only_torch_can_read(self, tmp_path: Path) -> None:
        path = tmp_path / "model.bin"
        torch.save({"w": torch.ones(100)}, path, _use_new_zipfile_serialization=False)
        self._sums(tmp_path, path)
        done = command("verify", path, "--require-hashes")
        assert done.returncode == 0, done.stdout
        assert "1 tensor, 400 B" in done.stdout
        assert "as SHA256SUMS says" in done.stdout
        assert wl.load_checkpoint(path, verify=True)["w"].sum() == 100
        path.write_bytes(path.read_bytes().replace(b"\0\0\x80\x3f", b"\0\0\x80\x3e", 1))
        done = command("verify", path)
        assert done.returncode == 1
        assert "DAMAGED" in done.stdout
        with pytest.raises(wl.FormatError, match=r"model\.bin: its SHA-256 is"):
            wl.load_checkpoint(path, verify=True)

    def test_one_flipped_bit(self, torch_file: Path, tmp_path: Path) -> None:
        begin = indexed_files(wl.open_checkpoint(torch_file))[0].range(0)[0]
        data = bytearray(torch_file.read_bytes())
        data[begin] ^= 1
        torch_file.write_bytes(data)
        done = command("verify", torch_file)  # by the archive's own checksum
        assert done.returncode == 1
        assert "CRC-32" in done.stdout

        path = tmp_path / "model.safetensors"
        safetensors.torch.save_file({"w": torch.ones(100)}, path)
        self._sums(tmp_path, path)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        done = command("verify", tmp_path / "model.safetensors")
        assert done.returncode == 1
        assert "DAMAGED" in done.stdout
        with pytest.raises(wl.FormatError) as raised:
            wl.load_checkpoint(path, verify=True)
        assert raised.value.code == "hash_mismatch"

    def test_damaged_meanwhile(self, torch_file: Path) -> None:
        ((path, identity),) = wl.open_checkpoint(torch_file).files
        torch_file.write_bytes(torch_file.read_bytes()[:-10])
        said, wrong, _ = _check(path, identity)
        assert said.startswith("DAMAGED: ")
        assert wrong

    def test_archives_and_pipelines(self, dduf: Path) -> None:
        for path in (dduf, dduf.with_suffix("")):
            done = command("verify", path)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "[unet]" in done.stdout
        broken = dduf.read_bytes()[:-10]
        dduf.write_bytes(broken)
        assert command("verify", dduf).returncode == 1

    def test_verify_while_loading_shards(self, tmp_path: Path) -> None:
        model = torch.nn.ModuleList([torch.nn.Linear(20, 20) for _ in range(4)])
        huggingface_hub.save_torch_state_dict(
            dict(model.state_dict()), tmp_path, max_shard_size=1800
        )
        shards = sorted(tmp_path.glob("*.safetensors"))
        assert len(shards) > 1
        with pytest.raises(wl.CheckpointError, match="SHA256SUMS"):
            wl.load_checkpoint(tmp_path, verify=True)
        self._sums(tmp_path, *shards)
        loaded = wl.load_checkpoint(tmp_path, verify=True, dtype=torch.bfloat16)
        assert set(loaded) == set(model.state_dict())
        data = bytearray(shards[-1].read_bytes())
        data[-3] ^= 4
        shards[-1].write_bytes(data)
        with pytest.raises(wl.FormatError) as raised:
            wl.load_checkpoint(tmp_path, verify=True)
        assert raised.value.path == str(shards[-1])
