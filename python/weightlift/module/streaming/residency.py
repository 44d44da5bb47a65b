"""Cuts a model into pieces, and decides which stay on its device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from weightlift.core.errors import ArgumentError
from weightlift.core.report import format_bytes, format_count

__all__ = ["Piece", "Plan", "Share", "cut", "share_out"]

# Larger blocks do not read faster per byte.
_LARGEST_BLOCK_BYTES = 256 << 20
# The buffers take at most 1/_BUFFERS_PART of the memory, if the modules can be cut so.
_BUFFERS_PART = 4
# Pieces that together are this many times smaller than their neighbour are joined to it.
_SMALL_PART = 16


@dataclasses.dataclass(frozen=True)
class Piece:
    """Weights that are read together, or stay together.

    Attributes:
        name: the name of their module.
        weights: their names.
        bytes: their bytes on the device.
    """

    name: str
    weights: tuple[str, ...]
    bytes: int


@dataclasses.dataclass(frozen=True)
class Share:
    """The pieces that stay, and the buffers for the others.

    Attributes:
        resident: the numbers of the pieces that stay.
        buffers: the number of buffers.
        buffer_bytes: the bytes of each buffer.
    """

    resident: frozenset[int]
    buffers: int
    buffer_bytes: int


Plan = tuple[list[Piece], Share]


def cut(sizes: Mapping[str, int], memory: int, lookahead: int) -> list[Piece]:
    """Cuts a model along its modules: into the largest modules that fit a block, and the own
    weights of larger modules.

    Args:
        sizes: name of a weight -> bytes, in the order of the modules.
        memory: bytes that weights may take on the device.
        lookahead: the number of blocks to read ahead.
    """
    target = min(_LARGEST_BLOCK_BYTES, memory // (_BUFFERS_PART * (lookahead + 1)))
    pieces: list[Piece] = []

    def walk(prefix: str, names: Sequence[str]) -> None:
        total = sum(sizes[name] for name in names)
        depth = len(prefix) + 1 if prefix else 0
        children: dict[str, list[str]] = {}
        own = []
        for name in names:
            end = name.find(".", depth)
            if end < 0:
                own.append(name)
            else:
                children.setdefault(name[:end], []).append(name)
        if total <= target or not children:
            pieces.append(Piece(prefix, tuple(names), total))
            return
        if own:
            pieces.append(Piece(prefix, tuple(own), sum(sizes[name] for name in own)))
        for child, below in children.items():
            walk(child, below)

    if sizes:
        walk("", list(sizes))
    return _joined(pieces, target)


def _joined(pieces: Sequence[Piece], target: int) -> list[Piece]:
    """Joins neighbours that together are small, absolutely or relative to the largest of them,
    because each piece takes a whole buffer."""
    joined: list[Piece] = []
    largest = 0  # the largest piece joined into the last one
    for piece in pieces:
        last = joined[-1] if joined else Piece("", (), 0)
        together, base = last.bytes + piece.bytes, max(largest, piece.bytes)
        if joined and together <= max(target, base + base // _SMALL_PART):
            name = piece.name if piece.bytes > largest else last.name
            joined[-1] = Piece(name, last.weights + piece.weights, together)
            largest = base
        else:
            joined.append(piece)
            largest = piece.bytes
    return joined


def share_out(
    pieces: Sequence[Piece],
    memory: int,
    fixed: int,
    lookahead: int,
    uses: Mapping[int, int] | None = None,
) -> Share:
    """Decides which pieces stay on the device.

    First it sets the number and the size of the buffers: keeping the largest pieces may take less
    memory than buffers of their size. Then it chooses other pieces to keep: first those that a step
    uses most often; among equals, pieces that lie evenly between those to read, so that reading and
    computing overlap.

    Args:
        pieces: the pieces, in the order of their use.
        memory: bytes that weights may take on the device.
        fixed: bytes of ``memory`` taken by weights that cannot be streamed.
        lookahead: the number of blocks to read ahead.
        uses: piece -> number of uses in a step; 1 by default.

    Raises:
        ArgumentError: the memory is too small; the text names the layer and the smallest budget.
    """
    available = memory - fixed
    if sum(piece.bytes for piece in pieces) <= available:
        return Share(frozenset(range(len(pieces))), 0, 0)
    kept, buffers = _buffers(pieces, available, fixed, memory, lookahead)
    resident = {number for number, _ in kept}
    rest = [number for number in range(len(pieces)) if number not in resident]
    largest = max(pieces[number].bytes for number in rest)
    left = available - sum(pieces[number].bytes for number in resident) - buffers * largest
    resident |= _fill(pieces, rest, left, uses or {})
    streamed = [piece.bytes for number, piece in enumerate(pieces) if number not in resident]
    return Share(frozenset(resident), min(buffers, len(streamed)), max(streamed, default=0))


def _buffers(
    pieces: Sequence[Piece], available: int, fixed: int, memory: int, lookahead: int
) -> tuple[list[tuple[int, Piece]], int]:
    """The largest pieces that stay, and the number of buffers for the others."""
    by_size = sorted(enumerate(pieces), key=lambda item: -item[1].bytes)
    total = sum(piece.bytes for piece in pieces)
    best: tuple[tuple[int, int], int, int] | None = None
    smallest = None
    kept = 0
    for count, (_, piece) in enumerate(by_size):
        need = kept + piece.bytes
        smallest = need if smallest is None else min(smallest, need)
        buffers = min(lookahead + 1, (available - kept) // max(piece.bytes, 1))
        if buffers >= 1:
            stays = min(total, available - buffers * piece.bytes)
            score = buffers, stays
            if best is None or score > best[0]:
                best = score, count, buffers
        kept = need
    if best is None:
        name, size = by_size[0][1].name or "the model", by_size[0][1].bytes
        raise ArgumentError(
            f"memory is {format_bytes(memory)} ({format_count(memory, 'byte')}), and the layer "
            f"{name!r} alone takes {format_bytes(size)}: the smallest budget that works is "
            f"{fixed + (smallest or 0):,} bytes"
        )
    return by_size[: best[1]], best[2]


def _fill(
    pieces: Sequence[Piece], rest: Sequence[int], left: int, uses: Mapping[int, int]
) -> set[int]:
    """The pieces that stay in the remaining memory."""
    resident: set[int] = set()
    for often in sorted({uses.get(number, 1) for number in rest}, reverse=True):
        alike = [number for number in rest if uses.get(number, 1) == often]
        total = sum(pieces[number].bytes for number in alike)
        part = 1 - min(1.0, left / total) if total else 0.0
        owed = 0.0  # bytes that should have been left for reading so far
        for number in alike:
            size = pieces[number].bytes
            owed += part * size
            if owed >= size / 2 and part:
                owed -= size
            elif size <= left:
                resident.add(number)
                left -= size
        for number in alike:
            if number not in resident and pieces[number].bytes <= left:
                resident.add(number)
                left -= pieces[number].bytes
    return resident
