"""Parses sizes in bytes."""

from __future__ import annotations

import re

from weightlift.core.errors import ArgumentError

__all__ = ["parse_shard_size", "parse_size"]

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_size(size: int | str, name: str, *, fractions: bool = True) -> int:
    """The bytes of a number or of text such as ``"32MB"`` (10^6), ``"64MiB"`` (2^20), ``"1.5GB"``.

    ``fractions=False`` accepts only whole numbers.

    Raises:
        ArgumentError: ``size`` is neither; the text begins with ``name``.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    number = r"\d+(?:\.\d+)?" if fractions else r"\d+"
    found = re.fullmatch(rf"\s*({number})\s*([a-zA-Z]*)\s*", str(size))
    unit = _UNITS.get(found[2].lower()) if found is not None else None
    if found is None or unit is None:
        raise ArgumentError(
            f"{name} is {size!r}; write {'' if fractions else 'whole '}bytes, or text with "
            f"{'' if fractions else 'a whole number and '}one of kB, MB, GB, TB, KiB, MiB, GiB, "
            "TiB, such as '64MiB'"
        )
    return int(found[1]) * unit if found[1].isdigit() else int(float(found[1]) * unit)


def parse_shard_size(size: int | str) -> int:
    """The bytes of ``max_shard_size``.

    Raises:
        ArgumentError: it is no size, or leaves no room for a tensor.
    """
    largest = parse_size(size, "max_shard_size")
    if largest <= 0:
        raise ArgumentError(
            f"max_shard_size is {size!r}; a file needs room: write a size such as '5GB'"
        )
    return largest
