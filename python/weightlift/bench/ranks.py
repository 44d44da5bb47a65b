"""``weightlift bench --distributed``: one checkpoint, loaded by N processes at once."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlift.core.errors import CheckpointError, WeightliftError
from weightlift.core.report import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["KINDS", "distributed_table", "measure_ranks"]

KINDS = ("replicated", "FSDP2", "tensor parallel")
_LIMIT_SECONDS = 1800


def checkpoint_files(paths: Sequence[Path]) -> tuple[list[Path], tuple[str, str] | None]:
    """The safetensors files of a checkpoint, and the transformers class of its folder.

    Raises:
        CheckpointError: there are none.
    """
    if len(paths) != 1 or not paths[0].is_dir():
        return list(paths), None
    folder = paths[0]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder}: there are no .safetensors files in it; weightlift convert makes them"
        )
    config = folder / "config.json"
    architectures = (
        json.loads(config.read_text(encoding="utf-8")).get("architectures")
        if config.is_file()
        else None
    )
    return files, (architectures[0], str(folder)) if architectures else None


def measure_ranks(
    paths: Sequence[Path], ranks: int, repeat: int, kinds: Sequence[str] = KINDS
) -> dict[str, Any]:
    """Figures of all loads by ``ranks`` processes under torchrun.

    Returns:
        ``file_bytes``, ``ranks``, and ``loads``: kind -> contender -> a dict for each repetition,
        with the fields of ``measure_ranks.Load``.

    Raises:
        WeightliftError: the ranks failed; the text has the end of what they wrote.
    """
    files, model = checkpoint_files(paths)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        job = {
            "files": [str(file.absolute()) for file in files],
            "model": model,
            "contenders": list(kinds),
            "repeat": repeat,
            "out": str(out),
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), "-m", "weightlift.bench.measure_ranks"]
        ran = subprocess.run(
            [*command, json.dumps(job)],
            env={"OMP_NUM_THREADS": "1", **os.environ, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_LIMIT_SECONDS,
            check=False,
        )
        if not out.exists():
            tail = "\n".join(ran.stdout.splitlines()[-30:])
            raise WeightliftError(f"{ranks} ranks under torchrun failed:\n{tail}")
        loads = json.loads(out.read_text())
    return {
        "ranks": ranks,
        "file_bytes": sum(file.stat().st_size for file in files),
        "loads": loads,
    }


@dataclasses.dataclass(frozen=True)
class _Row:
    seconds: float
    ratio: float
    read: float
    mapped: float
    peak: float
    held: float


def _row(loads: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]], file_bytes: int) -> _Row:
    def median(field: str) -> float:
        return float(statistics.median(load[field] for load in loads))

    rounds = zip(loads, ours, strict=True)
    return _Row(
        median("seconds"),
        statistics.median(load["seconds"] / own["seconds"] for load, own in rounds),
        median("read_bytes") / file_bytes,
        median("mapped_bytes") / file_bytes,
        median("peak_bytes"),
        median("held_bytes"),
    )


def distributed_table(found: dict[str, Any]) -> Table:
    """A row for each contender; the times' ratio is to weightlift's of the same kind."""
    from rich import box
    from rich.table import Table

    from weightlift.bench.plot import format_seconds

    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), header_style="bold"
    )
    for title in ("", "time", "ratio", "read", "mapped", "memory", "held"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for kind, contenders in found["loads"].items():
        ours = next(iter(contenders.values()))
        rows = {name: _row(loads, ours, found["file_bytes"]) for name, loads in contenders.items()}
        table.add_row(kind)
        for name, row in rows.items():
            table.add_row(
                f"  {name}",
                format_seconds(row.seconds),
                f"{row.ratio:.2f}",
                f"{row.read:.2f}",
                f"{row.mapped:.2f}",
                format_bytes(int(row.peak)),
                format_bytes(int(row.held)),
                style="bold" if contenders[name] is ours else "",
            )
    table.caption = (
        "Medians; ratio: of the rounds' ratios. read, mapped: by all ranks together, in multiples "
        "of the files. memory: the peak of anonymous memory, of the rank that took most; held: its "
        "tensors, mapped ones too."
    )
    table.caption_justify = "left"
    return table
