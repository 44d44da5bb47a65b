"""``weightlift doctor``: the CPU and the memory."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import statistics
import threading
import time
from pathlib import Path

import weightlift._native as _native
from weightlift.cli.findings import Finding, format_rate
from weightlift.core.report import format_bytes, format_count

__all__ = ["probe_host", "probe_memory"]

_COPY_BYTES = 256 * 10**6
_FAULT_BYTES = 128 << 20
_MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h; the mmap module does not name it


def probe_host() -> list[Finding]:
    """CPU, memory and the cgroup's memory limit."""
    from weightlift.bench.conditions import cpu_model

    machine = _native.machine()
    cpus, isa = machine["cpus"], machine["isa"]
    online = os.cpu_count() or cpus
    findings = [
        Finding("cpu", "model", "ok", cpu_model()),
        Finding(
            "cpu",
            "usable",
            "ok" if cpus > 1 else "missing",
            f"{cpus} of {online} (affinity and cgroup quota)",
            "" if cpus > 1 else "casts and copies run on one thread, below the memory's rate",
            "" if cpus > 1 else "give the container more CPUs",
            cpus,
        ),
        Finding(
            "cpu",
            "instructions",
            "missing" if isa == "baseline" else "ok",
            isa,
            "casts run several times slower" if isa == "baseline" else "",
            "run on a CPU with AVX2, or let the VM pass the host's CPU through"
            if isa == "baseline"
            else "",
        ),
        Finding(
            "memory",
            "headroom",
            "ok",
            f"{format_bytes(machine['memory_headroom'])} free or in droppable caches",
            value=machine["memory_headroom"],
        ),
    ]
    limit = _cgroup_limit()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    bounded = limit is not None and limit < total
    findings.append(
        Finding(
            "memory",
            "cgroup limit",
            "info" if bounded else "ok",
            f"{format_bytes(limit)} of {format_bytes(total)}"
            if bounded and limit is not None
            else f"none; the machine has {format_bytes(total)}",
            "files beyond the limit do not stay in the page cache" if bounded else "",
            "raise the container's memory limit above the checkpoint's size" if bounded else "",
            limit,
        )
    )
    return findings


def _cgroup_limit() -> int | None:
    """The smallest memory limit of this process's cgroup and its parents, version 2 or 1."""
    limits = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                root, name = Path("/sys/fs/cgroup"), "memory.max"
            elif "memory" in controllers.split(","):
                root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
            else:
                continue
            # In a container the path may be the host's, and the mount the container's own root.
            place = root / path.lstrip("/")
            for folder in (place, *place.parents):
                with contextlib.suppress(OSError, ValueError):
                    limits.append(int((folder / name).read_text(encoding="ascii")))
                if folder == root:
                    break
    # Version 1 writes "none" as the largest multiple of a page.
    real = [limit for limit in limits if limit < 1 << 60]
    return min(real, default=None)


def probe_memory() -> list[Finding]:
    """Huge pages, their gain on this machine, and the rate of copies."""
    from weightlift.bench.conditions import huge_pages
    from weightlift.bench.measure_child import backed_memory

    # Measured first, before the other measurements make the machine back its memory.
    with (
        _anonymous(_FAULT_BYTES, mmap.MADV_HUGEPAGE) as first,
        _anonymous(_FAULT_BYTES, mmap.MADV_NOHUGEPAGE) as second,  # of what the first has not
    ):
        as_found = _touch_rate(first), _touch_rate(second)
    # As in _load_rate.
    with backed_memory(2 * _COPY_BYTES + 2 * _FAULT_BYTES):
        pass
    state = huge_pages()
    small = statistics.median(_fault_rate(mmap.MADV_NOHUGEPAGE) for _ in range(3))
    if state in ("always", "madvise"):
        huge = statistics.median(_fault_rate(mmap.MADV_HUGEPAGE) for _ in range(3))
        pages = Finding(
            "memory",
            "huge pages",
            "ok",
            f"{state}; new memory comes at {format_rate(huge)}, on small pages at "
            f"{format_rate(small)}",
            value=huge,
        )
    else:
        pages = Finding(
            "memory",
            "huge pages",
            "missing",
            f"{state or 'not in this kernel'}; new memory comes at {format_rate(small)}",
            "casts and reads into own memory, and pinning, take a page fault every 4 KiB",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
            small,
        )
    backed = small if state not in ("always", "madvise") else max(small, huge)
    threads = _native.machine()["cpus"]
    copy = _copy_rate(threads)
    return [
        _state_of_memory(*as_found, backed),
        pages,
        Finding(
            "memory",
            "copy",
            "info",
            f"{format_rate(copy)} with {format_count(int(threads), 'thread')}: no load that copies "
            "is faster than this",
            value=copy,
        ),
    ]


def _state_of_memory(huge: float, small: float, backed: float) -> Finding:
    """Whether the machine backs its free memory: from the rates of new memory on huge and small
    pages, and of backed memory."""
    if max(huge, small) > backed / 2:
        return Finding("memory", "state", "ok", "backed: the machine has the memory that is free")
    return Finding(
        "memory",
        "state",
        "missing",
        f"not backed: new memory comes at {format_rate(huge)} on huge pages and "
        f"{format_rate(small)} on small ones, at {format_rate(backed)} once the machine has it",
        "the first load after a pause waits for its memory; weightlift takes the pages that come "
        "faster",
        "a machine without free-page reporting; or touch memory right before the load",
        max(huge, small),
    )


def _anonymous(count: int, advice: int) -> mmap.mmap:
    memory = mmap.mmap(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(advice)
    return memory


def _fault_rate(advice: int) -> float:
    """The rate of first touches of memory by one thread, in bytes/s."""
    with _anonymous(_FAULT_BYTES, advice) as memory:
        return _touch_rate(memory)


def _touch_rate(memory: mmap.mmap) -> float:
    count = len(memory)
    start = time.perf_counter()
    try:
        memory.madvise(_MADV_POPULATE_WRITE)
    except OSError:  # before Linux 5.14
        for place in range(0, count, mmap.PAGESIZE):
            memory[place] = 1
    return count / (time.perf_counter() - start)


def _copy_rate(threads: int) -> float:
    """The best of five rates of memory copies by all threads, in bytes/s."""
    with (
        _anonymous(_COPY_BYTES, mmap.MADV_HUGEPAGE) as source,
        _anonymous(_COPY_BYTES, mmap.MADV_HUGEPAGE) as target,
    ):
        views = [ctypes.c_uint8.from_buffer(memory) for memory in (source, target)]
        from_, to = (ctypes.addressof(view) for view in views)
        part = _COPY_BYTES // threads
        ctypes.memset(from_, 1, _COPY_BYTES)
        ctypes.memset(to, 1, _COPY_BYTES)

        def copy(thread: int) -> None:
            ctypes.memmove(to + thread * part, from_ + thread * part, part)

        rates = []
        for _ in range(5):
            workers = [threading.Thread(target=copy, args=(n,)) for n in range(threads)]
            start = time.perf_counter()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            rates.append(threads * part / (time.perf_counter() - start))
        del views  # a mapping with views cannot be closed
    return max(rates)
