"""Loading code that runs again: the parts that its first run took of each tensor are read ahead."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from weightlift.core.errors import CheckpointError
from weightlift.load.copies import Copy, RunningCopies
from weightlift.module.recording.operators import handler_of
from weightlift.module.recording.placeholder import (
    Geometry,
    Memory,
    Placeholder,
    geometry_of,
)
from weightlift.module.recording.recorder import Recorder
from weightlift.module.recording.sources import Reader, Source, form_of

__all__ = ["Replay", "Taken"]

_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Taken:
    """What loading code took of the tensors of a checkpoint.

    Attributes:
        sources: the tensors that it was given.
        parts: name -> what was copied: (shape, strides, offset), in elements; or all.
        whole: name -> why, of tensors that came whole.
    """

    sources: Mapping[str, Source]
    parts: Mapping[str, Sequence[Geometry]]
    whole: Mapping[str, str]

    @classmethod
    def of(cls, recorder: Recorder) -> Taken:
        """When the loading code has ended."""
        parts: dict[str, dict[Geometry, None]] = {}
        for write in recorder.done:
            if isinstance(write, Copy):
                parts.setdefault(write.name, {})[write.shape, write.strides, write.offset] = None
        for name in recorder.whole:
            if name in recorder.sources:
                parts[name] = {geometry_of(form_of(recorder.sources[name])): None}
        lists = {name: list(found) for name, found in parts.items()}
        return cls(dict(recorder.sources), lists, dict(recorder.whole))

    @property
    def sliced_bytes(self) -> int:
        """Of all that was copied without the whole tensor."""
        return sum(
            math.prod(shape) * self.sources[name].dtype.itemsize
            for name, parts in self.parts.items()
            if name not in self.whole
            for shape, _, _ in parts
        )

    def is_of(self, sources: Mapping[str, Source | None]) -> bool:
        """Whether other tensors have the dtypes and shapes of those of the same names."""
        return all(
            source == self.sources[name] for name, source in sources.items() if name in self.parts
        )


class _TakenApart(Memory):
    """A tensor of which some parts have bytes.

    Attributes:
        parts: these, by the geometry that they have in the whole.
    """

    __slots__ = ("parts",)
    parts: Mapping[Geometry, torch.Tensor]

    def duplicate(
        self, source: torch.Tensor, dtype: torch.dtype, geometry: Geometry, device: torch.device
    ) -> Memory:
        made = _TakenApart(self.name, source, dtype, geometry, device)
        made.parts = self.parts
        return made


@dataclasses.dataclass(slots=True)
class _Group:
    """Tensors whose parts are read at once."""

    memories: list[_TakenApart]
    sources: list[Source]
    copies: list[Copy]


class Replay:
    """Gives out tensors to loading code that was recorded before, where no mode watches it.

    What came whole then is whole now. All else has the shape of the whole and the bytes of the
    parts that were copied then.
    Whoever takes another part, or does something else with it, gets the tensor read whole, there
    and then: so a part that was not read is never taken for one that was.

    Args:
        reader: whom the bytes come from.
        taken: by that code before.
        whole: where to note the tensors that are read whole: name -> why.
        group_bytes: of parts that are read at once; two groups are in memory at a time, and what
            the loading code keeps.
    """

    def __init__(
        self,
        reader: Reader,
        taken: Taken,
        whole: dict[str, str] | None = None,
        *,
        group_bytes: int = 32 << 20,
    ) -> None:
        self._reader = reader
        self._taken = taken
        self._sources: dict[str, Source] = {}
        self._group_bytes = group_bytes
        self._whole = {} if whole is None else whole

    def tensors(
        self, sources: Iterable[tuple[str, Source]]
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """(name, tensor) in this order, while the parts of those that come next are read."""
        groups = self._groups(sources)
        running: RunningCopies | None = None
        group = next(groups, None)
        try:
            running = self._start(group)
            while group is not None:
                following = next(groups, None)
                if running is not None:
                    report, running = running.result(), None
                    self._reader.ended(report)
                running = self._start(following)
                for memory, source in zip(group.memories, group.sources, strict=True):
                    if memory.name in self._taken.whole:
                        yield memory.name, memory.parts[memory.geometry]
                        continue
                    tensor = self.derive(memory, memory.source, source.dtype, memory.geometry)
                    yield memory.name, tensor
                group = following
        finally:
            if running is not None:
                running.cancel()

    def _start(self, group: _Group | None) -> RunningCopies | None:
        return self._reader.start(group.copies) if group is not None and group.copies else None

    def _groups(self, sources: Iterable[tuple[str, Source]]) -> Iterator[_Group]:
        group = _Group([], [], [])
        size = 0
        for name, source in sources:
            memory, copies = self._memory(name, source)
            own = sum(copy.target.nbytes for copy in copies)
            if group.copies and size + own > self._group_bytes:
                yield group
                group, size = _Group([], [], []), 0
            group.memories.append(memory)
            group.sources.append(source)
            group.copies += copies
            size += own
        yield group

    def _memory(self, name: str, source: Source) -> tuple[_TakenApart, list[Copy]]:
        self._sources[name] = source
        lies = form_of(source)
        copies = []
        for shape, strides, offset in self._taken.parts.get(name, ()):
            target = _dense(shape, strides, source.dtype)
            copies.append(Copy(name, offset, shape, strides, target))
        memory = _TakenApart(name, lies, source.dtype, geometry_of(lies), _CPU)
        memory.parts = {(c.shape, c.strides, c.offset): c.target for c in copies}
        return memory, copies

    # What operators ask of a ledger.

    def after(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return handler_of(func)(self, func, args, kwargs)

    dispatch = after

    def materialize(self, tensor: Placeholder, why: str) -> None:
        raise CheckpointError(
            f"tensor {tensor.memory.name!r}: {why} of a tensor that is loaded again cannot be "
            "done; load whole tensors instead"
        )

    def derive(
        self, memory: Memory, source: torch.Tensor, dtype: torch.dtype, geometry: Geometry
    ) -> Placeholder:
        return Placeholder(self, memory, source, dtype, geometry)

    def expose(self, tensor: torch.Tensor) -> None:
        pass  # nothing waits

    def is_target(self, tensor: torch.Tensor) -> bool:
        return False

    def overwrite(
        self, tensor: torch.Tensor, write: Callable[[torch.Tensor], object], *, constant: bool
    ) -> None:
        write(tensor)

    def settle(self, tensor: torch.Tensor, *, write: bool = False) -> torch.Tensor:
        return tensor

    def set_data(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        tensor.data = value

    def record(self, tensor: torch.Tensor, source: Placeholder) -> str | None:
        """Does a copy of a part that was read; else says why it cannot."""
        memory, lies = source.memory, source.source
        if lies.shape != tensor.shape:
            lies = lies.expand(tensor.shape)
        part = memory.parts.get(geometry_of(lies)) if isinstance(memory, _TakenApart) else None
        if part is None:
            return "another part of it than at first"
        if part.dtype != lies.dtype:
            part = part.view(lies.dtype)
        if source.dtype != part.dtype and not tensor.is_meta:
            part = part.to(source.dtype)
        tensor.copy_(part)
        return None

    def read(self, memories: Sequence[Memory], why: str) -> None:
        wanted = {id(memory): memory for memory in memories if memory.value is None}
        if not wanted:
            return
        read: dict[str, torch.Tensor] = {}
        for memory in wanted.values():
            form = geometry_of(form_of(self._sources[memory.name]))
            if isinstance(memory, _TakenApart) and form in memory.parts:
                read[memory.name] = memory.parts[form]
        names = list(dict.fromkeys(m.name for m in wanted.values() if m.name not in read))
        if names:
            self._whole.update(dict.fromkeys(names, why))
            read.update(self._reader.tensors(names))
        for memory in wanted.values():
            part = memory.part_of(read[memory.name])
            own_shape, own_strides, _ = memory.geometry
            memory.value = torch.empty_strided(
                own_shape, own_strides, dtype=memory.dtype, device=memory.device
            ).copy_(part)

    def real(self, tensor: Placeholder, why: str) -> torch.Tensor:
        self.read([tensor.memory], why)
        return tensor.with_bytes()


def _dense(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory for a part, in the order of its elements in the file."""
    order = sorted(range(len(shape)), key=lambda i: -strides[i])
    made = torch.empty([shape[i] for i in order], dtype=dtype)
    return made.permute([order.index(i) for i in range(len(shape))])
