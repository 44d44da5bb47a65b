"""The index of a checkpoint in shards: tensor -> file, as JSON."""

from __future__ import annotations

import itertools
import json
import posixpath
from pathlib import PureWindowsPath
from typing import Any

from weightlift.core.errors import CheckpointError

__all__ = ["LARGEST_INDEX", "parse_index"]

# As much as a safetensors header may have; an index of 92,000 tensors has 9 MB.
LARGEST_INDEX = 100_000_000


def parse_index(
    text: bytes, place: str, strict: bool
) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
    """(tensor -> file, what the index says besides, what to warn of)"""
    if len(text) > LARGEST_INDEX:
        raise CheckpointError(f"{place}: has more than {LARGEST_INDEX} bytes, as no index has")
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{place}: is a git-lfs pointer: fetch the file with `git lfs pull`")
    twice: list[str] = []
    try:
        found = json.loads(
            text.decode("utf-8-sig"), object_pairs_hook=lambda pairs: _object(pairs, twice, strict)
        )
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{place}: is not a valid index: {error}") from None
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{place}: is not an index: it has no object 'weight_map'")
    if not weight_map:
        raise CheckpointError(f"{place}: is an index of nothing: its weight_map is empty")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{place}: tensor {tensor!r}: its file is {name!r}; it must be the name of one"
            )
    plain = {name: _shard_name(name, place) for name in sorted(set(weight_map.values()))}
    if any(name != given for given, name in plain.items()):
        weight_map = {tensor: plain[name] for tensor, name in weight_map.items()}
    metadata = found.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{place}: its metadata is {metadata!r}; it must be an object")
    notes = (f"{twice[0]!r} is in it twice; the last entry holds",) if twice else ()
    return weight_map, metadata, notes


def _shard_name(name: str, place: str) -> str:
    """Refuses what leads out of the index's folder."""
    # Knows both kinds of separators, and drives, on every system.
    windows = PureWindowsPath(name)
    plain = posixpath.normpath(name)
    if (
        "\\" in name
        or "\0" in name
        or windows.drive
        or name.endswith("/")
        or plain.startswith(("/", "../"))
        or plain in (".", "..")
    ):
        raise CheckpointError(
            f"{place}: lists the file {name!r}; it must be the name of a file beside it, or of one "
            "in a folder beside it"
        )
    return plain


def _object(pairs: list[tuple[str, Any]], twice: list[str], strict: bool) -> dict[str, Any]:
    """A JSON object; of a key that is there twice the last value holds, as in Python's own."""
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice += [a for a, b in itertools.pairwise(keys) if a == b]
        if strict:
            raise ValueError(f"{twice[0]!r} is in it twice")
    return made
