"""Copies of whole tensors that several ranks share: each tensor is read once and exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from weightlift.core import dtypes
from weightlift.core.report import LoadReport
from weightlift.distributed.exchange import Exchange, SharedTensor
from weightlift.load.copies import Copy

if TYPE_CHECKING:
    from weightlift.checkpoint.checkpoint import Checkpoint
    from weightlift.distributed.rank_group import RankGroup
    from weightlift.load.options import LoadOptions

__all__ = ["is_of_whole_tensor", "share_copies"]

# The key of a copy on all ranks: name, file, byte range, the target's dtype and device.
_Key: TypeAlias = "tuple[str, str, int, int, str, str]"


def is_of_whole_tensor(copy: Copy, shape: Sequence[int]) -> bool:
    """Whether a copy reads a whole tensor contiguously, to a contiguous part of a target.

    Args:
        copy: the copy.
        shape: the tensor's shape.
    """
    expected = 1
    for count, stride in zip(reversed(copy.shape), reversed(copy.strides), strict=True):
        if count > 1 and stride != expected:
            return False
        expected *= count
    same = copy.shape == tuple(shape) and copy.offset == 0
    return same and not copy.as_bits and copy.target.is_contiguous()


def share_copies(
    copies: Sequence[Copy], checkpoint: Checkpoint, options: LoadOptions, rank_group: RankGroup
) -> tuple[list[Copy], LoadReport]:
    """Runs the copies that all ranks of a group have; all ranks call this at the same time.

    Args:
        copies: this rank's copies of whole tensors. No two write the same byte.
        checkpoint: the checkpoint.
        options: how to read.
        rank_group: the ranks that exchange them.

    Returns:
        The remaining copies, and the report.

    Raises:
        CheckpointError: on all ranks, if one failed or ended.
    """
    mine = {key: copy for copy in copies if (key := _key(copy, checkpoint)) is not None}
    everyone = rank_group.agree(None, set(mine))
    common = sorted(set.intersection(*everyone.values()))
    report = LoadReport()
    if not common:
        return list(copies), report
    shared = [
        SharedTensor(mine[key].name, mine[key].target.device, mine[key].target.detach())
        for key in common
    ]
    failure: Exception | None = None
    try:
        exchange = Exchange(checkpoint, options, shared, rank_group, rank_group.readers())
        report = exchange.run() or report
    except Exception as error:
        failure = error
    rank_group.agree(failure)
    done = {id(mine[key]) for key in common}
    return [copy for copy in copies if id(copy) not in done], report


def _key(copy: Copy, checkpoint: Checkpoint) -> _Key | None:
    """The key; ``None`` if the copy is not exchanged: the engine cannot cast it, or it is in no
    file."""
    stored = checkpoint[copy.name][0]
    wanted = dtypes.file_name(copy.target.dtype)
    place = checkpoint.byte_range(copy.name)
    castable = stored in dtypes.CASTABLE and wanted in dtypes.CASTABLE
    if place is None or checkpoint.is_view(copy.name) or not (stored == wanted or castable):
        return None
    path, begin, end = place
    kind = copy.target.device.type
    if kind not in ("cpu", "cuda"):
        return None
    return copy.name, Path(path).name, begin, end, str(copy.target.dtype), kind
