"""The tables of the other records: serving engines, saves, reused memory, streams."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from summary import OURS, of_machine
from weightlift.bench.plot import format_seconds
from weightlift.core.report import format_bytes

__all__ = ["pages_of_records"]

Summary = dict[str, Any]


def pages_of_records(results: Path) -> str:
    """A section for each kind of record and each machine that has one."""
    parts = []
    for folder, (title, section) in KINDS.items():
        for path in sorted((results / folder).glob("*.json")):
            summary = json.loads(path.read_text(encoding="utf-8"))
            parts += ["", f"## {title}: {of_machine(summary)}", "", *section(summary)]
            for picture in sorted(path.parent.glob(f"{path.stem}-*.png")):
                where = picture.relative_to(results.parent)
                parts += ["", f"![{picture.stem}]({where})"]
    return "\n".join(parts) + "\n" if parts else ""


def serving_section(summary: Summary) -> Iterator[str]:
    recording = summary["recording"]
    yield (
        f"`benchmarks/serving.py` recorded {recording['names']:,} tensors in "
        f"{recording['recording_processor_seconds']} s of processor time, "
        f"{recording['microseconds_a_tensor']} us each."
    )
    yield from [
        "",
        "| rank | parameters | read | read / parameters | memory beyond them |",
        "|---|--:|--:|--:|--:|",
    ]
    for one in summary["bytes"]:
        yield (
            f"| {one['model']}, {one['rank']} of {one['ranks']} "
            f"| {format_bytes(one['parameters_bytes'])} | {format_bytes(one['counted_bytes'])} "
            f"| {one['counted_bytes'] / one['parameters_bytes']:.3f} "
            f"| {one['peak_over_parameters_mib']} MiB |"
        )
    yield from [
        "",
        "| last rank, warm | way | read / parameters | calls that read | processor | median |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for one in summary["times"]:
        for way, seconds in one["seconds"].items():
            read = one.get("read_bytes", {}).get(way)
            share = f"{read / one['parameters_bytes']:.3f}" if read else ""
            calls = one.get("read_calls", {}).get(way)
            processor = one.get("processor_seconds", {}).get(way)
            ratio = one["times_as_long_as_slices"][way]
            yield (
                f"| {one['model']}, of {one['ranks']} | {way} | {share} "
                f"| {f'{calls:,}' if calls else ''} "
                f"| {format_seconds(processor) if processor else ''} "
                f"| {format_seconds(seconds)} ({ratio} times as long as slices) |"
            )
    if summary["vllm"]:
        yield from vllm_section(summary["vllm"])
    yield from ["", "The runs:", ""]
    for number, run in enumerate(summary["runs"], 1):
        date = run["date"][:16].replace("T", " ")
        yield f"{number}. {date} UTC, load average {run['load_average']}, `{run['command']}`"


def vllm_section(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield from [
        "",
        "`load_weights` of vLLM on the CPU by `--load-format auto` and by weightlift:",
        "",
        "| rank | warm, auto | warm | auto / weightlift | cold, auto | cold | from device, auto "
        "| from device |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in records:
        cold = [one["cold auto"], one["cold weightlift"]]
        seconds = [one["warm auto"], one["warm weightlift"], *(c["seconds"] for c in cold)]
        auto, ours, cold_auto, cold_ours = (format_seconds(value) for value in seconds)
        device_auto, device_ours = (format_bytes(c["device_bytes"]) for c in cold)
        yield (
            f"| {one['model']}, {one['rank']} of {one['ranks']} | {auto} | {ours} "
            f"| {one['auto_over_weightlift']} | {cold_auto} | {cold_ours} | {device_auto} "
            f"| {device_ours} |"
        )


def saves_section(summary: Summary) -> Iterator[str]:
    yield (
        f"{format_bytes(summary['bytes'])} written, flushed to the disk (fsync). Load average "
        f"{summary['load_average']}, `{summary['command']}`."
    )
    yield from [
        "",
        "| save | weightlift | reference | weightlift / reference |",
        "|---|--:|--:|--:|",
    ]
    for one in summary["saves"]:
        ours, reference = (statistics.median(seconds) for seconds in one["seconds"].values())
        low, high = one["range"]
        yield (
            f"| {one['name']} | {format_seconds(ours)} | {format_seconds(reference)} "
            f"| {one['ours_over_reference']:.2f} ({low:.2f} to {high:.2f}) |"
        )


def second_load_section(summary: Summary) -> Iterator[str]:
    fresh, pool = (
        statistics.median(one[kind] for one in summary["rounds"]) for kind in ("fresh", "pool")
    )
    yield (
        f"A bf16 file of {format_bytes(summary['bytes'])} to fp32, in a process that loads again "
        f"and again: {format_seconds(fresh)} into fresh memory, {format_seconds(pool)} into memory "
        f"of deleted tensors (`Settings(pool_bytes=)`), {summary['ratio']:.2f}x as fast. "
        f"`{summary['command']}`."
    )


def streams_section(summary: Summary) -> Iterator[str]:
    yield from [
        "| part | | time | memory | others' time, limit of memory | target | measured |",
        "|---|---|--:|--:|---|---|--:|",
    ]
    for part in summary["parts"].values():
        for one in part["workloads"]:
            yield stream_row(one)
    yield from ["", "The runs:", ""]
    for number, (name, part) in enumerate(summary["parts"].items(), 1):
        date = part["date"][:16].replace("T", " ")
        rates = "".join(
            f", {what} {format_bytes(rate)}/s" for what, rate in part.get("rates", {}).items()
        )
        yield (
            f"{number}. {name}: {date} UTC, load average {part['load_average']}, "
            f"`{part['command']}`{rates}"
        )


def stream_row(one: dict[str, Any]) -> str:
    contenders = dict(one["contenders"])
    # "layers": a model that runs while it loads
    name = next((name for name in contenders if name in (*OURS, "layers")), "")
    ours = contenders.pop(name, None)
    others = []
    for other, found in contenders.items():
        limit = found.get("limit_bytes")
        within = f" in {format_bytes(limit)}" if limit else ""
        others.append(f"{other} {format_seconds(middle_of(found))}{within}")
    others += [f"{other} not measured: {why}" for other, why in one["refused"].items()]
    figure = one["figure"] or {"target": "", "measured": "", "passed": True}
    measured = figure["measured"]
    if not figure["passed"]:
        measured = f"**{measured}, missed**"
    cells = [
        one["name"],
        one["about"],
        format_seconds(middle_of(ours)) if ours else "",
        format_bytes(ours["peak_bytes"]) if ours else "",
        ", ".join(others),
        figure["target"],
        measured,
    ]
    return f"| {' | '.join(cells)} |"


def middle_of(contender: dict[str, Any]) -> float:
    return float(contender.get("median") or statistics.median(contender["seconds"]))


KINDS: dict[str, tuple[str, Callable[[Summary], Iterator[str]]]] = {
    "serving": ("Serving engines", serving_section),
    "saves": ("Saving", saves_section),
    "streams": ("Weights that flow", streams_section),
    "second-load": ("Memory used again", second_load_section),
}
