"""``weightlift bench --stream``: a step of a model that is larger than its memory, against
accelerate's offload to the disk and diffusers' group offload."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from weightlift.core.errors import ArgumentError, CheckpointError
from weightlift.core.report import format_bytes
from weightlift.core.sizes import parse_size

__all__ = ["CONTENDERS", "StreamRun", "compare_streams", "describe", "plot_timeline"]

CONTENDERS = ("weightlift", "accelerate", "diffusers", "whole")
_WIDTH = 1024
_COLOURS = {"read": "#2f8f5b", "wait": "#c0504d", "use": "#8a8d91"}
_WORDS = {"read": "read and cast", "wait": "waiting", "use": "computing"}


@dataclasses.dataclass
class StreamRun:
    """Steps of one contender.

    Attributes:
        seconds: of each step after the first.
        peak_bytes: the most anonymous memory that the process took, above its libraries.
        digest: of the result; all should have the same.
        events: of the last step: (kind, block, begin, end).
        error: why there are no figures.
    """

    contender: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
    digest: str = ""
    events: list[tuple[str, str, float, float]] = dataclasses.field(default_factory=list)
    error: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else float("nan")


def compare_streams(
    model: str,
    memory: int | str,
    contenders: Sequence[str] = CONTENDERS,
    *,
    steps: int = 5,
    cold: bool = False,
    rows: int = 8,
    threads: int = 0,
) -> list[StreamRun]:
    """Runs steps of a model by each contender, each in a process of its own.

    Args:
        model: the folder of a model of transformers, or ``"stack:2GB"``, a stack of feed-forward
            layers of that size, which is made.
        memory: bytes for weights; accelerate is given a device map of as much.
        contenders: of ``CONTENDERS``; ``"whole"`` has all of it in memory.
        steps: of each, after a first one that is not counted.
        cold: the files are dropped from the page cache before each step.
        rows: tokens of a step.
        threads: of torch; 0 leaves them.

    Raises:
        ArgumentError: no such contender, or a memory that is none.
        CheckpointError: no such model.
    """
    budget = parse_size(memory, "memory")
    if unknown := [name for name in contenders if name not in CONTENDERS]:
        raise ArgumentError(f"{unknown[0]!r} is not one of {', '.join(CONTENDERS)}")
    with _folder(model) as (folder, layers):
        task = {
            "folder": str(folder),
            "files": [str(path) for path in sorted(folder.glob("*.safetensors"))],
            "layers": layers, "width": _WIDTH, "memory": budget, "steps": steps, "cold": cold,
            "rows": rows, "threads": threads, "scratch": str(folder.parent),
        }  # fmt: skip
        return [_run({**task, "contender": name}) for name in contenders]


@contextlib.contextmanager
def _folder(model: str) -> Iterator[tuple[Path, int]]:
    """Where the model is, and how many layers a stack has."""
    found = re.fullmatch(r"stack:(.+)", model)
    if found is None:
        folder = Path(model)
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{model}: no folder of a transformers model (it has no config.json); give one, or "
                "a size, as in stack:2GB"
            )
        yield folder, 0
        return
    import torch

    from weightlift.bench.stream_child import Stack
    from weightlift.save import save_file

    layer = (8 * _WIDTH * _WIDTH + 7 * _WIDTH) * 4
    layers = max(2, round(parse_size(found[1], "the stack's size") / layer))
    with tempfile.TemporaryDirectory(prefix="weightlift-bench-") as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        torch.manual_seed(0)
        save_file(Stack(layers, _WIDTH).state_dict(), folder / "model.safetensors")
        yield folder, layers


def _run(task: dict[str, Any]) -> StreamRun:
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "figures.json"
        child = subprocess.run(
            [sys.executable, "-m", "weightlift.bench.stream_child", str(out)],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode != 0:
            lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
            return StreamRun(task["contender"], error=lines[-1])
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
        lines.append(
            f"{run.contender:<12} {run.median * 1e3:9.1f} ms a step  {ratio}  "
            f"{format_bytes(run.peak_bytes):>9} of memory{same}"
        )
    return lines


def plot_timeline(run: StreamRun, path: str | Path, title: str) -> None:
    """Draws the last step: by block, when it was read, waited for and computed with."""
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
    axes.set_title(title)
    axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=120)
