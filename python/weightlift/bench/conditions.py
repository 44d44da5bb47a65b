"""The conditions of a measurement: the machine, its memory and its page cache."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import mmap
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import weightlift._native as _native
from weightlift.bench import measure_child
from weightlift.core.version import __version__

__all__ = [
    "BACKED",
    "NOT_BACKED",
    "RUN_CHILD",
    "BackedMemory",
    "cpu_model",
    "huge_pages",
    "machine",
    "new_memory_rate",
    "page_cache",
    "pipe_of",
    "prepare_files",
    "read_program",
    "resident_bytes",
    "settle",
]

# By runpy: running the path would put this folder before the standard library, and -m would import
# weightlift.
_RUN = (
    "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)
RUN_CHILD = ["-c", _RUN, measure_child.__file__]
# The state of the machine's free memory when a load begins.
BACKED = "backed"
NOT_BACKED = "not backed"
# A virtual machine reports free memory to its host after 2 s (Linux, mm/page_reporting.c), and
# large amounts in several steps.
TAKEN_SECONDS = 8.0
_PROBED_BYTES = 16 << 20
_SYS_CACHESTAT = 451  # on all architectures


def pipe_of(pipe: IO[bytes] | None) -> IO[bytes]:
    """An end of a child process's pipe.

    Raises:
        ValueError: the process was not started with ``subprocess.PIPE`` for this stream.
    """
    if pipe is None:
        raise ValueError("the child process has no pipe here: start it with subprocess.PIPE")
    return pipe


class BackedMemory:
    """``measure_child.backed_memory`` in another process: holds memory for a load until the load
    begins."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._holder: subprocess.Popen[bytes] | None = None
        self._held = 0

    def __enter__(self) -> BackedMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def hold(self) -> int:
        """Holds the wanted memory, but at most three quarters of what the machine has. Returns the
        bytes."""
        if self._holder is None:
            headroom: int = _native.machine()["memory_headroom"]
            count = min(self._wanted, headroom * 3 // 4)
            if count <= 0:
                return 0
            command = [sys.executable, *RUN_CHILD, str(count)]
            pipe = subprocess.PIPE
            self._holder = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
            )
            self._held = count if pipe_of(self._holder.stdout).readline() else 0
        return self._held

    def release(self) -> None:
        """Frees the memory and waits until it is free."""
        if self._holder is not None:
            with self._holder:  # closes its input, and waits
                self._holder = None


def new_memory_rate() -> float:
    """The rate at which new memory on huge pages arrives now, in bytes/s. It is low if a host must
    back it.

    The slowest of four blocks, because the memory that was freed last is always backed and comes
    first.
    """
    rates = []
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            start = time.perf_counter()
            stack.enter_context(measure_child.backed_memory(_PROBED_BYTES))
            rates.append(_PROBED_BYTES / (time.perf_counter() - start))
    return min(rates)


def settle(files: Iterable[str | os.PathLike[str]]) -> None:
    """Drops files from the page cache, reads them in from their beginning to their end, and touches
    each page through a mapping.

    This removes three differences between loads. Pages that were just written are in smaller folios
    than pages that were read ahead, which map several times faster. The host of a virtual machine
    may have taken pages back. If the host shadows its guest's page tables, the first process that
    maps a page pays several times as much as the next.
    """
    for file in files:
        _drop(file)
        _read_in(file)
        _touch(file)


def prepare_files(files: Sequence[str], cold: bool) -> int | None:
    """Reads the files into the page cache, or drops them from it. Returns the bytes that are in it
    then.

    Reads cached files too: the host of a virtual machine may have taken their memory without the
    kernel's knowledge, and the first reader would pay for it.
    """
    for file in files:
        if cold:
            _drop(file)
        else:
            _read_in(file)
    return resident_bytes(files)


def read_program(pid: int) -> None:
    """Reads the files that a process has mapped, such as its libraries.

    The host of a virtual machine may have taken the memory of parts that the imports did not touch,
    and a load's first calls into torch would pay for that.
    """
    found = set()
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)  # proc_pid_maps(5): the sixth is the path
        if len(fields) == 6 and fields[5].startswith("/"):
            found.add(fields[5])
    for path in found:
        with contextlib.suppress(OSError):  # deleted since, or a device
            if Path(path).is_file():
                _read_in(path)


def resident_bytes(files: Sequence[str]) -> int | None:
    found = [page_cache(file) for file in files]
    known = [count for count in found if count is not None]
    return sum(known) if len(known) == len(found) else None


def page_cache(file: str | os.PathLike[str]) -> int | None:
    """Bytes of a file that are in the page cache; ``None`` if the kernel does not say.

    By cachestat(2), of Linux 6.5; neither Python nor all C libraries have a function for it.
    """
    bounds = (ctypes.c_uint64 * 2)(0, 0)  # to the end
    counts = (ctypes.c_uint64 * 5)()
    descriptor = os.open(file, os.O_RDONLY)
    try:
        done = ctypes.CDLL(None).syscall(_SYS_CACHESTAT, descriptor, bounds, counts, 0)
        size = os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    return min(counts[0] * mmap.PAGESIZE, size) if done == 0 else None


def _drop(file: str | os.PathLike[str]) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # dirty pages are not dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _read_in(file: str | os.PathLike[str]) -> None:
    buffer = bytearray(8 << 20)
    with Path(file).open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


def _touch(file: str | os.PathLike[str]) -> None:
    with (
        Path(file).open("rb") as opened,
        contextlib.suppress(OSError, ValueError),  # a file system without mappings; an empty file
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapping,
        memoryview(mapping) as view,
        view[:: mmap.PAGESIZE] as pages,
    ):
        pages.tobytes()


def machine() -> dict[str, Any]:
    """The properties of the machine that matter for the figures."""
    native = _native.machine()
    found: dict[str, Any] = {
        "cpu": cpu_model(),
        "cpus": native["cpus"],
        "isa": native["isa"],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "huge_pages": huge_pages(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "safetensors": _version("safetensors"),
        "weightlift": _version("weightlift"),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def cpu_model() -> str:
    """The name in /proc/cpuinfo, or else the architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def huge_pages() -> str | None:
    """The state of transparent huge pages: ``always``, ``madvise`` or ``never``."""
    with contextlib.suppress(OSError, IndexError):
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
        return text.split("[")[1].split("]")[0]
    return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return __version__ if distribution == "weightlift" else None
