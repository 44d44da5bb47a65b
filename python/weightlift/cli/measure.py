"""Measures loads against each other, each in a process of its own.

Every measurement is a fresh process that has imported torch and the library before the clock
starts. Contenders take turns in random order, so that what else the machine does falls on all of
them, and are compared round by round: a ratio is the median of the rounds' ratios. Before each
measurement the memory that it will need is backed by the machine (``measure_child.back_memory``),
and the files are read into the page cache or dropped from it; how much of them is in it is asked of
the kernel and reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import random
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from weightlift import _native
from weightlift.cli import measure_child
from weightlift.cli.measure_child import CONTENDERS, Job, anonymous_bytes
from weightlift.errors import WeightliftError
from weightlift.torch_file import TorchFile, open_torch_file

__all__ = [
    "CONTENDERS",
    "Comparison",
    "Job",
    "Sample",
    "compare",
    "machine",
    "page_cache",
    "target_bytes",
]

# runpy rather than the path: that would put this folder, and its inspect.py, before the standard
# library. An installed package rather than -m: that would import weightlift.
_RUN = (
    "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)
_CHILD = [sys.executable, "-c", _RUN, measure_child.__file__]
_SLACK_BYTES = 512 * 10**6
_LIMIT_SECONDS = 600.0
# Asking for the peak costs some 30 microseconds.
_POLL_SECONDS = 0.02
# Bytes of an element, by torch's names and by the file's.
_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_FLOAT_WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


class _FailedError(Exception):
    """A contender that did not come to an end; the text says why."""


@dataclasses.dataclass
class Sample:
    """One measurement.

    Attributes:
        load_seconds: the library's call.
        touch_seconds: reading one byte of every page of the result; on CUDA, synchronising.
        cpu_seconds: of all threads, over both.
        bytes: of the tensors that came out.
        peak_anon_bytes: anonymous memory at its peak, less that before the load; sampled from
            outside every 20 ms and at the end.
        resident_bytes: of the files, in the page cache before the load; ``None`` where the kernel
            cannot tell.
        backed_bytes: of memory that was made available beforehand.
        report: what weightlift reports of the load.
        forward_seconds: of a model's first forward pass; ``None`` for what is no model, or has no
            ``dummy_inputs``. On CUDA, ``peak_device_bytes`` is what torch had allocated at most.
    """

    load_seconds: float
    touch_seconds: float
    cpu_seconds: float
    tensors: int
    bytes: int
    peak_anon_bytes: int
    resident_bytes: int | None
    backed_bytes: int
    report: dict[str, Any] | None = None
    forward_seconds: float | None = None
    peak_device_bytes: int | None = None

    @property
    def seconds(self) -> float:
        return self.load_seconds + self.touch_seconds


@dataclasses.dataclass
class Comparison:
    """The same load by several contenders.

    Attributes:
        name: of the load.
        job: the load; its contender is the first one's.
        cold: whether the files were dropped from the page cache.
        samples: by contender, in the order of the rounds.
        refused: contenders that were asked for and could not, with the reason.
        file_bytes: the size of the files.
        touched: whether the touch counts; without it a comparison is of the calls alone.
    """

    name: str
    job: Job
    cold: bool
    samples: dict[str, list[Sample]]
    refused: dict[str, str]
    file_bytes: int
    touched: bool = True

    def times(self, contender: str) -> list[float]:
        """Seconds, round by round."""
        return [s.seconds if self.touched else s.load_seconds for s in self.samples[contender]]

    def median(self, contender: str) -> float:
        """Seconds."""
        return statistics.median(self.times(contender))

    def time_ratio(self, contender: str, to: str) -> float | None:
        """The median over the rounds of ``contender``'s time over ``to``'s."""
        if not self.samples.get(contender) or not self.samples.get(to):
            return None
        pairs = zip(self.times(contender), self.times(to), strict=True)
        return statistics.median(one / other for one, other in pairs)

    def rate(self, contender: str) -> float:
        """Bytes of the checkpoint a second; of the tensor, where one was asked for."""
        whole = self.file_bytes if self.job.tensor is None else self.samples[contender][0].bytes
        return whole / self.median(contender)

    def peak(self, contender: str) -> int:
        """Bytes, in the worst round."""
        return max(sample.peak_anon_bytes for sample in self.samples[contender])

    def route(self, contender: str) -> list[str]:
        """The I/O paths that weightlift reports, each with its reason, most frequent first."""
        report = self.samples[contender][-1].report
        if report is None:
            return []
        found: dict[str, int] = {}
        for file in report["files"]:
            text = f"{file['io']}: {file['reason']}" if file["reason"] else file["io"]
            found[text] = found.get(text, 0) + 1
        return [*sorted(found, key=lambda text: -found[text]), *report["fallbacks"]]

    def to_json(self) -> dict[str, Any]:
        job = dataclasses.asdict(self.job)
        job.pop("contender")
        return {
            "name": self.name,
            **job,
            "cold": self.cold,
            "touched": self.touched,
            "file_bytes": self.file_bytes,
            "contenders": {
                name: {
                    "version": CONTENDERS[name].version(),
                    "median_seconds": self.median(name),
                    "bytes_per_second": self.rate(name),
                    "peak_anon_bytes": self.peak(name),
                    "time_ratio": {
                        other: self.time_ratio(name, other)
                        for other in self.samples
                        if other != name
                    },
                    "io": self.route(name),
                    "samples": [dataclasses.asdict(sample) for sample in samples],
                }
                for name, samples in self.samples.items()
            },
            "refused": self.refused,
        }


def compare(
    name: str,
    job: Job,
    contenders: Sequence[str],
    *,
    cold: bool = False,
    repeat: int = 5,
    seed: int = 0,
    touched: bool = True,
    step: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Measures ``job`` by all ``contenders``, ``repeat`` times each.

    Args:
        name: of the comparison.
        job: the load; its own contender is ignored.
        contenders: names in ``CONTENDERS``.
        cold: drop the files from the page cache before each measurement.
        repeat: rounds.
        seed: of the order within the rounds.
        touched: whether ``Comparison`` counts the touch of all pages.
        step: called with the contender's name after each measurement, failed ones included.
    """
    refused: dict[str, str] = {}
    able: list[str] = []
    for contender in contenders:
        reason = CONTENDERS[contender].refusal(job)
        if reason is None:
            able.append(contender)
        else:
            refused[contender] = reason
            for _ in range(repeat):
                step(contender)
    samples: dict[str, list[Sample]] = {contender: [] for contender in able}
    shuffle = random.Random(seed).shuffle
    # Their imports overlap, their measurements never. On CUDA one by one: another process's
    # context takes memory and time slices.
    together = 1 if job.on_cuda else max(1, _native.machine()["cpus"])
    if able and not cold:
        # Once whatever the page cache holds: a virtual machine's host may have taken those pages
        # back, and the first to read them would pay for all.
        for file in job.files:
            _read_in(file)
    for _ in range(repeat):
        order = [contender for contender in able if contender not in refused]
        shuffle(order)
        for start in range(0, len(order), together):
            with contextlib.ExitStack() as stack:
                children = [
                    stack.enter_context(_Child(dataclasses.replace(job, contender=contender)))
                    for contender in order[start : start + together]
                ]
                for child in children:
                    child.expect_ready()
                for child in children:
                    contender = child.job.contender
                    sample = _measure(child, cold)
                    if isinstance(sample, Sample):
                        samples[contender].append(sample)
                    else:
                        refused[contender] = sample
                    step(contender)
    return Comparison(
        name=name,
        job=dataclasses.replace(job, contender=contenders[0]),
        cold=cold,
        samples={c: found for c, found in samples.items() if c not in refused},
        refused=refused,
        file_bytes=sum(Path(file).stat().st_size for file in job.files),
        touched=touched,
    )


def _measure(child: _Child, cold: bool) -> Sample | str:
    """A measurement, or why there is none."""
    try:
        return _measured(child, cold)
    except _FailedError as failure:
        return str(failure)


def _measured(child: _Child, cold: bool) -> Sample:
    job = child.job
    child.check_ready()
    backed = _back_memory(target_bytes(job, cold) + _SLACK_BYTES) if job.what == "load" else 0
    resident = prepare_files(job.files, cold)
    figures, peak = child.go()
    before, after = figures.pop("anon_before"), figures.pop("anon_after")
    return Sample(
        peak_anon_bytes=max(peak, after, before) - before,
        resident_bytes=resident,
        backed_bytes=backed,
        **figures,
    )


class _Child:
    """A measured process, from its imports to its end."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __enter__(self) -> _Child:
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [*_CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
        )
        self._lines = _lines(self._process, self._poll)
        self._peak = 0
        self._failure: _FailedError | None = None
        self._sampling = False
        self._say(json.dumps(dataclasses.asdict(self.job)))
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            _pipe(self._process.stdin).close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _pipe(self._process.stdout).close()
        self._errors.close()

    def expect_ready(self) -> None:
        """Waits until its imports are done; ``check_ready`` raises what went wrong."""
        try:
            self._line()
        except _FailedError as failure:
            self._failure = failure

    def check_ready(self) -> None:
        if self._failure is not None:
            raise self._failure

    def go(self) -> tuple[dict[str, Any], int]:
        """Lets the clock run: the figures, and the peak of the anonymous memory."""
        self._sampling = True
        self._say("go")
        figures = self._line()
        self._sampling = False
        _pipe(self._process.stdin).close()
        if self._process.wait(timeout=_LIMIT_SECONDS) != 0:
            raise _FailedError(f"ended with status {self._process.returncode}{self._last_words()}")
        return figures, self._peak

    def _say(self, line: str) -> None:
        try:
            _pipe(self._process.stdin).write(line.encode() + b"\n")
        except BrokenPipeError:
            raise _FailedError(f"ended early{self._last_words()}") from None

    def _line(self) -> dict[str, Any]:
        try:
            line: dict[str, Any] = json.loads(next(self._lines))
        except StopIteration:
            self._process.wait()
            raise _FailedError(
                f"ended with status {self._process.returncode}{self._last_words()}"
            ) from None
        except TimeoutError:
            self._process.kill()
            raise _FailedError(f"took longer than {_LIMIT_SECONDS:.0f} s") from None
        if "failed" in line:
            raise _FailedError(line["failed"])
        return line

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def _poll(self) -> None:
        if self._sampling:
            with contextlib.suppress(OSError):
                self._peak = max(self._peak, anonymous_bytes(self._process.pid))


def _lines(process: subprocess.Popen[bytes], poll: Callable[[], None]) -> Iterator[str]:
    """The JSON lines of a process's output; libraries print lines of their own between them."""
    pending = b""
    stdout = _pipe(process.stdout)
    deadline = time.monotonic() + _LIMIT_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            poll()
            if not selector.select(_POLL_SECONDS):
                continue
            data = os.read(stdout.fileno(), 1 << 16)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                if line.startswith(b"{"):
                    deadline = time.monotonic() + _LIMIT_SECONDS
                    yield line.decode()
        raise TimeoutError


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def target_bytes(job: Job, cold: bool = False) -> int:
    """About what a load takes of the machine's free memory.

    A mapping takes none for itself, but a cold file's pages come out of it; on CUDA it is the
    device's that is taken. A cast takes what its results take.
    """
    size = sum(Path(file).stat().st_size for file in job.files)
    page_cache_bytes = size if cold else 0
    if job.on_cuda or job.tensor is not None:
        return page_cache_bytes
    if job.dtype is None:
        return page_cache_bytes + (size if job.mode == "read" else 0)
    width = _WIDTHS.get(job.dtype, 1)
    total = 0
    for file in job.files:
        part: _native.IndexedFile
        if file.endswith(".safetensors"):
            part = _native.IndexedFile.open(file)
        else:
            opened = open_torch_file(file)
            if not isinstance(opened, TorchFile):
                return page_cache_bytes + size * width
            part = opened.index
        for position, dtype in enumerate(part.dtypes()):
            begin, end = part.range(position)
            own = _FLOAT_WIDTHS.get(dtype)
            total += end - begin if own is None else (end - begin) // own * width
    return page_cache_bytes + total


def _back_memory(count: int) -> int:
    """Backs ``count`` bytes, or what the machine can spare; returns how many."""
    headroom: int = _native.machine()["memory_headroom"]
    count = min(count, headroom * 3 // 4)
    if count <= 0 or subprocess.run([*_CHILD, str(count)], check=False).returncode != 0:
        return 0
    return count


def prepare_files(files: Sequence[str], cold: bool) -> int | None:
    """Reads the files into the page cache or drops them from it; the bytes that are in it then."""
    resident: int | None = 0
    for file in files:
        if cold:
            _drop(file)
        found = page_cache(file)
        if not cold and found != Path(file).stat().st_size:
            _read_in(file)
            found = page_cache(file)
        resident = None if found is None or resident is None else resident + found
    return resident


def page_cache(file: str | os.PathLike[str]) -> int | None:
    """Bytes of a file that are in the page cache; ``None`` where nobody can tell."""
    try:
        if os.fspath(file).endswith(".safetensors"):
            return _native.IndexedFile.open(os.fspath(file)).resident_bytes()
        opened = open_torch_file(file)
        return opened.index.resident_bytes() if isinstance(opened, TorchFile) else None
    except WeightliftError:
        return None  # no checkpoint


def _drop(file: str) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # pages that wait to be written are not dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _read_in(file: str) -> None:
    buffer = bytearray(8 << 20)
    with Path(file).open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


def machine() -> dict[str, Any]:
    """What a reader of the figures has to know of the machine."""
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
    """As /proc/cpuinfo names it; the architecture, where it does not."""
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
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        import weightlift

        return weightlift.__version__ if distribution == "weightlift" else None
