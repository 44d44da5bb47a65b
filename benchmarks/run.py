"""The benchmark: each target of the design, measured against the reference in the same run.

    python benchmarks/run.py                      # all CPU workloads
    python benchmarks/run.py cast-down cast-up    # some
    python benchmarks/run.py --device cuda        # all CUDA workloads

Files are made by code and kept under --data. Each measurement is a process of its own; rounds are
interleaved in random order, and the figure is the median of the rounds' ratios. The results are
written to benchmarks/results.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from bench_data import (
    llama_1b,
    llama_many,
    many_small,
    model,
    moe_many,
    one_file,
    torch_file,
    unet_860m,
)
from weightlift.cli.bench import describe_run
from weightlift.cli.measure import Comparison, Job, compare, machine
from weightlift.cli.plot import format_seconds, plot
from weightlift.report import format_bytes

OURS, REFERENCE = "weightlift", "safetensors"
PEERS = ["safetensors-prefetch", "fastsafetensors", "instanttensor", "runai-model-streamer"]
GB = 10**9
RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured figure beside its target."""

    target: str
    measured: str
    passed: bool


@dataclasses.dataclass(frozen=True)
class Workload:
    """A load whose figure has a target.

    Attributes:
        what: for the reader.
        job: makes the files that it needs in a folder, at a scale, and names the load.
        judge: the figure; it gets the ceilings on CUDA, else nothing.
    """

    what: str
    job: Callable[[Path, float], Job]
    judge: Callable[[Comparison, dict[str, float]], Figure]
    contenders: tuple[str, ...] = (OURS, REFERENCE)
    cold: bool = False
    touched: bool = True
    # Short loads are measured more often: their figures scatter more, and it costs little.
    rounds: int = 1


def ratio_at_most(
    limit: float, to: str = REFERENCE, ours: str = OURS
) -> Callable[[Comparison, dict[str, float]], Figure]:
    """Our time over the reference's."""

    def judge(found: Comparison, _: dict[str, float]) -> Figure:
        ratio = found.time_ratio(ours, to)
        return _figure(f"<= {limit:g}x the time of {to}", ratio, "x", lambda r: r <= limit)

    return judge


def faster_at_least(
    limit: float, than: str = REFERENCE, ours: str = OURS
) -> Callable[[Comparison, dict[str, float]], Figure]:
    """The reference's time over ours."""

    def judge(found: Comparison, _: dict[str, float]) -> Figure:
        ratio = found.time_ratio(than, ours)
        return _figure(f">= {limit:g}x faster than {than}", ratio, "x", lambda r: r >= limit)

    return judge


def microseconds_a_tensor(limit: float, ours: str) -> Callable[..., Figure]:
    """What the call costs beside the bytes, which are next to none."""

    def judge(found: Comparison, _: dict[str, float]) -> Figure:
        each = None
        if ours in found.samples:
            each = found.median(ours) / found.samples[ours][0].tensors * 1e6
        return _figure(f"<= {limit:g} microseconds a tensor", each, " us", lambda us: us <= limit)

    return judge


def seconds_at_most(limit: float) -> Callable[[Comparison, dict[str, float]], Figure]:
    def judge(found: Comparison, _: dict[str, float]) -> Figure:
        seconds = found.median(OURS) if OURS in found.samples else None
        scaled = None if seconds is None else seconds * 1e3
        return _figure(f"<= {limit * 1e3:g} ms", scaled, " ms", lambda ms: ms <= limit * 1e3)

    return judge


def share_of_ceiling(limit: float) -> Callable[[Comparison, dict[str, float]], Figure]:
    """Our rate over the smaller of the link's and the page cache's."""

    def judge(found: Comparison, ceilings: dict[str, float]) -> Figure:
        share = None
        if OURS in found.samples and ceilings:
            share = found.rate(OURS) / min(ceilings.values()) * 100
        return _figure(f">= {limit:g} % of the ceiling", share, " %", lambda s: s >= limit)

    return judge


def cast_to_device(limit: float) -> Callable[[Comparison, dict[str, float]], Figure]:
    """Our time over the slower of reading the file on the host and sending the result."""

    def judge(found: Comparison, ceilings: dict[str, float]) -> Figure:
        ratio = None
        if OURS in found.samples and ceilings:
            sample = found.samples[OURS][0]
            floor = max(
                found.file_bytes / ceilings["page cache to memory"],
                sample.bytes / ceilings["pinned memory to the GPU"],
            )
            ratio = found.median(OURS) / floor
        return _figure(f"<= {limit:g}x the bytes' time", ratio, "x", lambda r: r <= limit)

    return judge


def times_empty(limit: float) -> Callable[[Comparison, dict[str, float]], Figure]:
    """Our time over that of a loop of torch.empty."""

    def judge(found: Comparison, _: dict[str, float]) -> Figure:
        ratio = found.time_ratio(OURS, "torch.empty")
        return _figure(f"<= {limit:g}x torch.empty", ratio, "x", lambda r: r <= limit)

    return judge


def _figure(target: str, value: float | None, unit: str, passes: Callable[[float], bool]) -> Figure:
    if value is None:
        return Figure(target, "not measured", False)
    return Figure(target, f"{value:.{1 if value >= 20 else 2}f}{unit}", passes(value))


def _file(name: str, count: float, stored: torch.dtype, **job: Any) -> Callable[[Path, float], Job]:
    """A job on a file of about ``count`` bytes, times the scale; ``job`` are further fields."""

    def make(data: Path, scale: float) -> Job:
        size = int(count * scale)
        path = one_file(data / f"{name}-{size // 10**6}mb.safetensors", size, stored)
        return Job(OURS, (str(path),), **job)

    return make


def _one_tensor(data: Path, scale: float) -> Job:
    from safetensors import safe_open

    job = _file("bf16", 2 * GB, torch.bfloat16)(data, scale)
    with safe_open(job.files[0], framework="pt") as opened:
        names = sorted(name for name in opened.keys() if "proj" in name)  # noqa: SIM118
    return dataclasses.replace(job, tensor=names[len(names) // 2])


def _small(device: str) -> Callable[[Path, float], Job]:
    def make(data: Path, scale: float) -> Job:
        count = max(1, int(100_000 * scale))
        return Job(OURS, (str(many_small(data / f"small-{count}.safetensors", count)),), device)

    return make


def _bin(count: float, stored: torch.dtype, **job: Any) -> Callable[[Path, float], Job]:
    """A job on a file of ``torch.save``, and the same tensors as safetensors beside it."""

    def make(data: Path, scale: float) -> Job:
        size = int(count * scale)
        name = f"twin-{size // 10**6}mb-{str(stored).removeprefix('torch.')}"
        one_file(data / f"{name}.safetensors", size, stored)
        return Job(OURS, (str(torch_file(data / f"{name}.bin", size, stored)),), **job)

    return make


def _model(
    name: str,
    build: Callable[[], torch.nn.Module],
    where: str,
    stored: torch.dtype,
    shards: int = 1,
    **job: Any,
) -> Callable[[Path, float], Job]:
    """A job on a model's folder; ``where`` is its class, as ``module:Class``."""

    def make(data: Path, scale: float) -> Job:
        stem = "diffusion_pytorch_model" if where.startswith("diffusers") else "model"
        files = model(data / name, build, stem, shards, stored)
        paths = tuple(map(str, files))
        return Job("stock", paths, folder=str(data / name), model=where, **job)

    return make


_LLAMA = ("llama-1b", llama_1b, "transformers:LlamaForCausalLM", torch.bfloat16, 5)
_UNET = ("unet-860m", unet_860m, "diffusers:UNet2DConditionModel", torch.float32)
_MANY = ("llama-9000", llama_many, "transformers:LlamaForCausalLM", torch.bfloat16)


def _moe(data: Path, scale: float) -> Job:
    files = tuple(map(str, moe_many(data / "moe-9000")))
    where = "transformers:Qwen3MoeForCausalLM"
    return Job("stock", files, dtype="bfloat16", folder=str(data / "moe-9000"), model=where)


MODELS = {
    "bin-read": Workload(
        ".bin, into own memory",
        _bin(2 * GB, torch.bfloat16),
        ratio_at_most(1.05, "twin"),
        (OURS, "twin", "torch-plain"),
    ),
    "bin-map": Workload(
        ".bin, mapped",
        _bin(2 * GB, torch.bfloat16, mode="map"),
        ratio_at_most(1.05, "twin"),
        (OURS, "twin", "torch"),
    ),
    "bin-cast": Workload(
        ".bin, fp32 -> bf16",
        _bin(2 * GB, torch.float32, dtype="bfloat16"),
        ratio_at_most(1.05, "twin"),
        (OURS, "twin", "torch"),
    ),
    "into-same": Workload(
        "load_into, 1.1 B parameters in 5 shards, against mapping the files",
        _model(*_LLAMA, dtype="bfloat16"),
        ratio_at_most(1.05, OURS, "load_into"),
        ("load_into", OURS),
    ),
    "into-cast": Workload(
        "load_into, 1.1 B parameters, bf16 -> fp32",
        _model(*_LLAMA, dtype="float32"),
        faster_at_least(2.5, "stock", "load_into"),
        ("load_into", "stock"),
    ),
    "into-9000": Workload(
        "load_into, a model of more than 9,000 tensors",
        _model(*_MANY, dtype="bfloat16"),
        microseconds_a_tensor(20, "load_into"),
        ("load_into",),
        touched=False,
    ),
    "transformers-same": Workload(
        "transformers, 1.1 B parameters in 5 shards, bf16 kept",
        _model(*_LLAMA, dtype="bfloat16"),
        ratio_at_most(1.05, "stock", "backend"),
        ("backend", "stock"),
    ),
    "transformers-cast": Workload(
        "transformers, 1.1 B parameters, bf16 -> fp32",
        _model(*_LLAMA, dtype="float32"),
        faster_at_least(2.5, "stock", "backend"),
        ("backend", "stock"),
    ),
    "transformers-moe": Workload(
        "transformers, a MoE of more than 9,000 tensors, the call alone",
        _moe,
        ratio_at_most(0.5, "stock", "backend"),
        ("backend", "stock"),
        touched=False,
    ),
    "unet-same": Workload(
        "diffusers, the UNet of Stable Diffusion 1.5, fp32",
        _model(*_UNET, dtype="float32"),
        ratio_at_most(1.05, "stock", "ModelMixin"),
        ("ModelMixin", "backend", "stock"),
    ),
    "unet-cast": Workload(
        "diffusers, the UNet of Stable Diffusion 1.5, fp32 -> bf16",
        _model(*_UNET, dtype="bfloat16"),
        faster_at_least(2.5, "stock", "ModelMixin"),
        ("ModelMixin", "backend", "stock"),
    ),
}
CPU = {
    "same-2gb": Workload(
        "bf16, every page touched", _file("bf16", 2 * GB, torch.bfloat16), ratio_at_most(1.05)
    ),
    "one-tensor": Workload(
        "open the file, read one tensor", _one_tensor, ratio_at_most(1.05), rounds=3
    ),
    "cast-down": Workload(
        "fp32 -> bf16",
        _file("fp32", 3 * GB, torch.float32, dtype="bfloat16"),
        faster_at_least(2.5),
    ),
    "cast-up": Workload(
        "bf16 -> fp32",
        _file("bf16", 2 * GB, torch.bfloat16, dtype="float32"),
        faster_at_least(2.5),
    ),
    # The calls alone: the pages are the same for all, and their touch would hide the calls.
    "small-100k": Workload(
        "100,000 tensors of 1 to 16 KiB, the call alone",
        _small("cpu"),
        ratio_at_most(0.4),
        touched=False,
    ),
    "cold-2gb": Workload(
        "bf16, not in the page cache",
        _file("bf16", 2 * GB, torch.bfloat16),
        faster_at_least(2.0),
        cold=True,
    ),
    "import": Workload(
        "import, on top of torch's", lambda *_: Job(OURS, what="import"), seconds_at_most(0.05)
    ),
    **MODELS,
}
CUDA = {
    "cuda-same": Workload(
        "bf16",
        _file("bf16", 8 * GB, torch.bfloat16, device="cuda"),
        share_of_ceiling(95),
        (OURS, REFERENCE, *PEERS),
    ),
    "cuda-cast": Workload(
        "fp32 -> bf16",
        _file("fp32", 4 * GB, torch.float32, device="cuda", dtype="bfloat16"),
        cast_to_device(1.1),
    ),
    "cuda-small-100k": Workload(
        "100,000 tensors of 1 to 16 KiB",
        _small("cuda"),
        times_empty(2),
        (OURS, REFERENCE, "torch.empty"),
    ),
}


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
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results/DATE-MACHINE.json")
    parser.add_argument("--plot", type=Path, help="draw the medians here")
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
    jobs = make_jobs(chosen, arguments.data, arguments.scale, console)
    ceilings: dict[str, float] = {}
    if arguments.device == "cuda":
        ceilings = measure_ceilings(jobs, arguments.repeat)
    comparisons = run(chosen, jobs, arguments.repeat, arguments.seed)
    figures = {
        name: workload.judge(comparisons[name], ceilings) for name, workload in chosen.items()
    }

    now = datetime.datetime.now(datetime.timezone.utc)
    out = arguments.out or RESULTS / f"{now:%Y-%m-%d}-{short_name(arguments.device)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "date": now.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        "scale": arguments.scale,
        "machine": machine(),
        "ceilings": ceilings,
        "figures": {name: dataclasses.asdict(figure) for name, figure in figures.items()},
        "comparisons": [comparison.to_json() for comparison in comparisons.values()],
    }
    # Recorded results hold no paths of the machine.
    text = json.dumps(content, indent=1).replace(str(arguments.data), "DATA")
    out.write_text(text + "\n")
    if arguments.plot is not None:
        plot(list(comparisons.values()), arguments.plot, "Time to load, medians")
    show(console, chosen, comparisons, figures)
    for name, rate in ceilings.items():
        console.print(f"{name}: {rate / 1e9:.1f} GB/s")
    console.print(f"\n{out} written; {time.monotonic() - start:.0f} s in all")
    return 0


def make_jobs(
    chosen: dict[str, Workload], data: Path, scale: float, console: Console
) -> dict[str, Job]:
    jobs = {}
    for name, workload in chosen.items():
        with console.status(f"making the files of {name}"):
            jobs[name] = workload.job(data, scale)
    return jobs


def run(
    chosen: dict[str, Workload], jobs: dict[str, Job], repeat: int, seed: int
) -> dict[str, Comparison]:
    comparisons = {}
    total = sum(len(w.contenders) * w.rounds * repeat for w in chosen.values())
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
            comparisons[name] = compare(
                name,
                jobs[name],
                workload.contenders,
                cold=workload.cold,
                repeat=repeat * workload.rounds,
                seed=seed,
                touched=workload.touched,
                step=lambda _: progress.advance(task),
            )
    return comparisons


def show(
    console: Console,
    chosen: dict[str, Workload],
    comparisons: dict[str, Comparison],
    figures: dict[str, Figure],
) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("workload", no_wrap=True)
    for title in ("contender", "time", "GB/s", "memory", "target", "measured", ""):
        right = title in ("time", "GB/s", "memory", "measured")
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    for name in chosen:
        comparison, figure = comparisons[name], figures[name]
        ends = [figure.target, figure.measured, "[green]PASS" if figure.passed else "[red]missed"]
        for place, contender in enumerate(comparison.samples):
            rate = ""
            if comparison.job.what == "load":
                rate = f"{comparison.rate(contender) / 1e9:.2f}"
            table.add_row(
                name if place == 0 else "",
                contender,
                format_seconds(comparison.median(contender)),
                rate,
                format_bytes(comparison.peak(contender)),
                *(ends if contender == chosen[name].contenders[0] else ["", "", ""]),
            )
        for contender, why in comparison.refused.items():
            table.add_row("", contender, "", "", "", f"[dim]not measured: {why}")
    console.print(table)
    console.print()
    for name, workload in chosen.items():
        comparison = comparisons[name]
        if comparison.job.what != "load":
            console.print(f"[bold]{name}[/bold]: {workload.what}")
            continue
        size = format_bytes(comparison.file_bytes)
        console.print(f"[bold]{name}[/bold]: {size}, {workload.what}; {describe_run(comparison)}")
        if OURS in comparison.samples:
            for way in comparison.route(OURS):
                console.print(f"  {way}", style="dim", markup=False)


def measure_ceilings(jobs: dict[str, Job], repeat: int) -> dict[str, float]:
    """Bytes a second that no load can beat: pinned memory to the GPU, page cache to memory."""
    done = subprocess.run(
        [sys.executable, "-c", _PINNED], check=True, capture_output=True, text=True
    )
    ceilings = {"pinned memory to the GPU": float(done.stdout)}
    job = max(jobs.values(), key=lambda job: Path(job.files[0]).stat().st_size)
    reading = dataclasses.replace(job, device="cpu", dtype=None, mode="read")
    found = compare("ceiling", reading, [OURS], repeat=repeat)
    if OURS in found.samples:
        # The engine's own time: the ring that a load to the GPU goes through is there before.
        seconds = statistics.median(
            sample.report["seconds"] for sample in found.samples[OURS] if sample.report
        )
        ceilings["page cache to memory"] = found.file_bytes / seconds
    return ceilings


# In a process of its own, so that its pinned memory is gone when the loads are measured.
_PINNED = """
import time, torch
source = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
target = torch.empty_like(source, device="cuda")
rates = []
for _ in range(20):
    torch.cuda.synchronize()
    start = time.perf_counter()
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    rates.append(source.nbytes / (time.perf_counter() - start))
print(max(rates))
"""


def short_name(device: str) -> str:
    """The machine in a file name: its GPU, or its CPU and how many."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        found = machine()
        name = f"{found['cpu']} {found['cpus']} cpus"
    words = re.sub(r"\(.*?\)|processor|cpu @.*", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
