"""Converts a checkpoint of any form to safetensors files, in bounded memory."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weightlift.checkpoint.checkpoint import Checkpoint, describe_location
from weightlift.checkpoint.safetensors_writer import (
    Entry,
    bytes_of,
    header_of,
    in_order,
    size_of,
    write_safetensors,
)
from weightlift.core import dtypes
from weightlift.core.atomic import (
    flush_file,
    flush_folder,
    naming_target,
    put_folder_in_place,
    put_in_place,
    temporary_beside,
)
from weightlift.core.devices import parse_device
from weightlift.core.errors import ArgumentError, CheckpointError
from weightlift.core.requirements import require
from weightlift.core.sizes import parse_shard_size
from weightlift.load.load_tensors import load_tensors
from weightlift.load.options import LoadOptions

if TYPE_CHECKING:
    import torch

__all__ = ["convert_checkpoint"]

_log = logging.getLogger("weightlift")

# Tensor bytes in memory at once, unless a single tensor is larger.
_AT_ONCE = 256 << 20
_DTYPE_KEYS = ("dtype", "torch_dtype")
_QUANTIZATION = "quantization_config"
# Quantization configurations of AutoGPTQ and similar tools, and of NVIDIA ModelOpt.
_OF_QUANTIZATION = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# The shard names of transformers, diffusers and huggingface_hub.
_SHARD = "{stem}{variant}-{number:05}-of-{count:05}.safetensors"


def convert_checkpoint(
    checkpoint: Checkpoint,
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "10GB",
    stem: str = "model",
    variant: str | None = None,
    companions: Mapping[str, bytes] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Writes a checkpoint as one ``.safetensors`` file, or as a folder of shards with an index.

    The files are written under a temporary name, flushed, and renamed at the end: after an error or
    a kill there is no target. Tied tensors are written once; the metadata has ``{dropped name: kept
    name}``, as huggingface_hub writes it.

    Args:
        checkpoint: a checkpoint of any form.
        target: a file that ends in ``.safetensors``, or a folder; neither may exist.
        dtype: the dtype to cast floating-point tensors to; ``None`` keeps them.
        max_shard_size: largest number of tensor bytes in one file of a folder, unless a single
            tensor is larger: bytes, or text such as ``"5GB"`` (10^9 bytes).
        stem: the beginning of the file names in a folder.
        variant: ``"fp16"`` gives ``model.fp16.safetensors``.
        companions: file name -> content of other files to write into the folder. If the target is
            a file, a warning names them. ``dtype`` replaces the dtype in a configuration;
            quantization entries stay, with a warning.
        progress: called with the bytes done and the total.

    Returns:
        The names of the written files.

    Raises:
        ArgumentError: the target exists, or a size or a name is invalid.
        CheckpointError: safetensors has no dtype for a tensor.
    """
    require("torch", "convert")
    target = Path(target)
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise ArgumentError(f"{target} exists: remove it, or give another target")
    for what, part in (("stem", stem), ("variant", variant or "")):
        if "/" in part or "\0" in part:
            raise ArgumentError(f"{what} is {part!r}; it must be a part of a file name")
    largest = parse_shard_size(max_shard_size)
    name = dtypes.parse_dtype(dtype)
    entries, tied = _entries(checkpoint, name)
    _warn_of_left_out(checkpoint)
    written = _Written(
        checkpoint,
        entries,
        name,
        {"format": "pt", **_texts(checkpoint.metadata), **tied},
        _Progress(sum(entry.bytes for entry in entries), progress),
    )
    if target.suffix.lower() == ".safetensors":
        _write_file(written, target)
        _warn_of_companions(companions or {}, checkpoint, target, name)
        return [target.name]
    names = _NamesOfShards(stem, variant, largest)
    return _write_folder(written, target, names, _fitting(companions or {}, name))


class _Progress:
    """Reports the bytes done."""

    def __init__(self, total: int, callback: Callable[[int, int], None] | None) -> None:
        self.total = total
        self._done = 0
        self._callback = callback
        self.add(0)

    def add(self, count: int) -> None:
        self._done += count
        if self._callback is not None:
            self._callback(self._done, self.total)


class _Written(NamedTuple):
    """The input of a conversion.

    Attributes:
        source: the checkpoint.
        entries: all tensors, in the order of the file.
        dtype: the file's name of the dtype to cast to, or ``None``.
        header: metadata for the header of a single file, or for the index.
        progress: receives the bytes done.
    """

    source: Checkpoint
    entries: list[Entry]
    dtype: str | None
    header: dict[str, str]
    progress: _Progress


class _NamesOfShards(NamedTuple):
    stem: str
    variant: str | None
    largest: int


def _make_folder(folder: Path) -> None:
    """
    Raises:
        OSError: a file is in its place, or in that of a folder above it.
    """
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise NotADirectoryError(
                    errno.ENOTDIR, "is a file, not a folder: name another target", str(place)
                )
            break
    folder.mkdir(parents=True, exist_ok=True)


def _write_file(written: _Written, target: Path) -> None:
    _make_folder(target.parent)
    temporary = temporary_beside(target)
    with naming_target(target, temporary):
        try:
            _write(written, written.entries, written.header, temporary)
            put_in_place(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    flush_folder(target.parent)


def _write_folder(
    written: _Written, target: Path, names: _NamesOfShards, companions: Mapping[str, bytes]
) -> list[str]:
    shards = list(_split(written.entries, names.largest))
    files = _names(names.stem, names.variant, len(shards))
    _make_folder(target.parent)
    folder = temporary_beside(target)
    with naming_target(target, folder):
        folder.mkdir()
        try:
            for file, shard in zip(files, shards, strict=True):
                header = written.header if len(shards) == 1 else {"format": "pt"}
                _write(written, shard, header, folder / file)
            contents = dict(companions)
            if len(shards) > 1:
                of_variant = f".{names.variant}" if names.variant else ""
                index = f"{names.stem}.safetensors.index{of_variant}.json"
                contents = {index: _index(written, files, shards), **contents}
            for file, content in contents.items():
                (folder / file).write_bytes(content)
                flush_file(folder / file)
            flush_folder(folder)
            put_folder_in_place(folder, target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    flush_folder(target.parent)
    return [*files, *contents]


def _index(written: _Written, files: Sequence[str], shards: Sequence[Sequence[Entry]]) -> bytes:
    index = {
        "metadata": {
            **{key: value for key, value in written.header.items() if key != "format"},
            "total_size": written.progress.total,
        },
        "weight_map": {
            entry.name: file for file, shard in zip(files, shards, strict=True) for entry in shard
        },
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _warn_of_left_out(checkpoint: Checkpoint) -> None:
    if checkpoint.left_out:
        named = ", ".join(f"{name!r} ({count})" for name, count in checkpoint.left_out.items())
        _log.warning(
            "%s: the tensors in %s are not converted",
            describe_location(checkpoint),
            named,
        )


def _fitting(companions: Mapping[str, bytes], dtype: str | None) -> dict[str, bytes]:
    """Companions with the dtype of the converted weights: transformers casts to the dtype in
    config.json when it loads."""
    if dtype is None:
        return dict(companions)
    return {name: _with_dtype(name, content, dtype) for name, content in companions.items()}


def _warn_of_companions(
    companions: Mapping[str, bytes], source: Checkpoint, target: Path, dtype: str | None
) -> None:
    """Warns of files that describe the weights and do not fit into a single-file target."""
    beside = {Path(path).resolve().parent for path in source.paths}
    if target.resolve().parent not in beside:
        if companions:
            _log.warning(
                "%s: %s %s not copied: give a folder as the target to copy %s",
                target,
                ", ".join(sorted(companions)),
                *(("is", "it") if len(companions) == 1 else ("are", "them")),
            )
        return
    for name, content in _fitting(companions, dtype).items():
        if content != companions[name]:
            _log.warning(
                "%s: %s beside it has another dtype than these weights, and transformers casts to "
                "that dtype when it loads: change it",
                target,
                name,
            )


def _with_dtype(name: str, content: bytes, dtype: str) -> bytes:
    telling = name in _OF_QUANTIZATION or b"dtype" in content or b"quant" in content
    if not name.endswith(".json") or not telling:
        return content
    try:
        config = json.loads(content)
    except (ValueError, RecursionError):
        _log.warning(
            "%s: is not JSON and was copied unchanged; check whether it names a dtype", name
        )
        return content
    if not isinstance(config, dict):
        return content
    changed, quantized = _set_dtype(config, dtypes.TORCH_NAMES[dtype])
    if quantized or name in _OF_QUANTIZATION:
        _log.warning(
            "%s: the model is quantized; dtype= cast the other tensors, %s was copied unchanged",
            name,
            f"its {_QUANTIZATION}" if quantized else "it",
        )
    if not changed:
        return content
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _set_dtype(config: dict[str, Any], dtype: str) -> tuple[bool, bool]:
    """Sets the dtype in a configuration and in nested ones. Returns whether there was a dtype, and
    whether there was a quantization, whose dtypes stay because its tensors are not cast."""
    changed = quantized = False
    todo: list[Any] = [config]
    while todo:
        one = todo.pop()
        if isinstance(one, list):
            todo += one
            continue
        if not isinstance(one, dict):
            continue
        for key, value in one.items():
            if key == _QUANTIZATION and value:
                quantized = True
            elif key in _DTYPE_KEYS and _is_floating(value):
                one[key] = ("torch." if value.startswith("torch.") else "") + dtype
                changed = True
            elif key in _DTYPE_KEYS and isinstance(value, dict):
                # transformers writes one per sub-model: {"text_config": "float32", ...}.
                for part in [part for part, held in value.items() if _is_floating(held)]:
                    value[part] = ("torch." if value[part].startswith("torch.") else "") + dtype
                    changed = True
            else:
                todo.append(value)
    return changed, quantized


def _is_floating(value: Any) -> bool:
    """Whether the value names a floating-point dtype."""
    return isinstance(value, str) and value.removeprefix("torch.") in {
        dtypes.TORCH_NAMES[name] for name in dtypes.FLOATING if name in dtypes.TORCH_NAMES
    }


def _texts(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key != "not_tensors"}


def _entries(checkpoint: Checkpoint, dtype: str | None) -> tuple[list[Entry], dict[str, str]]:
    """The entries in the order of the reference's writer, and the tied names."""
    kept: dict[object, str] = {}
    tied: dict[str, str] = {}
    entries = []
    for name, (own, shape) in checkpoint.headers().items():
        place = None if checkpoint.is_plain else checkpoint.place(name)
        view = None if place is None else place[2]
        if place is not None and view is not None:
            part, position, _ = place
            key = (part, position, view.shape, view.stride, view.offset)
            first = kept.setdefault(key, name)
            if first != name:
                tied[name] = first
                continue
        if own in ("C32", "C128"):
            raise CheckpointError(
                f"{checkpoint}: tensor {name!r}: safetensors has no dtype for {own}; leave it out"
            )
        target = dtype if dtype and own in dtypes.FLOATING and own != "F4" else own
        size = math.prod(shape) * dtypes.bits(target) // 8
        entries.append(Entry(name, target, shape, size))
    return in_order(entries), tied


def _split(entries: Sequence[Entry], largest: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    held = 0
    for entry in entries:
        if shard and held + entry.bytes > largest:
            yield shard
            shard, held = [], 0
        shard.append(entry)
        held += entry.bytes
    yield shard


def _names(stem: str, variant: str | None, count: int) -> list[str]:
    of_variant = f".{variant}" if variant else ""
    if count == 1:
        return [f"{stem}{of_variant}.safetensors"]
    return [
        _SHARD.format(stem=stem, variant=of_variant, number=number, count=count)
        for number in range(1, count + 1)
    ]


def _write(
    written: _Written, entries: Sequence[Entry], metadata: Mapping[str, str], path: Path
) -> None:
    write_safetensors(
        path,
        header_of(entries, metadata),
        _data(written, entries),
        size=size_of(entries),
        show=written.progress.add,
    )


def _data(written: _Written, entries: Sequence[Entry]) -> Iterator[memoryview]:
    for batch in _batches(entries):
        tensors = load_tensors(
            written.source,
            parse_device("cpu"),
            dtype=written.dtype,
            names=[entry.name for entry in batch],
            options=LoadOptions(mode="read"),
        )
        for entry in batch:
            yield bytes_of(tensors.pop(entry.name))


def _batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    yield from _split(list(entries), _AT_ONCE)
