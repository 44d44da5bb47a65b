"""``weightlift inspect``: the content of a checkpoint, from its index."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.resolve import torch_format_of
from weightlift.cli.sources import (
    Bin,
    OpenOptions,
    Paths,
    Prefix,
    Revision,
    StateDictKey,
    Subfolder,
    Variant,
    components_of,
    expand,
    name_width,
    place_of,
    print_whole,
    safe_text,
    shorten,
)
from weightlift.cli.values import names_of, one_of, whole_number
from weightlift.core import dtypes
from weightlift.core.errors import WeightliftError
from weightlift.core.report import format_bytes, format_count

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["inspect"]


class Sort(enum.Enum):
    NAME = "name"
    SIZE = "size"
    OFFSET = "offset"


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """A tensor.

    Attributes:
        file: the name of its file.
        offset: its first byte in the file; for a view the first byte of its base; ``None`` for a
            tensor that only torch can load.
        shares: the tensor that has the same bytes, or ``None``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int | None
    bytes: int
    shares: str | None = None

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


_ORDERS: dict[Sort, Any] = {
    Sort.NAME: lambda entry: entry.name,
    Sort.SIZE: lambda entry: (-entry.bytes, entry.file, entry.offset or 0),
    Sort.OFFSET: lambda entry: (entry.file, entry.offset or 0, entry.bytes),
}


def inspect(
    paths: Paths,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every tensor.")] = False,
    sort: Annotated[
        Sort,
        typer.Option(
            parser=one_of(Sort),
            autocompletion=names_of(Sort),
            metavar="name|size|offset",
            help="The order of the tensors; that of the file by default.",
            show_default=False,
        ),
    ] = Sort.OFFSET,
    limit: Annotated[
        int,
        typer.Option(
            parser=whole_number(0),
            metavar="N",
            help="List at most this many tensors; 0 lists all.",
        ),
    ] = 40,
    subfolder: Subfolder = None,
    variant: Variant = None,
    use_bin: Bin = False,
    state_dict_key: StateDictKey = None,
    prefix: Prefix = None,
    revision: Revision = None,
) -> None:
    """Show the content of a checkpoint; no tensor is read.

    Shows each component of a pipeline. Downloads the weights of a Hub repository.

    Examples:

      weightlift inspect model.safetensors --sort size --limit 10

      weightlift inspect pipeline/ --subfolder unet --json

      weightlift inspect '*.safetensors'
    """
    options = OpenOptions(subfolder, variant, use_bin, state_dict_key, prefix, revision)
    from weightlift.cli.main import print_error

    every = expand(paths)
    if as_json:
        contents = [_content(path, options, sort) for path in every]
        print(json.dumps(contents[0] if len(contents) == 1 else contents, indent=2))
        return
    failed = 0
    for number, path in enumerate(every):
        if number > failed:
            print()
        try:
            _show_all(path, options, sort, limit)
        except (WeightliftError, OSError) as error:
            if len(every) == 1:
                raise
            print_error(error)  # and the others are shown
            failed += 1
    if failed:
        raise typer.Exit(1)


def _show_all(path: str, options: OpenOptions, sort: Sort, limit: int) -> None:
    for number, name in enumerate(_components(path, options)):
        one = describe(path, options, name)
        if name is not None:
            print(f"{chr(10) if number else ''}{safe_text(name)}")
        _show(one, sorted(one["tensors"], key=_ORDERS[sort]), limit)


def _content(path: str, options: OpenOptions, sort: Sort) -> dict[str, Any]:
    """What ``--json`` prints of a path: its checkpoint, or those of its components."""
    found = {name: describe(path, options, name) for name in _components(path, options)}
    for one in found.values():
        entries = sorted(one["tensors"], key=_ORDERS[sort])
        one["tensors"] = [dataclasses.asdict(entry) for entry in entries]
    whole = {"path": path, "components": {str(name): one for name, one in found.items()}}
    return found.get(None, whole)


def _components(path: str, options: OpenOptions) -> list[str | None]:
    if options.subfolder is not None:
        return [None]
    return [*components_of(path, options.revision)] or [None]


def describe(path: str, options: OpenOptions, component: str | None = None) -> dict[str, Any]:
    """Everything that ``inspect`` shows; sizes and offsets in bytes."""
    if options == OpenOptions() and _is_lone(path):
        checkpoint = Checkpoint.from_file(path)
    else:
        checkpoint = options.open(path, component)
    entries = [_entry(checkpoint, name) for name in checkpoint]
    totals: dict[str, dict[str, int]] = {}
    for entry in entries:
        if entry.shares is not None:
            continue
        total = totals.setdefault(entry.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        total["tensors"] += 1
        total["parameters"] += entry.parameters
        total["bytes"] += entry.bytes
    files = [
        {"path": file, "format": form, "bytes": size, "header_bytes": _header(file, form)}
        for (file, _), form, size in zip(
            checkpoint.files, checkpoint.formats, checkpoint.file_sizes, strict=False
        )
    ]
    files += [  # of files that only torch can read, nothing more is known
        {"path": path, "format": "torch", "bytes": Path(path).stat().st_size, "header_bytes": None}
        for path, _ in checkpoint.loaded
    ]
    filled = [entry for entry in entries if entry.bytes and entry.offset is not None]
    return {
        "path": place_of(path, component or options.subfolder),
        "files": files,
        "file_bytes": sum(file["bytes"] for file in files),
        "tensor_bytes": sum(total["bytes"] for total in totals.values()),
        "totals": dict(sorted(totals.items(), key=lambda pair: -pair[1]["bytes"])),
        "alignment": _alignment(filled),
        "misaligned_tensors": sum(
            1
            for entry in filled
            if (entry.offset or 0) % max(1, entry.bytes // max(1, entry.parameters)) != 0
        ),
        "resident_bytes": None if checkpoint.loaded else checkpoint.resident_bytes(),
        "metadata": {
            key: value for metadata in checkpoint.file_metadata() for key, value in metadata.items()
        }
        | dict(checkpoint.metadata),
        "fallbacks": list(checkpoint.fallbacks),
        "tensors": entries,
    }


def _is_lone(path: str) -> bool:
    """A file that is not torch's, by its name or its bytes, is taken for safetensors."""
    others = path.lower().endswith((".dduf", ".json"))
    return not others and Path(path).is_file() and torch_format_of(path) is None


def _entry(checkpoint: Checkpoint, name: str) -> TensorEntry:
    dtype, shape = checkpoint[name]
    found = checkpoint.byte_range(name)
    if found is None:
        return TensorEntry(name, dtype, shape, "", None, checkpoint.in_memory[name].nbytes)
    path, begin, end = found
    count = end - begin
    view = checkpoint.view(name)
    if view is not None:
        count = math.prod(shape) * dtypes.bits(dtype) // 8
    shares = view.base if view is not None and view.base != name else None
    return TensorEntry(name, dtype, shape, Path(path).name, begin, count, shares)


def _header(path: str, form: str) -> int | None:
    """The size of a safetensors file's header, from its first eight bytes."""
    if form != "safetensors" or path.lower().endswith(".dduf"):
        return None
    with Path(path).open("rb") as opened:
        return int.from_bytes(opened.read(8), "little")


def _alignment(entries: list[TensorEntry]) -> int | None:
    """The largest power of two, up to a page, that divides every offset."""
    common = math.gcd(4096, *(entry.offset or 0 for entry in entries))
    return common if entries else None


def _table(*columns: tuple[str, str]) -> Table:
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for title, side in columns:
        made.add_column(
            title,
            justify="right" if side == ">" else "left",
            no_wrap=title not in ("metadata", ""),
            overflow="fold",
            header_style="bold",
        )
    return made


def _show(found: dict[str, Any], entries: list[TensorEntry], limit: int) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_facts(found, len(entries)))
    console.print()
    totals = _table(("dtype", "<"), ("tensors", ">"), ("parameters", ">"), ("size", ">"))
    for dtype, total in found["totals"].items():
        totals.add_row(
            dtype,
            f"{total['tensors']:,}",
            count_text(total["parameters"]),
            format_bytes(total["bytes"]),
        )
    print_whole(console, totals)
    if found["metadata"]:
        console.print()
        console.print(_metadata(found["metadata"], limit))
    if not entries:
        return
    console.print()
    listed = entries if limit == 0 else entries[:limit]
    number_of = {Path(file["path"]).name: str(n) for n, file in enumerate(found["files"], 1)}
    print_whole(console, _tensors(listed, number_of, console.width))
    left = entries[len(listed) :]
    if left:
        console.print(
            f"... and {len(left):,} more, {format_bytes(sum(entry.bytes for entry in left))}; "
            "--limit 0 lists all",
            style="dim",
        )


def _facts(found: dict[str, Any], tensors: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")

    def fact(name: str, value: str) -> None:
        facts.add_row(name, Text(value))

    parameters = sum(total["parameters"] for total in found["totals"].values())
    files = found["files"]
    fact("path", safe_text(found["path"]))
    if len(files) > 1:
        for number, file in enumerate(files, 1):
            name = safe_text(Path(file["path"]).name)
            fact(f"file {number}", f"{name}, {format_bytes(file['bytes'])}")
    fact("size", f"{format_bytes(found['file_bytes'])} ({found['file_bytes']:,} bytes)")
    fact("tensors", f"{tensors:,}, {count_text(parameters)} parameter{'s' * (parameters != 1)}")
    headers = [file["header_bytes"] for file in files if file["header_bytes"] is not None]
    if headers:
        fact("header" if len(headers) == 1 else "headers", format_bytes(sum(headers)))
    if found["alignment"] is not None or not found["tensor_bytes"]:
        fact("alignment", _alignment_text(found))
        fact("page cache", _residency_text(found))
    for fallback in found["fallbacks"]:
        fact("note", safe_text(fallback))
    return facts


def _metadata(metadata: dict[str, str], limit: int) -> Table:
    from rich.text import Text

    table = _table(("metadata", "<"), ("", "<"))
    for key, value in sorted(metadata.items()):
        text = safe_text(value)
        if limit and len(text) > 300:
            text = f"{text[:300]}... ({len(text):,} characters)"
        table.add_row(Text(safe_text(key)), Text(text))
    return table


def _tensors(entries: list[TensorEntry], number_of: dict[str, str], width: int) -> Table:
    """The table of tensors; long names lose their middle, so that no column is cut."""
    from rich.text import Text

    rows = [
        [
            entry.dtype,
            " x ".join(map(str, entry.shape)) or "scalar",
            format_bytes(entry.bytes),
            "" if entry.offset is None else f"{entry.offset:,}",
            *([number_of.get(entry.file, "")] if len(number_of) > 1 else []),
        ]
        for entry in entries
    ]
    titles = ["dtype", "shape", "size", "offset", *(["file"] if len(number_of) > 1 else [])]
    left = name_width(width, titles, rows)
    sides = {"dtype": "<", "shape": "<"}
    table = _table(("name", "<"), *((title, sides.get(title, ">")) for title in titles))
    for entry, row in zip(entries, rows, strict=True):
        shares = "" if entry.shares is None else f" = {safe_text(entry.shares)}"
        table.add_row(Text(shorten(safe_text(entry.name) + shares, left)), *row)
    return table


def _alignment_text(found: dict[str, Any]) -> str:
    if found["alignment"] is None:
        return "no data"
    step = format_count(found["alignment"], "byte")
    text = f"every tensor begins at a multiple of {step}"
    count = found["misaligned_tensors"]
    if count:
        their = "its" if count == 1 else "their"
        text += (
            f"; {format_count(count, 'is', 'are')} not aligned to {their} own elements (slower to "
            "compute on where mapped; weightlift.save_file aligns)"
        )
    return text


def _residency_text(found: dict[str, Any]) -> str:
    resident = found["resident_bytes"]
    if resident is None:
        return "unknown: this kernel has no cachestat (Linux 6.5 has)"
    share = resident / found["file_bytes"] if found["file_bytes"] else 1.0
    return f"{share:.0%} of the file ({format_bytes(resident)})"


def count_text(number: int) -> str:
    """``1536`` as ``"1.5 K"``: how parameters are counted."""
    if number < 1000:
        return str(number)
    power = 1
    while number / 1000**power >= 999.5 and power < 4:
        power += 1
    return f"{number / 1000**power:.1f} {' KMBT'[power]}"
