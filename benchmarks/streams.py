"""Measures models that load while they run, and models that are larger than their memory.

    python benchmarks/streams.py                   # all parts that the record has not
    python benchmarks/streams.py step leaks        # these, measured anew
    python benchmarks/streams.py --scale 0.05      # quickly, on small models

Writes benchmarks/results/streams/MACHINE.json, part by part, so that a stopped run can go on; at
another scale, build/bench-runs/streams-SCALE-MACHINE.json. Then `python benchmarks/report.py`.

    load      a cold file of 4 GB that runs while it loads; 1,000 modules that are in the page cache
    step      a step of 6 GB in 2 GB, by weightlift, by accelerate, and with all of it in memory
    hooks     what 1,000 small modules cost that stay, and what those cost that are read
    leaks     200 steps, and what the process has more after 100 and after all of them
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import floors
from judges import Figure
from rounds import made_by, write_parts
from summary import RESULTS, RUNS, machine_name
from weightlift.bench.conditions import machine
from weightlift.bench.stream_child import drop_from_page_cache
from weightlift.bench.streaming import (
    Steps,
    StreamRun,
    compare_streams,
    describe,
    layers_bytes,
    plot_timeline,
    stack_layers,
)
from weightlift.core.report import format_bytes

GB = 10**9
MIB = 1 << 20
# Beyond the budget and the libraries: the heap, and some page cache.
BEYOND = 256 * MIB
# So small that a module's own work is negligible. A layer has three modules with weights.
SMALL_WIDTH, SMALL_LAYERS = 64, 334
# Steps of which a record has the time each.
MOST_SECONDS = 10
STEP_DISK = "disk, direct, once through"


@dataclasses.dataclass(frozen=True)
class Result:
    """A workload of the summary.

    Attributes:
        name, about: the workload's name and description.
        bytes: the model's size.
        runs: the contenders' runs.
        figure: the figure and its target.
    """

    name: str
    about: str
    bytes: int
    runs: Sequence[StreamRun]
    figure: Figure


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--data", type=Path, default=Path("build/bench-data"))
    parser.add_argument("--out", type=Path, help="the record")
    parser.add_argument("--scale", type=float, default=1.0, help="of the models' sizes")
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"{unknown[0]}: the parts are {', '.join(PARTS)}")
    name = machine_name(machine())
    out: Path = arguments.out or (
        RESULTS / "streams" / f"{name}.json"
        if arguments.scale == 1
        else RUNS / f"streams-{arguments.scale:g}-{name}.json"
    )
    arguments.out = out
    for folder in (arguments.data, RUNS, out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts or PARTS:
        if part in parts_of(out) and not arguments.parts:
            print(f"{part}: {out} has it")
            continue
        start, load = time.monotonic(), os.getloadavg()[0]
        found = PARTS[part](arguments)
        write(out, part, arguments, load, found)
        print(f"{part}: {time.monotonic() - start:.0f} s, written to {out}\n", flush=True)
    return 0


def measure_load(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs run.py, which has these workloads."""
    out = RUNS / f"streams-load-{arguments.scale:g}.json"
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "layers-cold",
               "layers-1000", "--repeat", "3", "--scale", str(arguments.scale),
               "--data", str(arguments.data), "--out", str(out)]  # fmt: skip
    subprocess.run(command, check=True)
    run = json.loads(out.read_text(encoding="utf-8"))
    workloads = []
    for one in run["comparisons"]:
        contenders = {}
        for name, found in one["contenders"].items():
            seconds = [s["load_seconds"] + s["touch_seconds"] for s in found["samples"]]
            contenders[name] = {
                "seconds": [round(s, 4) for s in seconds],
                "peak_bytes": found["peak_anon_bytes"],
            }
        workload = {
            "name": one["name"], "about": one["about"], "bytes": one["file_bytes"],
            "figure": run["figures"].get(one["name"]), "contenders": contenders,
            "refused": one["refused"],
        }  # fmt: skip
        workloads.append(workload)
    return {"workloads": workloads}


def measure_step(arguments: argparse.Namespace) -> dict[str, Any]:
    size, budget = int(6 * GB * arguments.scale), int(2 * GB * arguments.scale)
    steps = Steps(5, rows=8, beyond=BEYOND, keep=arguments.data)
    runs = compare_streams(f"stack:{size}", budget, ("weightlift", "accelerate", "whole"), steps)
    (file,) = arguments.data.glob(f"stack-{layers_of(size)}-*/model.safetensors")
    rate = disk_rate(file)
    ours = runs[0]  # the only one if it failed
    if any(run.error for run in runs if run.contender != "accelerate"):
        figure = Figure("", "not measured", False)
    else:
        _, theirs, whole = runs
        read = ours.streamed_bytes / rate
        share = max(read, whole.median) / ours.median
        ratio = theirs.median / ours.median  # nan if it could not be measured, and then missed
        over = (ours.peak_bytes - budget) / MIB
        figure = Figure(
            ">= 90 % of the floor, >= 3x accelerate, <= budget + 64 MiB",
            f"{share * 100:.0f} %, {ratio:.2f}x, {over:+.1f} MiB",
            share >= 0.9 and ratio >= 3 and over <= 64,
        )
        print(
            f"disk {rate / GB:.2f} GB/s: {read:.3f} s for {ours.streamed_bytes / GB:.2f} GB; "
            f"computing {whole.median:.3f} s"
        )
        picture = arguments.out.with_name(f"{arguments.out.stem}-step.png")
        title = f"A step of {format_bytes(size)} in {format_bytes(budget)} of memory"
        plot_timeline(ours, picture, title)
    about = f"a step of a model of {format_bytes(size)} in {format_bytes(budget)}"
    if ours.limit_bytes:
        about += f", in a cgroup of {format_bytes(ours.limit_bytes)}"
    return record([Result("stream-step", about, size, runs, figure)], {STEP_DISK: rate})


def layers_of(size: int) -> int:
    return stack_layers(size, Steps().width)


def disk_rate(file: Path) -> float:
    """The rate of direct reads in bytes/s, in one pass over the file: a second pass may find it in
    a cache of the virtual machine's host."""
    drop_from_page_cache(str(file))
    floors.REPEAT = 1
    return floors.read_rate(file, file.stat().st_size // MIB * MIB, direct=True)


def measure_hooks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each step takes a few milliseconds; warm, with one thread."""
    layers = max(2, int(SMALL_LAYERS * arguments.scale))
    size = layers_bytes(layers, SMALL_WIDTH)
    modules = 3 * layers
    steps = Steps(100, rows=1, threads=1, width=SMALL_WIDTH, keep=arguments.data)
    results = []
    for name, part, limit, about in (
        ("stream-hooks", 1.5, 20, "1,002 small modules, all of which stay in memory"),
        ("stream-small", 0.3, 60, "1,002 small modules in 30 % of their memory"),
    ):
        runs = compare_streams(f"stack:{size}", int(size * part), ("weightlift", "whole"), steps)
        ours, whole = runs
        each = (ours.median - whole.median) / modules * 1e6
        work = statistics.median(ours.cpu_seconds or [0]) - statistics.median(
            whole.cpu_seconds or [0]
        )
        figure = Figure(
            f"<= {limit} us a module",
            f"{each:.1f} us, of {work / modules * 1e6:.1f} us of processors",
            each <= limit,
        )
        results.append(Result(name, about, size, runs, figure))
    return record(results, {})


def measure_leaks(arguments: argparse.Namespace) -> dict[str, Any]:
    size = int(600e6 * max(arguments.scale, 0.3))  # in layers of 34 MB
    steps = Steps(220, rows=1, beyond=BEYOND, keep=arguments.data)  # the first 20 fill caches
    runs = compare_streams(f"stack:{size}", size // 3, ("weightlift",), steps)
    grown = runs[0].grown
    figure = Figure(
        "nothing more after 100 steps, nor after 200",
        ", ".join(
            " and ".join(f"{at[what]:+,}" for at in grown) + f" {what}"
            for what in (grown[0] if grown else ())
        )
        or "not measured",
        # Python takes memory from the system in units of 1 MiB.
        bool(grown)
        and all(at["bytes"] <= MIB and at["threads"] <= 0 and at["files"] <= 0 for at in grown),
    )
    about = f"200 steps of a model of {format_bytes(size)} in {format_bytes(size // 3)}"
    return record([Result("stream-leaks", about, size, runs, figure)], {})


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "load": measure_load,
    "step": measure_step,
    "hooks": measure_hooks,
    "leaks": measure_leaks,
}


def record(results: Sequence[Result], rates: dict[str, float]) -> dict[str, Any]:
    """Prints the results of a part, and returns what the record gets."""
    for result in results:
        print(f"{result.name}: {result.about}")
        print("\n".join(f"  {line}" for line in describe(result.runs)))
        verdict = "ok" if result.figure.passed else "missed"
        print(f"  {result.figure.target}: {result.figure.measured}: {verdict}", flush=True)
    return {
        "rates": {name: round(rate) for name, rate in rates.items()},
        "workloads": [
            {
                "name": result.name,
                "about": result.about,
                "bytes": result.bytes,
                "figure": dataclasses.asdict(result.figure),
                "contenders": {run.contender: contender(run) for run in result.runs if run.seconds},
                "refused": {run.contender: run.error for run in result.runs if run.error},
            }
            for result in results
        ],
    }


def contender(run: StreamRun) -> dict[str, Any]:
    return {
        "seconds": [round(seconds, 6) for seconds in run.seconds[-MOST_SECONDS:]],
        "median": statistics.median(run.seconds),
        "cpu_seconds": statistics.median(run.cpu_seconds),
        "peak_bytes": run.peak_bytes,
        "limit_bytes": run.limit_bytes,
    }


def parts_of(out: Path) -> dict[str, Any]:
    """The parts of a record that were measured on this machine as it is now."""
    if not out.exists():
        return {}
    known = json.loads(out.read_text(encoding="utf-8"))
    return dict(known["parts"]) if known["machine"] == machine() else {}


def write(
    out: Path, part: str, arguments: argparse.Namespace, load: float, found: dict[str, Any]
) -> None:
    scale = [] if arguments.scale == 1 else ["--scale", f"{arguments.scale:g}"]
    about = {**made_by(__file__, part, *scale), "load_average": round(load, 2)}
    parts = {**parts_of(out), part: {**about, **found}}
    write_parts(out, {name: parts[name] for name in PARTS if name in parts})


if __name__ == "__main__":
    sys.exit(main())
