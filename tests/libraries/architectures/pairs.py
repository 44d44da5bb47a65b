"""Rows of options that contain every pair of values of two options."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["every", "pairs", "sample"]

_TRIES = 60


def every(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations."""
    return [dict(zip(options, row, strict=True)) for row in itertools.product(*options.values())]


def pairs(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A small number of rows with every pair of values of two options; the same in each call."""
    chosen = random.Random(0)
    names = list(options)
    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in range(len(options[a]))
        for y in range(len(options[b]))
    }
    rows = []
    while missing:
        first = min(missing)  # each row covers at least one new pair
        best: tuple[set[Any], dict[str, int]] | None = None
        for _ in range(_TRIES):
            row = {name: chosen.randrange(len(options[name])) for name in names}
            row[first[0]], row[first[2]] = first[1], first[3]
            found = {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)} & missing
            if best is None or len(found) > len(best[0]):
                best = found, row
        if best is None:
            break
        missing -= best[0]
        rows.append({name: options[name][number] for name, number in best[1].items()})
    return rows


def sample(rows: Sequence[dict[str, Any]], count: int, seed: str) -> list[dict[str, Any]]:
    """``count`` of the rows, depending on the seed. Each value of an option is in one of them, if
    this many rows can contain all values."""
    chosen = random.Random(seed)
    left = chosen.sample(list(rows), len(rows))
    missing = {(name, str(value)) for row in rows for name, value in row.items()}
    taken: list[dict[str, Any]] = []
    while left and len(taken) < count:
        best = max(left, key=lambda row: len(missing & _values(row)))
        left.remove(best)
        missing -= _values(best)
        taken.append(best)
    return taken


def _values(row: Mapping[str, Any]) -> set[tuple[str, str]]:
    return {(name, str(value)) for name, value in row.items()}
