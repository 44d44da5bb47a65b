"""``weightlift estimate``: the memory of a checkpoint's weights, by dtype and by device."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.cli.sources import (
    Bin,
    OpenOptions,
    Paths,
    Prefix,
    Revision,
    StateDictKey,
    Subfolder,
    Variant,
    expand,
    open_all,
    place_of,
    print_whole,
    safe_text,
    title_of,
)
from weightlift.core import dtypes
from weightlift.core.report import format_bytes

__all__ = ["estimate"]

# Bits of a floating-point element.
_BITS = {"float32": 32, "bfloat16, float16": 16, "8 bits": 8, "4 bits": 4}
# Adam needs weights, gradients and two moments, all in the dtype of the weights.
_COPIES_TO_TRAIN = 4
_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def estimate(
    paths: Paths,
    device_map: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help='Bytes of each device for a map of name prefixes to devices, such as \'{"layers": '
            '0, "": "cpu"}\', or for a file with one.',
            show_default=False,
        ),
    ] = None,
    subfolder: Subfolder = None,
    variant: Variant = None,
    use_bin: Bin = False,
    state_dict_key: StateDictKey = None,
    prefix: Prefix = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate the memory of a checkpoint's weights; no tensor is read.

    For each dtype: all weights, the largest tensor, and training with Adam (weights, gradients and
    two moments, all in that dtype). Integer weights keep their dtype. Activations and caches come
    on top.

    Examples:

      weightlift estimate org/model

      weightlift estimate model/ --device-map '{"model.layers": 0, "": "cpu"}'
    """
    options = OpenOptions(subfolder, variant, use_bin, state_dict_key, prefix, revision)
    every = expand(paths)
    checkpoints = [checkpoint for path in every for _, checkpoint in open_all(path, options)]
    title = place_of(every[0], subfolder) if len(every) == 1 else title_of(every)
    found = describe(title, checkpoints)
    if device_map is not None:
        found["devices"] = _by_device(checkpoints, _device_map(device_map))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)


def describe(path: str, checkpoints: list[Checkpoint]) -> dict[str, Any]:
    """Sizes in bytes."""
    floating: list[int] = []
    others: list[int] = []
    own: list[int] = []
    for checkpoint in checkpoints:
        for dtype, shape in _unique(checkpoint):
            elements = math.prod(shape)
            size = elements * dtypes.bits(dtype) // 8
            own.append(size)
            if dtype in dtypes.FLOATING:
                floating.append(elements)
            else:
                others.append(size)
    rows = {"as stored": _row(sum(own), max(own, default=0))}
    for name, bits in _BITS.items():
        total = sum(elements * bits // 8 for elements in floating) + sum(others)
        largest = max([*(elements * bits // 8 for elements in floating), *others], default=0)
        rows[name] = _row(total, largest)
    return {"path": path, "parameters": sum(floating), "tensors": len(own), "dtypes": rows}


def _row(total: int, largest: int) -> dict[str, int]:
    return {"weights": total, "largest_tensor": largest, "training": total * _COPIES_TO_TRAIN}


def _unique(checkpoint: Checkpoint) -> list[tuple[str, tuple[int, ...]]]:
    """dtype and shape of each tensor; tensors that share bytes count once."""
    found = []
    for name, header in checkpoint.items():
        place = checkpoint.place(name)
        view = None if place is None else place[2]
        if view is None or view.base == name:
            found.append(header)
    return found


def _device_map(given: str) -> dict[str, str | int]:
    example = '{"layers": 0, "": "cpu"}'
    if given in _AUTOMATIC:
        raise typer.BadParameter(
            f"{given!r} is made for the memory of one machine, when a model is loaded; here it is "
            f"JSON, such as {example}, or a file with it",
            param_hint="--device-map",
        )
    is_file = _is_file(given)
    text = Path(given).read_text(encoding="utf-8", errors="replace") if is_file else given
    try:
        found = json.loads(text)
    except ValueError as error:
        what = f"{given}: " if is_file else f"{given!r} is no file and "
        raise typer.BadParameter(f"{what}not JSON: {error}", param_hint="--device-map") from None
    if not isinstance(found, dict) or not found:
        raise typer.BadParameter(
            f"a map is a JSON object, such as {example}", param_hint="--device-map"
        )
    for beginning, device in found.items():
        if isinstance(device, bool) or not re.fullmatch(r"cpu|disk|cuda|(cuda:)?\d+", str(device)):
            raise typer.BadParameter(
                f'{beginning!r}: {json.dumps(device)} is not one of 0, 1, ..., "cuda:0", '
                '"cpu", "disk"',
                param_hint="--device-map",
            )
    return found


def _is_file(given: str) -> bool:
    try:
        return Path(given).is_file()
    except OSError:  # a text that is longer than any name
        return False


def _by_device(checkpoints: list[Checkpoint], device_map: dict[str, str | int]) -> dict[str, int]:
    """Device -> bytes as stored; the longest matching prefix counts.

    Raises:
        typer.BadParameter: a tensor has no device.
    """
    found: dict[str, int] = {}
    used: set[str] = set()
    for checkpoint in checkpoints:
        for name, (dtype, shape) in checkpoint.items():
            parts = name.split(".")
            beginnings = [".".join(parts[:count]) for count in range(len(parts), -1, -1)]
            fit = next((one for one in beginnings if one in device_map), None)
            if fit is None:
                raise typer.BadParameter(
                    f'{name} has no device; add "" for all others',
                    param_hint="--device-map",
                )
            used.add(fit)
            device = str(device_map[fit])
            device = (
                f"cuda:{device}"
                if device.isdigit()
                else device.replace("cuda", "cuda:0", device == "cuda")
            )
            size = math.prod(shape) * dtypes.bits(dtype) // 8
            found[device] = found.get(device, 0) + size
    for unused in sorted({*device_map} - used - {""}):
        raise typer.BadParameter(
            f"no tensor's name begins with {unused!r}", param_hint="--device-map"
        )
    return found


def _show(found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from weightlift.cli.inspect import count_text

    console = Console(highlight=False)
    tensors = f"{found['tensors']:,} tensor{'s' * (found['tensors'] != 1)}"
    parameters = f"{count_text(found['parameters'])} parameter{'s' * (found['parameters'] != 1)}"
    console.print(f"{safe_text(found['path'])}: {tensors}, {parameters}\n", markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for title in ("dtype", "weights", "largest tensor", "training with Adam"):
        side = "left" if title == "dtype" else "right"
        table.add_column(title, justify=side, no_wrap=True, header_style="bold")  # type: ignore[arg-type]
    for name, row in found["dtypes"].items():
        table.add_row(name, *(format_bytes(size) for size in row.values()))
    print_whole(console, table)
    devices = found.get("devices", {})
    if devices:
        console.print()
    for device, size in devices.items():
        console.print(f"{device}: {format_bytes(size)} as stored")
