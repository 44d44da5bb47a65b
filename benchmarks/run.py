"""The benchmark: weightlift and its peers on the same loads, in the same run.

    python benchmarks/run.py                      # all CPU workloads
    python benchmarks/run.py cast-down cast-up    # some
    python benchmarks/run.py --device cuda        # all CUDA workloads
    python benchmarks/run.py --scale 0.02         # quickly, on small files

Generated files are kept under --data. Each measurement is a separate process with the Python of its
contender's environment (`make bench-env`). Rounds are interleaved in random order, and the figure
is the median of the rounds' ratios. Runs are written to build/bench-runs;
`benchmarks/summary.py` makes the machine's summary of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

import floors
from judges import Figure, Rates
from summary import RUNS, first_line, machine_name
from weightlift.bench.comparison import Comparison
from weightlift.bench.conditions import NOT_BACKED, machine
from weightlift.bench.measure import Job, compare
from weightlift.bench.plot import format_seconds
from weightlift.bench.tables import describe_run
from weightlift.core.report import format_bytes
from workloads import CPU, CUDA, Workload

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = Path(__file__).with_name("peers.py")
ENVIRONMENTS = ROOT / ".bench"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join([*CPU, *CUDA])}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--data", type=Path, default=Path("build/bench-data"))
    parser.add_argument("--scale", type=float, default=1.0, help="of the files' sizes")
    parser.add_argument("--repeat", type=int, default=5, help="rounds, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the order within the rounds")
    parser.add_argument(
        "--out",
        type=Path,
        help="instead of build/bench-runs/DATE-MACHINE.json, or -2 where that is",
    )
    arguments = parser.parse_args()
    known = CUDA if arguments.device == "cuda" else CPU
    unknown = [name for name in arguments.workloads if name not in known]
    if unknown:
        parser.error(f"{unknown[0]}: --device {arguments.device} has {', '.join(known)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; `weightlift doctor` tells more")
    chosen = {name: known[name] for name in arguments.workloads or known}

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    start = time.monotonic()
    arguments.data.mkdir(parents=True, exist_ok=True)
    jobs = make_jobs(chosen, arguments.data, arguments.scale, console)
    before = measure_rates(jobs, console)
    now = datetime.datetime.now(datetime.timezone.utc)
    about: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        "scale": arguments.scale,
        "machine": machine(),
    }
    out = arguments.out or unused(f"{now:%Y-%m-%d}-{machine_name(about['machine'])}")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Results have no paths of the machine.
    paths = {arguments.out: "RESULT", arguments.data: "DATA", ROOT: "ROOT"}

    comparisons: dict[str, Comparison] = {}
    for name, comparison in run(chosen, jobs, arguments.repeat, arguments.seed):
        comparisons[name] = comparison
        # After each workload, so that a stopped run leaves its results.
        figures = write(out, about, before, chosen, comparisons, paths)
        verdict = "ok" if figures[name].passed else "missed"
        console.print(
            f"{name}: {figures[name].target}: {figures[name].measured}: {verdict}, "
            f"after {time.monotonic() - start:.0f} s",
            markup=False,
        )
    found = mean_rates(before, measure_rates(jobs, console))
    figures = write(out, about, found, chosen, comparisons, paths)
    show(console, chosen, comparisons, figures, found)
    print_methods(console, chosen, comparisons)
    for name, rate in found.items():
        console.print(f"{name}: {rate / 1e9:.1f} GB/s")
    console.print(f"\n{out} written; {time.monotonic() - start:.0f} s in all")
    return 0


def mean_rates(before: Rates, after: Rates) -> Rates:
    """The rates of a run. A machine that others share too may be faster or slower for a minute, so
    they are measured before and after the workloads."""
    return {name: (before[name] + after[name]) / 2 for name in before if name in after}


def write(
    out: Path,
    about: dict[str, Any],
    found: Rates,
    chosen: dict[str, Workload],
    comparisons: dict[str, Comparison],
    paths: dict[Path | None, str],
) -> dict[str, Figure]:
    """Writes the results so far, and returns their figures. ``paths`` get these names."""
    figures = {name: chosen[name].judge(made, found) for name, made in comparisons.items()}
    content = about | {
        "rates": found,
        "figures": {name: dataclasses.asdict(figure) for name, figure in figures.items()},
        "comparisons": [to_json(chosen[name], made, found) for name, made in comparisons.items()],
    }
    text = json.dumps(content, indent=1)
    for path, word in paths.items():
        text = text.replace(str(path), word) if path else text
    out.write_text(text + "\n")
    return figures


def unused(name: str) -> Path:
    """The file for the results. It does not replace an earlier run of the same day."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    paths = (RUNS / f"{name}.json" for name in names)
    return next(path for path in paths if not path.exists())


def make_jobs(
    chosen: dict[str, Workload], data: Path, scale: float, console: Console
) -> dict[str, Job]:
    jobs = {}
    for name, workload in chosen.items():
        with console.status(f"making the files of {name}"):
            jobs[name] = workload.job(data, scale)
    return jobs


def measure_rates(jobs: dict[str, Job], console: Console) -> Rates:
    sizes = sorted((Path(file).stat().st_size, file) for job in jobs.values() for file in job.files)
    if not sizes:
        return {}
    # The smallest file that is large enough, because it is read as a whole.
    chosen = next((file for size, file in sizes if size >= floors.MOST), sizes[-1][1])
    with console.status("measuring what the machine gives"):
        return floors.measure(Path(chosen))


def run(
    chosen: dict[str, Workload], jobs: dict[str, Job], repeat: int, seed: int
) -> Iterator[tuple[str, Comparison]]:
    rounds = {name: math.ceil(workload.rounds * repeat) for name, workload in chosen.items()}
    total = sum(len(workload.contenders) * rounds[name] for name, workload in chosen.items())
    with Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("measuring", total=total)
        for name, workload in chosen.items():
            progress.update(task, description=name)
            found = compare(
                name,
                jobs[name],
                workload.contenders,
                cold=workload.cold,
                repeat=rounds[name],
                seed=seed,
                touched=workload.touched,
                memory=workload.memory,
                adapters=ADAPTERS,
                environments=ENVIRONMENTS,
                step=lambda _: progress.advance(task),
            )
            yield name, found


def floor_of(
    workload: Workload, comparison: Comparison, contender: str, found: Rates
) -> float | None:
    """The lower bound of the load's time on this machine, in seconds."""
    if workload.floor is None or contender not in comparison.samples:
        return None
    files = comparison.file_bytes
    given = comparison.samples[contender][0].bytes
    if workload.floor == "memory":
        new = "new memory, not backed" if comparison.memory == NOT_BACKED else "new memory"
        return max(files / found["page cache"], given / found[new])
    if workload.floor == "link":
        return files / min(found["pinned memory to the GPU"], found["page cache to memory"])
    rate = found.get({"mapped": "page cache, mapped", "disk": "disk, direct"}[workload.floor])
    return None if rate is None else files / rate


def in_turn(
    workload: Workload, comparison: Comparison, contender: str, found: Rates
) -> float | None:
    """The seconds of a load into new memory if the same threads read the source, get the memory and
    write it, one after the other. The floor is the larger of reading and getting memory alone."""
    if workload.floor != "memory" or contender not in comparison.samples:
        return None
    backed = comparison.memory != NOT_BACKED
    new = found["new memory, written" if backed else "new memory, not backed"]
    given = comparison.samples[contender][0].bytes
    return comparison.file_bytes / found["page cache"] + given / new


def to_json(workload: Workload, comparison: Comparison, found: Rates) -> dict[str, Any]:
    content = comparison.to_json()
    content["about"] = workload.what
    for name, contender in content["contenders"].items():
        floor = floor_of(workload, comparison, name, found)
        contender["floor_seconds"] = floor
        contender["floor_multiple"] = None if floor is None else comparison.median(name) / floor
        turns = in_turn(workload, comparison, name, found)
        contender["in_turn_multiple"] = None if turns is None else comparison.median(name) / turns
    return content


def show(
    console: Console,
    chosen: dict[str, Workload],
    comparisons: dict[str, Comparison],
    figures: dict[str, Figure],
    found: Rates,
) -> None:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        header_style="bold",
        padding=(0, 1, 0, 0),
    )
    table.add_column("workload", no_wrap=True, min_width=17)
    table.add_column("contender", no_wrap=True, min_width=20)
    for title, width in (("time", 8), ("GB/s", 5), ("floor", 7), ("memory", 8)):
        table.add_column(title, no_wrap=True, min_width=width, justify="right")
    table.add_column("target", max_width=18)
    table.add_column("measured", no_wrap=True, min_width=11, justify="right")
    table.add_column("", no_wrap=True, min_width=6)
    for name, workload in chosen.items():
        comparison, figure = comparisons[name], figures[name]
        ends = [figure.target, figure.measured, "[green]ok" if figure.passed else "[red]missed"]
        rows = [c for c in workload.contenders if c in comparison.samples]
        if not rows:
            table.add_row(name, "none could be measured", *[""] * 4, *ends)
        for place, contender in enumerate(rows):
            rate = ""
            if comparison.job.what == "load":
                rate = f"{comparison.rate(contender) / 1e9:.2f}"
            floor = floor_of(workload, comparison, contender, found)
            table.add_row(
                name if place == 0 else "",
                contender,
                format_seconds(comparison.median(contender)),
                rate,
                "" if floor is None else f"{comparison.median(contender) / floor:.2f}x",
                format_bytes(comparison.peak(contender)),
                *(ends if place == 0 else [""] * 3),
            )
    console.print(table)
    console.print()


def print_methods(
    console: Console, chosen: dict[str, Workload], comparisons: dict[str, Comparison]
) -> None:
    """The conditions and phases of each measurement, and the contenders that could not be measured,
    with the reason."""
    refused: dict[tuple[str, str], list[str]] = {}
    for name, workload in chosen.items():
        comparison = comparisons[name]
        for contender, why in comparison.refused.items():
            refused.setdefault((contender, first_line(why)), []).append(name)
        if comparison.job.what != "load":
            console.print(f"[bold]{name}[/bold]: {workload.what}")
            continue
        size = format_bytes(comparison.file_bytes)
        console.print(f"[bold]{name}[/bold]: {size}, {workload.what}; {describe_run(comparison)}")
        for contender in comparison.samples:
            parts = [
                f"{phase} {format_seconds(seconds)}"
                for phase, seconds in comparison.phases(contender).items()
                if seconds >= 1e-4
            ]
            if contender in comparison.conversions:
                took = format_seconds(comparison.conversions[contender])
                parts.append(f"converted beforehand in {took}")
            line = f"  {contender}: {', '.join(parts)}"
            console.print(line, style="dim", markup=False, soft_wrap=True)
            pages = [f"host memory: {text}" for text in comparison.pages(contender)]
            for way in [*comparison.route(contender), *pages]:
                console.print(f"    {way}", style="dim", markup=False, soft_wrap=True)
    if refused:
        console.print("\n[bold]not measured[/bold]")
    for (contender, why), names in refused.items():
        line = f"  {contender}: {why} ({', '.join(names)})"
        console.print(line, markup=False, soft_wrap=True)
    console.print()


if __name__ == "__main__":
    sys.exit(main())
