"""The same bytes from every file system, and a report that says how they were read."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file as reference_load_file

import fuse_server
import weightlift as wl
from support import Entry, assert_same_tensors, entry, file_bytes

ENTRIES: dict[str, Entry] = {
    "a": entry("F32", [300, 1001], 1),
    "b": entry("BF16", [77, 513], 2),
    "c": entry("U8", [4097], 3),
}
CONTENT = file_bytes(ENTRIES, None, 3)


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        # Skips only if the machine does not allow the test.
        pytest.skip(f"{command[0]}: {done.stderr.strip()}")


@contextlib.contextmanager
def _mounted(folder: Path, *arguments: str | Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    _run("mount", *arguments, folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def _loop(base: Path, kind: str) -> Iterator[Path]:
    """A new file system in a file."""
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"mkfs.{kind} is not installed")
    image = base / "image"
    with image.open("wb") as file:
        file.truncate(512 << 20)
    _run(f"mkfs.{kind}", "-q", image)
    with _mounted(base / "mount", "-t", kind, "-o", "loop", image) as folder:
        yield folder


@contextlib.contextmanager
def _place(base: Path, kind: str) -> Iterator[Path]:
    """The file on a file system of this kind."""
    source = base / "model.safetensors"
    source.write_bytes(CONTENT)
    with contextlib.ExitStack() as stack:
        if kind in ("tmpfs", "ramfs"):
            folder = stack.enter_context(_mounted(base / "mount", "-t", kind, kind))
        elif kind in ("ext4", "xfs"):
            folder = stack.enter_context(_loop(base, kind))
        elif kind == "overlay":
            for name in ("lower", "upper", "work", "over"):
                (base / name).mkdir()
            source.rename(base / "lower" / source.name)
            layers = ",".join(f"{name}dir={base / name}" for name in ("lower", "upper", "work"))
            over = _mounted(base / "over", "-t", "overlay", "-o", layers, "overlay")
            yield stack.enter_context(over) / source.name
            return
        elif kind == "read-only":
            (base / "there").mkdir()
            source.rename(base / "there" / source.name)
            folder = stack.enter_context(_mounted(base / "mount", "--bind", base / "there"))
            _run("mount", "-o", "remount,bind,ro", folder)
            yield folder / source.name
            return
        else:
            (base / "mount").mkdir()
            try:
                direct = kind == "FUSE, direct I/O"
                opened = fuse_server.mounted(base / "mount", source, direct=direct)
                yield stack.enter_context(opened)
            except PermissionError as error:
                pytest.skip(f"no FUSE here: {error}")
            return
        shutil.copy(source, folder)
        with (folder / source.name).open("rb+") as file:
            os.fsync(file.fileno())
        yield folder / source.name


KINDS = ["ext4", "xfs", "tmpfs", "ramfs", "overlay", "read-only", "FUSE", "FUSE, direct I/O"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount file systems")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes(tmp_path: Path, kind: str) -> None:
    expected_path = tmp_path / "expected.safetensors"
    expected_path.write_bytes(CONTENT)
    expected = reference_load_file(expected_path)
    ways = {"mapped", "page cache", "buffered", "direct"}
    with _place(tmp_path, kind) as path:
        for cold in (True, False):
            for io_path in ("auto", "buffered", "direct"):
                for mode in ("auto", "map", "read"):
                    if cold:
                        descriptor = os.open(path, os.O_RDONLY)
                        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                        os.close(descriptor)
                    with wl.Settings(io_path=io_path):
                        loaded = wl.load_file(path, mode=mode)
                    assert_same_tensors(loaded, expected)
                    del loaded  # or the file system stays busy
                    report = wl.last_report()
                    assert report is not None
                    (file,) = report.files
                    assert file.path == str(path)
                    assert file.reason
                    assert file.io in ways
                    assert (file.io == "mapped") == (mode != "read")
                    if mode == "read" and io_path == "direct" and file.io != "direct":
                        assert any("direct" in text for text in report.fallbacks), report
                    # It has none (open(2), EINVAL), whatever the kernel.
                    assert (kind, file.io) != ("ramfs", "direct")
        cast = wl.load_file(path, dtype="float16")
        assert torch.equal(cast["b"].nan_to_num(), expected["b"].to(torch.float16).nan_to_num())
        with wl.safe_open(path) as opened:
            assert torch.equal(opened.get_slice("c")[5:-3], expected["c"][5:-3])


def test_a_symlinked_hub_cache(tmp_path: Path) -> None:
    """Snapshots link to blobs, and the cache itself is a link: the given name counts."""
    blob = tmp_path / "disk" / "models--a--b" / "blobs" / ("0" * 64)
    snapshot = tmp_path / "disk" / "models--a--b" / "snapshots" / "main"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    blob.write_bytes(CONTENT)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    (tmp_path / "cache").symlink_to("disk")
    given = tmp_path / "cache" / "models--a--b" / "snapshots" / "main"
    expected = reference_load_file(given / "model.safetensors")
    for load in (
        lambda: wl.load_file(given / "model.safetensors"),
        lambda: wl.load_file(given / "model.safetensors", mode="read"),
        lambda: wl.load_checkpoint(given),
    ):
        assert_same_tensors(load(), expected)
        report = wl.last_report()
        assert report is not None
        assert report.files[0].path == str(given / "model.safetensors")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount file systems")
def test_a_save_to_a_full_disk(tmp_path: Path) -> None:
    big = {"w": torch.ones(1 << 20)}
    small = {"w": torch.zeros(1000)}
    with _mounted(tmp_path / "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as folder:
        wl.save_file(small, folder / "f")
        with pytest.raises(Exception, match="No space left"):
            wl.save_file(big, folder / "f")
        assert [path.name for path in folder.iterdir()] == ["f"]
        assert_same_tensors(reference_load_file(folder / "f"), small)
        wl.save_file(small, folder / "g")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount file systems")
def test_a_save_to_a_read_only_disk(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with _mounted(tmp_path / "mount", "--bind", tmp_path / "there") as folder:
        _run("mount", "-o", "remount,bind,ro", folder)
        with pytest.raises(Exception, match="Read-only file system"):
            wl.save_file({"w": torch.ones(3)}, folder / "f")
    assert list((tmp_path / "there").iterdir()) == []
