"""The tensors that a load returns, and torch's work on them after the engine has ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weightlift.core import dtypes

if TYPE_CHECKING:
    import torch

    from weightlift.checkpoint.torch_file import View

__all__ = ["Outputs"]


class Outputs:
    """Tensors by number, and the names under which the load returns them.

    A number is a tensor's index in ``tensors``. Several names may have one number: tensors that
    share memory in a torch file are loaded once, and each name is a view.
    """

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self._names: list[str] = []
        # The number of each name; ``None`` while they count up from 0.
        self._numbers: list[int] | None = None
        self._views: list[tuple[int, View]] = []
        self._made_by_engine: list[Sequence[int]] = []
        # torch's work: casts between rare dtypes, copies into targets that are not contiguous or
        # have a dtype that the engine does not cast to, and devices other than CUDA.
        self._casts: list[tuple[int, str]] = []
        self._copies: list[tuple[int, torch.Tensor]] = []
        self._moves: list[tuple[range, torch.device]] = []
        # If tensors are taken one by one: name -> (place, number); the number of names left for
        # each number; the numbers that torch has finished.
        self._entries: dict[str, tuple[int, int]] | None = None
        self._left: Counter[int] = Counter()
        self._finished: set[int] = set()

    def new(self, tensor: Any = None) -> int:
        """The number for a tensor, which may be set later."""
        number = len(self.tensors)
        self.tensors.append(tensor)
        return number

    def hand_out(self, name: str, number: int, view: View | None = None) -> None:
        """Returns a tensor, or a view of it, under a name."""
        if view is not None:
            self._views.append((len(self._names), view))
        if self._numbers is None:
            self._numbers = list(range(len(self._names)))
        self._names.append(name)
        self._numbers.append(number)

    def hand_out_all(self, names: Sequence[str]) -> range:
        """Numbers for tensors that are set later, each under its name."""
        numbers = range(len(self.tensors), len(self.tensors) + len(names))
        if self._numbers is not None:
            self._numbers += numbers
        self.tensors += [None] * len(names)
        self._names += names
        return numbers

    def expect(self, numbers: Sequence[int]) -> None:
        """Declares the numbers of the next tensors that the engine makes."""
        self._made_by_engine.append(numbers)

    def cast(self, number: int, dtype: str) -> None:
        """Schedules a cast by torch, before views are made."""
        self._casts.append((number, dtype))

    def copy_into(self, target: torch.Tensor) -> None:
        """Schedules a copy by torch of the last tensor into ``target``, which replaces it."""
        self._copies.append((len(self._names) - 1, target))

    def move(self, numbers: range, device: torch.device) -> None:
        """Schedules a move by torch, before casts."""
        self._moves.append((numbers, device))

    def number(self, name: str) -> int:
        """The number of a tensor, by one of its names."""
        return self._entry(name)[1]

    def numbers(self) -> dict[str, int]:
        """Name -> number."""
        numbers = range(len(self._names)) if self._numbers is None else self._numbers
        return dict(zip(self._names, numbers, strict=True))

    def deliver_one(self, name: str) -> Any:
        """The tensor of a name after the engine has filled it; call it once for each name."""
        entry, number = self._entry(name)
        tensor = self.tensors[number]
        if number not in self._finished:
            self._finished.add(number)
            for numbers, device in self._moves:
                if number in numbers:
                    tensor = tensor.to(device)
            for cast, dtype in self._casts:
                if cast == number and tensor.is_floating_point():
                    tensor = tensor.to(dtypes.to_torch(dtype))
            self.tensors[number] = tensor
        self._left[number] -= 1
        if self._left[number] == 0:
            self.tensors[number] = None
        for viewed, view in self._views:
            if viewed == entry:
                return tensor.as_strided(view.shape, view.stride, view.offset)
        return tensor

    def clear(self) -> None:
        """Drops all tensors."""
        self.tensors = [None] * len(self.tensors)

    def _entry(self, name: str) -> tuple[int, int]:
        if self._entries is None:
            numbers = self.numbers()
            self._entries = {key: (i, numbers[key]) for i, key in enumerate(self._names)}
            self._left = Counter(numbers.values())
        return self._entries[name]

    def deliver(self, made: Sequence[Any]) -> dict[str, Any]:
        """Name -> tensor, from the tensors that the engine has made."""
        self.take(made)
        tensors = self.tensors
        for numbers, device in self._moves:
            for number in numbers:
                tensors[number] = tensors[number].to(device)
        for number, dtype in self._casts:
            if tensors[number].is_floating_point():
                tensors[number] = tensors[number].to(dtypes.to_torch(dtype))
        handed_out = tensors
        if self._numbers is not None:
            handed_out = [tensors[number] for number in self._numbers]
        for entry, view in self._views:
            base = handed_out[entry]
            handed_out[entry] = base.as_strided(view.shape, view.stride, view.offset)
        for entry, target in self._copies:
            handed_out[entry] = target.copy_(handed_out[entry])
        self.tensors = []  # the load must not keep them alive
        return dict(zip(self._names, handed_out, strict=True))

    def take(self, made: Sequence[Any]) -> None:
        """Stores the engine's tensors, which the engine may not have filled yet."""
        expected = sum(map(len, self._made_by_engine))
        if len(made) != expected:
            raise RuntimeError(f"the engine has made {len(made)} tensors, not {expected}")
        first = 0
        for numbers in self._made_by_engine:
            part = made[first : first + len(numbers)]
            first += len(numbers)
            if isinstance(numbers, range):
                self.tensors[numbers.start : numbers.stop] = part
            else:
                for number, tensor in zip(numbers, part, strict=True):
                    self.tensors[number] = tensor
