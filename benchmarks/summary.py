"""Makes the summary of a machine and its kernel from runs of the benchmark.

    python benchmarks/summary.py                       # of all runs in build/bench-runs
    python benchmarks/summary.py RUN.json RUN.json     # of these

writes benchmarks/results/MACHINE-KERNEL.json. It has the newest result of each workload, as medians
and ranges over the rounds, without the single measurements. Workloads of the old summary that the
runs lack are kept if they were measured under the same conditions (machine, torch, scale). Then
`python benchmarks/report.py` draws the pictures and writes the tables.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from weightlift.core.report import format_bytes

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "build" / "bench-runs"
RESULTS = ROOT / "benchmarks" / "results"
MOST_BYTES = 200_000
# weightlift's contenders. The target of a workload is for the first of them in it.
OURS = (
    "weightlift",
    "load_into",
    "backend",
    "ModelMixin",
    "weightlift.safe_open",
    "weightlift.flax",
)
# Runs in one summary must agree in these, and in the scale.
_CONDITIONS = ("cpu", "cpus", "gpu", "memory_bytes", "kernel", "torch")
_DIGITS = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="by default build/bench-runs/*.json")
    parser.add_argument("--out", type=Path, help="instead of results/MACHINE-KERNEL.json")
    arguments = parser.parse_args()
    paths = arguments.runs or sorted(RUNS.glob("*.json"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    runs = [run for run in runs if "figures" in run]
    if not runs:
        sys.exit("there is no run of benchmarks/run.py to summarize")
    newest = max(runs, key=lambda run: str(run["date"]))
    left_out = [run for run in runs if conditions(run) != conditions(newest)]
    out = arguments.out or RESULTS / f"{summary_name(newest['machine'])}.json"
    earlier = json.loads(out.read_text(encoding="utf-8")) if out.exists() else None
    if earlier is not None and conditions(earlier) != conditions(newest):
        print(f"{out.name} was of another torch or scale, or other memory: it is made anew")
        earlier = None
    summary = summarize([run for run in runs if run not in left_out], earlier)
    text = to_text(summary)
    if len(text) > MOST_BYTES:
        sys.exit(f"the summary has {len(text)} bytes; at most {MOST_BYTES} are kept")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    for run in left_out:
        print(f"left out, of other conditions: {run['date']}, {run['command']}")
    print(f"{out}: {len(summary['workloads'])} workloads, {len(text)} bytes")


def summarize(runs: Iterable[dict[str, Any]], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """The newest result of each workload in ``runs``; for other workloads, that of ``earlier``."""
    newest_first = sorted(runs, key=lambda run: str(run["date"]), reverse=True)
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for run in newest_first:
        about = {key: run[key] for key in ("date", "command")}
        about["rates"] = rounded(run.get("rates") or run.get("ceilings") or {})
        for comparison in run["comparisons"]:
            if comparison["name"] not in found and comparison["contenders"]:
                figure = run["figures"][comparison["name"]]
                found[comparison["name"]] = (workload(comparison, figure), about)
    for known in (earlier or {}).get("workloads", []):
        about = earlier["runs"][known["run"]] if earlier else {}
        if known["name"] not in found:
            found[known["name"]] = ({**known}, about)
    used: list[dict[str, Any]] = []
    for _, about in found.values():
        if about not in used:
            used.append(about)
    used.sort(key=lambda about: str(about["date"]), reverse=True)
    latest = newest_first[0]
    return {
        "machine": latest["machine"],
        "scale": latest["scale"],
        "runs": used,
        "workloads": [{**content, "run": used.index(about)} for content, about in found.values()],
    }


def workload(comparison: dict[str, Any], figure: dict[str, Any]) -> dict[str, Any]:
    """One workload, from a run's comparison and its figure."""
    names = ("name", "about", "device", "model", "folder", "cold", "touched", "file_bytes")
    content = {name: comparison.get(name) for name in names}
    content["folder"] = content["folder"] is not None
    content |= {
        "memory": comparison.get("memory", "backed"),
        "figure": figure,
        "refused": {name: first_line(why) for name, why in comparison["refused"].items()},
    }
    if comparison.get("floor"):
        content["floor"] = rounded(comparison["floor"])
    ours = our_contender(comparison["contenders"])
    own_times = None if ours is None else times(comparison, ours)
    content["contenders"] = {
        name: contender(comparison, name, own_times) for name in comparison["contenders"]
    }
    return content


def contender(
    comparison: dict[str, Any], name: str, own_times: list[float] | None
) -> dict[str, Any]:
    found = comparison["contenders"][name]
    seconds = times(comparison, name)
    samples = found["samples"]
    content: dict[str, Any] = {
        "version": found["version"],
        "rounds": len(seconds),
        "seconds": spread(seconds),
        "cpu_seconds": rounded(statistics.median(sample["cpu_seconds"] for sample in samples)),
        "peak_anon_bytes": found["peak_anon_bytes"],
        "phases": rounded(found["phases"]),
        "io": found["io"],
    }
    if own_times is not None and len(own_times) == len(seconds):
        pairs = zip(seconds, own_times, strict=True)
        content["time_ratio"] = spread([one / own for one, own in pairs])
    if found.get("conversion_seconds") is not None:
        content["conversion_seconds"] = rounded(found["conversion_seconds"])
    for multiple in ("floor_multiple", "in_turn_multiple"):
        if found.get(multiple) is not None:
            content[multiple] = rounded(found[multiple])
    return content


def times(comparison: dict[str, Any], name: str) -> list[float]:
    """Seconds, round by round."""
    return [
        sample["load_seconds"] + (sample["touch_seconds"] if comparison["touched"] else 0.0)
        for sample in comparison["contenders"][name]["samples"]
    ]


def our_contender(contenders: Iterable[str]) -> str | None:
    """The contender that a workload's target is for."""
    return next((name for name in contenders if name in OURS), None)


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": rounded(statistics.median(values)),
        "least": rounded(min(values)),
        "most": rounded(max(values)),
    }


def rounded(value: Any) -> Any:
    """Numbers with four significant digits, in dicts too."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def conditions(run: dict[str, Any]) -> list[Any]:
    return [run["scale"], *(run["machine"].get(key) for key in _CONDITIONS)]


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:160]


def of_machine(summary: dict[str, Any]) -> str:
    machine = summary["machine"]
    where = machine.get("gpu") or machine["cpu"]
    return (
        f"{where}, {machine['cpus']} CPUs, {format_bytes(machine['memory_bytes'])}, Linux "
        f"{machine['kernel']}, torch {machine['torch']}"
    )


def summary_name(machine: dict[str, Any]) -> str:
    return f"{machine_name(machine)}-linux-{_slug(str(machine['kernel']))}"


def machine_name(machine: dict[str, Any]) -> str:
    """The machine's file name: its GPU, or its CPU and the number of CPUs."""
    name = machine.get("gpu") or f"{machine['cpu']} {machine['cpus']} cpus"
    words = re.sub(r"\(.*?\)|processor|cpu @.*", " ", str(name), flags=re.IGNORECASE)
    return _slug(words) or platform.machine()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def to_text(summary: dict[str, Any]) -> str:
    """JSON with a line for each contender, so that it is readable and versions can be compared."""
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    # The innermost values go on one line.
    return re.sub(r"[{\[][^{}\[\]]*[}\]]", lambda m: re.sub(r"\n *", " ", m[0]), text) + "\n"


if __name__ == "__main__":
    main()
