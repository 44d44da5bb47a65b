"""The tables of ``weightlift bench``, at most 80 columns wide, and the lines below them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weightlift.bench.conditions import BACKED
from weightlift.bench.models import NAMES, state
from weightlift.bench.plot import format_rate
from weightlift.core.report import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from weightlift.bench.comparison import Comparison, Sample

__all__ = [
    "comparison_table",
    "describe_run",
    "distributed_table",
    "forward_notes",
    "models_table",
    "notes",
    "verdicts",
]


def describe_run(found: Comparison) -> str:
    """The conditions of a comparison: the page cache, the rounds and the backed memory."""
    every = [sample for samples in found.samples.values() for sample in samples]
    if not every:
        return "nothing could be measured"
    residents = {sample.resident_bytes for sample in every}
    if None in residents:
        cache = "an unknown share of the files (Linux reports it since 6.5)"
    else:
        known = [count for count in residents if count is not None]
        shares = [f"{bound(known) / max(found.file_bytes, 1):.1%}" for bound in (min, max)]
        cache = f"{' to '.join(dict.fromkeys(shares))} of the files"
    rounds = max(len(samples) for samples in found.samples.values())
    rates = [one.new_memory_rate for one in every if one.new_memory_rate is not None]
    came = f"; new memory came at {format_rate(statistics.median(rates))}" if rates else ""
    if found.memory == BACKED:
        backed = format_bytes(min(sample.backed_bytes for sample in every))
        memory = f"{backed} of memory on huge pages backed beforehand and held until the load began"
    else:
        memory = "memory not backed: left free first, so that a host could take it"
    warm = "warm, read once more before each load"
    return (
        f"{'cold' if found.cold else warm}: before each load the page cache held {cache}; "
        f"rounds in random order: {rounds}, a new process each; {memory}{came}"
    )


def comparison_table(comparison: Comparison, reference: str = "weightlift") -> Table:
    """A row for each contender; the times' ratio is to ``reference``'s."""
    from rich import box
    from rich.table import Table

    from weightlift.bench.plot import format_seconds

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    for title in ["", "time", "load", "touch", "rate", "CPU", "memory", "ratio"]:
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for name, samples in comparison.samples.items():
        ratio = comparison.time_ratio(name, reference)
        table.add_row(
            name,
            format_seconds(comparison.median(name)),
            format_seconds(statistics.median(sample.load_seconds for sample in samples)),
            format_seconds(statistics.median(sample.touch_seconds for sample in samples)),
            format_rate(comparison.rate(name)),
            format_seconds(statistics.median(sample.cpu_seconds for sample in samples)),
            format_bytes(comparison.peak(name)),
            "" if ratio is None else f"{ratio:.2f}",
            style="bold" if name == reference else "",
        )
    table.caption = (
        "Medians; rate: of the files' bytes; memory: the peak of what the load took for itself, "
        f"beside the page cache; ratio: time over {reference}'s, median of the rounds."
    )
    table.caption_justify = "left"
    return table


def verdicts(found: Comparison, ours: str) -> list[str]:
    """A line for each other contender: which is faster, by how much, and whether all rounds agree.

    Args:
        found: what was measured.
        ours: the contender that the others are compared with.
    """
    names = {ours: "weightlift", "stock": "the library alone"}
    own = names[ours]
    lines = []
    for other in found.samples:
        ratios = found.time_ratios(other, ours) if other != ours else []
        if not ratios:
            continue
        against = names.get(other, other)
        ratio = statistics.median(ratios)
        rounds = f"{min(ratios):.2f}x to {max(ratios):.2f}x in {len(ratios)} rounds"
        if len(ratios) == 1:
            rounds = "one round only; use a larger --repeat"
        if len(ratios) == 1 and f"{ratio:.2f}" == "1.00":
            text = f"{own} is as fast as {against} ({rounds})"
        elif min(ratios) > 1:
            text = f"{own} is {ratio:.2f}x as fast as {against} ({rounds})"
        elif max(ratios) < 1:
            text = f"{own} is slower: {ratio:.2f}x as fast as {against} ({rounds})"
        else:
            text = f"{own} is neither faster nor slower than {against} in all rounds ({rounds})"
        lines.append(f"{state(found.cold)}: {text}")
    return lines


def notes(comparison: Comparison) -> list[str]:
    """weightlift's I/O paths, and the contenders that could not be measured."""
    lines = []
    for ours in ("weightlift", "backend"):
        if ours in comparison.samples:
            lines += [f"weightlift's I/O path: {text}" for text in comparison.route(ours)]
    for name, why in comparison.refused.items():
        lines.append(f"{NAMES.get(name, name)}: not measured: {why}")
    return lines


def models_table(comparisons: Sequence[Comparison]) -> Table:
    """Rows for each state of the page cache; at most 80 columns wide."""
    from rich import box
    from rich.table import Table

    from weightlift.bench.plot import format_seconds

    def median(samples: list[Sample], of: str) -> str:
        values = [value for value in (getattr(one, of) for one in samples) if value is not None]
        return format_seconds(statistics.median(values)) if values else ""

    on_cuda = comparisons[0].job.on_cuda
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), header_style="bold"
    )
    titles = ["", "", "call", "loaded", "1st forward", "memory"]
    for title in [*titles, *(["on GPU"] if on_cuda else []), "ratio"]:
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for found in comparisons:
        ratio = found.time_ratio("stock", "backend")
        label = state(found.cold)
        for contender in ("stock", "backend"):
            samples = found.samples.get(contender)
            if samples is None:
                continue
            ours = contender == "backend"
            table.add_row(
                label,
                NAMES[contender],
                median(samples, "load_seconds"),
                median(samples, "seconds"),
                median(samples, "first_forward_seconds"),
                format_bytes(found.peak(contender)),
                *([format_bytes(_device_peak(samples))] if on_cuda else []),
                f"{ratio:.2f}x" if ours and ratio is not None else "",
                style="bold" if ours else "",
            )
            label = ""
    ranges = [
        f"{state(found.cold)} {min(ratios):.2f}x to {max(ratios):.2f}x"
        for found in comparisons
        if (ratios := found.time_ratios("stock", "backend"))
    ]
    table.caption = (
        "Medians. call: from_pretrained; loaded: every page of the weights touched too; 1st "
        "forward: from the start to the end of a small one; memory: the load's own at its peak, "
        "beside the page cache; ratio: the library's time to loaded over weightlift's, by round"
        f"{''.join(f'; {one}' for one in ranges)}."
    )
    table.caption_justify = "left"
    return table


def forward_notes(found: Comparison) -> list[str]:
    """The reasons why there was no forward pass."""
    every = [sample for samples in found.samples.values() for sample in samples]
    return [
        f"no forward pass: {why}" for why in sorted({one.forward for one in every if one.forward})
    ]


def _device_peak(samples: list[Sample]) -> int:
    return max(max(one.peak_device_bytes or 0, one.device_bytes or 0) for one in samples)


@dataclasses.dataclass(frozen=True)
class _Row:
    seconds: float
    ratio: float
    read: float
    mapped: float
    peak: float
    held: float


def _row(loads: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]], file_bytes: int) -> _Row:
    def median(field: str) -> float:
        return float(statistics.median(load[field] for load in loads))

    rounds = zip(loads, ours, strict=True)
    return _Row(
        median("seconds"),
        statistics.median(load["seconds"] / own["seconds"] for load, own in rounds),
        median("read_bytes") / file_bytes,
        median("mapped_bytes") / file_bytes,
        median("peak_bytes"),
        median("held_bytes"),
    )


def distributed_table(found: dict[str, Any]) -> Table:
    """A row for each contender; the times' ratio is to weightlift's of the same kind."""
    from rich import box
    from rich.table import Table

    from weightlift.bench.plot import format_seconds

    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), header_style="bold"
    )
    for title in ("", "time", "ratio", "read", "mapped", "memory", "held"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for kind, contenders in found["loads"].items():
        ours = next(iter(contenders.values()))
        rows = {name: _row(loads, ours, found["file_bytes"]) for name, loads in contenders.items()}
        table.add_row(kind)
        for name, row in rows.items():
            table.add_row(
                f"  {name}",
                format_seconds(row.seconds),
                f"{row.ratio:.2f}",
                f"{row.read:.2f}",
                f"{row.mapped:.2f}",
                format_bytes(int(row.peak)),
                format_bytes(int(row.held)),
                style="bold" if contenders[name] is ours else "",
            )
    table.caption = (
        "Medians; ratio: of the rounds' ratios. read, mapped: by all ranks together, in multiples "
        "of the files. memory: the peak of anonymous memory, of the rank that took most; held: its "
        "tensors, mapped ones too."
    )
    table.caption_justify = "left"
    return table
