"""The ranks of one load: they compare their plans and share their errors."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.distributed as dist

from weightlift.core.errors import CheckpointError
from weightlift.core.report import format_count

if TYPE_CHECKING:
    from weightlift.checkpoint.checkpoint import Checkpoint

__all__ = ["RankGroup", "Scope", "describe", "digest", "require_same"]


# The ranks that exchange replicated tensors: those of a node, or all.
Scope: TypeAlias = Literal["node", "group"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """A rank's message at a common point.

    Attributes:
        failure: the text of its error, or ``None``.
        payload: its data.
    """

    failure: str | None
    payload: Any


class RankGroup:
    """The ranks that load together.

    Args:
        groups: process groups over which, one after the other, a message reaches all ranks (those
            of a mesh).
        scope: the ranks that exchange replicated tensors; ``None``: none.

    Attributes:
        load_started: whether all ranks have reached the start of the load.
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup], scope: Scope | None) -> None:
        self.groups = groups
        self.scope = scope
        self.load_started = False
        self._node: dist.ProcessGroup | None = None
        self._lost: CheckpointError | None = None

    def agree(self, error: BaseException | None, payload: Any = None) -> dict[int, Any]:
        """Waits for all ranks; returns rank -> payload.

        Raises:
            CheckpointError: on every rank, if one has an error.
        """
        answers = self.gather(self.groups, error, payload)
        self.refuse({rank: answer.failure for rank, answer in answers.items()}, error)
        return {rank: answer.payload for rank, answer in answers.items()}

    @staticmethod
    def refuse(failures: Mapping[int, str | None], error: BaseException | None) -> None:
        """Raises the same error on all ranks if one has failed."""
        reasons = [f"rank {rank}: {reason}" for rank, reason in failures.items() if reason]
        if reasons:
            raise CheckpointError(f"no rank has loaded anything: {'; '.join(reasons)}") from error

    def gather(
        self,
        groups: Sequence[dist.ProcessGroup],
        error: BaseException | None,
        payload: Any = None,
    ) -> dict[int, Answer]:
        """The answers of all ranks of these groups, by rank."""
        if self._lost is not None:
            raise self._lost
        failure = None if error is None else f"{type(error).__name__}: {error}"
        answers = {dist.get_rank(): Answer(failure, payload)}
        for group in groups:
            gathered: list[Any] = [None] * group.size()
            with self.naming_lost_ranks(group, failure):
                dist.all_gather_object(gathered, answers, group)
            for answers_of_rank in gathered:
                answers.update(answers_of_rank)
        return dict(sorted(answers.items()))

    @contextlib.contextmanager
    def naming_lost_ranks(
        self, group: dist.ProcessGroup, failure: str | None = None
    ) -> Iterator[None]:
        """Raises a ``CheckpointError`` inside the block if a rank does not answer."""
        try:
            yield
        except RuntimeError as error:  # all backends of torch raise RuntimeErrors
            gone = _unreachable(group)
            who = f"rank {', '.join(map(str, gone))} is" if gone else "one of its ranks is"
            own = f"; rank {dist.get_rank()} itself had failed: {failure}" if failure else ""
            self._lost = CheckpointError(
                f"the load ended: {who} gone or does not answer ({error}){own}; restart all ranks"
            )
            raise self._lost from error

    def readers(self) -> dist.ProcessGroup:
        """The ranks that share the reads: all ranks, or those of this node."""
        (group,) = self.groups
        if self.scope == "node":
            nodes = self.agree(None, _node_id())
            mine = [rank for rank, node in nodes.items() if node == nodes[dist.get_rank()]]
            if len(mine) < len(nodes):
                made: Any = dist.new_group(mine, use_local_synchronization=True)
                self._node = group = made
        return group

    def close(self) -> None:
        if self._node is not None and self._lost is None:
            dist.destroy_process_group(self._node)


def _node_id() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _unreachable(group: dist.ProcessGroup) -> list[int]:
    """The ranks with closed connections, if the backend reports them at once (gloo)."""
    if dist.get_backend(group) != "gloo":
        return []
    gone = []
    for peer in range(group.size()):
        if peer == group.rank():
            continue
        try:
            group.send([torch.zeros(1, dtype=torch.uint8)], peer, 0)
        except RuntimeError:
            gone.append(dist.get_global_rank(group, peer))
    return gone


def describe(checkpoint: Checkpoint) -> tuple[str, str]:
    """(hash of the index and of the files' sizes, the same in words)."""
    sizes = checkpoint.file_sizes
    what = (
        f"{format_count(len(checkpoint), 'tensor')} in {format_count(len(sizes), 'file')} of "
        f"{format_count(sum(sizes), 'byte')}"
    )
    where = checkpoint.paths[0] if checkpoint.files else "memory"
    return digest((checkpoint.headers(), sizes)), f"{what} ({where})"


def digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()


def require_same(
    rank_group: RankGroup, answers: Mapping[int, Sequence[Any]], outcomes: Mapping[str, str]
) -> None:
    """Raises the same error on all ranks if their plans differ.

    Args:
        rank_group: the ranks of the load.
        answers: rank -> (``describe`` of its checkpoint, digest of its outcomes).
        outcomes: name -> its treatment on this rank.
    """
    first = min(answers)
    for rank, ((digest, text), _) in answers.items():
        if digest != answers[first][0][0]:
            raise CheckpointError(
                f"the ranks have different checkpoints: rank {first} has {answers[first][0][1]}, "
                f"rank {rank} has {text}; names, shapes and sizes of the files must be the same"
            )
    if all(digest == answers[first][1] for _, digest in answers.values()):
        return
    everyone = rank_group.agree(None, dict(outcomes))
    for rank, names in everyone.items():
        for name in sorted(names.keys() | everyone[first].keys()):
            here, there = names.get(name), everyone[first].get(name)
            # Without an exchange, a rank may have modules that the others lack.
            if here != there and (rank_group.scope is not None or None not in (here, there)):
                raise CheckpointError(
                    f"the ranks load different things: {name!r} is to be {there or 'nowhere'} on "
                    f"rank {first} and {here or 'nowhere'} on rank {rank}"
                )
