"""``weightlift diff``: the differences between two checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.cli.sources import (
    SOURCE_HELP,
    Bin,
    OpenOptions,
    Prefix,
    Revision,
    StateDictKey,
    Subfolder,
    Variant,
    name_width,
    open_all,
    print_whole,
    safe_text,
    shorten,
)
from weightlift.cli.values import whole_number

if TYPE_CHECKING:
    import torch

__all__ = ["diff"]

# Tensor bytes of one checkpoint in memory at once, unless a single tensor is larger.
_AT_ONCE = 256 << 20


@dataclasses.dataclass(frozen=True)
class Difference:
    """A tensor that differs.

    Attributes:
        kind: ``"only in A"``, ``"only in B"``, ``"shape"``, ``"dtype"`` (equal values when cast to
            the wider dtype), or ``"values"``.
        a, b: dtype and shape in A and B, or ``None``.
        largest: the largest absolute difference; ``nan`` if a value is not a number.
        cosine: the cosine of the two as vectors; ``None`` if one of them is zero.
    """

    name: str
    kind: str
    a: str = ""
    b: str = ""
    largest: float | None = None
    cosine: float | None = None


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=SOURCE_HELP, show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.", show_default=False)],
    names_only: Annotated[
        bool, typer.Option("--headers", help="Names, dtypes and shapes alone; no tensor is read.")
    ] = False,
    limit: Annotated[
        int,
        typer.Option(
            parser=whole_number(0),
            metavar="N",
            help="List at most this many differences; 0 lists all.",
        ),
    ] = 40,
    subfolder: Subfolder = None,
    variant: Variant = None,
    use_bin: Bin = False,
    state_dict_key: StateDictKey = None,
    prefix: Prefix = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print no result; the exit status tells.")
    ] = False,
) -> None:
    """Compare two checkpoints of any forms: names, dtypes, shapes and values.

    Values are compared bit by bit, then by their largest difference and their cosine. Exit status 1
    if anything differs.

    Examples:

      weightlift diff pytorch_model.bin model.safetensors

      weightlift diff org/model ./fine-tuned --limit 0
    """
    from weightlift.core.requirements import require

    if not names_only:
        require("torch", "weightlift diff")
    options = OpenOptions(subfolder, variant, use_bin, state_dict_key, prefix, revision)
    first, second = dict(open_all(a, options)), dict(open_all(b, options))
    found: list[Difference] = []
    count = 0
    for component in dict.fromkeys([*first, *second]):
        prefix = "" if component is None else f"{component}/"
        one, other = first.get(component), second.get(component)
        count += len(set(one or ()) | set(other or ()))
        found += [
            dataclasses.replace(difference, name=prefix + difference.name)
            for difference in _compare(one, other, not names_only)
        ]
    if as_json:
        whole = {"a": a, "b": b, "tensors": count, "equal": count - len(found)}
        differences = [_plain(dataclasses.asdict(one)) for one in found]
        print(json.dumps({**whole, "differences": differences}, indent=2))
    elif not quiet:
        _show(found, count, limit)
    if found:
        raise typer.Exit(1)


def _compare(
    one: Checkpoint | None, other: Checkpoint | None, values: bool
) -> Iterator[Difference]:
    ours = {} if one is None else dict(one.items())
    theirs = {} if other is None else dict(other.items())
    same: list[str] = []
    for name in dict.fromkeys([*ours, *theirs]):
        mine, its = ours.get(name), theirs.get(name)
        if mine is None or its is None:
            kind = "only in A" if its is None else "only in B"
            yield Difference(name, kind, _header(mine), _header(its))
        elif mine[1] != its[1]:
            yield Difference(name, "shape", _header(mine), _header(its))
        elif values:
            same.append(name)
        elif mine[0] != its[0]:
            yield Difference(name, "dtype", _header(mine), _header(its))
    if one is None or other is None:
        return
    for names in _batches(same, ours):
        yield from _compare_values(one, other, names)


def _batches(
    names: Sequence[str], headers: dict[str, tuple[str, tuple[int, ...]]]
) -> Iterator[list[str]]:
    from weightlift.core import dtypes

    batch: list[str] = []
    held = 0
    for name in names:
        dtype, shape = headers[name]
        size = math.prod(shape) * dtypes.bits(dtype) // 8
        if batch and held + size > _AT_ONCE:
            yield batch
            batch, held = [], 0
        batch.append(name)
        held += size
    if batch:
        yield batch


def _compare_values(one: Checkpoint, other: Checkpoint, names: list[str]) -> Iterator[Difference]:
    from weightlift.core.devices import parse_device
    from weightlift.load.load_tensors import load_tensors

    cpu = parse_device("cpu")
    ours, theirs = (load_tensors(part, cpu, names=names) for part in (one, other))
    for name in names:
        mine, its = ours[name], theirs[name]
        headers = _header(one[name]), _header(other[name])
        if mine.dtype == its.dtype and _same_bits(mine, its):
            continue
        if not (mine.is_floating_point() or mine.is_complex()) and mine.dtype == its.dtype:
            yield Difference(name, "values", *headers, _largest(mine.long(), its.long()))
            continue
        wide, wider = mine.double(), its.double()
        if _same_bits(wide, wider):
            yield Difference(name, "dtype", *headers)
            continue
        yield Difference(name, "values", *headers, _largest(wide, wider), _cosine(wide, wider))


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(first, second)


def _largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float | None:
    lengths = float(one.norm()), float(other.norm())
    if not all(lengths):
        return None
    return float(one.reshape(-1) @ other.reshape(-1)) / (lengths[0] * lengths[1])


def _header(header: tuple[str, tuple[int, ...]] | None) -> str:
    return "" if header is None else f"{header[0]} {' x '.join(map(str, header[1])) or 'scalar'}"


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity as text, because JSON has neither."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in found.items()
    }


def _side_by_side(a: str, b: str) -> str:
    """Two descriptions such as "F32 3 x 4", with equal parts once."""
    if a == b:
        return a
    (dtype, _, shape), (other, _, other_shape) = a.partition(" "), b.partition(" ")
    if a and b and shape == other_shape:
        return f"{dtype} / {other}"
    return f"{a or '-'} / {b or '-'}"


def _show(found: list[Difference], count: int, limit: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    tensors = f"{count:,} tensor{'s' * (count != 1)}"
    if not found:
        console.print(f"{tensors}, all equal")
        return
    listed = found if limit == 0 else found[:limit]
    rows: list[tuple[str, ...]] = []
    for one in listed:
        how = _side_by_side(one.a, one.b)
        largest = "" if one.largest is None else f"{one.largest:.3g}"
        rows.append((one.kind, how, largest, "" if one.cosine is None else f"{one.cosine:.6f}"))
    titles = ["differs in", "A / B", "largest", "cosine"]
    kept = [i for i in range(len(titles)) if i < 2 or any(row[i] for row in rows)]
    titles = [titles[i] for i in kept]
    rows = [tuple(row[i] for i in kept) for row in rows]
    width = name_width(console.width, titles, rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for title in ("name", *titles):
        side = "right" if title in ("largest", "cosine") else "left"
        table.add_column(title, justify=side, no_wrap=True, header_style="bold")  # type: ignore[arg-type]
    for one, row in zip(listed, rows, strict=True):
        table.add_row(Text(shorten(safe_text(one.name), width)), *row)
    print_whole(console, table)
    if len(found) > len(listed):
        console.print(f"... and {len(found) - len(listed):,} more; --limit 0 lists all")
    console.print(f"\n{len(found):,} of {tensors} differ{'s' * (len(found) == 1)}")
