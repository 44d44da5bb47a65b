from __future__ import annotations

import os
import resource
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open as reference_safe_open
from safetensors.torch import load_file as reference_load_file
from safetensors.torch import save_file as reference_save_file

import weightlift as wl
from support import (
    REFERENCE_DTYPES,
    assert_same,
    assert_same_tensors,
    entry,
    exit_code,
    file_bytes,
    forked,
    in_child,
    random_bytes,
)

MIB = 1 << 20


def of_all_dtypes() -> dict[str, torch.Tensor]:
    tensors = {}
    for number, (name, dtype) in enumerate(REFERENCE_DTYPES.items()):
        count = 12 * dtype.itemsize
        data = np.frombuffer(random_bytes(count, number, name), dtype=np.uint8).copy()
        tensors[name] = torch.from_numpy(data).view(dtype).reshape(3, 4)
    tensors["scalar"] = torch.tensor(1.5)
    tensors["empty"] = torch.empty(0, 4)
    return tensors


def test_the_reference_reads_it(tmp_path: Path) -> None:
    tensors = of_all_dtypes()
    wl.save_file(tensors, tmp_path / "f", {"a": "b"})
    loaded = reference_load_file(tmp_path / "f")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same(loaded[name], tensor)
    with reference_safe_open(tmp_path / "f", "pt") as file:
        assert file.metadata() == {"a": "b"}
    assert_same_tensors(wl.load_file(tmp_path / "f"), loaded)


def test_the_bytes_are_the_references(tmp_path: Path) -> None:
    tensors = of_all_dtypes()
    wl.save_file(tensors, tmp_path / "ours", {"k": "v"})
    reference_save_file(tensors, tmp_path / "theirs", {"k": "v"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_no_tensors(tmp_path: Path) -> None:
    wl.save_file({}, tmp_path / "f")
    assert wl.load_file(tmp_path / "f") == {}
    with wl.safe_open(tmp_path / "f") as file:
        assert file.metadata() is None


@pytest.mark.parametrize("given", [str, Path])
def test_kinds_of_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Callable[[str], str | Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "重み.safetensors", os.fsdecode(b"caf\xe9"), ".hidden"):
        wl.save_file({"w": torch.ones(3)}, given(name))
        assert wl.load_file(name)["w"].sum() == 3
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("length", [200, 255])
def test_names_as_long_as_they_may_be(tmp_path: Path, length: int) -> None:
    """The temporary name does not contain the name."""
    path = tmp_path / ("n" * length)
    reference_save_file({"w": torch.zeros(3)}, path)
    wl.save_file({"w": torch.ones(3)}, path)
    assert wl.load_file(path)["w"].sum() == 3


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000, 0o027, 0o277])
def test_mode_is_what_the_umask_allows(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        wl.save_file({"w": torch.ones(3)}, tmp_path / "f")
        (tmp_path / "other").touch()
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    saved = stat.S_IMODE((tmp_path / "f").stat().st_mode)
    assert saved == 0o666 & ~umask
    assert saved == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_saving_over_a_file_whose_mapping_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(file_bytes({"w": entry("I32", [MIB], 1)}))
    loaded = wl.load_file(path, mode="map")["w"]
    expected = loaded.clone()
    wl.save_file({"w": loaded + 1}, path)
    assert torch.equal(loaded, expected)
    assert torch.equal(wl.load_file(path)["w"], expected + 1)
    wl.save_file({"w": loaded}, path)  # its own bytes, from the old file's pages
    assert torch.equal(wl.load_file(path)["w"], expected)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"w": torch.ones(3, 4).t()}, None),
        ({"w": torch.ones(4), "v": "no tensor"}, None),
        ({5: torch.ones(4)}, None),
        ({"w": torch.ones(4)}, {"a": 5}),
        ({"w": torch.ones(4), "v": torch.ones(4, device="meta")}, None),
    ],
)
def test_what_cannot_be_saved_leaves_no_trace(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None
) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(Exception) as theirs:
        reference_save_file(tensors, tmp_path / "g", metadata)
    with pytest.raises(theirs.type):
        wl.save_file(tensors, tmp_path / "f", metadata)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


def test_shared_memory_is_refused(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    with pytest.raises(RuntimeError, match="share memory"):
        wl.save_file({"a": whole, "b": whole}, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        wl.save_file({"w": torch.ones(3)}, tmp_path)
    with pytest.raises(Exception, match="No such file"):
        wl.save_file({"w": torch.ones(3)}, tmp_path / "missing" / "f")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit like a full disk: no file may grow beyond 64 KiB."""
    (tmp_path / "f").write_bytes(b"old")
    tensors = {"w": torch.ones(MIB)}

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            wl.save_file(tensors, tmp_path / "f")
        except Exception as error:
            if "File too large" not in str(error):
                os._exit(2)
            os._exit(7)

    assert in_child(save) == 7
    assert (tmp_path / "f").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_folder_that_may_not_be_listed() -> None:
    # Not in tmp_path, whose parents are closed to others, and root may do everything.
    folder = Path(tempfile.mkdtemp())
    tensors = {"w": torch.ones(3)}

    def save() -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)
        wl.save_file(tensors, folder / "f")

    try:
        folder.chmod(0o333)
        assert in_child(save) == 0
        folder.chmod(0o755)
        assert wl.load_file(folder / "f")["w"].sum() == 3
        assert [found.name for found in folder.iterdir()] == ["f"]
    finally:
        shutil.rmtree(folder)


def test_killed_at_any_time(tmp_path: Path) -> None:
    """The old file or the new one, never a part."""
    path = tmp_path / "f"
    old = {"w": torch.zeros(4 * MIB, dtype=torch.uint8), "v": torch.zeros(100)}
    new = {"w": torch.ones(4 * MIB, dtype=torch.uint8), "v": torch.ones(100)}
    wl.save_file(old, path)

    def save() -> None:
        for _ in range(1000):
            wl.save_file(new, path)
            wl.save_file(old, path)

    seen = set()
    for turn in range(12):
        child = forked(save)
        time.sleep(0.01 + 0.007 * turn)
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL
        loaded = reference_load_file(path)
        value = int(loaded["w"][0])
        assert loaded["w"].min() == loaded["w"].max() == value
        assert loaded["v"].min() == loaded["v"].max() == value
        seen.add(value)
    assert seen <= {0, 1}


def test_flushed_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash of the machine loses neither the bytes nor the name: the file is flushed before it
    gets its name, and the folder after."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(("flush", "folder" if name == tmp_path else "file"))
        fsync(descriptor)

    def noted_replace(source: str, target: str) -> None:
        events.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    wl.save_file({"w": torch.ones(3)}, tmp_path / "f")
    assert events == [("flush", "file"), ("rename", "f"), ("flush", "folder")]
