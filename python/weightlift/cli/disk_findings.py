"""``weightlift doctor``: the disk."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightlift.cli.findings import Finding, format_rate, no_torch
from weightlift.core.report import format_bytes
from weightlift.core.settings import IoPath

__all__ = ["probe_disk"]

_MB = 10**6
_DIRECT_UNIT = 1 << 20
# /proc/self/mountinfo's names of file systems whose bytes come over a network.
_NETWORK = ("nfs", "cifs", "smb", "lustre", "ceph", "gpfs", "beegfs", "9p", "fuse")


def probe_disk(folder: Path, count: int) -> list[Finding]:
    """Measures how fast each I/O path of the engine reads a file of ``count`` bytes."""
    kind, device = _file_system(folder)
    network = kind.startswith(_NETWORK)
    findings = [
        Finding(
            "disk",
            "file system",
            "info" if network else "ok",
            f"{folder}: {kind} on {device}",
            "its bytes come over a network or through a user process" if network else "",
            "keep checkpoints that are loaded often on a local disk" if network else "",
        )
    ]
    try:
        import torch  # noqa: F401 - load_file needs it
    except ImportError:
        return [*findings, no_torch("disk", "read rates")]
    free = os.statvfs(folder)
    if free.f_bavail * free.f_frsize < 2 * count:
        return [
            *findings,
            Finding(
                "disk",
                "read rates",
                "missing",
                f"not measured: less than {format_bytes(2 * count)} free",
                "the rates are unknown",
                "free some space, or give a smaller --disk-mb",
            ),
        ]
    try:
        descriptor, name = tempfile.mkstemp(
            prefix=".weightlift-doctor-", suffix=".safetensors", dir=folder
        )
    except OSError as error:
        return [
            *findings,
            Finding(
                "disk",
                "read rates",
                "missing",
                f"not measured: {error.strerror}",
                "the rates are unknown",
                "give a writable folder with --disk",
            ),
        ]
    try:
        with os.fdopen(descriptor, "wb") as file:
            _write_checkpoint(file.write, count)
            file.flush()
            os.fsync(file.fileno())
        return findings + _read_rates(name, count)
    finally:
        Path(name).unlink()


def _write_checkpoint(write: Callable[[bytes], Any], count: int) -> None:
    """Writes a .safetensors file of random bytes, which no file system can compress."""
    tensors = max(1, count // (16 * _MB))
    size = count // tensors
    entries = {
        str(n): {"dtype": "U8", "shape": [size], "data_offsets": [n * size, (n + 1) * size]}
        for n in range(tensors)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    write(len(header).to_bytes(8, "little") + header)
    for _ in range(tensors):
        write(os.urandom(size))


def _read_rates(name: str, count: int) -> list[Finding]:
    from weightlift.bench.conditions import page_cache, prepare_files

    prepare_files([name], cold=True)
    left = page_cache(name)
    # tmpfs, and file systems without a page cache of their own, keep what is dropped.
    droppable = left is None or left < count // 10
    warm = statistics.median(_load_rate(name, "auto", cold=False) for _ in range(3))
    findings = []
    if droppable:
        buffered = statistics.median(_load_rate(name, "buffered", cold=True) for _ in range(3))
        unsure = "" if left is not None else "; the kernel does not tell whether it was cold"
        text = f"{format_rate(buffered)} through the page cache{unsure}"
        findings.append(Finding("disk", "cold, buffered", "info", text, value=buffered))
    refusal = _direct_refusal(name)
    if refusal is None and droppable:
        direct = statistics.median(_load_rate(name, "direct", cold=True) for _ in range(3))
        text = f"{format_rate(direct)} by O_DIRECT"
        findings.append(Finding("disk", "cold, direct", "ok", text, value=direct))
    elif refusal is not None:
        findings.append(
            Finding(
                "disk",
                "cold, direct",
                "missing",
                f"no direct I/O: {refusal}",
                "files larger than the free memory push everything else out of the page cache",
                "keep such files on ext4 or xfs",
            )
        )
    if not droppable:
        text = "the files are always in memory, so there is no cold rate"
        findings.append(Finding("disk", "cold", "ok", text))
    text = f"{format_rate(warm)} from the page cache into own memory"
    findings.append(Finding("disk", "page cache", "info", text, value=warm))
    if left is None:
        findings.append(
            Finding(
                "disk",
                "residency",
                "missing",
                "the kernel cannot tell what is in the page cache",
                "weightlift may choose the wrong I/O path for a file",
                "Linux 6.5 has cachestat; some sandboxes forbid it",
            )
        )
    return findings


def _load_rate(name: str, io_path: IoPath, cold: bool) -> float:
    """The rate of ``load_file`` into own memory, in bytes/s."""
    from weightlift.bench.conditions import prepare_files
    from weightlift.bench.measure_child import backed_memory
    from weightlift.core.settings import Settings
    from weightlift.load_file import load_file

    # Backed memory: the cost of a first touch in a virtual machine is measured elsewhere.
    with backed_memory(Path(name).stat().st_size + 64 * _MB):
        prepare_files([name], cold)
    with Settings(io_path=io_path):
        start = time.perf_counter()
        tensors = load_file(name, mode="read")
        seconds = time.perf_counter() - start
    return sum(tensor.nbytes for tensor in tensors.values()) / seconds


def _direct_refusal(name: str) -> str | None:
    """Why the file cannot be read with O_DIRECT, or ``None`` if it can."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, _DIRECT_UNIT) as buffer:  # page-aligned
                os.preadv(descriptor, [buffer], 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"{errno.errorcode.get(error.errno or 0, '?')}, {error.strerror}"
    return None


def _file_system(folder: Path) -> tuple[str, str]:
    """The type and source of the mount of ``folder``; proc(5), mountinfo."""
    place = folder.resolve()
    best = ("unknown", "unknown")
    depth = -1
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            before, _, after = line.partition(" - ")
            point = Path(before.split()[4].replace("\\040", " "))
            if point in (place, *place.parents) and len(point.parts) >= depth:
                kind, source = after.split()[:2]
                best, depth = (kind, source), len(point.parts)
    return best
