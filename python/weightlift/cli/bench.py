"""``weightlift bench``: one checkpoint, loaded by several libraries."""

from __future__ import annotations

import contextlib
import datetime
import enum
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightlift.core.report import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from weightlift.bench.measure import Comparison

__all__ = ["bench", "comparison_table", "describe_run", "notes"]


class Device(enum.Enum):
    CPU = "cpu"
    CUDA = "cuda"


def bench(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            show_default=False,
            help="The files of one checkpoint; they are loaded together. With --from-pretrained: "
            "the folder of a model or pipeline; module:Class after it where its configuration "
            "names no class, or alone, for a model made by default.",
        ),
    ],
    from_pretrained: Annotated[
        bool,
        typer.Option(
            "--from-pretrained",
            help="Measure from_pretrained by the library alone and with the backend on.",
        ),
    ] = False,
    distributed: Annotated[
        int | None,
        typer.Option(
            "--distributed",
            min=1,
            metavar="N",
            help="Load with N processes on gloo, replicated and sharded, on the CPU; a folder or "
            "files of .safetensors.",
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="Where the tensors go.")] = Device.CPU,
    dtype: Annotated[
        str | None,
        typer.Option(help="Load floating-point tensors as this, such as bfloat16."),
    ] = None,
    against: Annotated[
        str, typer.Option(help="Whom to compare with, separated by commas.")
    ] = "safetensors,torch",
    cold: Annotated[
        bool | None,
        typer.Option(
            "--cold/--warm",
            help="Drop the files from the page cache before each load; by default warm, with "
            "--from-pretrained both.",
            show_default=False,
        ),
    ] = None,
    repeat: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Measurements of each; by default 5, with --from-pretrained 3.",
            show_default=False,
        ),
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write all figures here.")
    ] = None,
    plot_out: Annotated[
        Path | None, typer.Option("--plot", metavar="OUT.png", help="Draw the medians here.")
    ] = None,
) -> None:
    """Measure how fast a checkpoint loads, against other libraries.

    Each measurement is a process of its own that has imported what it needs before the clock
    starts; it loads all tensors and touches all pages (on CUDA: synchronises).
    """
    from weightlift.bench import measure
    from weightlift.bench.conditions import machine

    paths = [Path(file) for file in files]
    if not from_pretrained:
        for path in paths:
            if not path.exists():
                raise typer.BadParameter(f"{path} does not exist", param_hint="FILE")
    if distributed is not None:
        _bench_distributed(paths, distributed, repeat or 5, json_out)
        return
    if dtype is not None:
        _check_dtype(dtype)
        dtype = dtype.removeprefix("torch.")
    if device is Device.CUDA:
        from weightlift.load.allocation import TorchAllocator

        TorchAllocator()  # says why there is none
    for out in (json_out, plot_out):
        if out is not None and not out.absolute().parent.is_dir():
            raise FileNotFoundError(2, "its folder does not exist; make it first", str(out))
    if from_pretrained:
        states = [True, False] if cold is None else [cold]
        found = _bench_models(files, device.value, dtype, states, repeat or 3)
    else:
        contenders = ["weightlift"]
        for name in filter(None, (part.strip() for part in against.split(","))):
            if name not in measure.CONTENDERS:
                known = ", ".join(key for key in measure.CONTENDERS if key != "weightlift")
                raise typer.BadParameter(f"{name!r} is not one of {known}", param_hint="--against")
            if name not in contenders:
                contenders.append(name)
        found = [_bench_files(paths, device.value, dtype, contenders, bool(cold), repeat or 5)]
    if json_out is not None:
        json_out.write_text(json.dumps(_json(found, machine()), indent=2) + "\n")
    if plot_out is not None and any(one.samples for one in found):
        from weightlift.bench.plot import plot

        plot(found, plot_out, f"Time to load, median of {_rounds(found)}")
    if not all(one.job.contender in one.samples for one in found):
        raise typer.Exit(1)


def _bench_files(
    paths: list[Path],
    device: str,
    dtype: str | None,
    contenders: list[str],
    cold: bool,
    repeat: int,
) -> Comparison:
    from rich.console import Console

    from weightlift.bench import measure

    folders = [path for path in paths if path.is_dir()]
    if folders:
        raise typer.BadParameter(f"{folders[0]} is a folder: add --from-pretrained")
    job = measure.Job("weightlift", tuple(map(str, paths)), device, dtype)
    title = _title(paths, job)
    with _progress(len(contenders) * repeat) as (begin, step):
        found = measure.compare(
            title, job, contenders, cold=cold, repeat=repeat, begin=begin, step=step
        )
    console = Console(highlight=False)
    console.print(f"[bold]{title}[/bold]")
    console.print(describe_run(found), style="dim")
    if found.samples:
        console.print()
        console.print(comparison_table(found, contenders[0]))
    for line in notes(found):
        console.print(line, markup=False, soft_wrap=True)
    return found


def _bench_models(
    arguments: list[str], device: str, dtype: str | None, states: list[bool], repeat: int
) -> list[Comparison]:
    import dataclasses

    from rich.console import Console

    from weightlift.bench import measure, models

    contenders = list(models.NAMES)
    with models.bench_folder(arguments) as (folder, where):
        job = models.model_job(folder, device, dtype, where)
        job = dataclasses.replace(job, forward=True)
        title = models.model_title(job)
        with _progress(len(contenders) * repeat * len(states)) as (begin, step):
            found = [
                measure.compare(
                    f"{title}, {models.state(cold)}",
                    job,
                    contenders,
                    cold=cold,
                    repeat=repeat,
                    begin=models.told(begin, cold),
                    step=step,
                )
                for cold in states
            ]
    console = Console(highlight=False)
    console.print(f"[bold]{title}[/bold]")
    for one in found:
        console.print(describe_run(one), style="dim")
    console.print()
    if any(one.samples for one in found):
        console.print(models.models_table(found))
    lines = [line for one in found for line in [*notes(one), *models.forward_notes(one)]]
    for line in dict.fromkeys(lines):
        console.print(line, markup=False, soft_wrap=True)
    return found


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """What to call with words for what is begun, and after each measurement: a bar on a terminal's
    stderr, elsewhere lines with the time."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    console = Console(stderr=True)
    started = time.monotonic()

    def line(text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - started:6.1f} s  {text}\n")
        sys.stderr.flush()

    if not console.is_terminal:
        yield line, lambda _: None
        return
    with Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("starting", total=total)
        yield (
            lambda text: progress.update(task, description=text),
            lambda _: progress.advance(task),
        )


def _bench_distributed(files: list[Path], ranks: int, repeat: int, json_out: Path | None) -> None:
    from rich.console import Console

    from weightlift.bench.conditions import machine
    from weightlift.bench.ranks import distributed_table, measure_ranks

    console = Console(highlight=False)
    with Console(stderr=True).status(f"measuring loads by {ranks} processes"):
        found = measure_ranks(files, ranks, repeat)
    size = format_bytes(found["file_bytes"])
    console.print(f"[bold]{files[0].name}, {size}, by {ranks} processes on gloo[/bold]")
    console.print()
    console.print(distributed_table(found))
    if json_out is not None:
        json_out.write_text(json.dumps({**_run(), "machine": machine(), **found}) + "\n")


def _check_dtype(dtype: str) -> None:
    from weightlift.core.dtypes import parse_dtype

    try:
        named = parse_dtype(dtype)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--dtype") from None
    if named is None:
        raise typer.BadParameter("leave it out to keep the file's dtypes", param_hint="--dtype")


def _title(files: list[Path], job: Any) -> str:
    size = sum(file.stat().st_size for file in files)
    name = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    cast = f" as {job.dtype}" if job.dtype else ""
    return f"{name}, {format_bytes(size)}, to {job.device}{cast}"


def describe_run(found: Comparison) -> str:
    """How it was measured: what the page cache held, what memory was backed."""
    every = [sample for samples in found.samples.values() for sample in samples]
    if not every:
        return "nothing could be measured"
    residents = {sample.resident_bytes for sample in every}
    if None in residents:
        cache = "nobody knows what: Linux tells it from 6.5 on"
    else:
        told = [known for known in residents if known is not None]
        shares = [f"{bound(told) / max(found.file_bytes, 1):.1%}" for bound in (min, max)]
        cache = f"{' to '.join(dict.fromkeys(shares))} of the files"
    rounds = max(len(samples) for samples in found.samples.values())
    backed = min(sample.backed_bytes for sample in every)
    warm = "warm, read once more before each load"
    return (
        f"{'cold' if found.cold else warm}: before each load the page cache held {cache}; "
        f"rounds in random order: {rounds}, a new process each; {format_bytes(backed)} of memory "
        f"on huge pages touched beforehand and held until it begins"
    )


def comparison_table(comparison: Comparison, reference: str = "weightlift") -> Table:
    """A row for each contender; the times' ratio is to ``reference``'s."""
    from rich import box
    from rich.table import Table

    from weightlift.bench.plot import format_seconds

    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), header_style="bold"
    )
    for title in ["", "time", "load", "touch", "GB/s", "CPU", "memory", "ratio"]:
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for name, samples in comparison.samples.items():
        ratio = comparison.time_ratio(name, reference)
        table.add_row(
            name,
            format_seconds(comparison.median(name)),
            format_seconds(statistics.median(sample.load_seconds for sample in samples)),
            format_seconds(statistics.median(sample.touch_seconds for sample in samples)),
            f"{comparison.rate(name) / 1e9:.2f}",
            format_seconds(statistics.median(sample.cpu_seconds for sample in samples)),
            format_bytes(comparison.peak(name)),
            "" if ratio is None else f"{ratio:.2f}",
            style="bold" if name == reference else "",
        )
    table.caption = (
        "Medians; GB/s of the files' bytes; memory: the peak of what the load took for itself, "
        f"beside the page cache; ratio: time over {reference}'s, median of the rounds."
    )
    table.caption_justify = "left"
    return table


def notes(comparison: Comparison) -> list[str]:
    """The I/O path that weightlift took, and who could not be measured."""
    lines = []
    for ours in ("weightlift", "backend"):
        if ours in comparison.samples:
            lines += [f"weightlift's way: {text}" for text in comparison.route(ours)]
    for name, why in comparison.refused.items():
        lines.append(f"{'weightlift' if name == 'backend' else name}: not measured: {why}")
    return lines


def _run() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["weightlift", *sys.argv[1:]]),
    }


def _json(found: list[Comparison], machine: dict[str, Any]) -> dict[str, Any]:
    return {**_run(), "machine": machine, "comparisons": [one.to_json() for one in found]}


def _rounds(found: list[Comparison]) -> int:
    return max(len(samples) for one in found for samples in one.samples.values())
