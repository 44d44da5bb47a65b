"""``weightlift bench --stream``: a step of a model that is larger than its memory, against
accelerate's offload to the disk and diffusers' group offload."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from weightlift.bench.stream_child import drop_from_page_cache
from weightlift.core.errors import ArgumentError, CheckpointError
from weightlift.core.report import format_bytes
from weightlift.core.sizes import parse_size

__all__ = [
    "CONTENDERS",
    "Steps",
    "StreamRun",
    "compare_streams",
    "describe",
    "layers_bytes",
    "plot_timeline",
    "stack_layers",
]

CONTENDERS = ("weightlift", "accelerate", "diffusers", "whole")
_WIDTH = 1024
_CHILD = ["-m", "weightlift.bench.stream_child"]
_KILLED = "killed, as the kernel does when memory is short"
_VERSION_2 = ("/sys/fs/cgroup", "memory.max")
_VERSION_1 = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
_COLOURS = {"read": "#2f8f5b", "wait": "#c0504d", "use": "#8a8d91"}
_WORDS = {"read": "read and cast", "wait": "waiting", "use": "computing, until the next of these"}


@dataclasses.dataclass
class StreamRun:
    """Steps of one contender.

    Attributes:
        seconds: of each step after the first.
        cpu_seconds: the processor time of all threads, for the same steps.
        streamed_bytes: the bytes that weightlift reads in each step.
        peak_bytes: the peak of the process's anonymous memory, less its value after the imports.
        grown: the increase from the twentieth step (the last, if there are fewer) to the step half
            way to the end, and to the end: bytes of anonymous memory, threads, open files.
        limit_bytes: the limit of its cgroup, which counts its page cache too; 0 without one.
        digest: of the result; it should be the same for all contenders.
        events: of the last step, as (kind, block, begin, end).
        error: why there are no figures.
    """

    contender: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    streamed_bytes: int = 0
    peak_bytes: int = 0
    grown: list[dict[str, int]] = dataclasses.field(default_factory=list)
    limit_bytes: int = 0
    digest: str = ""
    events: list[tuple[str, str, float, float]] = dataclasses.field(default_factory=list)
    error: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else float("nan")


@dataclasses.dataclass(frozen=True)
class Steps:
    """How steps are measured.

    Attributes:
        count: steps of each contender, after a first one that is not counted.
        cold: drop the files, and those that a contender has made from them, from the page cache
            before each step.
        rows: tokens of a step.
        threads: torch's threads; 0 for torch's default.
        width: the width of a stack.
        beyond: the bytes that a process may take beyond its budget and its libraries, including its
            page cache, if a cgroup can be made; ``None`` for no limit. A contender that the kernel
            kills there runs again with twice as much, up to ``16 * beyond``. ``"whole"`` has no
            limit.
        keep: a folder that keeps a stack for the next run.
    """

    count: int = 5
    cold: bool = False
    rows: int = 8
    threads: int = 0
    width: int = _WIDTH
    beyond: int | None = None
    keep: Path | None = None


def compare_streams(
    model: str,
    memory: int | str,
    contenders: Sequence[str] = CONTENDERS,
    steps: Steps = Steps(),
    *,
    begin: Callable[[str], None] = lambda _: None,
    step: Callable[[str], None] = lambda _: None,
) -> list[StreamRun]:
    """Runs steps of a model by each contender, each in its own process. The others are compared
    with the first: if it cannot be measured, none is.

    Args:
        model: the folder of a transformers model, or ``"stack:2GB"`` to make a stack of
            feed-forward layers of that size.
        memory: bytes for weights; accelerate gets a device map with the same limit.
        contenders: names in ``CONTENDERS``; ``"whole"`` has the whole model in memory.
        steps: how they are measured.
        begin, step: called with the name of a contender before and after it runs.

    Raises:
        ArgumentError: there is no such contender, or ``memory`` is not a size.
        CheckpointError: there is no such model.
    """
    budget = parse_size(memory, "memory")
    if unknown := [name for name in contenders if name not in CONTENDERS]:
        raise ArgumentError(f"{unknown[0]!r} is not one of {', '.join(CONTENDERS)}")
    with (
        _folder(model, steps.width, steps.keep) as (folder, layers),
        _group(steps.beyond, budget) as group,
    ):
        task: dict[str, Any] = {
            "folder": str(folder),
            "files": [str(path) for path in sorted(folder.glob("*.safetensors"))],
            "layers": layers, "width": steps.width, "memory": budget, "steps": steps.count,
            "cold": steps.cold, "rows": steps.rows, "threads": steps.threads,
            "scratch": str(folder.parent), "group": None,
        }  # fmt: skip
        for file in task["files"] if group else ():  # so that their pages are charged to the group
            drop_from_page_cache(file)
        runs: list[StreamRun] = []
        for name in contenders:
            begin(name)
            runs.append(_run_within_limit({**task, "contender": name}, group, steps.beyond))
            step(name)
            if runs[0].error:
                break
        return runs


@contextlib.contextmanager
def _group(beyond: int | None, budget: int) -> Iterator[str | None]:
    """A cgroup with a memory limit, if one can be made; else ``None``."""
    if beyond is None:
        yield None
        return
    name = f"weightlift-bench-{os.getpid()}"
    for root, limit in (_VERSION_2, _VERSION_1):
        group = Path(root) / name
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / limit).exists():
                _set_limit(group, budget + beyond)
                for swap in ("memory.swap.max", "memory.swappiness"):
                    with contextlib.suppress(OSError):
                        (group / swap).write_text("0")
                yield str(group)
                return
        finally:
            group.rmdir()
    yield None


def _set_limit(group: Path, count: int) -> None:
    for _, limit in (_VERSION_2, _VERSION_1):
        if (group / limit).exists():
            (group / limit).write_text(str(count))


def _run_within_limit(task: dict[str, Any], group: str | None, beyond: int | None) -> StreamRun:
    """Runs a contender in the smallest limit of memory in which the kernel does not kill it."""
    if group is None or beyond is None or task["contender"] == "whole":
        return _run(task)
    budget = task["memory"]
    for more in (beyond << doubled for doubled in range(5)):
        _set_limit(Path(group), budget + more)
        run = _run({**task, "group": group})
        run.limit_bytes = budget + more
        if run.error != _KILLED:
            break
    if run.error == _KILLED:
        run.error = f"killed in the memory limit of {format_bytes(run.limit_bytes)}"
    _set_limit(Path(group), budget + beyond)
    return run


@contextlib.contextmanager
def _folder(model: str, width: int, keep: Path | None) -> Iterator[tuple[Path, int]]:
    """The model's folder, and the number of layers if it is a stack."""
    found = re.fullmatch(r"stack:(.+)", model)
    if found is None:
        folder = Path(model)
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{model}: not the folder of a transformers model (it has no config.json); give "
                "one, or a size, as in stack:2GB"
            )
        yield folder, 0
        return
    import torch

    from weightlift.bench.stream_child import Stack
    from weightlift.save import save_file

    size = parse_size(found[1], "the stack's size")
    layers = stack_layers(size, width)
    if size < (smallest := layers_bytes(1, width)):
        raise ArgumentError(
            f"{model}: one layer of a stack has {format_bytes(smallest)}; give at least that"
        )
    with tempfile.TemporaryDirectory(prefix="weightlift-bench-", dir=keep) as temporary:
        folder = (keep or Path(temporary)) / f"stack-{layers}-{width}"
        file = folder / "model.safetensors"
        if not file.exists():
            folder.mkdir(exist_ok=True)
            torch.manual_seed(0)
            save_file(Stack(layers, width).state_dict(), file)
        yield folder, layers


def stack_layers(size: int, width: int) -> int:
    """The number of layers of a stack of about ``size`` bytes."""
    return max(1, round(size / layers_bytes(1, width)))


def layers_bytes(layers: int, width: int) -> int:
    """Bytes of so many layers of a stack."""
    return layers * (8 * width * width + 7 * width) * 4


def _run(task: dict[str, Any]) -> StreamRun:
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "figures.json"
        child = subprocess.run(
            [sys.executable, *_CHILD, str(out)],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode == -signal.SIGKILL:
            return StreamRun(task["contender"], error=_KILLED)
        if child.returncode != 0:
            lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
            # Removes the name of the exception's module.
            said = re.sub(r"^(?:\w+\.)+(?=\w+(?:: |$))", "", lines[-1])
            return StreamRun(task["contender"], error=said)
        return StreamRun(task["contender"], **json.loads(out.read_text()))


def describe(runs: Sequence[StreamRun]) -> list[str]:
    """Lines of a table: the median step, its ratio to the first contender's, the peak."""
    first = runs[0]
    lines = []
    for run in runs:
        if run.error:
            lines.append(f"{run.contender:<12} not measured: {run.error}")
            continue
        ratio = f"{run.median / first.median:6.2f} x" if first.seconds else ""
        same = "" if run.digest == first.digest else "  another result"
        if run.limit_bytes > first.limit_bytes:  # 0 for "whole"
            same += f"  (killed in less than a limit of {format_bytes(run.limit_bytes)})"
        lines.append(
            f"{run.contender:<12} {run.median * 1e3:9.1f} ms a step  {ratio}  "
            f"{format_bytes(run.peak_bytes):>9} of memory{same}"
        )
    return lines


def plot_timeline(run: StreamRun, path: str | Path, title: str) -> None:
    """Draws the last step: when each block was read, waited for and used."""
    from matplotlib.figure import Figure

    blocks = list(dict.fromkeys(block for kind, block, _, _ in run.events if kind == "use"))
    blocks += [b for b in dict.fromkeys(e[1] for e in run.events) if b not in blocks]
    start = min((begin for _, _, begin, _ in run.events), default=0.0)
    figure = Figure(figsize=(10, 1.5 + 0.22 * len(blocks)), layout="constrained")
    axes = figure.add_subplot()
    for kind, offset in (("use", 0.0), ("read", -0.2), ("wait", 0.2)):
        rows = [(blocks.index(b), begin, end) for k, b, begin, end in run.events if k == kind]
        if not rows:
            continue
        axes.barh(
            [row + offset for row, _, _ in rows],
            [(end - begin) * 1e3 for _, begin, end in rows],
            left=[(begin - start) * 1e3 for _, begin, _ in rows],
            height=0.36 if kind != "use" else 0.8,
            color=_COLOURS[kind],
            label=_WORDS[kind],
            zorder=1 if kind == "use" else 2,
        )
    axes.set_yticks(range(len(blocks)), blocks, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_ylabel("blocks that are read at each step, in the order of use")
    axes.set_title(title)
    axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=120)
