"""``weightlift bench``: one checkpoint, loaded by several libraries."""

from __future__ import annotations

import datetime
import enum
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightlift.report import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from weightlift.cli.measure import Comparison, Job, Sample

__all__ = ["bench", "comparison_table", "describe_run", "model_job", "notes"]


class Device(enum.Enum):
    CPU = "cpu"
    CUDA = "cuda"


def bench(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            exists=True,
            readable=True,
            help="The files of one checkpoint; they are loaded together. With --from-pretrained: "
            "the folder of a model or pipeline.",
        ),
    ],
    from_pretrained: Annotated[
        bool,
        typer.Option(
            "--from-pretrained",
            help="Measure the library's from_pretrained on a folder, stock against the backend.",
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
        bool,
        typer.Option("--cold/--warm", help="Drop the files from the page cache before each load."),
    ] = False,
    repeat: Annotated[int, typer.Option(min=1, help="Measurements of each.")] = 5,
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
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    from weightlift.cli import measure

    if distributed is not None:
        _bench_distributed(files, distributed, repeat, json_out)
        return
    contenders = ["backend", "stock"] if from_pretrained else ["weightlift"]
    for name in (
        [] if from_pretrained else filter(None, (part.strip() for part in against.split(",")))
    ):
        if name not in measure.CONTENDERS:
            known = ", ".join(key for key in measure.CONTENDERS if key != "weightlift")
            raise typer.BadParameter(f"{name!r} is not one of {known}", param_hint="--against")
        if name not in contenders:
            contenders.append(name)
    if dtype is not None:
        _check_dtype(dtype)
        dtype = dtype.removeprefix("torch.")
    if device is Device.CUDA:
        from weightlift.allocation import TorchAllocator

        TorchAllocator()  # says why there is none
    for out in (json_out, plot_out):
        if out is not None and not out.absolute().parent.is_dir():
            raise FileNotFoundError(2, "its folder does not exist; make it first", str(out))
    if from_pretrained:
        job = model_job(files[0], device.value, dtype)
        files = [Path(file) for file in job.files]
    else:
        folders = [file for file in files if file.is_dir()]
        if folders:
            raise typer.BadParameter(f"{folders[0]} is a folder: add --from-pretrained")
        names = [str(file) for file in files]
        job = measure.Job("weightlift", tuple(names), device.value, dtype)
    title = _title(files, job)

    console = Console(highlight=False)
    with Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("measuring", total=len(contenders) * repeat)
        found = measure.compare(
            title,
            job,
            contenders,
            cold=cold,
            repeat=repeat,
            step=lambda name: progress.update(task, advance=1, description=f"measured {name}"),
        )
    console.print(f"[bold]{title}[/bold]", highlight=False)
    console.print(describe_run(found), style="dim")
    if found.samples:
        console.print()
        console.print(comparison_table(found, contenders[0]))
    for line in notes(found):
        console.print(line, markup=False, soft_wrap=True)
    if json_out is not None:
        json_out.write_text(json.dumps(_json(found, measure.machine()), indent=2) + "\n")
    if plot_out is not None and found.samples:
        from weightlift.cli.plot import plot

        plot([found], plot_out, f"Time to load, median of {repeat}")
    if contenders[0] not in found.samples:
        raise typer.Exit(1)


def _bench_distributed(files: list[Path], ranks: int, repeat: int, json_out: Path | None) -> None:
    from rich.console import Console

    from weightlift.cli import measure
    from weightlift.cli.bench_distributed import distributed_table, measure_ranks

    console = Console(highlight=False)
    with Console(stderr=True).status(f"measuring loads by {ranks} processes"):
        found = measure_ranks(files, ranks, repeat)
    size = format_bytes(found["file_bytes"])
    console.print(f"[bold]{files[0].name}, {size}, by {ranks} processes on gloo[/bold]")
    console.print()
    console.print(distributed_table(found))
    if json_out is not None:
        json_out.write_text(json.dumps({**_run(), "machine": measure.machine(), **found}) + "\n")


def model_job(folder: Path, device: str, dtype: str | None) -> Job:
    """The load of a model or pipeline by the class that its configuration names.

    Raises:
        CheckpointError: the folder has no configuration that names one, or no weights.
    """
    from weightlift.cli.measure import Job
    from weightlift.errors import CheckpointError

    config: dict[str, Any] = {}
    for name in ("model_index.json", "config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            break
    architectures = config.get("architectures") or []
    if config.get("_class_name"):
        where = f"diffusers:{config['_class_name']}"
    elif architectures:
        where = f"transformers:{architectures[0]}"
    else:
        raise CheckpointError(
            f"{folder}: it has no config.json or model_index.json that names a class"
        )
    found = sorted(folder.rglob("*.safetensors")) or sorted(folder.rglob("*.bin"))
    if not found:
        raise CheckpointError(f"{folder}: there are no weights in it")
    files = tuple(map(str, found))
    return Job("stock", files, device, dtype, folder=str(folder), model=where)


def _check_dtype(dtype: str) -> None:
    from weightlift.dtypes import parse_dtype

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
    warm = "warm, read in from beginning to end once"
    return (
        f"{'cold' if found.cold else warm}: before each load the page cache held {cache}; "
        f"{rounds} rounds in random order, a new process each; {format_bytes(backed)} of memory "
        f"on huge pages touched and freed before each"
    )


def comparison_table(comparison: Comparison, reference: str = "weightlift") -> Table:
    """A row for each contender; the times' ratio is to ``reference``'s."""
    from rich import box
    from rich.table import Table

    from weightlift.cli.plot import format_seconds

    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), header_style="bold"
    )
    forwards = any(s.forward_seconds is not None for c in comparison.samples.values() for s in c)
    titles = ["", "time", "load", "touch", "GB/s", "CPU", "memory", "ratio"]
    for title in [*titles, *(["to 1st forward"] if forwards else [])]:
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
            *([_forward(samples)] if forwards else []),
            style="bold" if name == reference else "",
        )
    table.caption = (
        "Medians; GB/s of the files' bytes; memory: the peak of what the load took for itself, "
        f"beside the page cache; ratio: time over {reference}'s, median of the rounds."
    )
    table.caption_justify = "left"
    return table


def _forward(samples: list[Sample]) -> str:
    from weightlift.cli.plot import format_seconds

    times = [s.seconds + s.forward_seconds for s in samples if s.forward_seconds is not None]
    return format_seconds(statistics.median(times)) if times else ""


def notes(comparison: Comparison) -> list[str]:
    """The I/O path that weightlift took, and who could not be measured."""
    lines = []
    for ours in ("weightlift", "backend"):
        if ours in comparison.samples:
            lines += [f"weightlift's way: {text}" for text in comparison.route(ours)]
    lines += [f"{name}: not measured: {why}" for name, why in comparison.refused.items()]
    return lines


def _run() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["weightlift", *sys.argv[1:]]),
    }


def _json(found: Comparison, machine: dict[str, Any]) -> dict[str, Any]:
    return {**_run(), "machine": machine, "comparisons": [found.to_json()]}
