"""A simulated device with a clock, for streaming weights: one link and one compute queue, both
behind the host, and an oracle that knows the content of each buffer at each time. The host is
infinitely fast, as a real one may be, so everything that no wait or mark orders is reordered.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


class RaceError(AssertionError):
    """A use found another block in its buffer."""


@dataclass
class Span:
    """An access to a buffer: its kind, its block, its begin and end."""

    buffer: int
    block: int
    begin: float
    end: float


@dataclass
class ComputeQueue:
    """The device side of a stream.

    Attributes:
        bytes_per_second: of the link.
        jitter: up to this part of its time a copy or a use takes longer.
    """

    bytes_per_second: float
    jitter: float = 0.0
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    link_free: float = 0.0
    compute_free: float = 0.0
    copies: list[Span] = field(default_factory=list)
    uses: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._numbers = random.Random(self.seed)
        self._waited = 0.0

    def _longer(self, seconds: float) -> float:
        return seconds * (1 + self.jitter * self._numbers.random())

    def allocate(self, count: int) -> torch.Tensor:
        return torch.empty(max(count, 1), dtype=torch.uint8)

    def copy(self, transfer: Any, after: Sequence[float]) -> float:
        begin = max(self.link_free, *after, 0.0)
        end = begin + self._longer(transfer.bytes / self.bytes_per_second)
        self.link_free = end
        self.copies.append(Span(transfer.buffer.data_ptr(), transfer.block, begin, end))
        return end

    def wait(self, arrival: float) -> None:
        self._waited = max(self._waited, arrival)

    def mark(self) -> float:
        return self.compute_free

    def finish(self) -> None:
        pass

    def compute(self, seconds: float, buffer: torch.Tensor | None = None, block: int = -1) -> None:
        """Queues computing, with a block in a buffer or with what is always there."""
        begin = max(self.compute_free, self._waited)
        self.compute_free = begin + self._longer(seconds)
        if buffer is not None:
            self.uses.append(Span(buffer.data_ptr(), block, begin, self.compute_free))

    def check(self) -> None:
        """Raises a ``RaceError`` where a copy overtook a use, or a use a copy."""
        for use in self.uses:
            last = None
            for copy in self.copies:
                if copy.buffer != use.buffer or copy.begin >= use.end:
                    continue
                if copy.end > use.begin:
                    raise RaceError(f"{copy} while {use}")
                if last is None or copy.end > last.end:
                    last = copy
            if last is None or last.block != use.block:
                raise RaceError(f"{use} found {last}")
