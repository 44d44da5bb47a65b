"""Shared reads: in rounds, each rank reads a part of the shared tensors and sends it to the
others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from weightlift.core import dtypes
from weightlift.core.report import LoadReport
from weightlift.load.load_plan import LoadPlan
from weightlift.load.plans import progress_callback

if TYPE_CHECKING:
    from weightlift.checkpoint.checkpoint import Checkpoint
    from weightlift.distributed.rank_group import RankGroup
    from weightlift.load.destination import SliceRange
    from weightlift.load.options import LoadOptions, Progress
    from weightlift.load.running_load import RunningLoad

__all__ = ["Exchange", "SharedTensor"]

# Bytes that a rank reads in one round. A round is exchanged while the next one is read.
_ROUND_BYTES = 32 << 20
_LEAST_ROUND_BYTES = 1 << 20
# Smaller pieces are copied into one buffer: a collective takes about 100 us on gloo.
_ALONE_BYTES = 256 << 10


@dataclasses.dataclass(frozen=True, slots=True)
class SharedTensor:
    """A tensor that a group reads once, and this rank's memory for it."""

    name: str
    device: torch.device
    tensor: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """Contiguous rows of a tensor that one rank reads in one round."""

    shared: SharedTensor
    dimension: int
    start: int
    count: int

    @property
    def tensor(self) -> torch.Tensor:
        tensor = self.shared.tensor
        return tensor.narrow(self.dimension, self.start, self.count) if tensor.dim() else tensor

    @property
    def raw(self) -> torch.Tensor:
        return self.tensor.reshape(-1).view(torch.uint8)

    @property
    def ranges(self) -> list[SliceRange]:
        ranges = [(0, 1, extent) for extent in self.shared.tensor.shape]
        if ranges:
            ranges[self.dimension] = (self.start, 1, self.count)
        return ranges


# The pieces that each rank reads in one round.
_Round = Sequence[Sequence[_Piece]]


class Exchange:
    """Reads and exchanges the tensors that a group shares; all ranks ``run`` it.

    Args:
        checkpoint: the checkpoint, the same on all ranks.
        options: how a rank reads its pieces.
        tensors: the shared tensors, the same on all ranks, in the same order.
        rank_group: the ranks of the load, which share their errors.
        readers: the ranks that share the reads.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: LoadOptions,
        tensors: Sequence[SharedTensor],
        rank_group: RankGroup,
        readers: dist.ProcessGroup,
    ) -> None:
        self._checkpoint = checkpoint
        self._options = dataclasses.replace(options, pin_memory=False, verify=False, progress=False)
        self._progress = options.progress
        self._rank_group = rank_group
        self._readers = readers
        self._rounds = _rounds(tensors, checkpoint, readers.size())

    def run(self) -> LoadReport | None:
        """Fills the tensors on every rank: exchanges the pieces of each round while it reads the
        next round.

        Returns:
            This rank's report; ``None`` if another rank has failed.

        Raises:
            Exception: the error of this rank's reads, after all readers have received it.
        """
        with progress_callback(self._progress) as show:
            report = self._run(show)
        if report is None:
            return None
        return report.plus(LoadReport(bytes=sum(map(self._file_bytes, self._pieces_of_others()))))

    def refuse(self, failure: BaseException) -> None:
        """Replaces ``run`` on a rank that has failed: sends the error to the other readers."""
        if self._rounds:
            self._all_continue(failure)

    def _run(self, show: Progress | None) -> LoadReport | None:
        report = LoadReport()
        done = 0
        total = sum(_bytes(shares) for shares in self._rounds)
        reads = self._reads()
        running: RunningLoad | None = None
        try:
            for number, shares in enumerate(self._rounds):
                try:
                    if number == 0:
                        running = next(reads)
                    if running is not None:
                        running.result()
                        report = report.plus(running.report)
                    running = next(reads, None)
                    packed = [_pack(share) for share in shares]
                except Exception as error:
                    self._all_continue(error)
                    raise
                if not self._all_continue(None):
                    return None
                with self._rank_group.naming_lost_ranks(self._readers):
                    _broadcast(self._readers, shares, packed)
                done += _bytes(shares)
                if show is not None:
                    show(done, total)
        finally:
            if running is not None:
                running.cancel()
        return report

    def _all_continue(self, failure: BaseException | None) -> bool:
        """Sends this rank's state to the other readers; returns whether all continue."""
        answers = self._rank_group.gather([self._readers], failure)
        return all(answer.failure is None for answer in answers.values())

    def _reads(self) -> Iterator[RunningLoad | None]:
        """Starts the reads of this rank's pieces, round by round; ``None`` if it has none."""
        for shares in self._rounds:
            share = shares[self._readers.rank()]
            yield self._read(share) if share else None

    def _read(self, share: Sequence[_Piece]) -> RunningLoad:
        plan = LoadPlan(self._checkpoint, self._options)
        by_device: dict[torch.device, list[_Piece]] = {}
        for piece in share:
            by_device.setdefault(piece.shared.device, []).append(piece)
        for device, pieces in by_device.items():
            plan.add(
                device,
                None,
                [piece.shared.name for piece in pieces],
                [piece.tensor for piece in pieces],
                [piece.ranges for piece in pieces],
            )
        return plan.start()

    def _pieces_of_others(self) -> Iterator[_Piece]:
        for shares in self._rounds:
            for rank, share in enumerate(shares):
                if rank != self._readers.rank():
                    yield from share

    def _file_bytes(self, piece: _Piece) -> int:
        """Bytes of a piece in its file."""
        elements = math.prod(count for _, _, count in piece.ranges)
        return elements * dtypes.bits(self._checkpoint[piece.shared.name][0]) // 8


def _rounds(tensors: Sequence[SharedTensor], checkpoint: Checkpoint, ranks: int) -> list[_Round]:
    """The pieces of each rank in each round: byte runs of equal lengths."""
    ordered = sorted(
        (shared for shared in tensors if shared.tensor.numel() > 0),
        key=lambda shared: _file_order(checkpoint, shared.name),
    )
    total = sum(shared.tensor.nbytes for shared in ordered)
    # A small model also gets several rounds, so that reads and exchanges overlap.
    limit = min(max(total // (8 * ranks), _LEAST_ROUND_BYTES), _ROUND_BYTES)
    shares: list[list[_Piece]] = [[]]
    room = limit
    for shared in ordered:
        shape = shared.tensor.shape
        dimension = next((i for i, extent in enumerate(shape) if extent > 1), 0)
        rows = shape[dimension] if shape else 1
        row_bytes = shared.tensor.nbytes // rows
        start = 0
        while start < rows:
            count = min(rows - start, room // row_bytes)
            if count == 0 and room == limit:
                count = 1
            if count:
                shares[-1].append(_Piece(shared, dimension, start, count))
            start += count
            room -= count * row_bytes
            if start < rows or room <= 0:
                shares.append([])
                room = limit
    while len(shares) % ranks:
        shares.append([])
    return [shares[i : i + ranks] for i in range(0, len(shares), ranks)]


def _file_order(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    place = checkpoint.place(name)
    return (len(checkpoint.files), 0) if place is None else place[:2]


def _bytes(shares: _Round) -> int:
    return sum(piece.raw.numel() for share in shares for piece in share)


def _small(share: Sequence[_Piece]) -> list[torch.Tensor]:
    return [raw for raw in (piece.raw for piece in share) if raw.numel() < _ALONE_BYTES]


def _pack(share: Sequence[_Piece]) -> torch.Tensor:
    """The small pieces of a share in one buffer."""
    small = _small(share)
    device = small[0].device if small else torch.device("cpu")
    return torch.cat([raw.to(device) for raw in small]) if small else torch.empty(0)


def _broadcast(group: dist.ProcessGroup, shares: _Round, packed: Sequence[torch.Tensor]) -> None:
    """Broadcasts every rank's share; in place, except for the small pieces."""
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
