"""The regression gate, which does not depend on the machine's speed: compares the instructions,
system calls and allocations of loads with the budgets in budgets.json.

    python tests/perf/run.py             # everything, minutes (`make check-perf`)
    python tests/perf/run.py --quick     # system calls and allocations, seconds (in `make test`)
    python tests/perf/run.py --update    # writes what it counts as the new budgets
    python tests/perf/run.py NAME...     # these loads
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from loads import LOADS

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / "build" / "perf"
BUDGETS = HERE / "budgets.json"

# It depends on chance which of two threads waits. The simulated driver calls getpid(2) in each
# call.
NOT_COUNTED = {"futex", "sched_yield", "restart_syscall", "clock_nanosleep", "exit", "getpid"}
# strace(1) of Debian 12 is older than these calls.
NEW_CALLS = {"syscall_0x1c3": "cachestat", "syscall_0x1c4": "fchmodat2"}

# The distance of a limit from the count: a share, and a constant. A whole load may have a few more
# or fewer system calls, depending on where the heap ends.
ROOM = {
    "instructions": (0.05, 50.0),
    "engine instructions": (0.05, 20.0),
    "engine instructions a MiB": (0.05, 500.0),
    "native allocations": (0.02, 0.05),
    "Python allocations": (0.02, 0.05),
    "driver calls": (0.0, 0.02),
    "a call a unit": (0.0, 0.02),
    "a call in all": (0.0, 0.0),
    "a heap's call in all": (0.1, 4.0),
}
HEAP_CALLS = {"brk()", "mmap()", "munmap()", "madvise()"}
# Smaller costs for each unit are chance.
LEAST_CALLS = 0.01
# Loads above their budgets are counted so many times more, and the least counts: which thread wakes
# first changes some counts by a few percent.
AGAIN = 2

Figures = dict[str, float]


def environment() -> dict[str, str]:
    """Conditions of the counts that are not in this repository."""
    packages = ("torch", "safetensors", "transformers", "diffusers", "huggingface_hub", "numpy")
    optimized = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    return {
        "python": f"{platform.python_version()}, {platform.python_compiler()}"
        + (", --enable-optimizations" if optimized else ""),
        "C library": os.confstr("CS_GNU_LIBC_VERSION") or "",
        **{name: version(name) for name in packages},
    }


def build_counters() -> Path:
    library = WORK / "counters.so"
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        sys.exit("the counters need a C++ compiler")
    include = sysconfig.get_paths()["include"]
    source = HERE / "counters.cc"
    command = [compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    # Resolved lazily, because strace and valgrind preload the library too, without Python.
    command += ["-Wl,-z,lazy"]
    subprocess.run([*command, f"-I{include}", "-o", library, source], check=True)
    return library


def child(
    counter: str, loads: list[str], before: Sequence[str] = ()
) -> dict[str, list[dict[str, int]]]:
    """The counts of loads.py itself."""
    command = [*before, sys.executable, str(HERE / "loads.py"), counter, str(WORK / "files")]
    kept = {name: text for name, text in os.environ.items() if not name.startswith("WEIGHTLIFT_")}
    # One reader thread, because the work of several depends on chance. Fixed string hashes, a heap
    # that grows in few steps, and no calls of the Hub. No page probes, which depend on the
    # machine's state.
    fixed = {
        "WEIGHTLIFT_HUGE_PAGES": "always",
        "WEIGHTLIFT_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "MALLOC_TOP_PAD_": str(64 << 20),
        "MALLOC_ARENA_MAX": "1",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "LD_PRELOAD": str(WORK / "counters.so"),
    }
    done = subprocess.run(
        [*command, *loads],
        env={**kept, **fixed},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"counting {counter} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    counted: dict[str, list[dict[str, int]]] = json.loads(done.stdout.splitlines()[-1])
    return counted


def count_allocations(loads: list[str]) -> dict[str, Figures]:
    counted = child("allocations", loads)
    return {name: _by_difference(name, *counted[name]) for name in loads}


def count_system_calls(loads: list[str]) -> dict[str, Figures]:
    with tempfile.NamedTemporaryFile(dir=WORK, suffix=".strace") as log:
        options = ["-f", "-qq", "-s", "64", "-e", "signal=none", "-o", log.name]
        child("system calls", loads, ["strace", *options])
        counts: dict[str, Counter[str]] = {}
        current: Counter[str] | None = None
        with Path(log.name).open(errors="replace") as lines:
            for line in lines:
                if "/counted/" in line and (mark := re.search(r'"/counted/([^"]*)"', line)):
                    current = counts.setdefault(mark[1], Counter()) if mark[1] else None
                elif current is not None and (found := re.match(r"\d+ +(\w+)\(", line)):
                    call = NEW_CALLS.get(found[1], found[1])
                    current[f"{call}()"] += call not in NOT_COUNTED
    figures = {}
    for name in loads:
        small, large = (+counts[f"{name}/{size}"] for size in LOADS[name].sizes)
        slopes = _by_difference(name, small, large)
        whole = {f"{call} in all": float(n) for call, n in small.items()}
        figures[name] = whole | {what: n for what, n in slopes.items() if n >= LEAST_CALLS}
    return figures


def count_instructions(loads: list[str]) -> dict[str, Figures]:
    """Counts with callgrind in one process, which is much faster while nothing is counted."""
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        options = ["--tool=callgrind", "--instr-atstart=no", "--quiet"]
        out = f"--callgrind-out-file={folder}/callgrind.out"
        child("instructions", loads, ["valgrind", *options, out])
        counted = {}
        profiles = WORK / "profiles"
        profiles.mkdir(exist_ok=True)
        for path in Path(folder).glob("callgrind.out.*"):
            found = read_profile(path)
            if found is not None:
                name, counts = found
                counted[name] = counts
                # For callgrind_annotate(1).
                path.replace(profiles / re.sub(r"\W+", "-", name))
    return {
        name: _by_difference(name, *(counted[f"{name}/{size}"] for size in LOADS[name].sizes))
        for name in loads
    }


def read_profile(path: Path) -> tuple[str, dict[str, int]] | None:
    """The name of a dump, all instructions, and those of the engine."""
    name = None
    total = engine = 0
    objects: dict[str, str] = {}
    in_engine = skip = False
    with path.open(errors="replace") as lines:
        for line in lines:
            if line[0] in "+-*0123456789":
                # Positions and a cost; after `calls=` it is the cost inside the callee.
                if in_engine and not skip:
                    engine += int(line.split()[1])
                skip = False
            elif line.startswith("calls="):
                skip = True
            elif line.startswith("ob="):
                number, _, text = line[3:].strip().partition(" ")
                in_engine = "_native." in objects.setdefault(number, text)
            elif line.startswith("cob="):
                number, _, text = line[4:].strip().partition(" ")
                objects.setdefault(number, text)
            elif line.startswith("desc: Trigger: Client Request: "):
                name = line.rstrip().removeprefix("desc: Trigger: Client Request: ")
            elif line.startswith(("summary:", "totals:")):
                total = int(line.split()[1])
    return None if name is None else (name, {"instructions": total, "engine instructions": engine})


def _by_difference(name: str, small: dict[str, int], large: dict[str, int]) -> Figures:
    """The cost of one more unit: fixed costs of a load are in both sizes."""
    load = LOADS[name]
    units = load.sizes[1] - load.sizes[0]
    return {
        f"{what} a {load.unit}": (large.get(what, 0) - small.get(what, 0)) / units
        for what in dict.fromkeys([*small, *large])
        if not (load.waits and what in ("instructions", "Python allocations"))
    }


def limit_of(figure: str, counted: float) -> float:
    what = re.sub(r" (a \w+|in all)$", "", figure)
    if what.endswith("()"):
        of = "a heap's call" if what in HEAP_CALLS else "a call"
        what = f"{of} in all" if figure.endswith("in all") else "a call a unit"
    elif figure in ROOM:
        what = figure
    share, absolute = ROOM[what]
    return round(max(counted, 0) * (1 + share) + absolute, 2)


def measure(quick: bool, chosen: list[str]) -> dict[str, Figures]:
    shutil.rmtree(WORK, ignore_errors=True)
    (WORK / "files").mkdir(parents=True)
    build_counters()
    # It makes the files.
    figures = count_allocations(chosen)
    # Nothing is timed, so all may run at once.
    jobs = [(count_system_calls, chosen)]
    if not quick:
        own = [name for name in chosen if LOADS[name].library is None]
        # Halves that take equally long; each library in its own process.
        groups = [own[::2], own[1::2], *([name] for name in chosen if name not in own)]
        jobs = [(count_instructions, group) for group in groups if group] + jobs
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        for found in pool.map(lambda job: job[0](job[1]), jobs):
            for name, counted in found.items():
                figures[name] |= counted
    return figures


def keep_least(figures: dict[str, Figures], again: dict[str, Figures]) -> None:
    """Lowers the figures to another count, in which a missing one was too small to list."""
    for name, counted in again.items():
        figures[name] = {
            figure: min(value, counted.get(figure, 0.0)) for figure, value in figures[name].items()
        }


def compare(
    figures: dict[str, Figures], budgets: dict[str, Any], same: bool
) -> list[tuple[str, str, float, float, str]]:
    """(load, figure, counted, limit, verdict) of each."""
    rows = []
    for name, counted in figures.items():
        own = budgets.get(name, {})
        for figure, value in counted.items():
            limit = own.get(figure, {}).get("limit", limit_of(figure, 0))
            if not same and ("()" not in figure or figure.endswith("in all")):
                verdict = "not judged"
            elif value > limit:
                verdict = "OVER"
            else:
                before = own.get(figure, {}).get("measured", 0)
                verdict = "less" if limit_of(figure, value) < before else "ok"
            rows.append((name, figure, value, limit, verdict))
    return rows


def show(rows: list[tuple[str, str, float, float, str]], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("load", "what"):
        table.add_column(title, no_wrap=True)
    for title in ("counted", "limit"):
        table.add_column(title, justify="right")
    table.add_column("verdict")
    last = None
    for name, figure, value, limit, verdict in rows:
        style = {"OVER": "bold red", "less": "green"}.get(verdict)
        first = name if name != last else ""
        table.add_row(first, figure, f"{value:,.2f}", f"{limit:,.2f}", verdict, style=style)
        last = name
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("loads", nargs="*", metavar="NAME", help=f"of: {'; '.join(LOADS)}")
    parser.add_argument("--quick", action="store_true", help="no instructions, no libraries")
    parser.add_argument("--update", action="store_true", help="write budgets.json, of all loads")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.loads if name not in LOADS]:
        parser.error(f"no such load: {unknown[0]}")
    if arguments.update and (arguments.quick or arguments.loads):
        parser.error("--update writes all budgets: it goes with nothing else")
    for program in ("strace", *(() if arguments.quick else ("valgrind",))):
        if shutil.which(program) is None:
            parser.error(f"{program} is not installed: apt-get install {program}")
    chosen = arguments.loads or [
        name for name, load in LOADS.items() if not (arguments.quick and load.library)
    ]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    start = time.monotonic()
    figures = measure(arguments.quick, chosen)
    if arguments.update:
        budgets = {
            name: {
                figure: {"measured": round(value, 2), "limit": limit_of(figure, value)}
                for figure, value in counted.items()
            }
            for name, counted in figures.items()
        }
        content = {"environment": environment(), "budgets": budgets}
        text = json.dumps(content, indent=1)
        # One line for each figure.
        text = re.sub(r'\{\s+("measured": [^,]+),\s+("limit": [^\s]+)\s+\}', r"{\1, \2}", text)
        BUDGETS.write_text(text + "\n")
    content = json.loads(BUDGETS.read_text())
    now, then = environment(), content["environment"]
    for round_ in range(1 + AGAIN):
        rows = compare(figures, content["budgets"], now == then)
        over = [row for row in rows if row[-1] == "OVER"]
        if not over or round_ == AGAIN:
            break
        keep_least(figures, measure(arguments.quick, list(dict.fromkeys(row[0] for row in over))))
    show(over if arguments.quick else rows, console)
    if now != then:
        other = [f"{k} {then.get(k)}, here {v}" for k, v in now.items() if v != then.get(k)]
        console.print(
            "only system calls a unit are judged: the budgets are for " + "; ".join(other)
        )
    if any(row[-1] == "less" for row in rows):
        console.print("some costs are well below their budgets: --update keeps it so")
    console.print(
        f"{len(rows)} figures, {len(over)} over their budgets; {time.monotonic() - start:.0f} s"
    )
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
