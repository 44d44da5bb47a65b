"""The measurements of ``weightlift bench`` and its JSON output."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightlift.bench import models
from weightlift.bench.comparison import Comparison
from weightlift.bench.conditions import machine
from weightlift.bench.measure import Job, compare
from weightlift.bench.progress import progress_of
from weightlift.core.report import format_bytes
from weightlift.core.requirements import require

__all__ = ["compare_files", "compare_models", "rounds_of", "to_json"]


def compare_files(
    files: Sequence[Path],
    device: str,
    dtype: str | None,
    contenders: Sequence[str],
    *,
    cold: bool,
    repeat: int,
    adapters: Path | None = None,
) -> Comparison:
    """Measures loads of one checkpoint's files by each contender. Shows the progress on stderr.

    Raises:
        FileNotFoundError, ValueError: ``adapters`` is not a file of adapters.
    """
    job = Job("weightlift", tuple(map(str, files)), device, dtype)
    with progress_of(len(contenders) * repeat) as (begin, step):
        return compare(
            _title(files, job),
            job,
            contenders,
            cold=cold,
            repeat=repeat,
            adapters=adapters,
            begin=begin,
            step=step,
        )


def compare_models(
    arguments: Sequence[str], device: str, dtype: str | None, states: Sequence[bool], repeat: int
) -> tuple[str, list[Comparison]]:
    """Measures a model or pipeline, by its library alone and with the backend. Returns its title
    and a comparison for each of ``states``, which say whether the files are cold.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: there is no such class, there are no weights, or the model is too large to
            make.
    """
    contenders = list(models.NAMES)
    with models.bench_folder(arguments) as (folder, where):
        job = models.model_job(folder, device, dtype, where)
        job = dataclasses.replace(job, forward=True)
        title = models.model_title(job)
        require(str(job.model).partition(":")[0].partition(".")[0], "this model")
        with progress_of(len(contenders) * repeat * len(states)) as (begin, step):
            found = []
            for cold in states:

                def begin_here(text: str, state: str = models.state(cold)) -> None:
                    for name, shown in models.NAMES.items():
                        text = text.replace(name, shown)
                    begin(f"{state}: {text}")

                found.append(
                    compare(
                        f"{title}, {models.state(cold)}",
                        job,
                        contenders,
                        cold=cold,
                        repeat=repeat,
                        begin=begin_here,
                        step=step,
                    )
                )
    return title, found


def to_json(found: Mapping[str, object]) -> dict[str, object]:
    """The output of ``--json`` and ``--output``: ``found``, with the date, the command and the
    machine."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["weightlift", *sys.argv[1:]]),
        "machine": machine(),
        **found,
    }


def rounds_of(found: Sequence[Comparison]) -> int:
    return max(len(samples) for one in found for samples in one.samples.values())


def _title(files: Sequence[Path], job: Job) -> str:
    size = sum(file.stat().st_size for file in files)
    name = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    cast = f" as {job.dtype}" if job.dtype else ""
    return f"{name}, {format_bytes(size)}, to {job.device}{cast}"
