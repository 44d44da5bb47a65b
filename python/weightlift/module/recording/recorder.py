"""The recorder: records which elements of a checkpoint loading code copies where."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from weightlift.core.errors import CheckpointError
from weightlift.load.allocation import empty_on_host
from weightlift.load.copies import Copy
from weightlift.module.recording.casts import casts
from weightlift.module.recording.modes import SeeFunctions, SeeOperators
from weightlift.module.recording.operators import handler_of, run_on_real
from weightlift.module.recording.overlapped_copies import OverlappedCopies
from weightlift.module.recording.placeholder import Geometry, Memory, Placeholder, geometry_of
from weightlift.module.recording.sources import Reader, Source, form_of
from weightlift.module.recording.targets import (
    Constant,
    Target,
    covers,
    disjoint,
    write_rounds,
)

__all__ = ["Recorder"]

_plain_dispatch = torch.Tensor.__torch_dispatch__
_CPU = torch.device("cpu")
_META = torch.device("meta")
_OWN_ATTRIBUTES = frozenset({"_is_param", "ledger", "memory", "source"})


class IdentitySet:
    """A set of tensors, compared by identity."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._members = {id(tensor): tensor for tensor in tensors}

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._members


class Recorder:
    """Runs loading code and records its writes.

    Copies of a checkpoint's elements wait. Other writes run at once, after the copies that wait for
    the same memory, so that a read of a target always sees the right values.

    Args:
        reader: reads tensors that cannot be recorded.
        device: the device that placeholders report.
        ahead: bytes of waiting copies that start a group while the loading code still runs; 0:
            never.
        held: whether a copy must wait until the end in any case.
        threads: whether the loading code may use the tensors in its own threads. The recorder does
            not see other writes of these threads, so it runs their copies at once.
    """

    def __init__(
        self,
        reader: Reader,
        device: torch.device = _CPU,
        *,
        ahead: int = 0,
        held: Callable[[Copy], bool] = lambda copy: False,
        threads: bool = False,
    ) -> None:
        self.reader = reader
        self._ahead = OverlappedCopies(ahead)
        self._held = held
        self._device = device
        self._thread = threading.get_ident()
        self._lock = threading.RLock() if threads else None
        self._open = False
        self.targets: dict[int, Target] = {}  # by the address of the storage
        self.whole: dict[str, str] = {}  # name -> why it was read whole
        self.used: set[str] = set()
        self.done: list[Copy | Constant] = []  # all repeatable writes, in order
        self.once: str | None = None  # describes a write that cannot be repeated
        self.sources: dict[str, Source] = {}  # the sources of all placeholders
        self._forms: dict[Source, torch.Tensor] = {}
        self._made: list[weakref.ref[Placeholder]] = []

    # Before and after the loading code.

    def expect(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Names targets, and declares those on ``meta`` that will become real."""
        for name, tensor in tensors:
            storage = _storage_of(tensor)
            if storage is not None:
                self.targets.setdefault(storage._cdata, Target(storage, name))

    def placeholder(self, name: str, source: Source) -> Placeholder:
        """The placeholder for a tensor of the checkpoint."""
        self.sources[name] = source
        # One meta tensor serves all tensors of the same form.
        lies = self._forms.get(source)
        if lies is None:
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                lies = form_of(source)
            self._forms[source] = lies
        memory = Memory(name, lies, source.dtype, geometry_of(lies), self._device)
        return self.derive(memory, lies, source.dtype, memory.geometry)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Records loading code of this thread inside the block."""
        self._open = True
        try:
            with SeeOperators(self), SeeFunctions(self):
                yield
        except BaseException:
            self._ahead.cancel()
            raise
        finally:
            self._open = False

    def is_written(self, tensor: torch.Tensor) -> bool:
        """Whether anything is or was written to a tensor."""
        storage = _storage_of(tensor)
        target = None if storage is None else self.targets.get(storage._cdata)
        return target is not None and bool(target.parts)

    def unfilled(
        self, tensors: Iterable[tuple[str, torch.Tensor]], *, in_part: bool = False
    ) -> list[str]:
        """The names of those of the expected tensors that nothing was written to.

        Args:
            tensors: those that have been given another memory are left out.
            in_part: and of those that were written to in part only.
        """
        found = []
        for name, tensor in tensors:
            storage = _storage_of(tensor)
            target = None if storage is None else self.targets.get(storage._cdata)
            if target is None or not tensor.numel():
                continue
            if not target.parts or (in_part and target.unwritten()):
                found.append(name)
        return found

    def take_whole(
        self,
        tensor: torch.Tensor,
        headers: Mapping[str, tuple[str, tuple[int, ...]]],
        taken: set[str],
    ) -> str | None:
        """The name of the checkpoint's tensor that is all that a tensor gets, as it is; then it is
        the caller's to load. Each of them once: ``taken``."""
        storage = _storage_of(tensor)
        target = None if storage is None else self.targets.get(storage._cdata)
        if storage is None or target is None or target.value is not None or not target.writes:
            return None
        *before, last = target.writes
        if not isinstance(last, Copy) or last.as_bits or not tensor.is_contiguous():
            return None
        if last.name in taken:
            return None
        whole = last.target.numel() * last.target.element_size() == storage.nbytes()
        if not whole or any(not covers(last.target, write.target) for write in before):
            return None
        shape = headers[last.name][1]
        if last.shape != shape or last.offset or tensor.shape != shape:
            return None
        expected = 1
        for count, stride in zip(reversed(shape), reversed(last.strides), strict=True):
            if count > 1 and stride != expected:
                return None
            expected *= count
        if last.target.dtype != tensor.dtype or not last.target.is_contiguous():
            return None
        target.writes, target.parts = [], []
        taken.add(last.name)
        return last.name

    def allocate(self) -> None:
        """Gives memory to the named targets on ``meta`` that are written to.

        Raises:
            CheckpointError: one of them is written in part only, or is nobody's.
        """
        for target in self.targets.values():
            if target.storage.device != _META or not target.parts:
                continue
            if target.name is None:
                if any(isinstance(write, Copy) for write in target.writes):
                    raise CheckpointError(
                        "the loading code fills a tensor on meta that is not of the module: give "
                        "record() the module, or load onto real tensors"
                    )
                continue
            missing = target.unwritten()
            if missing:
                raise CheckpointError(
                    f"{target.name}: the loading code leaves {missing} of its elements as they "
                    "are, which on meta are none: load onto a real model"
                )
            if target.value is None:
                target.value = empty_on_host((target.storage.nbytes(),), torch.uint8)

    def real_target(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The memory that was made for a target on ``meta``, if any was."""
        storage = _storage_of(tensor)
        target = None if storage is None else self.targets.get(storage._cdata)
        return None if target is None or target.value is None else self._at(target, tensor)

    def real_targets(self) -> list[tuple[str, torch.Tensor]]:
        """(name, all its bytes) of what was written to."""
        found = []
        for target in self.targets.values():
            if not target.parts or (target.value is None and target.storage.device == _META):
                continue
            value = target.value
            if value is None:
                value = torch.empty(0, dtype=torch.uint8, device=target.storage.device)
                value.set_(target.storage)
            found.append((target.name or "a target without a name", value))
        return found

    def repeat(self) -> None:
        """Does all writes again.

        Raises:
            CheckpointError: some cannot be done again.
        """
        if self.whole or self.once:
            name, why = next(iter(self.whole.items()), ("", self.once))
            raise CheckpointError(
                f"the recording cannot be loaded again: {f'tensor {name!r}: ' * bool(name)}{why}"
            )
        waiting: list[Copy] = []
        for write in self.done:
            part = self.real_target(write.target) if write.target.is_meta else write.target
            if part is None:
                continue
            if isinstance(write, Copy):
                waiting.append(dataclasses.replace(write, target=part))
                continue
            if any(_overlap(part, copy.target) for copy in waiting):
                self._copy(waiting)
                waiting = []
            with torch.no_grad():
                write.write(part)
        self._copy(waiting)
        for copy in waiting:
            if not copy.target.is_inference():
                torch.autograd.graph.increment_version(copy.target)

    def kept(self) -> IdentitySet:
        """The placeholders that the loading code kept."""
        return IdentitySet(tensor for ref in self._made if (tensor := ref()) is not None)

    def replace_kept(self) -> dict[str, torch.Tensor]:
        """Replaces kept placeholders, such as those that became parameters, with real tensors: name
        -> tensor."""
        kept = [tensor for ref in self._made if (tensor := ref()) is not None]
        self._made.clear()  # a tensor with weak references cannot be swapped
        self.read([tensor.memory for tensor in kept], "kept", note=False)
        found: dict[str, torch.Tensor] = {}
        while kept:
            tensor = kept.pop()
            real = tensor.with_bytes()
            if getattr(tensor, "_is_param", False):
                real = torch.nn.Parameter(real, requires_grad=tensor.requires_grad)
            elif tensor.requires_grad:
                real.requires_grad_()
            extra = {k: v for k, v in tensor.__dict__.items() if k not in _OWN_ATTRIBUTES}
            found[tensor.memory.name] = tensor
            with contextlib.suppress(RuntimeError):  # C++ code holds it: it reads its bytes itself
                torch.utils.swap_tensors(tensor, real)  # type: ignore[no-untyped-call]
                tensor.__dict__.update(extra)
        return found

    # What the modes tell.

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._lock is None:
            return handler_of(func)(self, func, args, kwargs)
        with self._lock:
            return handler_of(func)(self, func, args, kwargs)

    def after(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handles a placeholder in an operator outside the modes."""
        if self._open and self._is_elsewhere():
            if self._lock is not None:
                return self.dispatch(func, args, kwargs)
            raise CheckpointError(
                f"{func}: the loading code used a tensor in a thread that is not recorded; load "
                "whole tensors instead"
            )
        return run_on_real(self, func, args, kwargs)

    def is_target(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a target on ``meta`` that will become real."""
        if type(tensor) is Placeholder:
            return False
        storage = _storage_of(tensor)
        target = None if storage is None else self.targets.get(storage._cdata)
        return target is not None and target.name is not None

    def real(self, tensor: Placeholder, why: str) -> torch.Tensor:
        """The tensor with its bytes."""
        with self._lock or contextlib.nullcontext():
            self.read([tensor.memory], why)
        return tensor.with_bytes()

    def materialize(self, tensor: Placeholder, why: str) -> None:
        """Turns this object into a tensor with bytes."""
        real = self.real(tensor, why)
        self._made = [ref for ref in self._made if ref() is not tensor]
        try:
            torch.utils.swap_tensors(tensor, real)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise CheckpointError(
                f"tensor {tensor.memory.name!r}: {why} is impossible for a recorded tensor "
                f"({error}); load whole tensors instead"
            ) from error

    def set_data(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        if isinstance(value, Placeholder):
            value = self.real(value, "set as .data")
        if value.is_meta or not self.is_target(tensor) or not tensor.is_meta:
            tensor.data = value
            return
        # torch does not set other memory on a meta tensor.
        kind, attributes = type(tensor), dict(tensor.__dict__)
        new = value
        if isinstance(tensor, torch.nn.Parameter):
            new = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
        torch.utils.swap_tensors(tensor, new)  # type: ignore[no-untyped-call]
        tensor.__class__ = kind
        tensor.__dict__.update(attributes)

    def settle(self, tensor: torch.Tensor, *, write: bool = False) -> torch.Tensor:
        """Runs the writes that wait for a tensor's memory. Returns the tensor, or its real tensor
        if it is on ``meta``.

        Args:
            tensor: the tensor that an operator will read.
            write: whether the operator writes to it too.
        """
        storage = _storage_of(tensor)
        target = None if storage is None else self.targets.get(storage._cdata)
        if target is None or storage is None:
            return tensor
        self._ahead.wait(storage._cdata)
        if write:
            self.once = self.once or "a target was changed in place"
            target.parts.append(tensor)
        if not tensor.is_meta:
            self.finish([target])
            return tensor
        if target.value is None:
            if not target.writes and not write:
                return tensor  # nothing is known of it
            target.value = torch.empty(target.storage.nbytes(), dtype=torch.uint8)
        self.finish([target])
        return self._at(target, tensor)

    def finish(self, targets: Sequence[Target] | None = None) -> None:
        """Runs all waiting writes."""
        waiting: list[Copy] = []
        if targets is None:
            self._ahead.wait()
        for target in self.targets.values() if targets is None else targets:
            self._ahead.wait(target.storage._cdata)
            if not target.writes or (target.value is None and target.storage.device == _META):
                continue
            writes, target.writes = target.writes, []
            if target.value is None:
                waiting += [write for write in writes if isinstance(write, Copy)]
                continue
            first = len(waiting)
            for write in writes:
                part = self._at(target, write.target)
                if isinstance(write, Copy):
                    waiting.append(dataclasses.replace(write, target=part))
                else:
                    if any(_overlap(part, copy.target) for copy in waiting[first:]):
                        self._copy(waiting)
                        waiting = []
                        first = 0
                    write.write(part)
        self._copy(waiting)

    def expose(self, tensor: torch.Tensor) -> None:
        """Does what waits for the memory of a tensor; all later copies to it are done there and
        then."""
        self.settle(tensor)
        storage = _storage_of(tensor)
        target = None if storage is None else self._target_of(storage, True)
        if target is not None:
            target.exposed = True

    def take_held(self) -> list[Copy]:
        """Hands the held copies over to the caller: those to targets that have memory and are not
        written twice in the same place."""
        taken: list[Copy] = []
        for target in self.targets.values():
            copies = [write for write in target.writes if isinstance(write, Copy)]
            on_meta = target.value is None and target.storage.device == _META
            if on_meta or len(copies) < len(target.writes) or len(write_rounds(copies)) != 1:
                continue
            taken += [copy for copy in copies if self._held(copy)]
            target.writes = [copy for copy in copies if not self._held(copy)]
        return taken

    def put_back(self, copies: Sequence[Copy]) -> None:
        """Takes back copies of ``take_held`` that the caller did not run."""
        for copy in copies:
            self.targets[copy.target.untyped_storage()._cdata].writes.append(copy)

    def overwrite(
        self, tensor: torch.Tensor, write: Callable[[torch.Tensor], object], *, constant: bool
    ) -> None:
        """Overwrites a part of a target.

        Args:
            tensor: the part.
            write: writes it.
            constant: whether ``write`` can be repeated later with the same result.
        """
        storage = _storage_of(tensor)
        target = None if storage is None else self._target_of(storage, tensor.is_meta)
        if constant:
            self.done.append(Constant(tensor, write))
        else:
            self.once = self.once or "a target was filled with computed values"
        if target is None or tensor.numel() == 0:
            write(tensor)
            return
        self._ahead.wait(target.storage._cdata)
        target.writes = [old for old in target.writes if not covers(tensor, old.target)]
        target.parts.append(tensor)
        if not tensor.is_meta:
            if any(not disjoint(tensor, old.target) for old in target.writes):
                self.finish([target])
            write(tensor)
        elif target.value is None and constant:
            target.writes.append(Constant(tensor, write))
        else:
            write(self.settle(tensor, write=True))

    def record(self, tensor: torch.Tensor, source: Placeholder) -> str | None:
        """Records a copy, or returns the reason why that is impossible."""
        memory = source.memory
        storage = _storage_of(tensor)
        if storage is None or type(tensor).__torch_dispatch__ is not _plain_dispatch:
            return f"copied into a {type(tensor).__name__}"
        lies = source.source
        if lies.shape != tensor.shape:
            # Raises copy_'s own error for incompatible shapes.
            torch.empty(tensor.shape, device=_META).copy_(lies)
            lies = lies.expand(tensor.shape)
        strides = lies.stride()
        for count, stride, step in zip(tensor.shape, strides, tensor.stride(), strict=True):
            if count > 1 and (stride == 0 or step == 0):
                return "copied with elements that repeat"
        if tensor.is_conj() or tensor.is_neg():
            return "copied into a conjugated view"
        as_bits = lies.dtype != self.sources[memory.name].dtype
        if not casts(lies.dtype, source.dtype, tensor.dtype) or (
            as_bits and tensor.dtype != lies.dtype
        ):
            return f"cast from {lies.dtype} by way of {source.dtype} to {tensor.dtype}"
        self.used.add(memory.name)
        if tensor.numel() == 0:
            return None
        target = self._target_of(storage, True)
        if target is None:
            raise RuntimeError("no target was made")  # a bug in the recorder
        into = tensor if target.value is None else self._at(target, tensor)
        offset = int(lies.storage_offset())
        copy = Copy(memory.name, offset, tuple(lies.shape), strides, into, as_bits)
        target.writes.append(copy)
        target.parts.append(tensor)
        self.done.append(copy)
        if target.exposed or (self._open and self._is_elsewhere()):
            self.finish([target])
            return None
        if self._ahead.is_time(copy):
            self._start_prefetch()
        return None

    def derive(
        self, memory: Memory, source: torch.Tensor, dtype: torch.dtype, geometry: Geometry
    ) -> Placeholder:
        """Another view of a memory."""
        made = Placeholder(self, memory, source, dtype, geometry)
        self._made.append(weakref.ref(made))
        if len(self._made) >= 4096 and len(self._made) & (len(self._made) - 1) == 0:
            self._made = [ref for ref in self._made if ref() is not None]
        return made

    def read(self, memories: Sequence[Memory], why: str, *, note: bool = True) -> None:
        """Reads the bytes of these memories at once."""
        wanted = {id(memory): memory for memory in memories if memory.value is None}
        if not wanted:
            return
        names = list(dict.fromkeys(memory.name for memory in wanted.values()))
        if note:
            for name in names:
                self.whole.setdefault(name, why)
        self.used.update(names)
        read = self.reader.tensors(names)
        taken: set[str] = set()
        for memory in wanted.values():
            value = read[memory.name]
            part = memory.part_of(value)
            own_shape, own_strides, _ = memory.geometry
            alone = memory.name not in taken and part.numel() == value.numel()
            alone = alone and geometry_of(memory.source)[:2] == (own_shape, own_strides)
            taken.add(memory.name)
            if alone and memory.dtype == part.dtype and memory.device == part.device:
                memory.value = part
                continue
            memory.value = torch.empty_strided(
                own_shape, own_strides, dtype=memory.dtype, device=_real_device(memory.device)
            ).copy_(part)

    # Inside.

    def _is_elsewhere(self) -> bool:
        """Whether this is not the recorded thread."""
        return threading.get_ident() != self._thread

    def _start_prefetch(self) -> None:
        """Starts the waiting copies to targets with memory, unless they depend on others."""
        targets = [
            target
            for target in self.targets.values()
            if target.writes
            and target.value is None
            and target.storage.device != _META
            and not any(isinstance(write, Copy) and self._held(write) for write in target.writes)
        ]
        writes = [write for target in targets for write in target.writes]
        turns = write_rounds([write for write in writes if isinstance(write, Copy)])
        if len(turns) == 1:
            for target in targets:
                target.writes = []
            self._ahead.start(self.reader, turns[0])

    def _copy(self, copies: Sequence[Copy]) -> None:
        for turn in write_rounds(copies):
            self.reader.copy(turn)

    def _target_of(self, storage: torch.UntypedStorage, make: bool) -> Target | None:
        target = self.targets.get(storage._cdata)
        if target is None and make:
            target = self.targets[storage._cdata] = Target(storage)
        return target

    def _at(self, target: Target, tensor: torch.Tensor) -> torch.Tensor:
        """The real memory of a target on ``meta``."""
        if target.value is None:
            raise RuntimeError("a target on meta without memory")  # a bug in the recorder
        shape, strides, offset = geometry_of(tensor)
        return target.value.view(tensor.dtype).as_strided(shape, strides, offset)


def _storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The storage; ``None`` for tensors without one, such as sparse tensors."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError, ValueError):  # lazy modules raise ValueError
        return None


def _real_device(device: torch.device) -> torch.device:
    return _CPU if device.type == "meta" else device


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    same = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return same and not disjoint(one, other)
