"""The Checkpoint object: opening, closing, requests for missing tensors."""

from __future__ import annotations

import json
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as reference_load_file
from safetensors.torch import load_model as reference_load_model
from safetensors.torch import save as reference_save
from safetensors.torch import save_file as reference_save_file
from safetensors.torch import save_model as reference_save_model

import weightlift as wl
from support import in_child, open_files

TENSORS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.ones(2)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    reference_save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_closes(path: Path) -> None:
    before = open_files()
    with wl.open_checkpoint(path) as checkpoint:
        assert len(checkpoint) == 2
        loaded = wl.load_checkpoint(checkpoint)
    assert checkpoint.closed
    assert open_files() == before
    for use in (
        lambda: checkpoint["layer.bias"],
        lambda: list(checkpoint),
        lambda: len(checkpoint),
        lambda: checkpoint.headers(),
        lambda: wl.load_checkpoint(checkpoint),
    ):
        with pytest.raises(ValueError, match="closed") as caught:
            use()
        assert isinstance(caught.value, wl.FormatError)
        assert caught.value.code == "file_closed"
    assert torch.equal(loaded["layer.bias"], TENSORS["layer.bias"])
    checkpoint.close()


def test_a_closed_safe_open_is_a_value_error(path: Path) -> None:
    with wl.safe_open(path) as file:
        pass
    with pytest.raises(ValueError, match="closed"):
        file.keys()
    other = wl.safe_open(path)
    other.close()
    with pytest.raises(wl.FileClosedError):
        other.get_tensor("layer.bias")


def test_the_former_name(path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="from_file"):
        assert set(wl.Checkpoint.of_file(path)) == set(TENSORS)
    assert set(wl.Checkpoint.from_file(path)) == set(TENSORS)


def test_a_name_with_a_typo(path: Path) -> None:
    checkpoint = wl.open_checkpoint(path)
    with pytest.raises(KeyError, match=r"'layer\.weight'"):
        checkpoint["layer.wieght"]
    with (
        wl.safe_open(path) as file,
        pytest.raises(wl.FormatError, match=r"similar are .*layer\.bias"),
    ):
        file.get_tensor("layers.bias")


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    names = {f"t{i}": f"m-{i + 1:05}-of-00150.safetensors" for i in range(150)}
    for name, file in names.items():
        reference_save_file({name: torch.full((3,), float(name[1:]))}, tmp_path / file)
    index = {"metadata": {}, "weight_map": names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    def load() -> None:
        # This many more than the test process has open.
        limit = max(map(int, os.listdir("/proc/self/fd"))) + 40  # noqa: PTH208
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        checkpoint = wl.open_checkpoint(tmp_path)
        opened = [wl.safe_open(tmp_path / file) for file in names.values()]
        for mode in ("auto", "read", "map"):
            loaded = wl.load_checkpoint(checkpoint, mode=mode)
            assert all(loaded[f"t{i}"].tolist() == [i] * 3 for i in range(150))
        cast = wl.load_checkpoint(checkpoint, dtype="float16")
        assert all(cast[f"t{i}"].tolist() == [i] * 3 for i in range(150))
        with wl.Settings(io_path="direct"):
            wl.load_checkpoint(checkpoint, mode="read")
        for i, file in enumerate(opened):
            assert file.get_tensor(f"t{i}").tolist() == [i] * 3
            assert file.get_slice(f"t{i}")[1:].tolist() == [i] * 2
        assert open_files() < limit

    assert in_child(load) == 0


@pytest.mark.parametrize("name", ["pytorch_model.bin", "m.pt", "blob"])
@pytest.mark.parametrize("zipped", [True, False])
def test_load_file_takes_every_form_that_is_one_file(
    tmp_path: Path, name: str, zipped: bool
) -> None:
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=zipped)
    loaded = wl.load_file(tmp_path / name)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in TENSORS.items())


def test_what_is_no_checkpoint_is_the_references_error(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    (tmp_path / "f.txt").write_text("some text that is no checkpoint")
    with pytest.raises(SafetensorError):
        reference_load_file(tmp_path / "f.txt")
    with pytest.raises(SafetensorError):
        wl.load_file(tmp_path / "f.txt")
    with pytest.raises(FileNotFoundError):
        wl.load_file(tmp_path / "gone.bin")
    with pytest.raises(IsADirectoryError):
        wl.load_file(tmp_path)


def test_save_and_load_of_bytes() -> None:
    data = wl.save(TENSORS, {"a": "b"})
    assert data == reference_save(TENSORS, {"a": "b"})
    loaded = wl.load(data)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in TENSORS.items())
    loaded["layer.bias"].fill_(9)  # memory of its own
    assert torch.equal(wl.load(bytearray(data))["layer.bias"], TENSORS["layer.bias"])
    assert wl.load(wl.save({})) == {}
    with pytest.raises(wl.FormatError, match="the bytes given to load"):
        wl.load(data[:-1])


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(3, 3)
        self.b = torch.nn.Linear(3, 3)
        self.b.weight = self.a.weight


Save = Callable[..., None]


@pytest.mark.parametrize("save", [wl.save_model, reference_save_model])
def test_models_with_tied_weights(tmp_path: Path, save: Save) -> None:
    model = Tied()
    save(model, str(tmp_path / "f.safetensors"))
    if save is wl.save_model:
        reference_save_model(model, str(tmp_path / "g.safetensors"))
        theirs, ours = (tmp_path / name for name in ("g.safetensors", "f.safetensors"))
        assert theirs.read_bytes() == ours.read_bytes()
        assert ours.stat().st_mode & 0o777 == 0o666 & ~_umask()
    for load in (wl.load_model, reference_load_model):
        other = Tied()
        missing, unexpected = load(other, str(tmp_path / "f.safetensors"))
        assert (set(missing), list(unexpected)) == (set(), [])
        assert torch.equal(other.b.weight, model.a.weight)
        assert other.a.weight is other.b.weight


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_model_with_other_names(tmp_path: Path) -> None:
    wl.save_file({"a.weight": torch.ones(3, 3), "c": torch.ones(1)}, tmp_path / "f.safetensors")
    model = Tied()
    with pytest.raises(RuntimeError) as theirs:
        reference_load_model(Tied(), str(tmp_path / "f.safetensors"))
    with pytest.raises(RuntimeError, match=r'Missing.*"a.bias".*\n.*Unexpected.*"c"') as ours:
        wl.load_model(model, tmp_path / "f.safetensors")
    assert str(theirs.value).splitlines()[1:] == str(ours.value).splitlines()[1:]
    missing, unexpected = wl.load_model(model, tmp_path / "f.safetensors", strict=False)
    assert (missing, unexpected) == ({"a.bias", "b.bias"}, ["c"])


@pytest.mark.parametrize("size", ["5GB", 30, "30B", "1X"])
def test_save_checkpoint(tmp_path: Path, size: int | str) -> None:
    if size == "1X":
        with pytest.raises(ValueError, match=r"max_shard_size is '1X'; write bytes"):
            wl.save_checkpoint(TENSORS, tmp_path, max_shard_size=size)
        return
    files = wl.save_checkpoint(TENSORS, tmp_path / "new", max_shard_size=size, metadata={"k": "v"})
    assert (len(files) > 1) == (size in (30, "30B"))
    loaded = wl.load_checkpoint(tmp_path / "new")
    assert all(torch.equal(loaded[key], tensor) for key, tensor in TENSORS.items())


def _set_time(path: Path) -> None:
    os.utime(path, (10**9, 10**9 + random.randrange(10**6)))


@pytest.mark.parametrize("mode", ["read", "auto"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_time_that_changes_while_no_byte_does(path: Path, mode: str, dtype: str | None) -> None:
    expected = TENSORS["layer.weight"]
    checkpoint = wl.open_checkpoint(path)
    with wl.safe_open(path) as file, wl.safe_open(path, backend="pread") as read:
        time.sleep(0.02)  # past the clock tick of its creation
        _set_time(path)
        loaded = wl.load_checkpoint(checkpoint, mode=mode, dtype=dtype)
        assert torch.equal(loaded["layer.weight"].float(), expected)
        for one in (file, read):
            _set_time(path)
            assert torch.equal(one.get_tensor("layer.weight"), expected)
            _set_time(path)
            assert torch.equal(one.get_slice("layer.weight")[1:], expected[1:])
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(3, 2)})
    _set_time(path)
    wl.load_into(model, checkpoint, strict=False)
    assert torch.equal(model["layer"].weight, expected)


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(lambda checkpoint: wl.load_checkpoint(checkpoint), id="mapped"),
        pytest.param(lambda checkpoint: wl.load_checkpoint(checkpoint, mode="read"), id="read"),
        pytest.param(lambda checkpoint: wl.load_checkpoint(checkpoint, dtype="float16"), id="cast"),
    ],
)
def test_a_file_that_is_touched_before_it_is_read(path: Path, load: Any) -> None:
    checkpoint = wl.open_checkpoint(path)
    time.sleep(0.02)
    path.touch()
    assert torch.equal(load(checkpoint)["layer.weight"].float(), TENSORS["layer.weight"])


@pytest.mark.parametrize("backend", ["mmap", "pread"])
@pytest.mark.parametrize("step", [1, 2, -1])
def test_a_file_that_is_touched_before_it_is_sliced(path: Path, backend: Any, step: int) -> None:
    with wl.safe_open(path, backend=backend) as file:
        time.sleep(0.02)
        path.touch()
        found = file.get_slice("layer.weight")[::step]
    expected = TENSORS["layer.weight"]
    assert torch.equal(found, expected.flip(0) if step < 0 else expected[::step])


@pytest.mark.parametrize(
    "line",
    [
        "{}  model.safetensors",
        "{} *model.safetensors",
        "{}  ./model.safetensors",
        "{} *././model.safetensors",
        "SHA256 (model.safetensors) = {}",
        "SHA256 (./model.safetensors) = {}",
    ],
)
def test_sums_in_all_forms(path: Path, line: str) -> None:
    import hashlib

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    other = "0" * 64 + "  other.safetensors\n"
    (path.parent / "SHA256SUMS").write_text(other + line.format(digest) + "\n")
    assert wl.load_file(path, verify=True).keys() == TENSORS.keys()
    (path.parent / "SHA256SUMS").write_text(line.format("1" * 64) + "\n")
    with pytest.raises(wl.FormatError, match="SHA-256"):
        wl.load_file(path, verify=True)
