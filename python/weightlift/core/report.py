"""What a load did: the report of the last one, and the sums since import."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from typing import Any, NamedTuple

import weightlift._native as _native

__all__ = ["FileReport", "LoadProgress", "LoadReport", "Stats", "last_report", "stats"]

# Names of a kind that a printed report lists.
_LISTED = 5
_DISK_WEIGHTS = ", disk weights"


@dataclasses.dataclass(frozen=True)
class FileReport:
    """One file of a load.

    Attributes:
        path: as it was given.
        bytes: of tensors that came from it.
        io: ``"mapped"``, ``"page cache"``, ``"buffered"`` or ``"direct"``.
        reason: why that path was taken.
    """

    path: str
    bytes: int
    io: str
    reason: str


class LoadProgress(NamedTuple):
    """How far a load is.

    Attributes:
        done: bytes of tensors that have arrived.
        total: those in all.
    """

    done: int
    total: int


@dataclasses.dataclass
class LoadReport:
    """What a load did; prints as a short table.

    Attributes:
        bytes: tensor bytes of the checkpoint that were delivered, mapped or copied.
        mapped_bytes: of these, handed out as a mapping, without a copy.
        read_bytes: moved out of files.
        seconds: from the plan to the last byte.
        files: by file, the bytes, the I/O path and why.
        devices: by device, such as ``"cuda:0"``, the bytes.
        pinned_bytes: pinned by the process's staging pool when the load ended.
        peak_staging_bytes: staging slots that this load held at once.
        threads: that read and cast; 0 where the calling thread did it all.
        memory: of each larger block of host memory, on which pages it lies, and why.
        copies: by CUDA device, how many chunks were copied at once, by which form of batch copies,
            or by the kernel.
        fallbacks: what was done another way than the fastest, and why.
        missing_keys: the model's, that the checkpoint does not have.
        unexpected_keys: the checkpoint's, that the model does not have.
        mismatched_keys: name, the checkpoint's shape, the model's shape.
        error_msgs: what else is wrong with the model.
        meta_keys: the model's tensors that are still on ``meta``, without data.
    """

    bytes: int = 0
    mapped_bytes: int = 0
    read_bytes: int = 0
    seconds: float = 0.0
    files: list[FileReport] = dataclasses.field(default_factory=list)
    devices: dict[str, int] = dataclasses.field(default_factory=dict)
    pinned_bytes: int = 0
    peak_staging_bytes: int = 0
    threads: int = 0
    missing_keys: list[str] = dataclasses.field(default_factory=list)
    unexpected_keys: list[str] = dataclasses.field(default_factory=list)
    mismatched_keys: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = dataclasses.field(
        default_factory=list
    )
    error_msgs: list[str] = dataclasses.field(default_factory=list)
    fallbacks: list[str] = dataclasses.field(default_factory=list)
    meta_keys: list[str] = dataclasses.field(default_factory=list)
    memory: list[str] = dataclasses.field(default_factory=list)
    copies: list[str] = dataclasses.field(default_factory=list)

    def wait(self) -> LoadReport:
        """Until all of it has been loaded; itself. Only loads with ``background=True`` go on when
        their report is there.

        Raises:
            WeightliftError: the load has failed, or was cancelled.
        """
        return self

    @property
    def progress(self) -> LoadProgress:
        """How far it is."""
        return LoadProgress(self.bytes, self.bytes)

    def cancel(self) -> None:
        """Ends a load with ``background=True``: what has not arrived stays on ``meta``."""

    @classmethod
    def from_native(cls, native: dict[str, Any]) -> LoadReport:
        report = cls(**{**native, "files": [FileReport(*file) for file in native["files"]]})
        report.devices = {
            "cpu" if device < 0 else f"cuda:{device}": count for device, count in native["devices"]
        }
        return report

    def plus(self, other: LoadReport) -> LoadReport:
        """What two loads did, one after the other."""
        devices = dict(self.devices)
        for name, count in other.devices.items():
            devices[name] = devices.get(name, 0) + count
        return LoadReport(
            bytes=self.bytes + other.bytes,
            mapped_bytes=self.mapped_bytes + other.mapped_bytes,
            read_bytes=self.read_bytes + other.read_bytes,
            seconds=self.seconds + other.seconds,
            files=[*self.files, *other.files],
            devices=devices,
            pinned_bytes=max(self.pinned_bytes, other.pinned_bytes),
            peak_staging_bytes=max(self.peak_staging_bytes, other.peak_staging_bytes),
            threads=max(self.threads, other.threads),
            memory=[*self.memory, *other.memory],
            copies=[*self.copies, *other.copies],
            fallbacks=[*self.fallbacks, *other.fallbacks],
        )

    def __str__(self) -> str:
        rate = f", {self.bytes / self.seconds / 1e9:.1f} GB/s" if self.seconds > 0 else ""
        lines = [
            f"{format_bytes(self.bytes)} in {self.seconds:.3f} s{rate}: "
            f"{format_bytes(self.mapped_bytes)} mapped, {format_bytes(self.read_bytes)} read"
        ]
        if len(self.devices) > 1 or "cpu" not in self.devices:
            lines += [f"  {name:<8} {format_bytes(n):>10}" for name, n in self.devices.items()]
        for file in self.files:
            lines.append(
                f"  {format_bytes(file.bytes):>10}  {file.path}: {file.io} ({file.reason})"
            )
        if self.peak_staging_bytes:
            lines.append(
                f"  staged through {format_bytes(self.peak_staging_bytes)} of pinned memory"
            )
        lines += [f"  copies: {text}" for text in dict.fromkeys(self.copies)]
        lines += [f"  host memory: {text}" for text in dict.fromkeys(self.memory)]
        lines += [f"  fallback: {text}" for text in self.fallbacks]
        mismatched = [
            f"{name} (checkpoint {_shape(stored)}, model {_shape(own)})"
            for name, stored, own in self.mismatched_keys
        ]
        for title, names in (
            ("missing", self.missing_keys),
            ("unexpected", self.unexpected_keys),
            ("mismatched", mismatched),
            ("still on meta, without data", self.meta_keys),
        ):
            if names:
                lines.append(f"  {len(names):,} {title}: {_shortened(names)}")
        lines += [f"  {text}" for text in self.error_msgs]
        return "\n".join(lines)


@dataclasses.dataclass
class Stats:
    """Sums over all loads of this process since import.

    Attributes:
        by_caller: the same by library; what hooks read of weights on the disk, tensor by tensor, is
            by itself, as in ``"transformers, disk weights"``.
        pool_bytes: of dead tensors, kept now for later loads (``Settings.pool_bytes``).
        reused_bytes: taken out of these by loads since import.
    """

    loads: int = 0
    bytes: int = 0
    mapped_bytes: int = 0
    read_bytes: int = 0
    seconds: float = 0.0
    fallbacks: int = 0
    by_caller: dict[str, Stats] = dataclasses.field(default_factory=dict)
    pool_bytes: int = 0
    reused_bytes: int = 0

    def _add(self, native: dict[str, Any], fallbacks: int) -> None:
        self.loads += 1
        self.bytes += native["bytes"]
        self.mapped_bytes += native["mapped_bytes"]
        self.read_bytes += native["read_bytes"]
        self.seconds += native["seconds"]
        self.fallbacks += fallbacks


def _shortened(names: list[str]) -> str:
    left = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f", and {left:,} more" if left > 0 else "")


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


_thread = threading.local()
_lock = threading.Lock()
_stats = Stats()
_reasons: Counter[tuple[str, str]] = Counter()


def record(
    native: dict[str, Any],
    fallbacks: list[str] | None = None,
    caller: str = "weightlift",
    *,
    is_last: bool = True,
) -> dict[str, Any]:
    """Makes the engine's report this thread's last one and adds it to the sums.

    ``fallbacks`` are those that were decided before the engine ran. What hooks read of weights on
    the disk (``disk_reads_of``) is summed apart, and is nobody's last load. What ends long after it
    was begun, perhaps on another thread, is not that thread's (``is_last``). Returns the whole
    report.
    """
    if fallbacks:
        native["fallbacks"] = [*native["fallbacks"], *fallbacks]
    if is_last and not caller.endswith(_DISK_WEIGHTS):
        _thread.last = native
    with _lock:
        count = len(native["fallbacks"])
        _stats._add(native, count)
        _stats.by_caller.setdefault(caller, Stats())._add(native, count)
    return native


def set_last_report(report: LoadReport) -> None:
    """Makes a report that says more than the engine's this thread's last one."""
    _thread.last = report


def disk_reads_of(caller: str) -> str:
    """As whom ``stats().by_caller`` sums what hooks read, during a forward pass, of weights that a
    load of ``caller`` left on the disk: such as ``"diffusers, disk weights"``."""
    return caller + _DISK_WEIGHTS


def record_fallback(caller: str, reason: str) -> int:
    """Counts a load that the engine did not do; returns how often there was this reason."""
    with _lock:
        _stats.fallbacks += 1
        _stats.by_caller.setdefault(caller, Stats()).fallbacks += 1
        _reasons[caller, reason] += 1
        return _reasons[caller, reason]


def fallback_reasons() -> dict[tuple[str, str], int]:
    """(caller, reason) of what ``record_fallback`` counted -> how often."""
    with _lock:
        return dict(_reasons)


def last_report() -> LoadReport | None:
    """The report of this thread's last load, or ``None`` before the first."""
    last = getattr(_thread, "last", None)
    if isinstance(last, dict):  # made when asked for: loads of one tensor are short
        last = _thread.last = LoadReport.from_native(last)
    return last


def stats() -> Stats:
    """A copy of the sums since import."""
    with _lock:
        callers = {name: dataclasses.replace(sums) for name, sums in _stats.by_caller.items()}
        kept, reused = _native.memory_pool()
        return dataclasses.replace(_stats, by_caller=callers, pool_bytes=kept, reused_bytes=reused)


def format_bytes(count: float) -> str:
    """``1536`` as ``"1.5 kB"``: decimal units, as disks and links are sold."""
    if abs(count) < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if abs(count) < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"
