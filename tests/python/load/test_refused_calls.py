"""Loads and saves work without the calls that a sandbox refuses, with the same bytes."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file as reference_load_file

import seccomp
import weightlift as wl
from support import bits, in_child
from weightlift.convert import convert_checkpoint
from weightlift.models.saving import save_weights

pytestmark = pytest.mark.skipif(not seccomp.NUMBERS, reason="knows no system calls of this machine")

TENSORS = {f"w.{i}": torch.arange(70_000.0) + i for i in range(4)}
ERRORS = [errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP]
NAMED = [errno.errorcode[number] for number in ERRORS]

OF_LOADS = [
    "cachestat",
    "fadvise64",
    "getrlimit",
    "madvise",
    "memfd_create",
    "mlock",
    "prlimit64",
    "readlink",
    "readlinkat",
    "sched_getaffinity",
    "statx",
]
OF_SAVES = [
    "chmod",
    "chown",
    "copy_file_range",
    "fadvise64",
    "fallocate",
    "fchmod",
    "fchmodat",
    "fchown",
    "fdatasync",
    "fsync",
    "sendfile",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file, shards and a .bin of the same tensors."""
    made = tmp_path_factory.mktemp("refused")
    wl.save_file(TENSORS, made / "f.safetensors")
    save_weights(TENSORS, made / "shards", max_shard_size=300_000)
    torch.save(TENSORS, made / "f.bin")
    return made


def equal(loaded: dict[str, torch.Tensor]) -> None:
    """Does not compute, because this is a fork."""
    if {name: bits(t) for name, t in loaded.items()} != {n: bits(t) for n, t in TENSORS.items()}:
        raise RuntimeError("other bytes")


def every_load(folder: Path) -> None:
    file = folder / "f.safetensors"
    for mode in ("map", "read", "auto"):
        equal(wl.load_file(file, mode=mode))
        equal(wl.load_file(folder / "f.bin", mode=mode))
        equal(wl.load_checkpoint(folder / "shards", mode=mode))
    for path in ("buffered", "direct"):
        wl.Settings.set_default(wl.Settings(io_path=path))
        equal(wl.load_file(file, mode="read"))
    wl.Settings.set_default(wl.Settings())
    half = wl.load_file(file, dtype="float64")
    if half["w.1"].dtype != torch.float64 or half["w.1"][1].item() != 2:
        raise RuntimeError("another cast")
    equal(wl.load(file.read_bytes()))
    for backend in ("mmap", "pread"):
        with wl.safe_open(file, backend=backend) as opened:
            equal(opened.get_tensors())
            if opened.get_slice("w.2")[5:7].tolist() != [7.0, 8.0]:
                raise RuntimeError("another slice")


@pytest.mark.parametrize("error", ERRORS, ids=NAMED)
def test_loads(folder: Path, error: int) -> None:
    def work() -> None:
        seccomp.refuse(OF_LOADS, error, leases=True, direct=True)
        every_load(folder)

    assert in_child(work) == 0


@pytest.mark.parametrize("call", [*OF_LOADS, "leases", "direct"])
def test_loads_without_one_call(folder: Path, call: str) -> None:
    """Each refused separately: another call could replace it."""

    def work() -> None:
        seccomp.refuse([call], errno.EPERM, leases=call == "leases", direct=call == "direct")
        every_load(folder)

    assert in_child(work) == 0


def no_proc() -> None:
    """An empty folder over /proc, in a mount namespace of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newns, ms_rec, ms_private = 0x20000, 0x4000, 0x40000
    done = (
        libc.unshare(clone_newns) == 0
        and libc.mount(b"none", b"/", None, ctypes.c_ulong(ms_rec | ms_private), None) == 0
        and libc.mount(b"none", b"/proc", b"tmpfs", ctypes.c_ulong(0), None) == 0
    )
    if not done:
        raise PermissionError(os.strerror(ctypes.get_errno()))


def test_loads_and_saves_without_proc(folder: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0 or in_child(no_proc) != 0:
        pytest.skip("may not mount anything over /proc here")

    def work() -> None:
        no_proc()
        if Path("/proc/self").exists():
            raise RuntimeError("/proc is there")
        every_load(folder)
        wl.save_file(TENSORS, tmp_path / "f")
        wl.save_checkpoint(TENSORS, tmp_path / "shards", max_shard_size=300_000)

    assert in_child(work) == 0
    assert_saved(tmp_path)


def assert_saved(folder: Path) -> None:
    files = [folder / "f", *sorted((folder / "shards").glob("*.safetensors"))]
    assert len(files) > 2
    equal(reference_load_file(files[0]))
    equal({k: v for file in files[1:] for k, v in reference_load_file(file).items()})
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("error", ERRORS, ids=NAMED)
@pytest.mark.parametrize("over", [False, True], ids=["new", "over old ones"])
def test_saves(tmp_path: Path, error: int, over: bool) -> None:
    def save() -> None:
        wl.save_file(TENSORS, tmp_path / "f")
        wl.save_checkpoint(TENSORS, tmp_path / "shards", max_shard_size=300_000)
        save_weights(TENSORS, tmp_path / "bin", max_shard_size=10**9, safe_serialization=False)

    def work() -> None:
        seccomp.refuse(OF_SAVES, error)
        save()

    if over:
        save()
    assert in_child(work) == 0
    assert_saved(tmp_path)
    equal(torch.load(next((tmp_path / "bin").glob("*.bin")), weights_only=True))


RENAMES = ["rename", "renameat", "renameat2"]
NO_RENAME = [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL, errno.EXDEV]


@pytest.mark.parametrize("error", NO_RENAME, ids=[errno.errorcode[number] for number in NO_RENAME])
def test_saves_where_nothing_can_be_renamed(tmp_path: Path, error: int) -> None:
    """A new file is copied to its place; an existing one is not replaced."""

    def refused(save: Callable[[], object], expected: str | None = None) -> Callable[[], None]:
        def work() -> None:
            os.umask(0o027)
            seccomp.refuse([*RENAMES, *OF_SAVES], error)
            try:
                save()
            except OSError as found:
                if expected is None or str(found.filename) != expected:
                    raise
            else:
                if expected is not None:
                    raise RuntimeError("no error")

        return work

    source = tmp_path / "source.bin"
    torch.save(TENSORS, source)

    def save() -> None:
        wl.save_file(TENSORS, tmp_path / "f")
        wl.save_checkpoint(TENSORS, tmp_path / "shards", max_shard_size=300_000)
        convert_checkpoint(wl.open_checkpoint(source), tmp_path / "new", max_shard_size=300_000)

    assert in_child(refused(save)) == 0
    assert_saved(tmp_path)
    equal(wl.load_checkpoint(tmp_path / "new"))
    before = (tmp_path / "f").read_bytes()
    other = {"w": torch.ones(3)}
    target = str(tmp_path / "f")
    assert in_child(refused(lambda: wl.save_file(other, tmp_path / "f"), target)) == 0
    assert (tmp_path / "f").read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_copied_file_has_the_mode_of_a_renamed_one(tmp_path: Path) -> None:
    def work() -> None:
        os.umask(0o027)
        seccomp.refuse(RENAMES, errno.EPERM)
        wl.save_file(TENSORS, tmp_path / "f")

    assert in_child(work) == 0
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640
