"""``weightlift doctor``: what this machine gives to a load, and what would make it faster."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import json
import mmap
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightlift import _native
from weightlift.report import format_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["Finding", "doctor"]

_MB = 10**6
_COPY_BYTES = 256 * _MB
_FAULT_BYTES = 128 << 20
_PINNED_BYTES = 256 * _MB
_DIRECT_UNIT = 1 << 20
# No compiled kernel is as small; a placeholder is.
_SMALLEST_IMAGE = 256
_MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h; the mmap module does not name it
# /proc/self/mountinfo's names of file systems whose bytes come over a network.
_NETWORK = ("nfs", "cifs", "smb", "lustre", "ceph", "gpfs", "beegfs", "9p", "fuse")


@dataclasses.dataclass
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: such as ``"disk"``.
        name: what of it.
        state: ``"ok"``; ``"missing"``, where something that would help is not there; ``"info"``.
        found: in words.
        costs: what is lost without it.
        remedy: what to do.
        value: the figure, in bytes or bytes a second, where it is one.
    """

    topic: str
    name: str
    state: str
    found: str
    costs: str = ""
    remedy: str = ""
    value: float | None = None


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    disk: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            exists=True,
            help="Measure the disk of this folder, or of this file's folder; by default that of "
            "the Hub cache, or of the current folder where there is none.",
        ),
    ] = None,
    disk_mb: Annotated[
        int, typer.Option(min=1, max=16_384, help="Size of the temporary file, in MB.")
    ] = 256,
) -> None:
    """Look at what loads depend on: CPU, memory, disk and GPU; say what is missing and costs time.

    Takes a few seconds; writes one temporary file beside what --disk names and removes it.
    """
    from rich.console import Console

    folder = _folder(disk)
    findings: list[Finding] = []
    with Console(stderr=True).status("looking around") as status:
        for title, look in (
            ("looking at the CPU and the memory", look_at_host),
            ("measuring the memory", look_at_memory),
            (
                f"measuring the disk of {folder} with {disk_mb} MB",
                lambda: look_at_disk(folder, disk_mb * _MB),
            ),
            ("looking for a GPU", look_at_gpu),
        ):
            status.update(title)
            findings += look()
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        _show(findings)


def _folder(disk: Path | None) -> Path:
    if disk is not None:
        return disk if disk.is_dir() else disk.absolute().parent
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    hub = Path(cache or f"{home}/hub").expanduser()
    return hub if os.access(hub, os.W_OK) else Path.cwd()


def _rate(value: float) -> str:
    return f"{value / 1e9:.1f} GB/s" if value >= 1e9 else f"{value / 1e6:.0f} MB/s"


# The host ---------------------------------------------------------------------------------------


def look_at_host() -> list[Finding]:
    """CPU, memory and the cgroup's limit on it."""
    from weightlift.cli.measure import cpu_model

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
    """The smallest memory limit on the way up from this process's cgroup, version 2 or 1."""
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


# Memory -----------------------------------------------------------------------------------------


def look_at_memory() -> list[Finding]:
    """Huge pages, with what they save here, and the rate of copies."""
    from weightlift.cli.measure import huge_pages
    from weightlift.cli.measure_child import back_memory

    # As in _load_rate.
    back_memory(2 * _COPY_BYTES + 2 * _FAULT_BYTES)
    state = huge_pages()
    small = statistics.median(_fault_rate(mmap.MADV_NOHUGEPAGE) for _ in range(3))
    if state in ("always", "madvise"):
        huge = statistics.median(_fault_rate(mmap.MADV_HUGEPAGE) for _ in range(3))
        pages = Finding(
            "memory",
            "huge pages",
            "ok",
            f"{state}; new memory comes at {_rate(huge)}, on small pages at {_rate(small)}",
            value=huge,
        )
    else:
        pages = Finding(
            "memory",
            "huge pages",
            "missing",
            f"{state or 'not in this kernel'}; new memory comes at {_rate(small)}",
            "casts and reads into own memory, and pinning, take a page fault every 4 KiB",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
            small,
        )
    threads = _native.machine()["cpus"]
    copy = _copy_rate(threads)
    return [
        pages,
        Finding(
            "memory",
            "copy",
            "info",
            f"{_rate(copy)} with {threads} threads: no load that copies is faster than this",
            value=copy,
        ),
    ]


def _anonymous(count: int, advice: int) -> mmap.mmap:
    memory = mmap.mmap(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(advice)
    return memory


def _fault_rate(advice: int) -> float:
    """Bytes a second of memory touched for the first time, by one thread."""
    with _anonymous(_FAULT_BYTES, advice) as memory:
        start = time.perf_counter()
        try:
            memory.madvise(_MADV_POPULATE_WRITE)
        except OSError:  # before Linux 5.14
            for place in range(0, _FAULT_BYTES, mmap.PAGESIZE):
                memory[place] = 1
        return _FAULT_BYTES / (time.perf_counter() - start)


def _copy_rate(threads: int) -> float:
    """Bytes a second copied from memory to memory, by all threads; the best of five."""
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
        del views  # a mapping that is pointed to cannot be closed
    return max(rates)


# The disk ---------------------------------------------------------------------------------------


def look_at_disk(folder: Path, count: int) -> list[Finding]:
    """How fast a file of ``count`` bytes in ``folder`` comes in, by the engine's ways to read."""
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
        return [*findings, _no_torch("disk", "read rates")]
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
                "free some space, or take a smaller --disk-mb",
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
                "name a folder that you may write to with --disk",
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
    """A .safetensors file of random bytes, which no file system can compress."""
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
    from weightlift.cli.measure import page_cache, prepare_files

    prepare_files([name], cold=True)
    left = page_cache(name)
    # tmpfs, and file systems without a page cache of their own, keep what is dropped.
    droppable = left is None or left < count // 10
    warm = statistics.median(_load_rate(name, "auto", cold=False) for _ in range(3))
    findings = []
    if droppable:
        buffered = statistics.median(_load_rate(name, "buffered", cold=True) for _ in range(3))
        seen = "" if left is not None else "; the kernel does not tell whether it was cold"
        findings.append(
            Finding(
                "disk",
                "cold, buffered",
                "info",
                f"{_rate(buffered)} through the page cache{seen}",
                value=buffered,
            )
        )
    refusal = _direct_refusal(name)
    if refusal is None and droppable:
        direct = statistics.median(_load_rate(name, "direct", cold=True) for _ in range(3))
        findings.append(
            Finding("disk", "cold, direct", "ok", f"{_rate(direct)} by O_DIRECT", value=direct)
        )
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
        findings.append(
            Finding("disk", "cold", "ok", "the files are in memory always; there is no cold")
        )
    findings.append(
        Finding(
            "disk",
            "page cache",
            "info",
            f"{_rate(warm)} from the page cache into own memory",
            value=warm,
        )
    )
    if left is None:
        findings.append(
            Finding(
                "disk",
                "residency",
                "missing",
                "the kernel cannot tell what is in the page cache",
                "weightlift takes files for cold that are not, or the other way round",
                "Linux 6.5 has cachestat; some sandboxes forbid it",
            )
        )
    return findings


def _load_rate(name: str, io_path: str, cold: bool) -> float:
    """Bytes a second of ``load_file`` into own memory."""
    import weightlift
    from weightlift.cli.measure import prepare_files
    from weightlift.cli.measure_child import back_memory

    # What the host of a virtual machine charges for a first touch is not what is measured here.
    back_memory(Path(name).stat().st_size + 64 * _MB)
    prepare_files([name], cold)
    with weightlift.Settings(io_path=io_path):
        start = time.perf_counter()
        tensors = weightlift.load_file(name, mode="read")
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
    """The type and the source of what is mounted where ``folder`` is; proc(5), mountinfo."""
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


# The GPU ----------------------------------------------------------------------------------------


def look_at_gpu() -> list[Finding]:
    """torch, the driver, its devices, the kernels in this build, and the rate of pinned copies."""
    image = _native.machine()["kernel_image_bytes"]
    without = "this build has none"
    if 0 < image < _SMALLEST_IMAGE:
        image, without = 0, "this is a test build: its kernels are the simulated driver's"
    kernels = Finding(
        "gpu",
        "kernels",
        "ok" if image else "missing",
        f"{format_bytes(image)} in this build" if image else without,
        "" if image else "many small tensors take a copy each, and casts run on the host",
        "" if image else "install a release wheel, or build with nvcc on the PATH",
        image,
    )
    try:
        import torch
    except ImportError:
        return [_no_torch("gpu", "torch"), kernels]
    findings = [Finding("gpu", "torch", "ok", f"{torch.__version__}")]
    if not torch.cuda.is_available():
        found, remedy = _why_no_cuda(torch.version.cuda)
        findings.append(
            Finding("gpu", "driver", "missing", found, "loads go to the CPU only", remedy)
        )
        return [*findings, kernels]
    # torch first, or it would not notice a fork.
    torch.empty(0, device="cuda")
    driver = _native.driver_report()
    major, minor = driver["version"] // 1000, driver["version"] % 1000 // 10
    findings.append(
        Finding("gpu", "driver", "ok", f"{driver['library']}, for CUDA {major}.{minor}")
    )
    findings.append(
        Finding("gpu", "batch copies", "ok", "cuMemcpyBatchAsync")
        if driver["batch_copies"]
        else Finding(
            "gpu",
            "batch copies",
            "missing",
            "no cuMemcpyBatchAsync",
            "many small tensors take a call each where the kernels cannot run",
            "a driver for CUDA 12.8 or later",
        )
    )
    for ordinal, (name, refusal) in enumerate(driver["devices"]):
        rate = _pinned_rate(torch.device("cuda", ordinal))
        findings.append(
            Finding(
                "gpu",
                f"cuda:{ordinal}",
                "ok",
                f"{name}; {_rate(rate)} from pinned memory: no load is faster than this",
                value=rate,
            )
        )
        if image and refusal:
            findings.append(
                Finding(
                    "gpu",
                    f"cuda:{ordinal} kernels",
                    "missing",
                    f"refused: {refusal}",
                    "many small tensors take a copy each, and casts run on the host",
                    "a wheel that was built for this GPU",
                )
            )
    return [*findings, kernels]


def _no_torch(topic: str, name: str) -> Finding:
    return Finding(
        topic,
        name,
        "missing",
        "torch is not installed",
        "nothing can be loaded",
        "pip install torch",
    )


def _why_no_cuda(built_for: str | None) -> tuple[str, str]:
    """Why torch sees no GPU, and what to do; without starting CUDA."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if built_for is None:
        text = "this torch is built without CUDA"
        if not Path("/proc/driver/nvidia/version").exists():
            return f"{text}, and no NVIDIA driver is loaded", "nothing, if there is no GPU"
        return text, "install a torch for CUDA, from pytorch.org"
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides all GPUs", "unset CUDA_VISIBLE_DEVICES"
    if not Path("/proc/driver/nvidia/version").exists():
        return "no NVIDIA driver is loaded", "install the driver, if there is a GPU"
    if not Path("/dev/nvidiactl").exists():
        return (
            "the driver is loaded, but /dev/nvidiactl is not there",
            "give the container the GPUs: docker run --gpus all",
        )
    return (
        f"torch, built for CUDA {built_for}, cannot use the driver",
        "look at what nvidia-smi and torch.cuda.init() say: an old driver, most often",
    )


def _pinned_rate(device: torch.device) -> float:
    """Bytes a second from pinned memory to the device; the best of five."""
    import torch

    source = torch.empty(_PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_PINNED_BYTES, dtype=torch.uint8, device=device)
    rates = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        rates.append(_PINNED_BYTES / (time.perf_counter() - start))
    return max(rates)


# Output -----------------------------------------------------------------------------------------


def _show(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    marks = {"ok": ("OK", "green"), "missing": ("missing", "yellow"), "info": ("", "")}
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    topic = ""
    for finding in findings:
        mark, style = marks[finding.state]
        table.add_row(
            Text(finding.topic if finding.topic != topic else "", style="bold"),
            finding.name,
            Text(mark, style=style),
            Text(finding.found),
        )
        topic = finding.topic
        for label, text in (("costs", finding.costs), ("do", finding.remedy)):
            if text:
                table.add_row("", "", Text(label, style="dim"), Text(text, style="dim"))
    console = Console(highlight=False)
    console.print(table)
    lost = sum(finding.state == "missing" for finding in findings)
    console.print(
        f"\n{lost} of {len(findings)} could be better"
        if lost
        else f"\nall {len(findings)} as they should be"
    )
