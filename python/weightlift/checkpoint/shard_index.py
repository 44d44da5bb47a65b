"""Parses the index of a sharded checkpoint: tensor -> file, as JSON."""

from __future__ import annotations

import codecs
import itertools
import json
import ntpath
import posixpath
from typing import Any

from weightlift.core.errors import CheckpointError

__all__ = ["LARGEST_INDEX", "parse_index"]

# The limit of a safetensors header. An index of 92,000 tensors has 9 MB.
LARGEST_INDEX = 100_000_000


def parse_index(
    text: bytes, place: str, strict: bool
) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
    """Returns (tensor -> file, the index's metadata, warnings)."""
    if len(text) > LARGEST_INDEX:
        raise CheckpointError(
            f"{place}: has more than {LARGEST_INDEX} bytes, the limit for an index"
        )
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{place}: is a git-lfs pointer: fetch the file with `git lfs pull`")
    twice: list[str] = []
    try:
        found = json.loads(
            # The codec utf-8-sig is a module that is imported for this alone.
            text.removeprefix(codecs.BOM_UTF8).decode(),
            object_pairs_hook=lambda pairs: _object(pairs, twice, strict),
        )
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{place}: is not a valid index: {error}") from None
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{place}: is not an index: it has no object 'weight_map'")
    if not weight_map:
        raise CheckpointError(f"{place}: is an empty index: its weight_map has no tensor")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{place}: tensor {tensor!r}: its file is {name!r}; it must be a file name"
            )
    plain = {name: _shard_name(name, place) for name in sorted(set(weight_map.values()))}
    if any(name != given for given, name in plain.items()):
        weight_map = {tensor: plain[name] for tensor, name in weight_map.items()}
    metadata = found.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{place}: its metadata is {metadata!r}; it must be an object")
    notes = (f"{twice[0]!r} is in it twice; the last entry is taken",) if twice else ()
    return weight_map, metadata, notes


def _shard_name(name: str, place: str) -> str:
    """A shard's path, normalized; refuses paths that leave the index's folder."""
    plain = posixpath.normpath(name)
    if (
        "\\" in name
        or "\0" in name
        or ntpath.splitdrive(name)[0]
        or name.endswith("/")
        or plain.startswith(("/", "../"))
        or plain in (".", "..")
    ):
        raise CheckpointError(
            f"{place}: lists the file {name!r}; it must be a file beside the index, or in a folder "
            "beside it"
        )
    return plain


def _object(pairs: list[tuple[str, Any]], twice: list[str], strict: bool) -> dict[str, Any]:
    """A JSON object; the last value of a duplicate key wins, as in Python's json."""
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice += [a for a, b in itertools.pairwise(keys) if a == b]
        if strict:
            raise ValueError(f"{twice[0]!r} is in it twice")
    return made
