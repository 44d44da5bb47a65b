"""Shared by the backends' tests: checks from outside that the engine did the work."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import weightlift as wl


def tensor_bytes(*paths: Path) -> int:
    """The bytes of all tensors in safetensors files or folders of such, from their headers."""
    total = 0
    for path in paths:
        for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
            data = file.read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            header.pop("__metadata__", None)
            total += sum(e["data_offsets"][1] - e["data_offsets"][0] for e in header.values())
    return total


@contextlib.contextmanager
def engine_moves(nbytes: int, caller: str) -> Iterator[None]:
    """Within the block, the engine moves this many tensor bytes for ``caller`` and none for others,
    and the libraries load nothing themselves."""
    before = wl.stats()
    yield
    after = wl.stats()
    moved = {
        name: (sums.bytes - old.bytes, sums.fallbacks - old.fallbacks)
        for name, sums in after.by_caller.items()
        for old in [before.by_caller.get(name, wl.Stats())]
        if sums != old
    }
    assert moved == {caller: (nbytes, 0)}
    assert after.fallbacks == before.fallbacks


@contextlib.contextmanager
def falls_back(caller: str, times: int = 1) -> Iterator[None]:
    """Within the block, the engine moves nothing, and ``caller`` leaves this many loads to the
    library."""
    before = wl.stats()
    yield
    after = wl.stats()
    old = before.by_caller.get(caller, wl.Stats())
    assert after.bytes == before.bytes
    assert after.by_caller.get(caller, wl.Stats()).fallbacks - old.fallbacks == times
