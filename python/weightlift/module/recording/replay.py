"""Replays loading code: reads the parts of tensors that its first run used ahead of it."""

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
    """The parts of a checkpoint's tensors that loading code used.

    Attributes:
        sources: the tensors that it received.
        parts: name -> the copied parts: (shape, strides, offset), in elements; or all.
        whole: name -> reason, for tensors that were read whole.
    """

    sources: Mapping[str, Source]
    parts: Mapping[str, Sequence[Geometry]]
    whole: Mapping[str, str]

    @classmethod
    def of(cls, recorder: Recorder) -> Taken:
        """From a recorder, after the loading code has ended."""
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
        """Bytes of all parts that were copied without reading the whole tensor."""
        return sum(
            math.prod(shape) * self.sources[name].dtype.itemsize
            for name, parts in self.parts.items()
            if name not in self.whole
            for shape, _, _ in parts
        )

    def is_of(self, sources: Mapping[str, Source | None]) -> bool:
        """Whether these tensors have the same dtypes and shapes as the recorded ones."""
        return all(
            source == self.sources[name] for name, source in sources.items() if name in self.parts
        )


class _TakenApart(Memory):
    """A tensor with bytes for some of its parts.

    Attributes:
        parts: geometry in the whole tensor -> the part.
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
    """Tensors whose parts are read together."""

    memories: list[_TakenApart]
    sources: list[Source]
    copies: list[Copy]


class Replay:
    """Gives tensors to loading code that was recorded before, without torch modes.

    Tensors that were read whole the first time are whole again. Others have the shape of the whole
    and the bytes of the parts that were copied. If the code uses another part, or another
    operation, the tensor is read whole at once, so that bytes that were not read are never used.

    Args:
        reader: reads the bytes.
        taken: the parts that the code used the first time.
        whole: receives the tensors that are read whole: name -> reason.
        group_bytes: bytes of parts in one group; two groups are in memory at a time, plus the
            tensors that the code keeps.
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
        """Yields (name, tensor) in this order, and reads the parts of the next tensors ahead."""
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
            f"tensor {tensor.memory.name!r}: {why} is impossible for a tensor that is loaded "
            "again; load whole tensors instead"
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
        """Copies a part that was read, or returns the reason why that is impossible."""
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
