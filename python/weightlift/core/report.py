"""The report of the last load, and the sums over all loads since import."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from typing import Any, NamedTuple

import weightlift._native as _native

__all__ = [
    "FileReport",
    "LoadProgress",
    "LoadReport",
    "Stats",
    "format_bytes",
    "format_count",
    "format_seconds",
    "last_report",
    "stats",
]

# How many names of one kind a printed report lists.
_LISTED = 5
_DISK_WEIGHTS = ", disk weights"


@dataclasses.dataclass(frozen=True)
class FileReport:
    """One file of a load.

    Attributes:
        path: the path as given.
        bytes: bytes of the tensors from this file.
        io: the I/O path, ``"mapped"``, ``"page cache"``, ``"buffered"`` or ``"direct"``.
        reason: why this I/O path was chosen.
    """

    path: str
    bytes: int
    io: str
    reason: str


class LoadProgress(NamedTuple):
    """The progress of a load.

    Attributes:
        done: bytes of the tensors that have arrived.
        total: bytes of all tensors of the load.
    """

    done: int
    total: int


@dataclasses.dataclass
class LoadReport:
    """The report of a load; prints as a short table.

    Attributes:
        bytes: tensor bytes of the checkpoint that the load delivered, mapped or copied.
        mapped_bytes: the part of ``bytes`` that is mapped, without a copy.
        read_bytes: bytes copied out of files.
        seconds: time from the plan to the last byte, in seconds.
        files: for each file its bytes, its I/O path and the reason.
        devices: bytes for each device, such as ``"cuda:0"``.
        pinned_bytes: bytes that the process's staging pool had pinned when the load ended.
        peak_staging_bytes: largest number of bytes in staging slots that this load held at once.
        threads: number of threads that read and cast; 0 if the calling thread did all the work.
        memory: for each larger block of host memory its kind of pages, and the reason.
        copies: for each CUDA device the number of chunks copied by each form of batch copy and by
            the kernel.
        fallbacks: each step that did not take the fastest way, and the reason.
        missing_keys: names that the model has and the checkpoint lacks.
        unexpected_keys: names that the checkpoint has and the model lacks.
        mismatched_keys: (name, the checkpoint's shape, the model's shape) of each tensor whose
            shapes differ.
        error_msgs: other faults of the model.
        meta_keys: names of the model's tensors that are still on ``meta``, without data.
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
        """Waits until the load has ended, and returns the report. Only a load with
        ``background=True`` still runs when the caller has its report.

        Raises:
            LoadCancelledError: the load was cancelled.
            WeightliftError: the load failed.
        """
        return self

    @property
    def progress(self) -> LoadProgress:
        """The bytes that have arrived, and those of the whole load."""
        return LoadProgress(self.bytes, self.bytes)

    def cancel(self) -> None:
        """Ends a load with ``background=True``. Tensors that have not arrived stay on ``meta``."""

    @classmethod
    def from_native(cls, native: dict[str, Any]) -> LoadReport:
        report = cls(**{**native, "files": [FileReport(*file) for file in native["files"]]})
        report.devices = {
            "cpu" if device < 0 else f"cuda:{device}": count for device, count in native["devices"]
        }
        return report

    def plus(self, other: LoadReport) -> LoadReport:
        """The sum of two reports of loads that ran one after the other."""
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
        has_rate = self.bytes > 0 and self.seconds > 0
        rate = f", {format_bytes(self.bytes / self.seconds)}/s" if has_rate else ""
        lines = [
            f"{format_bytes(self.bytes)} in {format_seconds(self.seconds)}{rate}: "
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
    """Sums over all loads of this process since import; prints as a short table.

    Attributes:
        loads: number of loads.
        bytes: tensor bytes that they delivered, mapped or copied.
        mapped_bytes: the part of ``bytes`` that is mapped, without a copy.
        read_bytes: bytes copied out of files.
        seconds: sum of the loads' times, in seconds; loads at the same time count each.
        fallbacks: number of steps that did not take the fastest way, and of loads that the library
            did.
        by_caller: the same sums for each library. Weights on the disk that hooks read tensor by
            tensor have their own entry, such as ``"transformers, disk weights"``.
        pool_bytes: bytes of deleted tensors that are kept now for later loads
            (``Settings.pool_bytes``).
        reused_bytes: bytes that loads since import took from them.
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

    def __str__(self) -> str:
        lines = [self._line("all loads"), *(s._line(f"  {n}") for n, s in self.by_caller.items())]
        if self.pool_bytes or self.reused_bytes:
            lines.append(
                f"  host memory: {format_bytes(self.pool_bytes)} kept, "
                f"{format_bytes(self.reused_bytes)} used again"
            )
        return "\n".join(lines)

    def _line(self, name: str) -> str:
        loads = "1 load" if self.loads == 1 else f"{self.loads:,} loads"
        fell = f", {self.fallbacks:,} fallback{'s' * (self.fallbacks != 1)}"
        return (
            f"{name}: {loads}, {format_bytes(self.bytes)} in {format_seconds(self.seconds)}: "
            f"{format_bytes(self.mapped_bytes)} mapped, {format_bytes(self.read_bytes)} read"
            + (fell if self.fallbacks else "")
        )

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
    """Adds the engine's report to the sums and makes it the last report of this thread.

    ``fallbacks`` were decided before the engine ran. Reads of weights on the disk by hooks
    (``disk_reads_of``) have their own sums and do not become a last report, nor do loads with
    ``is_last=False``, which may end on another thread. Returns the complete report.
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
    """Replaces this thread's last report by one with more content than the engine's."""
    _thread.last = report


def disk_reads_of(caller: str) -> str:
    """The name in ``stats().by_caller``, such as ``"diffusers, disk weights"``, for the reads by
    hooks during a forward pass of weights that a load of ``caller`` left on the disk."""
    return caller + _DISK_WEIGHTS


def record_fallback(caller: str, reason: str) -> int:
    """Counts a load that the library did instead of the engine; returns the count of this
    reason."""
    with _lock:
        _stats.fallbacks += 1
        _stats.by_caller.setdefault(caller, Stats()).fallbacks += 1
        _reasons[caller, reason] += 1
        return _reasons[caller, reason]


def fallback_reasons() -> dict[tuple[str, str], int]:
    """(caller, reason) -> how often ``record_fallback`` counted it."""
    with _lock:
        return dict(_reasons)


def last_report() -> LoadReport | None:
    """The report of this thread's last load, or ``None`` before the first."""
    last = getattr(_thread, "last", None)
    if isinstance(last, dict):  # built on demand, to keep loads of one tensor short
        last = _thread.last = LoadReport.from_native(last)
    return last


def stats() -> Stats:
    """A copy of the sums since import."""
    with _lock:
        callers = {name: dataclasses.replace(sums) for name, sums in _stats.by_caller.items()}
        kept, reused = _native.memory_pool()
        return dataclasses.replace(_stats, by_caller=callers, pool_bytes=kept, reused_bytes=reused)


def format_seconds(seconds: float) -> str:
    """``0.0012`` as ``"1.2 ms"``, what is longer than 10 ms as ``"0.012 s"``."""
    return f"{seconds:.3f} s" if seconds >= 0.01 else f"{seconds * 1e3:.2g} ms"


def format_count(count: int, one: str, more: str = "") -> str:
    """``1, "tensor"`` as ``"1 tensor"``, ``2000, "tensor"`` as ``"2,000 tensors"``."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def format_bytes(count: float) -> str:
    """``1536`` as ``"1.5 kB"``: decimal units."""
    if abs(count) < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if abs(count) < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"
