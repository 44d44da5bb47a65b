"""Each call that the engine makes fails in turn, in one process that must survive them all.

A program for test_faults.py, which preloads tests/native/fault_shim.cc into it. It prints a line
before each group of faults, so that a crash is located, and a summary at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import simulated
import support
import weightlift as wl
from weightlift import _native
from weightlift.checkpoint.checkpoint import Checkpoint, indexed_files
from weightlift.load import load_tensors, plans
from weightlift.models.saving import save_weights

SHORT = -1
MIB = 1 << 20

# What fails, how, and whether a load must not notice.
FAULTS: list[tuple[str, int, bool]] = [
    ("open", errno.EINTR, True),
    ("open", errno.EIO, False),
    ("open", errno.ENOMEM, False),
    ("close", errno.EINTR, True),
    ("close", errno.EIO, True),
    ("fstat", errno.EIO, False),
    ("fstat", errno.ENOMEM, False),
    ("statx", errno.EINVAL, True),
    ("statx", errno.EIO, True),
    ("mmap", errno.ENOMEM, False),
    ("mmap", errno.EAGAIN, False),
    ("mmap", errno.ENODEV, False),
    ("madvise", errno.EINTR, False),
    ("madvise", errno.EAGAIN, True),
    ("madvise", errno.EINVAL, True),
    ("madvise", errno.ENOMEM, False),
    ("madvise", errno.EFAULT, False),
    ("madvise", errno.EIO, False),
    ("posix_fadvise", errno.ENOSYS, True),
    ("posix_fadvise", errno.EIO, True),
    ("pread", SHORT, True),
    ("pread", errno.EINTR, True),
    ("pread", errno.EIO, False),
    ("pread", errno.ENOMEM, False),
    ("pread", errno.EAGAIN, False),
    ("pread", errno.EINVAL, False),
    ("syscall", errno.ENOSYS, True),
    ("syscall", errno.EIO, True),
    ("sched_getaffinity", errno.EINVAL, True),
    ("pthread_create", errno.EAGAIN, False),
]


class Range(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_uint64), ("end", ctypes.c_uint64))


def _code(library: str) -> Range:
    """The address range of a library's code."""
    (line,) = (
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if " r-xp " in line and re.search(library, line)
    )
    return Range(*(int(bound, 16) for bound in line.split()[0].split("-")))


class Shim:
    """The preloaded library's controls."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._library.fault_disarm.restype = ctypes.c_int64
        self._ours = _code(r"weightlift/_native\.")
        self._standard = _code(r"libstdc\+\+\.so")

    def arm(self, function: str, n: int, error: int, anyone: bool = False) -> None:
        callers, passed_by = self._ours, self._standard
        if anyone:
            callers, passed_by = Range(0, 2**64 - 1), Range(0, 0)
        self._library.fault_arm(function.encode(), ctypes.c_int64(n), error, callers, passed_by)

    def disarm(self) -> int:
        calls: int = self._library.fault_disarm()
        return calls


Load = Callable[[Path], dict[str, bytes]]


def of(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: support.bits(tensor) for name, tensor in tensors.items()}


def drop(path: Path) -> None:
    """Drops the file from the page cache, so that it is read from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def mapped(path: Path) -> dict[str, bytes]:
    return of(wl.load_file(path, mode="map"))


def mapped_cold(path: Path) -> dict[str, bytes]:
    drop(path)
    return of(wl.load_file(path))


def read(path: Path) -> dict[str, bytes]:
    return of(wl.load_file(path, mode="read"))


def read_direct(path: Path) -> dict[str, bytes]:
    with wl.Settings(io_path="direct"):
        return of(wl.load_file(path, mode="read"))


def cast(path: Path) -> dict[str, bytes]:
    return of(wl.load_file(path, dtype="bfloat16"))


def opened(path: Path) -> dict[str, bytes]:
    with wl.safe_open(path, backend="pread") as file:
        found = {name: file.get_tensor(name) for name in ("w.0", "w.1")}
        found["slice"] = file.get_slice("w.2")[3:-5, ::7]
        return of(found)


def torch_file(path: Path) -> dict[str, bytes]:
    return of(wl.load_checkpoint(path.with_suffix(".bin"), mode="read"))


def pinned(path: Path) -> dict[str, bytes]:
    part = indexed_files(Checkpoint.from_file(path))[0]
    plan = plans.new_plan(wl.Settings.current())
    plan.read(part, None, None, 0)
    plans.run_plan(plan, None)
    tensors = plan.tensors(torch.from_dlpack)
    return of(dict(zip(part.names(), tensors, strict=True)))


class OnDevice:
    """Loads to a simulated device; ``driver`` is the machine of the moment."""

    driver: Any = None

    def __init__(self, dtype: str | None = None) -> None:
        self.dtype = dtype

    def __call__(self, path: Path) -> dict[str, bytes]:
        allocator = simulated.SimulatedAllocator(self.driver)
        loaded = load_tensors.load_tensors(
            Checkpoint.from_file(path),
            torch.device("cuda", 0),
            dtype=self.dtype,
            allocator=allocator,
        )
        return {name: tensor.bits() for name, tensor in loaded.items()}


HOST: dict[str, Load] = {
    "mapped": mapped,
    "mapped, cold": mapped_cold,
    "read": read,
    "direct": read_direct,
    "cast": cast,
    "safe_open": opened,
    "torch file": torch_file,
}
DEVICE: dict[str, Load] = {"pinned": pinned, "cuda": OnDevice(), "cuda, cast": OnDevice("BF16")}


@contextlib.contextmanager
def no_machine() -> Iterator[None]:
    yield


def switch_on(seed: int) -> Any:
    """A simulated machine, for good."""
    library = simulated.LIBRARY
    assert library is not None
    driver = simulated.simulated_driver.SimulatedDriver(library)
    driver.tensors = simulated.weakref.WeakSet()
    driver.reset(1, seed, list(simulated.Policy)[seed % len(simulated.Policy)])
    _native.use_driver_for_testing(library)
    OnDevice.driver = driver
    return driver


@contextlib.contextmanager
def machine(seed: int) -> Iterator[None]:
    """A simulated machine that must be unchanged afterwards."""
    driver = switch_on(seed)
    try:
        yield
    finally:
        gc.collect()
        for tensor in list(driver.tensors):
            tensor.free()
        _native.use_driver_for_testing("")
    driver.check()


def make(path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {f"w.{i}": torch.randn(97, 701, generator=generator) for i in range(3)}
    tensors |= {f"small.{i}": torch.randn(i, generator=generator) for i in range(20)}
    tensors["half"] = torch.randn(50_001, generator=generator).to(torch.float16)
    tensors["ids"] = torch.arange(1000)
    safetensors.torch.save_file(tensors, path)
    torch.save(tensors, path.with_suffix(".bin"))
    for file in (path, path.with_suffix(".bin")):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # dirty pages could not be dropped
        os.close(descriptor)


def mappings(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path.parent))


class Sweep:
    def __init__(self, shim: Shim, path: Path) -> None:
        self.shim = shim
        self.path = path
        self.faults = 0
        self.errors = 0
        self.wrong: list[str] = []
        self.on_device = False

    def run(self, name: str, load: Load, on_device: bool) -> None:
        self.on_device = on_device
        inside = machine if on_device else lambda _: no_machine()
        with inside(0):
            expected = load(self.path)
        for function, error, invisible in FAULTS:
            what = f"{name}: {function} {errno.errorcode.get(error, 'short')}"
            print(what, flush=True)
            n = 1
            while True:
                struck = False
                try:
                    with inside(n):
                        struck = self.one(
                            f"{what}, number {n}", load, expected, n, function, error, invisible
                        )
                except AssertionError as left:  # of the machine
                    self.wrong.append(f"{what}, number {n}: {left}")
                if not struck:
                    break
                n += 1

    def one(
        self,
        what: str,
        load: Load,
        expected: dict[str, bytes],
        n: int,
        function: str,
        error: int,
        invisible: bool,
    ) -> bool:
        files, tasks, held = support.open_files(), support.tasks(), mappings(self.path)
        self.shim.arm(function, n, error)
        try:
            found = load(self.path)
        except Exception as raised:
            calls = self.shim.disarm()
            self.errors += 1
            if calls < n:
                self.wrong.append(f"{what}: {raised!r} without a fault")
            elif invisible:
                self.wrong.append(f"{what}: seen as {raised!r}")
            elif not isinstance(raised, wl.WeightliftError):
                self.wrong.append(f"{what}: {raised!r} is not one of ours")
            elif self.path.stem not in str(raised) and not (
                self.on_device and isinstance(raised, MemoryError)  # of a slot: of no file
            ):
                self.wrong.append(f"{what}: {raised!r} does not name the file")
            del raised
        else:
            calls = self.shim.disarm()
            if found != expected:
                self.wrong.append(f"{what}: wrong bytes")
            del found
        if calls < n:
            return False
        self.faults += 1
        gc.collect()
        if support.open_files() != files:
            self.wrong.append(f"{what}: {support.open_files() - files} files stay open")
        if (left := support.tasks(tasks)) != tasks:
            self.wrong.append(f"{what}: {left - tasks} threads stay")
        if mappings(self.path) != held:
            self.wrong.append(f"{what}: the file stays mapped")
        if load(self.path) != expected:
            self.wrong.append(f"{what}: the next load is wrong")
        return True


def saved(folder: Path) -> dict[str, bytes]:
    tensors = {f"w.{i}": torch.full((70, 1000), float(i)) for i in range(4)}
    folder.mkdir()
    wl.save_file(tensors, folder / "f.safetensors", {"k": "v"})
    save_weights(tensors, folder / "shards", max_shard_size=600_000)
    save_weights(tensors, folder / "pickles", safe_serialization=False)
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    shutil.rmtree(folder)
    return found


def short_writes(folder: Path) -> None:
    """Disks and file systems may write less than requested."""
    shim = Shim()
    expected = saved(folder / "expected")
    n, calls = 0, 0
    while calls >= n:
        n += 1
        shim.arm("write", n, SHORT, anyone=True)
        found = saved(folder / str(n))
        calls = shim.disarm()
        assert found == expected, n
    print(json.dumps({"files": len(expected), "writes": calls}))


def main() -> None:
    which, folder = sys.argv[1], Path(sys.argv[2])
    if which == "writes":
        short_writes(folder)
        return
    path = folder / "faulty.safetensors"
    make(path)
    torch.set_num_threads(1)
    wl.Settings.set_default(
        wl.Settings(
            threads=2, io_depth=2, read_bytes=256 << 10, chunk_bytes=512 << 10, pinned_bytes=MIB
        )
    )
    gc.collect()
    gc.freeze()  # or each of the thousands of collections would look at all of torch
    shim = Shim()
    loads = HOST if which == "host" else DEVICE
    sweep = Sweep(shim, path)
    for load in loads.values():
        with machine(0):
            load(path)
    before = support.anonymous_bytes()
    for name, load in loads.items():
        sweep.run(name, load, which != "host")
    gc.collect()
    grown = support.anonymous_bytes() - before
    print(
        json.dumps(
            {"faults": sweep.faults, "errors": sweep.errors, "wrong": sweep.wrong, "grown": grown}
        )
    )


if __name__ == "__main__":
    main()
