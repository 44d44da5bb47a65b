"""Draws the recorded results and writes them into the README, so that none there is typed by hand.

    python benchmarks/report.py

The figures come from the newest benchmarks/results/*.json of `benchmarks/run.py` for CPU and the
newest for CUDA, and those of workloads that it did not measure from the run before, which is said;
the pictures lie beside them. What `make demo` prints comes from .demo/demo.txt
where that is.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weightlift.cli.plot import Bar, Panel, draw, format_seconds
from weightlift.report import format_bytes
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
# Parts and floors, and weightlift on another form of the file.
APART = ("twin", "ModelMixin-twin", "construction", "reading", "torch.empty")


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    sections = []
    for path, content in recorded():
        pictures = [picture.relative_to(ROOT) for picture in draw_all(path, content)]
        sections.append(section(content, pictures))
    text = replace(text, "figures", "\n\n".join(sections))
    if DEMO.exists():
        lines = [line.rstrip() for line in DEMO.read_text(encoding="utf-8").splitlines()]
        text = replace(text, "demo", "`make demo` prints:\n\n```\n" + "\n".join(lines) + "\n```")
    readme.write_text(text, encoding="utf-8")


def recorded() -> list[tuple[Path, dict[str, Any]]]:
    """The results for the CPU, then for CUDA, the last run first; of an earlier one, the workloads
    that no later one measured on the same machine."""
    runs = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in RESULTS.glob("*.json")]
    runs = [(path, content) for path, content in runs if "figures" in content]
    machines: dict[str, tuple[Any, ...]] = {}
    done: set[tuple[str, str]] = set()
    found = []
    for path, content in sorted(runs, key=lambda run: run[1]["date"], reverse=True):
        device = content["comparisons"][0]["device"]
        machine = tuple(content["machine"].get(what) for what in ("cpu", "cpus", "gpu"))
        if machines.setdefault(device, machine) != machine:
            continue
        new = [one for one in content["comparisons"] if (device, one["name"]) not in done]
        if new:
            is_last = not any(device == of for of, _ in done)
            found.append((device, path, {**content, "comparisons": new, "is_last": is_last}))
        done |= {(device, one["name"]) for one in new}
    return [(path, content) for _, path, content in sorted(found, key=lambda one: one[0])]


def section(content: dict[str, Any], pictures: list[Path]) -> str:
    machine = content["machine"]
    where = machine.get("gpu") or machine["cpu"]
    rates = ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in content["ceilings"].items())
    before = "" if content["is_last"] else "What the last run did not measure, from one before it: "
    lines = [
        f"{before}`{content['command']}` on {where} ({machine['cpus']} CPUs, "
        f"{format_bytes(machine['memory_bytes'])}, Linux {machine['kernel']}, "
        f"torch {machine['torch']}), {content['date'][:10]}; `make bench` runs it, `make report` "
        f"writes this. {versions(content['comparisons'])}. One run: contenders interleaved in "
        "random order, each measurement in a fresh process with its memory backed beforehand, all "
        "pages touched, medians; ratios are medians of the rounds' ratios. *Memory* is the peak of "
        "the process's own. *Ceiling* is the share of what the machine gives, measured in the same "
        f"run: {rates}.",
        "",
        "| workload | | time | memory | ceiling | target | measured |",
        "|---|---|--:|--:|--:|---|--:|",
        *(row(comparison, content["figures"]) for comparison in content["comparisons"]),
        "",
        "Every contender's time, and in brackets how many times weightlift's it is; bold is faster "
        "than weightlift.",
        "",
        *(f"- {line}" for line in times(content["comparisons"])),
    ]
    ended = unfinished(content)
    if ended and content["is_last"]:
        lines += ["", f"The run was ended before {', '.join(ended)}."]
    refused = list(not_measured(content["comparisons"]))
    if refused:
        lines += ["", "Not measured there:", "", *(f"- {line}" for line in refused)]
    lines += [line for picture in pictures for line in ("", f"![times to load]({picture})")]
    return "\n".join(lines)


def unfinished(content: dict[str, Any]) -> list[str]:
    """Workloads that the command names and that have no result: they are recorded one by one."""
    done = {comparison["name"] for comparison in content["comparisons"]}
    asked = shlex.split(content["command"])
    return [name for name in asked if name in {**CPU, **CUDA} and name not in done]


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


def row(comparison: dict[str, Any], figures: dict[str, Any]) -> str:
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
    return f"| {' | '.join([*cells, figure['target'], measured])} |"


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


def draw_all(path: Path, content: dict[str, Any]) -> Iterator[Path]:
    """A picture of the loads of files and one of those of models."""
    groups: dict[str, list[Panel]] = {}
    for comparison in content["comparisons"]:
        if comparison.get("about") and comparison["contenders"]:
            group = "files" if comparison["folder"] is None else "models"
            groups.setdefault(group, []).append(panel(comparison))
    for group, panels in groups.items():
        target = path.with_name(f"{path.stem}-{group}.png")
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
