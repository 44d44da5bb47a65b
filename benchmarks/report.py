"""Draw the recorded results and write their tables into README.md and benchmarks/RESULTS.md.

    python benchmarks/report.py                    # README.md, benchmarks/RESULTS.md, the pictures
    python benchmarks/report.py --pages FOLDER     # also the bars of every workload

Reads benchmarks/results/*.json, which `benchmarks/summary.py` writes, and draws two pictures beside
each: the headline ratios and all workloads. README gets the newest summary that has all headlines;
RESULTS.md also gets the output of the last `make demo` (.demo/demo.txt, if it exists).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from report_records import pages_of_records
from summary import OURS, RESULTS, ROOT, of_machine, our_contender
from weightlift.bench.plot import Bar, Panel, draw, draw_ratios, format_seconds
from weightlift.core.report import format_bytes
from workloads import CPU, CUDA

DEMO = ROOT / ".demo" / "demo.txt"
PAGE = ROOT / "benchmarks" / "RESULTS.md"
# Not competitors: parts of a load, lower bounds, and weightlift on another form of the file.
APART = (
    "twin",
    "ModelMixin-twin",
    "construction",
    "reading",
    "layers-load",
    "layers-run",
    "whole",
    "torch.empty",
)
# (workload, reference, label) of the README's three figures, whatever their values.
HEADLINES = {
    "cpu": (
        ("same-bf16", "safetensors", "bf16 file, mapped"),
        ("cold-bf16", "safetensors", "bf16 file, not in the page cache"),
        ("transformers-cast", "stock", "transformers, 1.1 B parameters, bf16 as fp32"),
    ),
    "cuda": (
        ("cuda-same", "safetensors", "bf16 file to the GPU"),
        ("cuda-cast", "safetensors", "fp32 file as bf16 to the GPU"),
        ("cuda-cold", "safetensors", "bf16 file, not in the page cache, to the GPU"),
    ),
}
PANELS_A_PAGE = 6
Summary = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pages", type=Path, help="draw the bars of every workload into this folder"
    )
    arguments = parser.parse_args()
    summaries = read_summaries()
    for name, summary in summaries.items():
        draw_pictures(name, summary)
        if arguments.pages is not None:
            draw_pages(arguments.pages, name, summary)
    text = page(summaries) + pages_of_records(RESULTS)
    PAGE.write_text(text + demo_section(), encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if summaries:
        text = replace(text, "figures", headlines(*summary_of_readme(summaries)))
    readme.write_text(text, encoding="utf-8")


def demo_section() -> str:
    """The output of the last `make demo`: from its file, or else from the page's present
    section."""
    if DEMO.exists():
        lines = [line.rstrip() for line in DEMO.read_text(encoding="utf-8").splitlines()]
        return "\n".join(["\n## make demo", "", "```text", *lines, "```", ""])
    found = re.search(r"\n## make demo\n.*", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return found[0] if found else ""


def summary_of_readme(summaries: dict[str, Summary]) -> tuple[str, Summary]:
    """The first that has all headlines of its device, or else the first."""
    for name, summary in summaries.items():
        labels = [label for label, *_ in headline_rows(summary)]
        if labels in ([label for *_, label in rows] for rows in HEADLINES.values()):
            return name, summary
    return next(iter(summaries.items()))


def read_summaries() -> dict[str, Summary]:
    """The summaries by their files' names, the newest run first."""
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(RESULTS.glob("*.json"))
    }
    newest = sorted(found, key=lambda name: str(found[name]["runs"][0]["date"]), reverse=True)
    return {name: found[name] for name in newest}


def in_order(workloads: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the order of ``workloads.py``."""
    order = {name: place for place, name in enumerate([*CPU, *CUDA])}
    return sorted(workloads, key=lambda one: order.get(one["name"], len(order)))


# README's section: a row and a bar for each headline.


def headline_rows(summary: Summary) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(label, workload, reference) of each headline in the summary."""
    known = {workload["name"]: workload for workload in summary["workloads"]}
    for device in ("cuda", "cpu"):
        rows = [
            (label, known[name], reference)
            for name, reference, label in HEADLINES[device]
            if name in known and reference in known[name]["contenders"]
        ]
        if rows:
            yield from rows
            return


def headlines(name: str, summary: Summary) -> str:
    lines = [
        f"Measured on {of_machine(summary)}. Each load runs in a fresh process and touches all "
        "pages; contenders are interleaved. The speed-up is the median of the rounds' ratios. "
        "[benchmarks/RESULTS.md](benchmarks/RESULTS.md) has all workloads, floors and contenders.",
        "",
        "| load | weightlift | reference | speed-up | range |",
        "|---|--:|--:|--:|--:|",
    ]
    for label, workload, reference in headline_rows(summary):
        ours = our_contender(workload["contenders"]) or ""
        own, other = workload["contenders"][ours], workload["contenders"][reference]
        ratio = other["time_ratio"]
        lines.append(
            f"| {label} | {format_seconds(own['seconds']['median'])} | "
            f"{format_seconds(other['seconds']['median'])} ({library(workload, reference)}) | "
            f"{ratio['median']:.2f}x | {ratio['least']:.2f}x to {ratio['most']:.2f}x |"
        )
    picture = (RESULTS / f"{name}-headlines.png").relative_to(ROOT)
    return "\n".join([*lines, "", f"![speed-up over the reference library]({picture})"])


def library(workload: dict[str, Any], contender: str) -> str:
    """The name to print for a contender: ``stock`` is the library of the workload's model."""
    if contender == "stock":
        return str(workload["model"]).partition(":")[0]
    return contender


def draw_pictures(name: str, summary: Summary) -> None:
    rows = [
        (label, workload["contenders"][reference]["time_ratio"])
        for label, workload, reference in headline_rows(summary)
    ]
    if rows:
        draw_ratios(
            [(label, ratio["median"]) for label, ratio in rows],
            RESULTS / f"{name}-headlines.png",
            "Speed-up over the reference library",
        )
    every = []
    for workload in in_order(summary["workloads"]):
        reference = reference_of(workload)
        if reference is not None:
            ratio = workload["contenders"][reference]["time_ratio"]["median"]
            every.append((f"{workload['name']}, {library(workload, reference)}", ratio))
    if every:
        draw_ratios(
            every, RESULTS / f"{name}-workloads.png", "All workloads: speed-up over the reference"
        )


def reference_of(workload: dict[str, Any]) -> str | None:
    """The contender to compare with: the library's own loader, else the reference for files. A load
    into own memory is compared with another load into own memory."""
    own_memory = ("torch-plain",) if workload["name"] == "bin-read" else ()
    wanted = (
        *own_memory,
        "stock",
        "safetensors",
        "torch",
        "safetensors.safe_open",
        "safetensors.flax",
    )
    for name in (*wanted, "safetensors-pread", "accelerate"):
        if "time_ratio" in workload["contenders"].get(name, {}):
            return name
    return None


def draw_pages(folder: Path, name: str, summary: Summary) -> None:
    """Draw the bars of all contenders, ``PANELS_A_PAGE`` workloads to a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    workloads = in_order(summary["workloads"])
    panels = [panel(workload) for workload in workloads if workload["contenders"]]
    for start in range(0, len(panels), PANELS_A_PAGE):
        part = panels[start : start + PANELS_A_PAGE]
        target = folder / f"{name}-{start // PANELS_A_PAGE + 1}.png"
        draw(part, target, "Time to load, medians")


def panel(workload: dict[str, Any]) -> Panel:
    ours = our_contender(workload["contenders"])
    bars = []
    for name, found in workload["contenders"].items():
        ratio = found.get("time_ratio")
        note = f"({ratio['median']:.2f}x)" if ratio is not None and name != ours else ""
        bars.append(Bar(library(workload, name), found["seconds"]["median"], note, name in OURS))
    return Panel(f"{workload['name']}: {workload['about']}", bars)


# The page of all machines.


def page(summaries: dict[str, Summary]) -> str:
    parts = [
        "# Measured",
        "",
        "`make report` writes this page from the summaries in results/, one per machine and "
        "kernel; `make bench summary` makes a summary. Contenders are interleaved in random "
        "order, each measurement runs in a fresh process, and all pages of the result are "
        "touched. Times are medians; ratios are medians of the rounds' ratios, with their range. "
        "*Memory* is the peak memory of the process without the page cache. *Floor* is the time "
        "divided by the shortest time that this machine allows for the same load, measured in the "
        "same run: for a cast, the longer of reading the source and getting new memory. *In turn* "
        "is the time divided by the sum of reading the source and writing new memory, as the same "
        "threads do both. "
        "*State* says whether the machine backed the memory before the load. *Run* is the newest "
        "run that had the workload; the runs are listed below the tables.",
    ]
    for name, summary in summaries.items():
        parts += ["", f"## {of_machine(summary)}", "", *machine_section(summary)]
        for picture in sorted(RESULTS.glob(f"{name}-*.png")):
            parts += ["", f"![{picture.stem}]({picture.relative_to(PAGE.parent)})"]
    return "\n".join(parts) + "\n"


def machine_section(summary: Summary) -> Iterator[str]:
    workloads = in_order(summary["workloads"])
    yield f"Versions: {versions(workloads)}."
    yield ""
    yield "| workload | | state | time | memory | floor | in turn | target | measured | run |"
    yield "|---|---|---|--:|--:|--:|--:|---|--:|--:|"
    for workload in workloads:
        yield row(workload)
    yield ""
    yield (
        "Every contender's time and, in brackets, its ratio to weightlift's time. Bold contenders "
        "are faster than weightlift."
    )
    yield ""
    for workload in workloads:
        yield f"- {times(workload)}"
    yield ""
    yield "The runs:"
    yield ""
    for number, run in enumerate(summary["runs"], 1):
        rates = ", ".join(f"{name} {format_rate(rate)}" for name, rate in run["rates"].items())
        yield f"{number}. {run['date'][:16].replace('T', ' ')} UTC, `{run['command']}`: {rates}"
    if refused := list(not_measured(workloads)):
        yield ""
        yield "Not measured there:"
        yield ""
        for line in refused:
            yield f"- {line}"


def format_rate(rate: float) -> str:
    return f"{format_bytes(rate)}/s"


def versions(workloads: Sequence[dict[str, Any]]) -> str:
    found = {
        f"{library(workload, name).partition('.')[0]} {contender['version']}"
        for workload in workloads
        for name, contender in workload["contenders"].items()
        if name not in (*OURS, *APART, "safetensors-pread", "torch-plain")
    }
    return ", ".join(sorted(found))


def row(workload: dict[str, Any]) -> str:
    figure = workload["figure"]
    measured = figure["measured"]
    if figure.get("against"):
        measured += f" ({figure['against']})"
    if not figure["passed"]:
        measured = f"**{measured}, missed**"
    ours = our_contender(workload["contenders"])
    cells = [workload["name"], workload.get("about") or "", workload["memory"]]
    if ours is None:
        cells += [""] * 4
    else:
        found = workload["contenders"][ours]
        floor, turns = found.get("floor_multiple"), found.get("in_turn_multiple")
        cells += [
            format_seconds(found["seconds"]["median"]),
            format_bytes(found["peak_anon_bytes"]),
            "" if floor is None else f"{floor:.2f}x",
            "" if turns is None else f"{turns:.2f}x",
        ]
    return f"| {' | '.join([*cells, figure['target'], measured, str(workload['run'] + 1)])} |"


def times(workload: dict[str, Any]) -> str:
    ours = our_contender(workload["contenders"])
    parts = []
    for name, found in workload["contenders"].items():
        text = f"{library(workload, name)} {format_seconds(found['seconds']['median'])}"
        ratio = found.get("time_ratio")
        if name != ours and ratio is not None:
            text += f" ({ratio['median']:.2f}x, {ratio['least']:.2f} to {ratio['most']:.2f})"
            if ratio["median"] < 1 and name not in (*OURS, *APART):
                text = f"**{text}**"
        if found.get("conversion_seconds") is not None:
            text += f" after a conversion of {format_seconds(found['conversion_seconds'])}"
        parts.append(text)
    return f"{workload['name']}: {', '.join(parts)}"


def not_measured(workloads: Sequence[dict[str, Any]]) -> Iterator[str]:
    refused: dict[tuple[str, str], list[str]] = {}
    for workload in workloads:
        for name, reason in workload["refused"].items():
            refused.setdefault((name, reason), []).append(workload["name"])
    for (name, reason), where in refused.items():
        yield f"{name} ({', '.join(where)}): {reason}"


def replace(text: str, name: str, body: str) -> str:
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    found, count = re.subn(pattern, lambda m: m[1] + body + "\n" + m[2], text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"README.md has no section {name}")
    return found


if __name__ == "__main__":
    main()
