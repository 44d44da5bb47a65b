"""Counts how often a step uses each weight."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["Uses"]


class Uses:
    """Counts the uses of each piece in the first step with hooks, which it then removes.

    Args:
        model: the model; its ``forward`` is a step.
        owners: piece -> modules.
        learned: called with piece -> uses at the end of the step.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        owners: Mapping[int, Sequence[torch.nn.Module]],
        learned: Callable[[dict[int, int]], None],
    ) -> None:
        self._counts: Counter[int] = Counter()
        self._last: int | None = None
        self._learned: Callable[[dict[int, int]], None] | None = learned
        self._hooks = [
            module.register_forward_pre_hook(_Hook(functools.partial(self._note, number)))
            for number, modules in owners.items()
            for module in modules
        ]
        self._hooks.append(model.register_forward_hook(_Hook(self._end)))

    def _note(self, number: int, *_: object) -> None:
        if number != self._last:
            self._counts[number] += 1
            self._last = number

    def _end(self, *_: object) -> None:
        learned = self._learned
        self.remove()
        if learned is not None:
            learned(dict(self._counts))

    def remove(self) -> None:
        self._learned = None
        for hook in self._hooks:
            hook.remove()


class _Hook:
    """A hook that copies and pickles of the module do not get."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: object) -> None:
        self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _hook_of_a_copy, ()


def _hook_of_a_copy() -> Callable[..., None]:
    return _nothing


def _nothing(*_: object) -> None:
    pass
