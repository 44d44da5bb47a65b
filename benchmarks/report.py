"""Draws the recorded results and writes them into the README, so that none there is typed by hand.

    python benchmarks/report.py

Of each workload, the figures come from the last of the benchmarks/results/*.json of
`benchmarks/run.py` that has it, of those under the newest's conditions (machine, torch, scale);
once for CPU and once for CUDA. The pictures lie beside them. What `make demo` prints comes from
.demo/demo.txt where that is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weightlift.bench.plot import Bar, Panel, draw, format_seconds
from weightlift.core.report import format_bytes
from workloads import CPU, CUDA

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEMO = ROOT / ".demo" / "demo.txt"
# What is of weightlift; the first of them in a row is the one that the target is for.
OURS = (
    "weightlift",
    "load_into",
    "backend",
    "ModelMixin",
    "weightlift.safe_open",
    "weightlift.flax",
)
# What must be the same for runs to stand in one table, besides the files' sizes.
_MACHINE = ("cpu", "cpus", "gpu", "kernel", "torch")
# Parts and floors, and weightlift on another form of the file.
APART = ("twin", "ModelMixin-twin", "construction", "reading", "torch.empty")


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    sections = []
    for device in ("cpu", "cuda"):
        runs = recorded(device)
        if runs:
            sections.append(section(device, runs))
    text = replace(text, "figures", "\n\n".join(sections))
    if DEMO.exists():
        lines = [line.rstrip() for line in DEMO.read_text(encoding="utf-8").splitlines()]
        text = replace(text, "demo", "`make demo` prints:\n\n```\n" + "\n".join(lines) + "\n```")
    readme.write_text(text, encoding="utf-8")


def recorded(device: str) -> list[dict[str, Any]]:
    """The runs under the conditions of the newest, the last first, with ``stem``, the file's; of
    each those workloads that no later one has."""
    runs = []
    for path in RESULTS.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "figures" in content and content["comparisons"][0]["device"] == device:
            runs.append({**content, "stem": path.stem})
    runs.sort(key=lambda run: str(run["date"]), reverse=True)
    done: set[str] = set()
    found = []
    for run in runs:
        if conditions(run) != conditions(runs[0]):
            continue
        new = [one for one in run["comparisons"] if one["name"] not in done]
        done |= {one["name"] for one in new}
        if new:
            found.append({**run, "comparisons": new})
    return found


def conditions(run: dict[str, Any]) -> list[Any]:
    return [run["scale"], *(run["machine"].get(key) for key in _MACHINE)]


def section(device: str, runs: list[dict[str, Any]]) -> str:
    order = {name: place for place, name in enumerate(CPU if device == "cpu" else CUDA)}
    measured = [
        (comparison, number, run["figures"])
        for number, run in enumerate(runs, 1)
        for comparison in run["comparisons"]
    ]
    measured.sort(key=lambda one: order.get(one[0]["name"], len(order)))
    comparisons = [comparison for comparison, _, _ in measured]
    machine = runs[0]["machine"]
    where = machine.get("gpu") or machine["cpu"]
    lines = [
        f"On {where} ({machine['cpus']} CPUs, {format_bytes(machine['memory_bytes'])}, Linux "
        f"{machine['kernel']}, torch {machine['torch']}); `make bench` runs it, `make report` "
        f"writes this. {versions(comparisons)}. Contenders interleaved in random order, each "
        "measurement in a fresh process with its memory backed beforehand, all pages touched, "
        "medians; ratios are medians of the rounds' ratios. *Memory* is the peak of the process's "
        "own. *Ceiling* is the share of what the machine gives, measured in "
        "the same run. *Run*: the last that had the workload; they are listed below.",
        "",
        "| workload | | time | memory | ceiling | target | measured | run |",
        "|---|---|--:|--:|--:|---|--:|--:|",
        *(row(comparison, figures, number) for comparison, number, figures in measured),
        "",
        "Every contender's time, and in brackets how many times weightlift's it is; bold is faster "
        "than weightlift.",
        "",
        *(f"- {line}" for line in times(comparisons)),
        "",
        "The runs:",
        "",
        *(f"{number}. {told(run)}" for number, run in enumerate(runs, 1)),
    ]
    if missing := order.keys() - {comparison["name"] for comparison in comparisons}:
        lines += ["", f"Not run there: {', '.join(sorted(missing, key=order.__getitem__))}."]
    if refused := list(not_measured(comparisons)):
        lines += ["", "Not measured there:", "", *(f"- {line}" for line in refused)]
    name = re.sub(r"^\d+-\d+-\d+-|-\d+$", "", runs[0]["stem"])  # without the date and number
    for picture in draw_all(name, comparisons):
        lines += ["", f"![times to load]({picture.relative_to(ROOT)})"]
    return "\n".join(lines)


def told(run: dict[str, Any]) -> str:
    rates = ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in run["ceilings"].items())
    return f"{run['date'][:16].replace('T', ' ')} UTC, `{run['command']}`: {rates}"


def versions(comparisons: list[dict[str, Any]]) -> str:
    known = {
        f"{name} {found['version']}"
        for comparison in comparisons
        for name, found in comparison["contenders"].items()
        if name not in (*OURS, *APART, "stock")
    }
    stock = {
        f"{comparison['model'].partition(':')[0]} {comparison['contenders']['stock']['version']}"
        for comparison in comparisons
        if "stock" in comparison["contenders"]
    }
    return ", ".join(sorted(known | stock))


def row(comparison: dict[str, Any], figures: dict[str, Any], run: int) -> str:
    figure = figures[comparison["name"]]
    measured = figure["measured"]
    if figure.get("against"):
        measured += f" ({figure['against']})"
    if not figure["passed"]:
        measured = f"**{measured}, missed**"
    ours = our_contender(comparison)
    cells = [comparison["name"], comparison.get("about", "")]
    if ours is None:
        cells += ["", "", ""]
    else:
        found = comparison["contenders"][ours]
        share = found.get("share_of_ceiling")
        cells += [
            format_seconds(found["median_seconds"]),
            format_bytes(found["peak_anon_bytes"]),
            "" if share is None else f"{share:.0%}",
        ]
    return f"| {' | '.join([*cells, figure['target'], measured, str(run)])} |"


def times(comparisons: list[dict[str, Any]]) -> Iterator[str]:
    for comparison in comparisons:
        ours = our_contender(comparison)
        parts = []
        for name, found in comparison["contenders"].items():
            text = f"{name} {format_seconds(found['median_seconds'])}"
            ratio = found["time_ratio"].get(ours)
            if name != ours and ratio is not None:
                text += f" ({ratio:.2f}x)"
                if ratio < 1 and name not in (*OURS, *APART):
                    text = f"**{text}**"
            if found.get("conversion_seconds") is not None:
                text += f" after a conversion of {format_seconds(found['conversion_seconds'])}"
            parts.append(text)
        yield f"{comparison['name']}: {', '.join(parts)}"


def not_measured(comparisons: list[dict[str, Any]]) -> Iterator[str]:
    refused: dict[tuple[str, str], list[str]] = {}
    for comparison in comparisons:
        for name, why in comparison["refused"].items():
            reason = why.strip().partition("\n")[0][:160]
            refused.setdefault((name, reason), []).append(comparison["name"])
    for (name, reason), where in refused.items():
        yield f"{name} ({', '.join(where)}): {reason}"


def our_contender(comparison: dict[str, Any]) -> str | None:
    return next((name for name in comparison["contenders"] if name in OURS), None)


def draw_all(name: str, comparisons: list[dict[str, Any]]) -> Iterator[Path]:
    """A picture of the loads of files and one of those of models."""
    groups: dict[str, list[Panel]] = {}
    for comparison in comparisons:
        if comparison.get("about") and comparison["contenders"]:
            group = "files" if comparison["folder"] is None else "models"
            groups.setdefault(group, []).append(panel(comparison))
    for group, panels in groups.items():
        target = RESULTS / f"{name}-{group}.png"
        draw(panels, target, f"Time to load, medians: {group}")
        yield target


def panel(comparison: dict[str, Any]) -> Panel:
    ours = our_contender(comparison)
    bars = []
    for name, found in comparison["contenders"].items():
        ratio = found["time_ratio"].get(ours)
        note = "" if ratio is None or name == ours else f"({ratio:.2f}x {ours}'s time)"
        bars.append(Bar(name, found["median_seconds"], note, name in OURS))
    return Panel(f"{comparison['name']}: {comparison['about']}", bars)


def replace(text: str, name: str, body: str) -> str:
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    found, count = re.subn(pattern, lambda m: m[1] + body + "\n" + m[2], text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"README.md has no section {name}")
    return found


if __name__ == "__main__":
    main()
