"""Measures loads against each other, each in its own process.

Every measurement is a fresh process that has imported torch and the library before the clock
starts. In each round the files are read into the page cache again (``conditions.settle``).
Contenders take turns in random order, so that other work of the machine affects all of them, and
they are compared round by round: a ratio is the median of the rounds' ratios. Before each
measurement, the memory that the load needs is backed by the machine and held
(``measure_child.backed_memory``), the libraries that the process has mapped are read, the files are
read once more or dropped from the page cache, and the memory is freed. The bytes of the files in
the page cache are reported. All contenders must load the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import weightlift._native as _native
from weightlift.bench.comparison import Comparison, Sample
from weightlift.bench.conditions import (
    BACKED,
    NOT_BACKED,
    RUN_CHILD,
    TAKEN_SECONDS,
    BackedMemory,
    new_memory_rate,
    pipe_of,
    prepare_files,
    read_program,
    resident_bytes,
    settle,
)
from weightlift.bench.contenders import CONTENDERS, Contender, Job, read_adapters
from weightlift.bench.measure_child import anonymous_bytes
from weightlift.checkpoint.torch_file import TorchFile, open_torch_file

__all__ = [
    "CONTENDERS",
    "Job",
    "compare",
    "target_bytes",
]

_SLACK_BYTES = 512 * 10**6
_LIMIT_SECONDS = 600.0
# For a process that has sent its figures or is no longer needed.
_END_SECONDS = 30.0
# Reading the process's memory takes tens of microseconds.
_POLL_SECONDS = 0.02
# Bytes of an element by torch's names, and by the file's names.
_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_FLOAT_WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


class _FailedError(Exception):
    """A contender cannot do the job or did not finish; the text says why."""


def compare(
    name: str,
    job: Job,
    contenders: Sequence[str],
    *,
    cold: bool = False,
    repeat: int = 5,
    seed: int = 0,
    touched: bool = True,
    memory: str = BACKED,
    adapters: Path | None = None,
    environments: Path | None = None,
    begin: Callable[[str], None] = lambda _: None,
    step: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Measures ``job`` by all ``contenders``, ``repeat`` times each.

    Args:
        name: of the comparison.
        job: the load; its own contender is ignored.
        contenders: names in ``CONTENDERS``, or among ``adapters``.
        cold: drop the files from the page cache before each measurement.
        repeat: rounds.
        seed: for the order within the rounds.
        touched: whether ``Comparison`` counts the touch of all pages.
        memory: the state of the machine's memory at the start of each load: ``"backed"``, or ``"not
            backed"``, for which each measurement first waits 8 s.
        adapters: a Python file with further contenders (``contenders.read_adapters``).
        environments: the folder of the contenders' virtual environments.
        begin: called with a description of the next step.
        step: called with the contender's name after each measurement, failed ones included.

    Raises:
        FileNotFoundError, ValueError: ``adapters`` is no such file.
    """
    contest = _Contest(job, _Surroundings(cold, memory, adapters, environments), begin, step)
    contest.prepare(contenders, repeat)
    backed = job.what == "load" and memory == BACKED
    holder = BackedMemory(target_bytes(job, cold) + _SLACK_BYTES if backed else 0)
    shuffle = random.Random(seed).shuffle
    for turn in range(repeat):
        order = contest.able()
        if not cold:
            # Again in each round: the time of a mapping depends on where the file's pages lie and
            # how the host backs them, and this is the same for all contenders of a round.
            begin("reading the files into the page cache")
            settle(sorted({file for name in order for file in contest.children[name].files}))
        shuffle(order)
        contest.run_round(order, f"round {turn + 1} of {repeat}", holder, checksum=turn == 0)
    found = contest.results()
    return Comparison(
        name=name,
        job=dataclasses.replace(job, contender=contenders[0]),
        cold=cold,
        samples=found,
        refused=contest.refused,
        file_bytes=sum(Path(file).stat().st_size for file in job.files),
        touched=touched,
        versions=contest.versions,
        conversions=contest.conversions,
        memory=memory,
    )


class _Surroundings(NamedTuple):
    """The conditions that all contenders share; see ``compare``."""

    cold: bool
    memory: str
    adapters: Path | None
    environments: Path | None


class _Contest:
    """Contenders that do one job in turn.

    Attributes:
        children: the process of each.
        refused: contenders that do not take part, with the reason.
        conversions: the seconds of each conversion to a contender's own format.
        versions: of the libraries.
        samples: the measurements of the contenders that take part.
    """

    def __init__(
        self,
        job: Job,
        surroundings: _Surroundings,
        begin: Callable[[str], None],
        step: Callable[[str], None],
    ) -> None:
        self._job = job
        self._surroundings = surroundings
        self._begin, self._step = begin, step
        self.children: dict[str, _Child] = {}
        self.refused: dict[str, str] = {}
        self.conversions: dict[str, float] = {}
        self.versions: dict[str, str | None] = {}
        self.samples: dict[str, list[Sample]] = {}

    def prepare(self, contenders: Sequence[str], repeat: int) -> None:
        """Finds the contenders that can do the job, and converts files for those that need it."""
        known = read_adapters(self._surroundings.adapters)
        for contender in contenders:
            reason = self._prepare(contender, known[contender])
            if reason is None:
                self.samples[contender] = []
                continue
            self.refused[contender] = reason
            for _ in range(repeat):
                self._step(contender)

    def _prepare(self, name: str, contender: Contender) -> str | None:
        """The reason if it cannot take part."""
        job = dataclasses.replace(self._job, contender=name)
        python = _python(contender, self._surroundings.environments)
        child = _Child(job, python, contender.reads(self._job), self._surroundings.adapters)
        self.children[name] = child
        reason = contender.why_not(self._job) if self._job.what == "load" else None
        if reason is None and contender.convert is not None:
            try:
                self.conversions[name] = _converted(child)
            except _FailedError as failure:
                return str(failure)
        return reason

    def able(self) -> list[str]:
        return [contender for contender in self.samples if contender not in self.refused]

    def run_round(
        self, order: Sequence[str], title: str, holder: BackedMemory, *, checksum: bool
    ) -> None:
        """Measures each contender once. Their imports overlap, but their measurements do not: the
        others wait meanwhile. On CUDA, a waiting context takes some of the device's memory but none
        of its time."""
        at_once = max(1, _native.machine()["cpus"] // (4 if self._job.on_cuda else 1))
        for start in range(0, len(order), at_once):
            with holder, contextlib.ExitStack() as stack:
                holder.hold()
                running = [
                    stack.enter_context(self._process_for(contender, checksum))
                    for contender in order[start : start + at_once]
                ]
                self._begin(f"importing {', '.join(child.job.contender for child in running)}")
                for child in running:
                    child.expect_ready()
                for child in running:
                    self._begin(f"measuring {child.job.contender}, {title}")
                    self._measure(child, holder)

    def _process_for(self, contender: str, checksum: bool) -> _Child:
        child = self.children[contender]
        return child.with_job(dataclasses.replace(child.job, checksum=checksum))

    def _measure(self, child: _Child, holder: BackedMemory) -> None:
        contender = child.job.contender
        sample = _measure(child, self._surroundings.cold, holder, self._surroundings.memory)
        self.versions[contender] = child.version
        if isinstance(sample, Sample):
            self.samples[contender].append(sample)
        else:
            self.refused[contender] = sample
        self._step(contender)

    def results(self) -> dict[str, list[Sample]]:
        """The samples of all contenders that finished and loaded the same bits."""
        found = {c: taken for c, taken in self.samples.items() if c not in self.refused}
        for contender, reason in _differing_bits(found).items():
            self.refused[contender] = reason
            del found[contender]
        return found


def _python(contender: Contender, environments: Path | None) -> str:
    """The interpreter that has this library: its environment's, or else this one."""
    if contender.environment is not None and environments is not None:
        own = environments.absolute() / contender.environment / "bin" / "python"
        if own.exists():
            return str(own)
    return sys.executable


def _converted(child: _Child) -> float:
    """Makes the files of a contender's own format if they do not exist. Returns the seconds it
    took."""
    made = child.files
    note = Path(made[0]).with_name(Path(made[0]).name + ".seconds")
    if not note.exists() or not all(Path(file).exists() for file in made):
        with child.with_job(dataclasses.replace(child.job, what="convert")) as converting:
            note.write_text(str(converting.line()["seconds"]), encoding="ascii")
    return float(note.read_text(encoding="ascii"))


def _differing_bits(samples: dict[str, list[Sample]]) -> dict[str, str]:
    """The contenders that loaded other bits than the first one, with the reason to refuse them."""
    first: tuple[str, int] | None = None
    wrong = {}
    for contender, taken in samples.items():
        for checksum in {s.checksum for s in taken if s.checksum is not None}:
            first = first or (contender, checksum)
            if checksum != first[1]:
                wrong[contender] = f"what it loads is not what {first[0]} loads"
    return wrong


def _measure(child: _Child, cold: bool, holder: BackedMemory, memory: str) -> Sample | str:
    """A measurement, or the reason why there is none."""
    try:
        return _measured(child, cold, holder, memory)
    except _FailedError as failure:
        return str(failure)


def _measured(child: _Child, cold: bool, holder: BackedMemory, memory: str) -> Sample:
    child.check_ready()
    files = child.files
    backed = holder.hold()
    read_program(child.pid)
    resident = prepare_files(files, cold)
    holder.release()
    if memory == NOT_BACKED:
        time.sleep(TAKEN_SECONDS)
    rate = new_memory_rate()
    figures, peak = child.go()
    before, after = figures.pop("anon_before"), figures.pop("anon_after")
    return Sample(
        peak_anon_bytes=max(peak, after, before) - before,
        resident_bytes=resident,
        resident_bytes_after=resident_bytes(files),
        backed_bytes=backed,
        new_memory_rate=rate,
        **figures,
    )


class _Child:
    """A measured process, from its imports to its end."""

    def __init__(self, job: Job, python: str, files: Sequence[str], adapters: Path | None) -> None:
        self.job = job
        self.files = files  # those that its contender reads
        self._python = python
        self._adapters = adapters
        self.version: str | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def with_job(self, job: Job) -> _Child:
        """Another process of the same contender, for ``job``."""
        return _Child(job, self._python, self.files, self._adapters)

    def __enter__(self) -> _Child:
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [self._python, *RUN_CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
        )
        self._lines = _lines(self._process, self._poll)
        self._peak = 0
        self._failure: _FailedError | None = None
        self._sampling = False
        adapters = None if self._adapters is None else str(self._adapters.absolute())
        self._send(json.dumps({**dataclasses.asdict(self.job), "adapters": adapters}))
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            pipe_of(self._process.stdin).close()
        try:
            self._process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        pipe_of(self._process.stdout).close()
        self._errors.close()

    def expect_ready(self) -> None:
        """Waits until its imports are done. ``check_ready`` raises their error."""
        try:
            self.version = self.line()["version"]
        except _FailedError as failure:
            self._failure = failure

    def check_ready(self) -> None:
        if self._failure is not None:
            raise self._failure

    def go(self) -> tuple[dict[str, Any], int]:
        """Starts the timed part. Returns the figures and the peak of the anonymous memory."""
        self._sampling = True
        self._send("go")
        figures = self.line()
        self._sampling = False  # later memory is not the load's
        while (more := self._next()) is not None:
            figures |= more
        pipe_of(self._process.stdin).close()
        if self._process.wait(timeout=_LIMIT_SECONDS) != 0:
            raise _FailedError(
                f"ended with status {self._process.returncode}{self._last_error_line()}"
            )
        return figures, self._peak

    def _send(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # ``line`` reports how the process ended
            pipe_of(self._process.stdin).write(line.encode() + b"\n")

    def line(self) -> dict[str, Any]:
        """The next line of the process."""
        line = self._next()
        if line is None:
            self._process.wait()
            raise _FailedError(
                f"ended with status {self._process.returncode}{self._last_error_line()}"
            )
        return line

    def _next(self) -> dict[str, Any] | None:
        """The next line, or ``None`` at the end of the output."""
        try:
            text = next(self._lines, None)
        except TimeoutError:
            self._process.kill()
            raise _FailedError(f"took longer than {_LIMIT_SECONDS:.0f} s") from None
        line: dict[str, Any] | None = None if text is None else json.loads(text)
        for key in ("failed", "refused"):
            if line is not None and key in line:
                raise _FailedError(line[key])
        return line

    def _last_error_line(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def _poll(self) -> None:
        if self._sampling:
            with contextlib.suppress(OSError):
                self._peak = max(self._peak, anonymous_bytes(self._process.pid))


def _lines(process: subprocess.Popen[bytes], poll: Callable[[], None]) -> Iterator[str]:
    """The JSON lines of a process's output; libraries may print other lines between them."""
    pending = b""
    stdout = pipe_of(process.stdout)
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
                    yield line.decode()
                    # Other contenders may have been measured meanwhile, so the limit starts again.
                    deadline = time.monotonic() + _LIMIT_SECONDS
        raise TimeoutError


def target_bytes(job: Job, cold: bool = False) -> int:
    """About how much of the machine's free memory a load may take, with any contender.

    A library that maps files takes no memory of its own, but others read the same file into new
    memory, and all must find the machine in the same state. The pages of a cold file count too. A
    load to CUDA takes the device's memory instead. A cast takes the memory of its results.
    """
    size = sum(Path(file).stat().st_size for file in job.files)
    page_cache_bytes = size if cold else 0
    if job.on_cuda or job.tensor is not None:
        return page_cache_bytes
    if job.dtype is None:
        return page_cache_bytes + size
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
            part = opened.part
        for position, dtype in enumerate(part.dtypes()):
            begin, end = part.range(position)
            own = _FLOAT_WIDTHS.get(dtype)
            total += end - begin if own is None else (end - begin) // own * width
    return page_cache_bytes + total
