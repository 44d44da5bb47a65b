"""Replaces the weights in a folder; after a kill the old or the new ones load.

The new files are there under temporary names. Each step is flushed before the next:

1. An existing index is replaced by one that lists the old shards under other hard links. Now no
   save writes to a name in an index, so that no loader can mix weights. If the file system has no
   hard links, or the configuration changes with the weights, the index lists a missing file: all
   loaders refuse it, and none falls back to ``.bin`` files beside it.
2. The new files get their names.
3. The new index gets its name; for a single file, the index is removed.
4. Stale files are removed: the single file beside an index, old shards, the links.

Loaders that prefer an index (weightlift, diffusers) see the new weights from step 3 on; those that
prefer a single file (transformers) from step 2 or 4 on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from weightlift.core.atomic import flush_file, flush_folder, put_in_place, temporary_beside
from weightlift.core.errors import ArgumentError
from weightlift.core.given import check_text

__all__ = ["WeightNames", "replace_weights"]


@dataclasses.dataclass(frozen=True)
class WeightNames:
    """The file names of one checkpoint.

    Attributes:
        base: such as ``"diffusion_pytorch_model.fp16"``.
        extension: ``".safetensors"`` or ``".bin"``.
        index: as it is written.
        old_indexes: as huggingface_hub and diffusers before 0.29 spell it for a variant; loaders
            find them where there is no ``index``.
        shard: matches shards, in both spellings, and the links of an interrupted save.
    """

    base: str
    extension: str
    index: str
    old_indexes: tuple[str, ...]
    shard: re.Pattern[str]

    @classmethod
    def of(cls, stem: str, variant: str | None, extension: str) -> WeightNames:
        for what, part in (("stem", stem), ("variant", variant)):
            check_text(what, part, "fp16")
            if part is not None and (part in ("", ".", "..") or "/" in part or "\0" in part):
                raise ArgumentError(f"{what} is {part!r}; it must be a part of a file name")
        of_variant = "" if variant is None else f".{variant}"
        base = stem + of_variant
        spellings = rf"{re.escape(base)}-\d{{5,}}-of-\d{{5,}}"
        old_indexes: tuple[str, ...] = ()
        if variant is not None:
            spellings += rf"|{re.escape(stem)}-\d{{5,}}-of-\d{{5,}}{re.escape(of_variant)}"
            old_indexes = (
                f"{base}{extension}.index.json",
                f"{stem}{extension}{of_variant}.index.json",
            )
        return cls(
            base,
            extension,
            f"{stem}{extension}.index{of_variant}.json",
            old_indexes,
            re.compile(
                rf"(?:{spellings}|{re.escape(base)}-previous-[0-9a-f]{{8}}-\d{{5,}})"
                rf"{re.escape(extension)}"
            ),
        )

    @property
    def single(self) -> str:
        return self.base + self.extension


def replace_weights(
    folder: Path,
    names: WeightNames,
    staged: Mapping[str, Path],
    present: list[str],
    sharded: bool,
    companions: Mapping[str, bytes],
) -> None:
    """Puts the flushed files in place of the folder's weights, in the steps of the module.

    Args:
        folder: the folder.
        names: the names of the weights.
        staged: name -> the new file of this name, under its temporary name.
        present: the names that the folder has.
        sharded: whether the new weights have an index.
        companions: name -> content, of files that make no sense with other weights.

    Raises:
        OSError: the system refuses a step.
    """
    refused = any(
        name in present and (folder / name).read_bytes() != content
        for name, content in companions.items()
    )
    old_index = next((name for name in (names.index, *names.old_indexes) if name in present), None)
    links: dict[str, str] = {}
    if refused or old_index:
        index = None if refused or old_index is None else _read_index(folder / old_index)
        links = _replace_index(folder, names, index)

    for name, temporary in staged.items():
        if name != names.index:
            put_in_place(temporary, folder / name)
    _remove(folder, names.old_indexes)
    flush_folder(folder)

    if sharded:
        put_in_place(staged[names.index], folder / names.index)
        flush_folder(folder)
    elif _remove(folder, [names.index]):
        flush_folder(folder)

    stale = {name for name in present if names.shard.fullmatch(name)} - staged.keys()
    stale.update(links.values(), {names.single} & set(present) if sharded else ())
    if _remove(folder, stale):
        flush_folder(folder)


def _remove(folder: Path, names: Iterable[str]) -> bool:
    """Removes files, if they are there; returns whether one was."""
    removed = False
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
            removed = True
    return removed


def _read_index(path: Path) -> dict[str, Any] | None:
    """The index; ``None`` if no loader would accept it."""
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    usable = isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values())
    return index if usable else None


def _replace_index(
    folder: Path, names: WeightNames, index: dict[str, Any] | None
) -> dict[str, str]:
    """Step 1: old shard -> link. Without an index, or links, loaders will refuse the new one."""
    if index is None:
        absent = f"{names.base}-of-an-interrupted-save{names.extension}"
        index = {"metadata": {"total_size": 0}, "weight_map": {"interrupted": absent}}
    token = os.urandom(4).hex()
    links = {
        shard: f"{names.base}-previous-{token}-{number:05d}{names.extension}"
        for number, shard in enumerate(sorted(set(index["weight_map"].values())))
    }
    weight_map = {tensor: links[shard] for tensor, shard in index["weight_map"].items()}
    temporary = temporary_beside(folder / names.index)
    try:
        temporary.write_text(json.dumps({**index, "weight_map": weight_map}))
        flush_file(temporary)
        for shard, link in links.items():
            if Path(shard).name == shard:
                with contextlib.suppress(OSError, ValueError):
                    os.link(folder / shard, folder / link)
        flush_folder(folder)
        temporary.replace(folder / names.index)
    except BaseException:
        if temporary.exists():  # otherwise the links are in use
            for made in (temporary, *(folder / link for link in links.values())):
                made.unlink(missing_ok=True)
        raise
    flush_folder(folder)
    return links
