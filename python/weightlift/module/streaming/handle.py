"""``stream``: a model runs with a budget of weights on its device."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

import weightlift._native as _native
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.open_checkpoint import open_checkpoint
from weightlift.core import dtypes
from weightlift.core.closing import Closing
from weightlift.core.devices import loadable_device
from weightlift.core.errors import ArgumentError
from weightlift.core.report import format_bytes
from weightlift.core.settings import Settings
from weightlift.core.sizes import parse_size
from weightlift.load.options import LoadOptions
from weightlift.module.fill import fill
from weightlift.module.matching import MatchPolicy, match
from weightlift.module.own_loading import modules_with_own_loading
from weightlift.module.parameters import (
    ParameterRef,
    assign_parameter,
    is_sharded,
    is_streamed,
    parameter_refs,
    set_all,
)
from weightlift.module.placement import DtypeRule, PlacementPolicy
from weightlift.module.streaming.device_side import DeviceSide, device_side
from weightlift.module.streaming.executor import ALIGNMENT, BlockOfWeights, Executor
from weightlift.module.streaming.residency import Piece, Share, cut, share_out
from weightlift.module.streaming.ring import Trace
from weightlift.module.streaming.sources import FileSource, HostSource, Source
from weightlift.module.streaming.streamed_weight import (
    MoveError,
    StreamedWeight,
    streamed_parameter,
)

__all__ = ["StreamHandle", "stream"]


def stream(
    model: torch.nn.Module,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str | int,
    memory: int | str,
    dtype: torch.dtype | str | None = None,
    lookahead: int = 2,
) -> StreamHandle:
    """Runs a model with a budget of weights on its device; the rest is read ahead of its use.

    What stays on the device is chosen by bytes, and by how often a step uses it. The rest is read
    from where it lies (the checkpoint's own files, or the host tensors of the model) into a few
    buffers that are used again and again, cast on the way, by a thread that runs ahead of the
    computing. The order is learned while the model runs; a wrong guess is a wait. Nothing is
    written, and no second copy of the model is made.

    Weights that are streamed are read-only: training them is an error; adapters on top of them
    (LoRA) can be trained. Their tensors tell shape, dtype and device; a deep copy of the model
    streams too, a pickle has the values. Moving or casting the model is refused until the handle is
    closed. The caller moves the inputs to ``device``.

    Args:
        model: on ``meta``, or, without a checkpoint, with its tensors on the CPU.
        checkpoint: a ``Checkpoint``, or what ``open_checkpoint`` takes. ``None`` streams the
            model's own tensors, which must not change meanwhile; on the CPU, those that ``dtype``
            casts.
        device: where the model computes: the CPU or a CUDA device.
        memory: bytes that weights may take on ``device``, buffers included; such as ``"2GB"``.
        dtype: of the floating-point tensors on ``device``, as in ``load_into``.
        lookahead: how many blocks are read ahead.

    Returns:
        A handle; closing it puts the model's tensors back as they were. A context manager.

    Raises:
        ArgumentError: the memory does not suffice (the text names the layer and the smallest budget
            that does), or the model cannot be streamed.
        CheckpointError: the checkpoint does not fit the model.
        DeviceError: there is no such device, or it cannot be streamed to.
        ReadError: a file cannot be read; later, from the operation that needs it.
    """
    budget = _checked_budget(memory, lookahead)
    side = device_side(loadable_device(device))
    refs = parameter_refs(model)
    _check_model(model, refs)
    restore = _Originals(refs)
    try:
        # What is made here is used in any mode, and autograd keeps nothing that one mode made.
        with torch.inference_mode(False):
            if checkpoint is None:
                task = _of_the_host(model, refs, side, budget, dtype, lookahead)
            else:
                if not isinstance(checkpoint, Checkpoint):
                    checkpoint = open_checkpoint(checkpoint)
                task = _of_a_checkpoint(model, refs, checkpoint, side, budget, dtype, lookahead)
            task.install()
            return task.begin(restore)
    except BaseException:
        restore.put_back()
        raise


def _checked_budget(memory: int | str, lookahead: int) -> int:
    budget = parse_size(memory, "memory")
    if budget <= 0:
        raise ArgumentError(f"memory is {memory!r}; it must be bytes above zero, such as '2GB'")
    if not isinstance(lookahead, int) or isinstance(lookahead, bool) or lookahead < 0:
        raise ArgumentError(f"lookahead is {lookahead!r}; it must be 0 or more blocks")
    return budget


def _check_model(model: torch.nn.Module, refs: Sequence[ParameterRef]) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError("a TorchScript module cannot be streamed: its code holds its weights")
    for ref in refs:
        if is_streamed(ref.tensor):
            raise ArgumentError(f"{ref.name!r} is streamed already: close that handle first")
        if is_sharded(ref.tensor):
            raise ArgumentError(f"{ref.name!r} is a DTensor: a sharded model cannot be streamed")
    for name, module in model.named_modules():
        if "_hf_hook" in vars(module):
            raise ArgumentError(
                f"{name or type(model).__name__!r} has accelerate's hooks, which move weights too: "
                "call accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
            )


class _Originals:
    """The tensors that a model had."""

    def __init__(self, refs: Iterable[ParameterRef]) -> None:
        self._places = [
            (module, key, ref.is_parameter, ref.tensor)
            for ref in refs
            for module, key in _places(ref)
        ]

    def put_back(self) -> None:
        for module, key, is_parameter, tensor in self._places:
            if is_parameter:
                assign_parameter(module, key, tensor)  # type: ignore[arg-type]
            else:
                module._buffers[key] = tensor


class _Wanted(NamedTuple):
    """A weight that may be streamed.

    Attributes:
        ref: in the model.
        dtype: on the device.
        key: in its source.
    """

    ref: ParameterRef
    dtype: torch.dtype
    key: str

    @property
    def bytes(self) -> int:
        return -(-self.ref.tensor.numel() * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


class _Task:
    """A stream that is planned.

    Args:
        model: whose it is.
        side: its device.
        memory: the budget.
        lookahead: blocks that are read ahead.
        wanted: what may be streamed, by name, in the order of the modules.
        fixed: bytes of what stays anyway.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        side: DeviceSide,
        memory: int,
        lookahead: int,
        wanted: Mapping[str, _Wanted],
        fixed: int,
    ) -> None:
        self.model, self.side = model, side
        self._lookahead = lookahead
        self._memory = memory
        self._wanted = wanted
        sizes = {name: want.bytes for name, want in wanted.items()}
        self.pieces: list[Piece] = cut(sizes, memory, lookahead)
        self.share: Share = share_out(self.pieces, memory, fixed, lookahead)
        self.fixed = fixed
        self.source: Source | None = None
        self.blocks: list[BlockOfWeights] = []
        self.executor = Executor((), side, 0, lookahead)

    @property
    def streamed(self) -> list[str]:
        return [
            name
            for number, piece in enumerate(self.pieces)
            if number not in self.share.resident
            for name in piece.weights
        ]

    @property
    def streamed_bytes(self) -> int:
        resident = self.share.resident
        return sum(p.bytes for number, p in enumerate(self.pieces) if number not in resident)

    def begin(self, restore: _Originals) -> StreamHandle:
        """Puts streamed weights into the model."""
        handle = StreamHandle(self, restore)
        if self.executor.ring.blocks:
            handle._uses = _Uses(self.model, self._owners(), handle._use_what_is_learned)
        return handle

    def install(self) -> None:
        """Puts streamed weights where the share says so."""
        stored = {}
        self.blocks = []
        for number, piece in enumerate(self.pieces):
            if number in self.share.resident or self.source is None:
                continue
            block = BlockOfWeights(len(self.blocks), piece.name or type(self.model).__name__)
            self.blocks.append(block)
            for name in piece.weights:
                ref, dtype, key = self._wanted[name]
                stored[name] = block.add(name, ref.tensor.shape, dtype, self.source, key)
        side, share = self.side, self.share
        self.executor = Executor(self.blocks, side, share.buffers, self._lookahead)
        for name, weight in stored.items():
            ref = self._wanted[name].ref
            streamed = StreamedWeight(self.executor, weight)
            _assign(ref, streamed_parameter(streamed, ref.tensor.requires_grad, vars(ref.tensor)))

    def share_again(self, uses: Mapping[int, int]) -> bool:
        """Has what a step uses more often stay on the device; ``False`` where that changes nothing.

        Args:
            uses: piece -> how often.
        """
        before = self.share
        after = share_out(self.pieces, self._memory, self.fixed, self._lookahead, uses)
        if after.resident == before.resident or self.source is None:
            return False
        self.executor.close()
        self.share = after
        for number in before.resident - after.resident:  # their memory is needed
            for name in self.pieces[number].weights:
                ref, dtype, _ = self._wanted[name]
                empty = torch.empty(ref.tensor.shape, dtype=dtype, device="meta")
                ref.tensor = _parameter_like(ref.tensor, empty)
        for number in sorted(after.resident - before.resident):
            self._make_resident(self.pieces[number])
        self.install()
        return True

    def _make_resident(self, piece: Piece) -> None:
        wanted = [self._wanted[name] for name in piece.weights]
        values = [
            torch.empty(want.ref.tensor.shape, dtype=want.dtype, device=self.side.device)
            for want in wanted
        ]
        if self.source is not None:
            self.source.fill([want.key for want in wanted], values)
        for want, value in zip(wanted, values, strict=True):
            _assign(want.ref, _parameter_like(want.ref.tensor, value))

    def _owners(self) -> dict[int, list[torch.nn.Module]]:
        """Piece -> the modules that hold its weights."""
        return {
            number: list(
                {id(m): m for m in (self._wanted[n].ref.module for n in piece.weights)}.values()
            )
            for number, piece in enumerate(self.pieces)
        }


class _Uses:
    """How often a step uses each piece: counted by hooks in the first one, which then go.

    Args:
        model: whose ``forward`` is a step.
        owners: piece -> modules.
        learned: is told piece -> uses at the end of the step.
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
    """A hook that stays behind when the module is copied or pickled."""

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


def _places(ref: ParameterRef) -> list[tuple[torch.nn.Module, str]]:
    return [(ref.module, ref.key), *((module, key) for _, module, key in ref.ties)]


def _assign(ref: ParameterRef, made: torch.nn.Parameter) -> None:
    ref.tensor = made
    for module, key in _places(ref):
        assign_parameter(module, key, made)


def _parameter_like(old: torch.Tensor, value: torch.Tensor) -> torch.nn.Parameter:
    made = torch.nn.Parameter(value, old.requires_grad)
    vars(made).update({k: v for k, v in vars(old).items() if k not in _STREAMED_ATTRIBUTES})
    return made


_STREAMED_ATTRIBUTES = frozenset({"_weights", "_stored", "_shadow", "_is_param"})


def _of_a_checkpoint(
    model: torch.nn.Module,
    refs: list[ParameterRef],
    checkpoint: Checkpoint,
    side: DeviceSide,
    memory: int,
    dtype: torch.dtype | str | None,
    lookahead: int,
) -> _Task:
    """Loads what stays on the device; the rest stays in the files."""
    headers = checkpoint.headers()
    own = {
        id(module)
        for _, top in modules_with_own_loading(model, headers)
        for module in top.modules()
    }
    found = match(model, refs, checkpoint, headers, MatchPolicy(strict=not own))
    placement = PlacementPolicy(dtype=dtype)
    rule = DtypeRule.of(model, placement)
    wanted: dict[str, _Wanted] = {}
    fixed = 0
    pairs = {id(ref): name for name, ref in found.pairs}
    for ref in refs:
        name = pairs.get(id(ref))
        target = None if name is None else rule.target(name, ref.tensor, headers[name][0])
        kind = ref.tensor.dtype
        if name is not None and headers[name][0] in dtypes.TORCH_NAMES:
            kind = dtypes.to_torch(target or headers[name][0])
        if (
            name is None
            or id(ref.module) in own
            or not _is_plain(ref.tensor)
            or not _keeps_kind(headers[name][0], ref.tensor.dtype)
        ):
            fixed += ref.tensor.numel() * kind.itemsize
        else:
            wanted[ref.name] = _Wanted(ref, kind, name)
    task = _Task(model, side, memory, lookahead, wanted, fixed)
    streamed = {*task.streamed}
    device_map = {
        name: "disk" if ref.name in streamed else side.device for ref in refs for name in ref.names
    }
    on_meta = _put_on_meta(refs)
    kept = PlacementPolicy(device_map=device_map, dtype=dtype, dispatch=lambda *_: None)
    # In memory of its own: pages of a mapping would be given up for those of what is read.
    how = LoadOptions(mode="read")
    fill(model, checkpoint, kept, MatchPolicy(compare_ties=True), how, refs=on_meta)
    # The caller may close the checkpoint.
    mine = checkpoint.renamed(lambda name: name)
    task.source = FileSource(mine, _settings_for(task.streamed_bytes))
    return task


def _settings_for(streamed_bytes: int) -> Settings:
    """Reads past the page cache what it could not keep from one step to the next: page by page it
    would throw out what is needed soonest."""
    settings = Settings.current()
    headroom: int = _native.machine()["memory_headroom"]
    if settings.io_path in (None, "auto") and streamed_bytes > headroom // 2:
        return dataclasses.replace(settings, io_path="direct")
    return settings


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether what takes its place need know no more than its shape and its dtype."""
    return type(tensor) is torch.nn.Parameter


def _keeps_kind(file_dtype: str, own: torch.dtype) -> bool:
    """Whether torch would not cast between integers, booleans and numbers."""
    if file_dtype in dtypes.FLOATING:
        return own.is_floating_point and file_dtype != "F4"
    return dtypes.file_name(own) == file_dtype


def _put_on_meta(refs: Sequence[ParameterRef]) -> list[ParameterRef]:
    """In place of real tensors that a checkpoint has, ones on ``meta``: the real ones stay as they
    are."""
    for ref in refs:
        if ref.tensor.is_meta or not ref.persistent:
            continue
        with torch.no_grad():
            empty = torch.empty_like(ref.tensor, device="meta")
        if ref.is_parameter:
            _assign(ref, _parameter_like(ref.tensor, empty))
            continue
        for module, key in _places(ref):
            module._buffers[key] = empty
        ref.tensor = empty
    return list(refs)


def _of_the_host(
    model: torch.nn.Module,
    refs: list[ParameterRef],
    side: DeviceSide,
    memory: int,
    dtype: torch.dtype | str | None,
    lookahead: int,
) -> _Task:
    """Brings what stays to the device; the rest stays in the host's memory."""
    rule = DtypeRule.of(model, PlacementPolicy(dtype="auto" if dtype is None else dtype))
    wanted: dict[str, _Wanted] = {}
    moved: list[tuple[ParameterRef, torch.dtype]] = []
    fixed = 0
    for ref in refs:
        tensor = ref.tensor
        if tensor.is_meta:
            raise ArgumentError(
                f"{ref.name!r} is on meta and has no data: give stream() the checkpoint that has it"
            )
        own = dtypes.file_name(tensor.dtype)
        target = None if own is None else rule.target(ref.name, tensor, own)
        kind = tensor.dtype if target is None else dtypes.to_torch(target)
        if tensor.device == side.device and kind == tensor.dtype:
            continue  # it is where it is used
        if ref.is_parameter and _is_plain(tensor) and tensor.device.type == "cpu":
            wanted[ref.name] = _Wanted(ref, kind, ref.name)
        else:
            moved.append((ref, kind))
            fixed += tensor.numel() * kind.itemsize
    task = _Task(model, side, memory, lookahead, wanted, fixed)
    streamed = {*task.streamed}
    source = HostSource({name: want.ref.tensor for name, want in wanted.items()})
    stays = [(want.ref, want.dtype) for name, want in wanted.items() if name not in streamed]
    for ref, kind in [*stays, *moved]:
        value = ref.tensor.detach().to(side.device, kind)
        if ref.is_parameter:
            _assign(ref, _parameter_like(ref.tensor, value))
        else:
            set_all([(ref, value)])
    task.source = source
    return task


class StreamHandle(Closing):
    """A model that is streamed; ``close`` ends that. A context manager.

    Attributes:
        device: where the model computes.
        resident_bytes: of weights that stay on it.
        streamed_bytes: of weights that are read at each use.
        buffer_bytes: of all buffers.
        blocks: the names of what is read at once, in the order of the modules.
    """

    def __init__(self, task: _Task, restore: _Originals) -> None:
        self._task = task
        self._restore: _Originals | None = restore
        self._uses: _Uses | None = None
        self._lock = threading.Lock()
        self.device = task.side.device
        if task.blocks:
            vars(task.model)["_apply"] = _Apply(task.model)

    @property
    def resident_bytes(self) -> int:
        task = self._task
        return sum(task.pieces[number].bytes for number in task.share.resident) + task.fixed

    @property
    def streamed_bytes(self) -> int:
        return sum(block.bytes for block in self._task.blocks)

    @property
    def buffer_bytes(self) -> int:
        return self._task.executor.buffer_bytes

    @property
    def blocks(self) -> list[str]:
        return [block.name for block in self._task.blocks]

    def _use_what_is_learned(self, uses: dict[int, int]) -> None:
        with self._lock:
            if self._restore is not None and max(uses.values(), default=0) > 1:
                trace = self._task.executor.ring.trace
                with torch.inference_mode(False):
                    self._task.share_again(uses)
                self._task.executor.ring.trace = trace

    @property
    def closed(self) -> bool:
        return self._restore is None

    @property
    def waits(self) -> int:
        """How often an operation had to wait for its weights, up to now."""
        return self._task.executor.ring.waits

    def trace(self, tell: Trace | None) -> None:
        """Has ``tell(kind, block, begin, end)`` called for what takes time: ``"read"``, ``"wait"``
        and ``"use"``, by the clock of ``time.perf_counter``; from the threads that do it."""
        self._task.executor.ring.trace = tell

    def close(self) -> None:
        """Puts the model's tensors back as they were, and gives the buffers back. Waits for what is
        being read. Twice is as once."""
        with self._lock:
            restore, self._restore = self._restore, None
        if restore is None:
            return
        if self._uses is not None:
            self._uses.remove()
        attributes = vars(self._task.model)
        if isinstance(attributes.get("_apply"), _Apply):
            del attributes["_apply"]
        restore.put_back()
        self._task.executor.close()

    def __repr__(self) -> str:
        if self.closed:
            return "<StreamHandle, closed>"
        return (
            f"<StreamHandle on {self.device}: {format_bytes(self.resident_bytes)} stay, "
            f"{format_bytes(self.streamed_bytes)} in {len(self.blocks)} blocks are streamed "
            f"through {format_bytes(self.buffer_bytes)}>"
        )


class _Apply:
    """``model._apply``, on which ``to``, ``half``, ``cuda`` and the like are built: it refuses what
    would change a streamed weight before anything else is changed. Weights refuse it too, where a
    part of the model is moved.

    It knows its module weakly: a model that is dropped goes at once. Copies and pickles of the
    module have one of their own.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = weakref.ref(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Apply, (self._module(),)

    def __call__(self, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        module = self._module()
        if module is None:
            return None
        for weight in module.parameters():
            if isinstance(weight, StreamedWeight):
                break
        else:
            return type(module)._apply(module, change, recurse)  # type: ignore[no-untyped-call]
        kinds = {(p.dtype, p.device) for p in module.parameters() if isinstance(p, StreamedWeight)}
        for dtype, device in kinds:
            before = torch.empty(2, 2, 2, 2, dtype=dtype, device=device)
            after = change(before)
            if (after.dtype, after.device, after.stride()) != (dtype, device, before.stride()):
                raise MoveError(
                    f"{type(module).__name__} reads weights anew at each use and cannot be moved "
                    "or cast: close the stream first, or stream it to that device, in that dtype"
                )
        return module
