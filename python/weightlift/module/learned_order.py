"""Predicts the next use of a block from earlier uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["LONGEST", "LearnedOrder"]

# Lengths of the sequences of uses whose successor is remembered. A block that is used between all
# others (a shared table, a module in several places) has many successors; the uses before it
# distinguish them.
_CONTEXTS = (8, 4, 2, 1)
LONGEST = _CONTEXTS[0]
# Limit of remembered sequences for each block: an order that changes in every step has no end.
_REMEMBERED = 64


class LearnedOrder:
    """Predicts the next block from the last uses.

    The longest known sequence of uses decides, else the order of the modules. Steps play no role: a
    generation with a first and further passes, or an encoder that runs without its decoder, is
    learned in the same way.

    Args:
        blocks: the numbers of the blocks, in the order of the modules.
    """

    def __init__(self, blocks: Iterable[int]) -> None:
        known = list(blocks)
        self._default = dict(zip(known, [*known[1:], *known[:1]], strict=True))
        self._limit = _REMEMBERED * (len(known) + 1)
        self._after: dict[tuple[int, ...], int] = {}

    def note(self, last: Sequence[int], used: int) -> None:
        """Learns that ``used`` followed ``last`` (newest at the end)."""
        if len(self._after) > self._limit:
            self._after.clear()
        for length in _CONTEXTS:
            if length <= len(last):
                self._after[tuple(last[-length:])] = used

    def predict(self, last: Sequence[int], count: int) -> list[int]:
        """A prediction of the next ``count`` distinct blocks, without the last one."""
        found: list[int] = []
        recent = list(last[-LONGEST:])
        now = recent[-1]
        for _ in range(2 * count + 4):  # the prediction may cycle within few blocks
            if len(found) == count:
                break
            following = self._next(recent)
            recent.append(following)
            if following != now and following not in found:
                found.append(following)
        return found

    def _next(self, recent: Sequence[int]) -> int:
        for length in _CONTEXTS:
            if length <= len(recent):
                following = self._after.get(tuple(recent[-length:]))
                if following is not None:
                    return following
        return self._default[recent[-1]]
