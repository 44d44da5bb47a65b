"""The recorded writes to each target, in order, and their grouping into rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from weightlift.load.copies import Copy

__all__ = ["Constant", "Target", "covers", "disjoint", "write_rounds"]


@dataclasses.dataclass(slots=True)
class Constant:
    """A write to a part of a target that needs no checkpoint.

    Attributes:
        target: the part.
        write: writes to the tensor given instead of the part.
    """

    target: torch.Tensor
    write: Callable[[torch.Tensor], object]


class Target:
    """One storage that the loading code writes to.

    Attributes:
        storage: kept, for its address is what it is known by.
        name: of the parameter, where that is known.
        writes: what is still to be done, in order.
        parts: what was written, in all.
        exposed: whether others may write to it unseen.
        value: on ``meta``, the real memory, from when somebody has looked at it; flat, of bytes.
    """

    __slots__ = ("exposed", "name", "parts", "storage", "value", "writes")

    def __init__(self, storage: torch.UntypedStorage, name: str | None = None) -> None:
        self.storage = storage
        self.name = name
        self.parts: list[torch.Tensor] = []
        self.writes: list[Copy | Constant] = []
        self.exposed = False
        self.value: torch.Tensor | None = None

    def unwritten(self) -> int:
        """The number of elements that no write covers."""
        if not self.parts:
            return 0
        item = min(part.element_size() for part in self.parts)
        wanted = self.storage.nbytes() // item
        # Most targets are written once, by one part or by disjoint parts.
        total = sum(part.numel() * part.element_size() for part in self.parts) // item
        if total == wanted and len(_rounds_of_storage([_touch(part) for part in self.parts])) == 1:
            return 0
        seen = torch.zeros(self.storage.nbytes(), dtype=torch.bool)
        for part in self.parts:
            size = part.element_size()
            strides = [stride * size for stride in part.stride()]
            seen.as_strided((*part.shape, size), (*strides, 1), part.storage_offset() * size).fill_(
                True
            )
        return int((~seen).sum()) // item


def _touch(part: torch.Tensor) -> Copy:
    return Copy("", 0, tuple(part.shape), part.stride(), part)


def extent_of(part: torch.Tensor) -> tuple[int, int]:
    """The byte range [first, last) of a part in its storage, including holes."""
    item = part.element_size()
    first = last = int(part.storage_offset())
    for count, stride in zip(part.shape, part.stride(), strict=True):
        last += (count - 1) * stride
    return first * item, (last + 1) * item


def covers(part: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether this part certainly contains another part of the same storage."""
    if part.dtype == other.dtype and (
        (part.shape, part.stride(), part.storage_offset())
        == (other.shape, other.stride(), other.storage_offset())
    ):
        return True
    first, last = extent_of(part)
    if last - first != part.numel() * part.element_size():
        return False  # it has holes
    begin, end = extent_of(other)
    return first <= begin and end <= last


def disjoint(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two parts of one storage certainly share no byte.

    Parts whose ranges overlap, such as columns of a matrix, are compared as boxes in the
    coordinates of their strides, if each stride is a multiple of the next.
    """
    first, last = extent_of(one)
    begin, end = extent_of(other)
    if last <= begin or end <= first:
        return True
    if one.element_size() != other.element_size():
        return False
    strides = sorted(
        {
            stride
            for part in (one, other)
            for count, stride in zip(part.shape, part.stride(), strict=True)
            if count > 1
        },
        reverse=True,
    )
    if any(stride <= 0 for stride in strides):
        return False
    boxes = [_box(part, strides) for part in (one, other)]
    a, b = boxes
    if a is None or b is None:
        return False
    return any(s + n <= t or t + m <= s for (s, n), (t, m) in zip(a, b, strict=True))


def _box(part: torch.Tensor, strides: Sequence[int]) -> list[tuple[int, int]] | None:
    """(start, count) along each stride, largest first, and within the smallest; ``None`` if the
    part is not a box."""
    counts = dict.fromkeys(strides, 1)
    for count, stride in zip(part.shape, part.stride(), strict=True):
        if count == 1:
            continue
        if counts[stride] != 1:
            return None
        counts[stride] = count
    box = []
    rest = int(part.storage_offset())
    outer = None
    for stride in strides:
        if outer is not None and outer % stride != 0:
            return None
        start, rest = divmod(rest, stride)
        if outer is not None and start + counts[stride] > outer // stride:
            return None
        box.append((start, counts[stride]))
        outer = stride
    box.append((rest, 1))
    return box


def write_rounds(copies: Sequence[Copy]) -> list[list[Copy]]:
    """Groups of copies that run one after the other; within a group no two write the same byte.
    Copies that are overwritten completely are left out."""
    by_storage: dict[int, list[Copy]] = {}
    for copy in copies:
        by_storage.setdefault(copy.target.untyped_storage()._cdata, []).append(copy)
    turns: list[list[Copy]] = []
    for group in by_storage.values():
        for turn, members in enumerate(_rounds_of_storage(group)):
            if turn == len(turns):
                turns.append([])
            turns[turn] += members
    return turns


def _rounds_of_storage(copies: Sequence[Copy]) -> list[list[Copy]]:
    if len(copies) == 1:
        return [list(copies)]
    by_place = sorted(range(len(copies)), key=lambda i: extent_of(copies[i].target)[0])
    clusters: list[list[int]] = []
    reach = -1
    for i in by_place:
        first, last = extent_of(copies[i].target)
        if first >= reach:
            clusters.append([])
        clusters[-1].append(i)
        reach = max(reach, last)
    turns: list[list[Copy]] = [[]]
    for cluster in clusters:
        kept: list[tuple[int, Copy]] = []  # (turn, copy)
        for i in sorted(cluster):
            copy = copies[i]
            kept = [(turn, old) for turn, old in kept if not covers(copy.target, old.target)]
            turn = 1 + max(
                (turn for turn, old in kept if not disjoint(copy.target, old.target)), default=-1
            )
            kept.append((turn, copy))
        for turn, copy in kept:
            while len(turns) <= turn:
                turns.append([])
            turns[turn].append(copy)
    return turns
