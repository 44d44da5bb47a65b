"""``weightlift inspect``: what is in a checkpoint file, from its header alone."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from weightlift import _native
from weightlift.report import format_bytes

__all__ = ["inspect"]


class Sort(enum.Enum):
    NAME = "name"
    SIZE = "size"
    OFFSET = "offset"


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """A tensor; ``offset`` counts from the start of the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


_ORDERS: dict[Sort, Any] = {
    Sort.NAME: lambda entry: entry.name,
    Sort.SIZE: lambda entry: (-entry.bytes, entry.offset),
    Sort.OFFSET: lambda entry: (entry.offset, entry.bytes),
}


def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A .safetensors file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every tensor.")] = False,
    sort: Annotated[Sort, typer.Option(help="The order of the tensors.")] = Sort.OFFSET,
    limit: Annotated[
        int, typer.Option(min=0, help="List at most this many tensors; 0 lists all.")
    ] = 40,
) -> None:
    """Show what is in a checkpoint file; no tensor is read."""
    found = describe(file)
    entries: list[TensorEntry] = sorted(found.pop("tensors"), key=_ORDERS[sort])
    if as_json:
        found["tensors"] = [dataclasses.asdict(entry) for entry in entries]
        print(json.dumps(found, indent=2))
    else:
        _show(found, entries, limit)


def describe(file: str) -> dict[str, Any]:
    """Everything that ``inspect`` shows; sizes and offsets in bytes."""
    part = _native.IndexedFile.open(file)
    ranges = [part.range(position) for position in range(len(part))]
    entries = [
        TensorEntry(name, dtype, tuple(shape), begin, end - begin)
        for name, dtype, shape, (begin, end) in zip(
            part.names(), part.dtypes(), part.shapes(), ranges, strict=True
        )
    ]
    totals: dict[str, dict[str, int]] = {}
    for entry in entries:
        total = totals.setdefault(entry.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        total["tensors"] += 1
        total["parameters"] += entry.parameters
        total["bytes"] += entry.bytes
    with Path(file).open("rb") as opened:
        # The format: a header's length in eight bytes, the header, the tensors.
        header = int.from_bytes(opened.read(8), "little")
    filled = [entry for entry in entries if entry.bytes]
    return {
        "file": file,
        "file_bytes": part.size,
        "header_bytes": header,
        "data_offset": 8 + header,
        "tensor_bytes": sum(entry.bytes for entry in entries),
        "totals": dict(sorted(totals.items(), key=lambda pair: -pair[1]["bytes"])),
        "alignment": _alignment(filled),
        "misaligned_tensors": sum(
            1
            for entry in filled
            if entry.offset % max(1, entry.bytes // max(1, entry.parameters)) != 0
        ),
        "resident_bytes": part.resident_bytes(),
        "metadata": part.metadata(),
        "tensors": entries,
    }


def _alignment(entries: list[TensorEntry]) -> int | None:
    """The largest power of two, up to a page, that divides every offset."""
    common = math.gcd(4096, *(entry.offset for entry in entries))
    return common if entries else None


def _plain(text: str) -> str:
    """Names come from strangers: no escape sequence reaches the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _show(found: dict[str, Any], entries: list[TensorEntry], limit: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)

    def table(*columns: tuple[str, str]) -> Table:
        made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
        for title, side in columns:
            wraps = title in ("name", "metadata", "")
            made.add_column(
                title,
                justify="right" if side == ">" else "left",
                no_wrap=not wraps,
                overflow="fold",
                header_style="bold",
            )
        return made

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")

    def fact(name: str, value: str) -> None:
        facts.add_row(name, Text(value))

    parameters = sum(total["parameters"] for total in found["totals"].values())
    fact("file", _plain(found["file"]))
    fact("size", f"{format_bytes(found['file_bytes'])} ({found['file_bytes']:,} bytes)")
    fact("tensors", f"{len(entries):,}, {_count(parameters)} parameters")
    fact("header", f"{format_bytes(found['header_bytes'])}")
    fact("alignment", _alignment_text(found))
    fact("page cache", _residency_text(found))
    console.print(facts)

    console.print()
    totals = table(("dtype", "<"), ("tensors", ">"), ("parameters", ">"), ("size", ">"))
    for dtype, total in found["totals"].items():
        totals.add_row(
            dtype,
            f"{total['tensors']:,}",
            _count(total["parameters"]),
            format_bytes(total["bytes"]),
        )
    console.print(totals)

    if found["metadata"]:
        console.print()
        metadata = table(("metadata", "<"), ("", "<"))
        for key, value in sorted(found["metadata"].items()):
            shown = _plain(value)
            if limit and len(shown) > 300:
                shown = f"{shown[:300]}... ({len(shown):,} characters)"
            metadata.add_row(Text(_plain(key)), Text(shown))
        console.print(metadata)

    if not entries:
        return
    console.print()
    shown_entries = entries if limit == 0 else entries[:limit]
    tensors = table(("name", "<"), ("dtype", "<"), ("shape", "<"), ("size", ">"), ("offset", ">"))
    for entry in shown_entries:
        tensors.add_row(
            Text(_plain(entry.name)),
            entry.dtype,
            " x ".join(map(str, entry.shape)) or "scalar",
            format_bytes(entry.bytes),
            f"{entry.offset:,}",
        )
    console.print(tensors)
    left = entries[len(shown_entries) :]
    if left:
        console.print(
            f"... and {len(left):,} more, {format_bytes(sum(entry.bytes for entry in left))}; "
            "--limit 0 lists all",
            style="dim",
        )


def _alignment_text(found: dict[str, Any]) -> str:
    if found["alignment"] is None:
        return "no data"
    text = f"every tensor begins at a multiple of {found['alignment']} bytes"
    if found["misaligned_tensors"]:
        text += (
            f"; {found['misaligned_tensors']:,} are not aligned to their own elements "
            "(slower to compute on where they are mapped; weightlift.save_file aligns)"
        )
    return text


def _residency_text(found: dict[str, Any]) -> str:
    resident = found["resident_bytes"]
    if resident is None:
        return "unknown: this kernel cannot tell (cachestat came with Linux 6.5)"
    share = resident / found["file_bytes"] if found["file_bytes"] else 1.0
    return f"{share:.0%} of the file ({format_bytes(resident)})"


def _count(number: int) -> str:
    """``1536`` as ``"1.5 K"``: how parameters are counted."""
    if number < 1000:
        return str(number)
    value = float(number)
    for unit in ("K", "M", "B", "T"):
        value /= 1000
        if value < 999.5 or unit == "T":
            return f"{value:.1f} {unit}"
    raise AssertionError("unreachable")
