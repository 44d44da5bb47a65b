"""Measures the machine's rates without a loader: the lower bounds of every load's time.

    python benchmarks/floors.py FILE

prints rates in bytes/s as JSON: copies from memory to memory; new memory, on huge or small pages,
whichever are faster, while the machine has it, then with a write of the program to each of its
pages, and after its host may have taken it; a file in the page cache, read into one buffer for each
thread, read into memory for the whole file, and mapped; the file from the disk with direct I/O;
pinned memory to the GPU. All threads work at once, and the best of several runs counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

THREADS = len(os.sched_getaffinity(0))
# Reads in flight that keep a disk busy. More gave no gain on the disks that were measured.
DISK_THREADS = 16
MOST = 2 * 10**9
UNIT = 1 << 20
REPEAT = 3
# Free memory is reported to the host after 2 s (Linux, mm/page_reporting.c), and here in several
# steps.
WAIT_SECONDS = 8.0
MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h; the mmap module does not name it


def measure(file: Path) -> dict[str, float]:
    """The rates, measured in a separate process, whose memory is free afterwards."""
    done = subprocess.run(
        [sys.executable, __file__, str(file)], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def memory(count: int) -> mmap.mmap:
    """Anonymous memory on huge pages, touched."""
    made = mmap.mmap(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        made.madvise(mmap.MADV_HUGEPAGE)
    ctypes.memset(address(made), 1, count)
    return made


def address(of: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_uint8.from_buffer(of))


def best_rate(count: int, threads: int, work: Callable[[int, int], None]) -> float:
    """The rate in bytes/s of ``work(begin, end)`` on parts of ``count`` bytes, one thread for each
    part."""
    part = -(-count // threads // UNIT) * UNIT
    bounds = [(n * part, min((n + 1) * part, count)) for n in range(threads) if n * part < count]
    seconds = []
    for _ in range(REPEAT):
        workers = [threading.Thread(target=work, args=bound) for bound in bounds]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds.append(time.perf_counter() - start)
    return count / min(seconds)


def copy_rate(count: int) -> float:
    source, target = memory(count), memory(count)
    from_, to = address(source), address(target)

    def copy(begin: int, end: int) -> None:
        ctypes.memmove(to + begin, from_ + begin, end - begin)

    rate = best_rate(count, THREADS, copy)
    source.close()
    target.close()
    return rate


def new_memory_rate(count: int, wait: float, written: bool = False) -> float:
    """The rate of untouched memory, ``wait`` seconds after the last memory was freed; on huge or
    small pages, whichever are faster, with all threads. The kernel clears the memory; if
    ``written``, the program writes it after that."""
    program = memory_toucher(written)
    rates = []
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_NOHUGEPAGE):
        for _ in range(1 if wait else REPEAT):
            with contextlib.closing(memory(count)):  # now the machine has it
                pass
            time.sleep(wait)
            rates.append(program(count, advice))
    return max(rates)


def memory_toucher(written: bool = False) -> Callable[[int, int], float]:
    """Returns a function of (bytes, advice) that measures bytes/s with all threads. It uses ctypes,
    which releases the GIL."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    step = (2 if written else 4) * UNIT  # what is written must still be in the cache

    def touch(count: int, advice: int) -> float:
        with contextlib.closing(mmap.mmap(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) as new:
            new.madvise(advice)
            start = address(new)

            def populate(begin: int, end: int) -> None:
                for at in range(begin, end, step):
                    libc.madvise(start + at, min(step, end - at), MADV_POPULATE_WRITE)
                    if written:
                        ctypes.memset(start + at, 1, min(step, end - at))

            part = -(-count // THREADS // (2 * UNIT)) * 2 * UNIT
            bounds = [(at, min(at + part, count)) for at in range(0, count, part)]
            workers = [threading.Thread(target=populate, args=bound) for bound in bounds]
            began = time.perf_counter()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            return count / (time.perf_counter() - began)

    return touch


def read_rate(file: Path, count: int, direct: bool, whole: bool = False) -> float:
    """Reads the file into one buffer for each thread, with ``direct`` by direct I/O; or into memory
    for the ``whole`` file."""
    descriptor = os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    target = memoryview(memory(count)) if whole else None

    def read(begin: int, end: int) -> None:
        unit = 4 * UNIT if direct or whole else UNIT  # small enough for a core's cache
        own = memoryview(memory(unit)) if target is None else target[begin:end]
        done = 0
        while done < end - begin:
            into = own[: end - begin - done] if target is None else own[done : done + unit]
            done += os.preadv(descriptor, [into], begin + done)

    try:
        return best_rate(count, DISK_THREADS if direct else THREADS, read)
    finally:
        os.close(descriptor)


def mapped_rate(file: Path, count: int) -> float:
    """Maps the file and reads a byte of each page."""
    seconds = []
    for _ in range(REPEAT):
        with file.open("rb") as opened:
            start = time.perf_counter()
            with mmap.mmap(opened.fileno(), count, access=mmap.ACCESS_COPY) as mapping:
                view = memoryview(mapping)[:: mmap.PAGESIZE]
                view.tobytes()
                seconds.append(time.perf_counter() - start)
                view.release()
    return count / min(seconds)


def pinned_rate(count: int) -> float:
    import torch

    source = torch.empty(count, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    rates = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(count / (time.perf_counter() - start))
    return max(rates)


def main() -> None:
    from weightlift.bench.conditions import settle

    file = Path(sys.argv[1])
    # A multiple of UNIT, for direct reads.
    count = min(file.stat().st_size, MOST) // (4 * UNIT) * 4 * UNIT
    found = {"memory copy": copy_rate(max(count // 2, 64 * UNIT))}
    fresh = max(count // 4 // (2 * UNIT) * 2 * UNIT, 64 * UNIT)
    found["new memory"] = new_memory_rate(fresh, 0)
    found["new memory, written"] = new_memory_rate(fresh, 0, written=True)
    found["new memory, not backed"] = new_memory_rate(fresh, WAIT_SECONDS)
    settle([file])
    found["page cache"] = read_rate(file, count, direct=False)
    found["page cache to memory"] = read_rate(file, count, direct=False, whole=True)
    found["page cache, mapped"] = mapped_rate(file, count)
    os.sync()
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    with contextlib.suppress(OSError):  # a file system without direct I/O
        found["disk, direct"] = read_rate(file, count, direct=True)
    import torch

    if torch.cuda.is_available():
        found["pinned memory to the GPU"] = pinned_rate(256 * UNIT)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
