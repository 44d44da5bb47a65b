"""A load that ranks share: each reads a part of what all of them want, and they exchange it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from weightlift.checkpoint.integrity import HashCheck
from weightlift.core import dtypes
from weightlift.core.report import LoadReport
from weightlift.distributed.rank_group import RankGroup, describe, digest, require_same
from weightlift.load.allocation import TorchAllocator
from weightlift.load.loading import Loading, SliceRange
from weightlift.load.options import LoadOptions
from weightlift.load.plans import progress_callback

if TYPE_CHECKING:
    from weightlift.checkpoint.checkpoint import Checkpoint

__all__ = ["GroupLoading"]

# What a rank reads in one round: while a round is exchanged, the next is being read.
_ROUND_BYTES = 32 << 20
_LEAST_ROUND_BYTES = 1 << 20
# Smaller pieces travel together, copied into one buffer: a collective takes some 100 us on gloo.
_ALONE_BYTES = 256 << 10


@dataclasses.dataclass(slots=True)
class _Item:
    """A tensor that a team reads once; on ``meta`` until the load begins."""

    name: str
    device: torch.device
    tensor: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of an item, contiguous."""

    item: _Item
    dimension: int
    start: int
    count: int

    @property
    def tensor(self) -> torch.Tensor:
        tensor = self.item.tensor
        return tensor.narrow(self.dimension, self.start, self.count) if tensor.dim() else tensor

    @property
    def raw(self) -> torch.Tensor:
        return self.tensor.reshape(-1).view(torch.uint8)

    @property
    def ranges(self) -> Sequence[SliceRange]:
        ranges = [(0, 1, extent) for extent in self.item.tensor.shape]
        if ranges:
            ranges[self.dimension] = (self.start, 1, self.count)
        return ranges


class GroupLoading(Loading):
    """A load that all ranks of a team do at the same time."""

    def __init__(self, team: RankGroup, checkpoint: Checkpoint, options: LoadOptions) -> None:
        # Of the files, each is verified by one rank.
        super().__init__(checkpoint, dataclasses.replace(options, verify=False))
        self._team = team
        self._verify = options.verify
        self._wanted: dict[str, str] = {}
        self._items: list[_Item] = []
        self._exchangers: dist.ProcessGroup | None = None
        self._exchanged: LoadReport | None = None
        self._failure: BaseException | None = None
        self._runs = False

    def add(
        self,
        device: torch.device,
        dtype: str | None = None,
        names: Sequence[str] | None = None,
        targets: Sequence[torch.Tensor] | None = None,
        parts: Sequence[Sequence[SliceRange]] | None = None,
    ) -> None:
        self._options.check_target(device, dtype)
        chosen = list(self._checkpoint if names is None else names)
        own: list[int] = []
        for i, name in enumerate(chosen):
            kept, shape = self._checkpoint[name]
            if targets is not None:
                tensor = targets[i]
            else:
                kind = dtypes.to_torch(dtype if dtype and kept in dtypes.FLOATING else kept)
                tensor = torch.empty(shape, dtype=kind, device="meta")
            shared = parts is None and self._is_shared(name, kept, device, tensor)
            way = "read once for all" if shared else "read by each rank"
            self._wanted[name] = f"{tensor.dtype} on {device.type}, {way}"
            if shared:
                self._items.append(_Item(name, device, tensor))
            else:
                own.append(i)
        if own:
            super().add(
                device,
                dtype,
                [chosen[i] for i in own],
                None if targets is None else [targets[i] for i in own],
                None if parts is None else [parts[i] for i in own],
            )

    def _is_shared(self, name: str, kept: str, device: torch.device, tensor: torch.Tensor) -> bool:
        """Whether the team exchanges a tensor: where it is copied, and the engine can do it."""
        place = self._checkpoint.place(name)
        wanted = dtypes.file_name(tensor.dtype)
        if self._team.scope is None or place is None or place[2] is not None:
            return False
        castable = kept in dtypes.CASTABLE and wanted in dtypes.CASTABLE
        if (
            dtypes.bits(kept) % 8
            or not (kept == wanted or castable)
            or device.type not in ("cpu", "cuda")
            or not tensor.is_contiguous()
        ):
            return False
        # What would be mapped needs no exchange on one node: its ranks share the page cache.
        copied = device.type == "cuda" or not tensor.is_meta or kept != wanted or self._pin_memory
        rewritten = self._mode == "auto" and self._checkpoint.formats[place[0]] == "torch"
        return copied or rewritten or self._mode == "read" or self._team.scope == "group"

    def start(self) -> None:
        team = self._team
        team.begun = True
        said = team.agree(None, (describe(self._checkpoint), digest(sorted(self._wanted.items()))))
        require_same(team, said, self._wanted)
        if self._items:
            self._exchangers = team.exchangers()
        try:
            if self._verify:  # each file by one rank
                first, step = sorted(said).index(dist.get_rank()), len(said)
                self._hashes = HashCheck(self._checkpoint.files[first::step])
            self._allocate()
            super().start()
            self._runs = True
        except Exception as error:  # result() tells the others
            self._failure = error

    def result(self) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        try:
            self._exchange()
            if self._failure is None:
                tensors = super().result()
                self._runs = False
        except Exception as error:
            self._failure = error
        finally:
            if self._runs:
                self.cancel()
        self._team.agree(self._failure)
        tensors.update((item.name, item.tensor) for item in self._items)
        return tensors

    @property
    def report(self) -> LoadReport:
        report = super().report
        return report if self._exchanged is None else report.plus(self._exchanged)

    def _allocate(self) -> None:
        sizes: dict[int, list[int]] = {}
        for item in self._items:
            if item.device.type == "cuda" and item.tensor.is_meta:
                sizes.setdefault(item.device.index, []).append(item.tensor.nbytes)
        if sizes and self._allocator is None:
            self._allocator = TorchAllocator()
        for index, of_device in sizes.items():
            assert self._allocator is not None
            self._allocator.reserve(index, of_device)
        for item in self._items:
            if item.tensor.is_meta:
                dtype = dtypes.file_name(item.tensor.dtype)
                assert dtype is not None
                item.tensor = self._empty(item.name, item.device, item.tensor.shape, dtype)

    def _exchange(self) -> None:
        """Round by round: what this rank has read goes to the others, and theirs comes; meanwhile
        the next round is being read."""
        group = self._exchangers
        if group is None:
            return
        rounds = _rounds(self._items, self._checkpoint, group.size())
        reads = [self._reading(shares[group.rank()]) for shares in rounds]
        sizes = [sum(p.raw.numel() for share in shares for p in share) for shares in rounds]
        running: Loading | None = None
        try:
            with progress_callback(self._progress) as show:
                for k, shares in enumerate(rounds):
                    packed: list[torch.Tensor] = []
                    try:
                        if self._failure is not None:
                            raise self._failure
                        if k == 0:
                            running = _started(reads[0])
                        if running is not None:
                            running.result()
                        running = _started(reads[k + 1]) if k + 1 < len(reads) else None
                        packed = [_pack(share) for share in shares]
                    except Exception as error:
                        self._failure = error
                    said = self._team.gather([group], self._failure)
                    if any(one.failure is not None for one in said.values()):
                        return
                    with self._team.naming_the_lost(group):
                        _broadcast(group, shares, packed)
                    if show is not None:
                        show(sum(sizes[: k + 1]), sum(sizes))
        finally:
            if running is not None:
                running.cancel()
        headers = self._checkpoint
        theirs = [
            piece
            for shares in rounds
            for rank, share in enumerate(shares)
            if rank != group.rank()
            for piece in share
        ]
        report = LoadReport(
            bytes=sum(
                math.prod(count for _, _, count in piece.ranges)
                * dtypes.bits(headers[piece.item.name][0])
                // 8
                for piece in theirs
            )
        )
        for read in reads:
            if read.has_work:
                report = report.plus(read.report)
        self._exchanged = report

    def _reading(self, share: Sequence[_Piece]) -> Loading:
        loading = Loading(
            self._checkpoint,
            LoadOptions(self._mode, settings=self._settings, caller=self._caller),
            allocator=self._allocator,
        )
        by_device: dict[torch.device, list[_Piece]] = {}
        for piece in share:
            by_device.setdefault(piece.item.device, []).append(piece)
        for device, pieces in by_device.items():
            loading.add(
                device,
                None,
                [piece.item.name for piece in pieces],
                [piece.tensor for piece in pieces],
                [piece.ranges for piece in pieces],
            )
        return loading


def _started(loading: Loading) -> Loading | None:
    if not loading.has_work:
        return None
    loading.start()
    return loading


def _rounds(items: Sequence[_Item], checkpoint: Checkpoint, ranks: int) -> list[list[list[_Piece]]]:
    """Of each round, what each rank reads: stretches of the files, of equal lengths."""

    def place(item: _Item) -> tuple[int, int]:
        found = checkpoint.place(item.name)
        assert found is not None
        return found[:2]

    ordered = sorted((item for item in items if item.tensor.numel() > 0), key=place)
    total = sum(item.tensor.nbytes for item in ordered)
    # Several rounds even of a small model, so that reading and exchanging overlap.
    limit = min(max(total // (8 * ranks), _LEAST_ROUND_BYTES), _ROUND_BYTES)
    shares: list[list[_Piece]] = [[]]
    room = limit
    for item in ordered:
        shape = item.tensor.shape
        dimension = next((i for i, extent in enumerate(shape) if extent > 1), 0)
        rows = shape[dimension] if shape else 1
        row_bytes = item.tensor.nbytes // rows
        start = 0
        while start < rows:
            count = min(rows - start, room // row_bytes)
            if count == 0 and room == limit:
                count = 1
            if count:
                shares[-1].append(_Piece(item, dimension, start, count))
            start += count
            room -= count * row_bytes
            if start < rows or room <= 0:
                shares.append([])
                room = limit
    while len(shares) % ranks:
        shares.append([])
    return [shares[i : i + ranks] for i in range(0, len(shares), ranks)]


def _small(share: Sequence[_Piece]) -> list[torch.Tensor]:
    return [raw for raw in (piece.raw for piece in share) if raw.numel() < _ALONE_BYTES]


def _pack(share: Sequence[_Piece]) -> torch.Tensor:
    """The small pieces of a share, one behind the other."""
    small = _small(share)
    device = small[0].device if small else torch.device("cpu")
    return torch.cat([raw.to(device) for raw in small]) if small else torch.empty(0)


def _broadcast(
    group: dist.ProcessGroup, shares: Sequence[Sequence[_Piece]], packed: Sequence[torch.Tensor]
) -> None:
    """Every rank's share to all; in place, but for the small pieces."""
    works: list[Any] = []
    for rank, (share, buffer) in enumerate(zip(shares, packed, strict=True)):
        large = [raw for raw in (p.raw for p in share) if raw.numel() >= _ALONE_BYTES]
        works += [
            dist.broadcast(tensor, group=group, group_src=rank, async_op=True)
            for tensor in [*large, *([buffer] if buffer.numel() else [])]
        ]
    for work in works:
        work.wait()
    for rank, (share, buffer) in enumerate(zip(shares, packed, strict=True)):
        if rank == group.rank():
            continue
        begin = 0
        for raw in _small(share):
            raw.copy_(buffer[begin : begin + raw.numel()])
            begin += raw.numel()
