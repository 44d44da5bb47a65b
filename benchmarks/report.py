"""Draws the machines' summaries and writes their tables, so that no figure is typed by hand.

    python benchmarks/report.py                    # README.md, benchmarks/RESULTS.md, the pictures
    python benchmarks/report.py --pages FOLDER     # and every workload's bars, some to a picture

Reads benchmarks/results/*.json, which `benchmarks/summary.py` makes, and draws two pictures beside
each: the headline ratios, and all workloads. README has the headlines of the machine that was
measured last; RESULTS.md has what `make demo` printed (.demo/demo.txt, where that is).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from summary import OURS, RESULTS, ROOT, our_contender
from weightlift.bench.plot import Bar, Panel, draw, draw_ratios, format_seconds
from weightlift.core.report import format_bytes
from workloads import CPU, CUDA

DEMO = ROOT / ".demo" / "demo.txt"
PAGE = ROOT / "benchmarks" / "RESULTS.md"
# Parts and floors, and weightlift on another form of the file.
APART = (
    "twin",
    "ModelMixin-twin",
    "construction",
    "reading",
    "layers-load",
    "layers-run",
    "torch.empty",
)
# (workload, the reference, its label), for the README: whatever they come to.
HEADLINES = {
    "cpu": (
        ("same-bf16", "safetensors", "bf16 file, mapped"),
        ("cast-down", "safetensors", "fp32 file as bf16"),
        ("small-100k", "safetensors", "100,000 small tensors"),
        ("cold-bf16", "safetensors", "bf16 file, not in the page cache"),
        ("transformers-cast", "stock", "transformers, 1.1 B parameters, bf16 as fp32"),
        ("transformers-moe", "stock", "transformers, mixture of experts"),
    ),
    "cuda": (
        ("cuda-same", "safetensors", "bf16 file to the GPU"),
        ("cuda-shards", "safetensors", "bf16 in 4 shards to the GPU"),
        ("cuda-cast", "safetensors", "fp32 file as bf16 to the GPU"),
        ("cuda-cold", "safetensors", "bf16 file, not in the page cache, to the GPU"),
        ("cuda-small-100k", "safetensors", "100,000 small tensors to the GPU"),
        ("cuda-moe-18k", "safetensors", "18,867 tensors to the GPU"),
    ),
}
PANELS_A_PAGE = 6
Summary = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", type=Path, help="draw every workload's bars here")
    arguments = parser.parse_args()
    summaries = read_summaries()
    for name, summary in summaries.items():
        draw_pictures(name, summary)
        if arguments.pages is not None:
            draw_pages(arguments.pages, name, summary)
    PAGE.write_text(page(summaries) + demo_section(), encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if summaries:
        text = replace(text, "figures", headlines(*next(iter(summaries.items()))))
    readme.write_text(text, encoding="utf-8")


def demo_section() -> str:
    """What `make demo` printed last: here, or when the page was written before."""
    if DEMO.exists():
        lines = [line.rstrip() for line in DEMO.read_text(encoding="utf-8").splitlines()]
        return "\n".join(["\n## make demo", "", "```text", *lines, "```", ""])
    found = re.search(r"\n## make demo\n.*", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return found[0] if found else ""


def read_summaries() -> dict[str, Summary]:
    """Name of the machine -> its summary; the last measured first."""
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(RESULTS.glob("*.json"))
    }
    newest = sorted(found, key=lambda name: str(found[name]["runs"][0]["date"]), reverse=True)
    return {name: found[name] for name in newest}


def in_order(workloads: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As ``workloads.py`` has them."""
    order = {name: place for place, name in enumerate([*CPU, *CUDA])}
    return sorted(workloads, key=lambda one: order.get(one["name"], len(order)))


def of_machine(summary: Summary) -> str:
    machine = summary["machine"]
    where = machine.get("gpu") or machine["cpu"]
    return (
        f"{where}, {machine['cpus']} CPUs, {format_bytes(machine['memory_bytes'])}, Linux "
        f"{machine['kernel']}, torch {machine['torch']}"
    )


# README's section: a row and a bar for each headline.


def headline_rows(summary: Summary) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(label, workload, reference) of the headlines that were measured."""
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
        f"On {of_machine(summary)}, each load in a fresh process, all pages touched, contenders "
        "interleaved; the median of the rounds' ratios, and their range. Every workload, its floor "
        "and all contenders: [benchmarks/RESULTS.md](benchmarks/RESULTS.md).",
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
    return "\n".join([*lines, "", f"![how many times faster than the reference]({picture})"])


def library(workload: dict[str, Any], contender: str) -> str:
    """A contender's name for the reader: the stock way is its library's."""
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
            "How many times faster than the reference library",
        )
    every = []
    for workload in in_order(summary["workloads"]):
        reference = reference_of(workload)
        if reference is not None:
            ratio = workload["contenders"][reference]["time_ratio"]["median"]
            every.append((f"{workload['name']}, {library(workload, reference)}", ratio))
    if every:
        draw_ratios(every, RESULTS / f"{name}-workloads.png", "All workloads, by the reference")


def reference_of(workload: dict[str, Any]) -> str | None:
    """Whom a reader would have used: the library's own way, or the reference for files. What is
    read into own memory is compared with what is."""
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
    """Bars of all contenders, some workloads to a picture."""
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
        "Written by `make report` out of the summaries in results/, a machine each; "
        "`make bench summary` makes one. Contenders are interleaved in random order, each "
        "measurement is a fresh process, all pages of the result are touched. Times are medians, "
        "ratios are medians of the rounds' ratios with their range. *Memory* is the peak of the "
        "process's own beside the page cache. *Floor* is the time over the shortest that this "
        "machine allows the same load, measured in the same run. *State* is that of the memory: "
        "backed by the machine before the load, or not. *Run*: the last that had the workload; "
        "they are listed below the tables.",
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
    yield "| workload | | state | time | memory | floor | target | measured | run |"
    yield "|---|---|---|--:|--:|--:|---|--:|--:|"
    for workload in workloads:
        yield row(workload)
    yield ""
    yield (
        "Every contender's time, and in brackets how many times weightlift's it is; bold is faster "
        "than weightlift."
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
        cells += ["", "", ""]
    else:
        found = workload["contenders"][ours]
        multiple = found.get("floor_multiple")
        cells += [
            format_seconds(found["seconds"]["median"]),
            format_bytes(found["peak_anon_bytes"]),
            "" if multiple is None else f"{multiple:.2f}x",
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
