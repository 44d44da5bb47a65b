"""What is used next: learned from the uses, and never relied on for more than a guess."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["LONGEST", "LearnedOrder"]

# Of how many uses together it is remembered what followed them. A block that is used between all
# others (a shared table, a module in several places) has many successors; what was used before it
# tells which.
_CONTEXTS = (8, 4, 2, 1)
LONGEST = _CONTEXTS[0]
# Remembered for each block, at most: an order that changes every step has no end of contexts.
_REMEMBERED = 64


class LearnedOrder:
    """What is used next, by what was used last.

    The longest sequence of uses that has been seen before decides; where none has, the order of the
    modules. There is no notion of a step: a generation with its first pass and its further ones, or
    an encoder that is called without its decoder, is learned like any other.

    Args:
        blocks: in the order of the modules, by number.
    """

    def __init__(self, blocks: Iterable[int]) -> None:
        known = list(blocks)
        self._default = dict(zip(known, [*known[1:], *known[:1]], strict=True))
        self._limit = _REMEMBERED * (len(known) + 1)
        self._after: dict[tuple[int, ...], int] = {}

    def note(self, last: Sequence[int], used: int) -> None:
        """``used`` came after these, the last of which came last."""
        if len(self._after) > self._limit:
            self._after.clear()
        for length in _CONTEXTS:
            if length <= len(last):
                self._after[tuple(last[-length:])] = used

    def ahead(self, last: Sequence[int], count: int) -> list[int]:
        """The next ``count`` different blocks that are not the last one, as far as is known."""
        found: list[int] = []
        recent = list(last[-LONGEST:])
        now = recent[-1]
        for _ in range(2 * count + 4):  # a walk may go round within few blocks
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
