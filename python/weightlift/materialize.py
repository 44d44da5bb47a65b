"""Checkpoint and placement become one LoadPlan; the engine runs it; tensors come out."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from weightlift import _native, dtypes
from weightlift.errors import (
    ArgumentError,
    DeviceError,
    FormatError,
    OutOfMemoryError,
    ReadError,
)
from weightlift.integrity import verify_file
from weightlift.report import record
from weightlift.settings import Settings

if TYPE_CHECKING:
    import torch

    from weightlift.checkpoint import Checkpoint

__all__ = ["Allocator", "TorchAllocator", "from_dlpack", "load_tensors", "new_plan", "run_plan"]

Progress = Callable[[int, int], None]

# How often a waiting caller looks up: for Ctrl-C, and for progress.
_POLL_SECONDS = 0.05
# torch's caching allocator cuts what is larger than this out of a block of its own, with a
# cudaMalloc each (c10/cuda/CUDACachingAllocator.cpp, kSmallSize).
_OWN_BLOCK_BYTES = 1 << 20


class Allocator(Protocol):
    """Where device memory comes from, and in which order its users come.

    ``empty`` returns the address and what owns it: the tensor, where torch allocates.
    """

    def empty(self, device: int, shape: Sequence[int], dtype: str) -> tuple[int, Any]: ...
    def stream(self, device: int) -> int: ...
    def reserve(self, device: int, sizes: Sequence[int]) -> None: ...


class TorchAllocator:
    """torch's caching allocator, so that its statistics and its freeing stay right."""

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            reason = (
                "this torch is built without CUDA"
                if torch.version.cuda is None
                else "torch sees no GPU (driver, container or CUDA_VISIBLE_DEVICES)"
            )
            raise DeviceError(f"cannot load to CUDA: {reason}; `weightlift doctor` tells more")
        # Before the engine's own first call, or torch would not notice a fork (torch.cuda docs).
        torch.cuda.init()  # type: ignore[no-untyped-call]

    def empty(self, device: int, shape: Sequence[int], dtype: str) -> tuple[int, Any]:
        import torch

        try:
            if dtype == "F4":
                shape = (*shape[:-1], shape[-1] // 2)
            tensor = torch.empty(
                tuple(shape), dtype=dtypes.to_torch(dtype), device=torch.device("cuda", device)
            )
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(str(error)) from error
        return tensor.data_ptr(), tensor

    def stream(self, device: int) -> int:
        import torch

        return int(torch.cuda.current_stream(device).cuda_stream)

    def reserve(self, device: int, sizes: Sequence[int]) -> None:
        """Gets one block for what is missing in torch's cache, so that the tensors to come are cut
        out of it: a cudaMalloc a tensor made loads several times slower (transformers #36380)."""
        import torch

        large = sum(size for size in sizes if size > _OWN_BLOCK_BYTES)
        config = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
        # These never cut a tensor out of a large block.
        whole = ("expandable_segments:True", "max_split_size_mb", "cudaMallocAsync")
        if large == 0 or (config and any(option in config for option in whole)):
            return
        if torch.cuda.get_allocator_backend() != "native":
            return
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if cached < large:
            try:
                torch.empty(large - cached, dtype=torch.uint8, device=torch.device("cuda", device))
            except torch.OutOfMemoryError:
                return  # in pieces it may still fit


def load_tensors(
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    dtype: str | None = None,
    mode: str = "auto",
    pin_memory: bool = False,
    names: Sequence[str] | None = None,
    shared: bool = False,
    verify: bool = False,
    progress: bool | Progress = False,
    settings: Settings | None = None,
    allocator: Allocator | None = None,
    caller: str = "weightlift",
) -> dict[str, Any]:
    """Loads tensors of a checkpoint to one device, in the order of the files.

    Args:
        checkpoint: what there is.
        device: where to; its index is filled in.
        dtype: the file's name of a floating-point dtype to cast floating-point tensors to.
        mode: ``"map"``, ``"read"`` or ``"auto"``.
        pin_memory: page-locked host memory.
        names: which tensors; all by default.
        shared: others may get the same tensors from ``checkpoint`` while these live.
        verify: compare the SHA-256 of the files with the known ones first.
        progress: ``True`` for a bar, or a function of bytes done and in all.
        settings: instead of those that hold now.
        allocator: where memory on ``device`` comes from; torch, by default.
        caller: whom ``stats()`` books it on.
    """
    _check_mode(mode, device, dtype, pin_memory)
    plan = new_plan(settings or Settings.current(), dtype)
    target = _Target(plan, device, dtype, mode, pin_memory, shared, allocator)
    for part in checkpoint.parts:
        if verify:
            verify_file(part.path, part.identity)
        which = None
        if names is not None:
            found = (part.find(name) for name in names)
            which = sorted(position for position in found if position is not None)
        target.add(part, which)
    native = run_plan(plan, target.allocator, progress)
    tensors = target.tensors()
    record(native, target.fallbacks, caller)
    return tensors


def new_plan(settings: Settings, dtype: str | None = None) -> _native.Plan:
    """An empty plan under these settings, for casts to ``dtype``."""
    plan = _native.Plan(settings.native(dtypes.fp8_rules(dtype)))
    if settings.populate is not None:
        plan.populate(settings.populate)
    return plan


def run_plan(
    plan: _native.Plan, allocator: Allocator | None, progress: bool | Progress = False
) -> dict[str, Any]:
    """Runs a plan to its end; Ctrl-C stops it, drains what is in flight and goes on up."""
    scratch = []
    keep = []
    for device, count in plan.prepare():
        assert allocator is not None
        address, owner = allocator.empty(device, (count,), "U8")
        scratch.append((device, address))
        keep.append(owner)
    with contextlib.ExitStack() as stack:
        show = stack.enter_context(_bar()) if progress is True else progress or None
        try:
            plan.start(scratch)
            while not plan.wait(_POLL_SECONDS):
                if show is not None:
                    show(*plan.progress())
            if show is not None:
                show(*plan.progress())
        except BaseException:
            plan.cancel()
            while not plan.wait(_POLL_SECONDS):
                pass
            raise
    return plan.finish()


class _Target:
    """One device, as the destination of parts of a checkpoint."""

    def __init__(
        self,
        plan: _native.Plan,
        device: torch.device,
        dtype: str | None,
        mode: str,
        pin_memory: bool,
        shared: bool,
        allocator: Allocator | None,
    ) -> None:
        self.plan = plan
        self.device = device
        self.dtype = dtype
        self.mode = mode
        self.shared = shared
        self.fallbacks: list[str] = []
        self.on_host = device.type != "cuda" and allocator is None
        self.allocator = None if self.on_host else allocator or TorchAllocator()
        self.pin_for = _pinning_device() if pin_memory else None
        self.order: list[str] = []  # of the files
        self.names: list[str] = []  # of what the plan makes
        self.owners: list[Any] = []  # of what the allocator made
        self.by_torch: list[str] = []  # casts that the engine does not have
        if device.type not in ("cpu", "cuda"):
            self.fallbacks.append(f"{device}: loaded to the CPU, then moved by torch")

    def add(self, part: _native.IndexedFile, which: Sequence[int] | None) -> None:
        casts = self._casts(part, which) if self.dtype is not None else []
        self.order += part.names(which)
        if self.on_host:
            self._add_host(part, which, casts)
        else:
            self._add_device(part, which, set(casts))

    def _casts(self, part: _native.IndexedFile, which: Sequence[int] | None) -> list[int]:
        """The positions that the engine casts; what only torch can cast is noted."""
        found = list(zip(_positions(part, which), part.dtypes(which), strict=True))
        others = [p for p, own in found if own in dtypes.FLOATING - dtypes.CASTABLE]
        for name, own in zip(part.names(others), part.dtypes(others), strict=True):
            if own == "F4":
                raise ArgumentError(
                    f"{part.path}: tensor {name!r}: F4 packs two numbers into a byte and cannot be "
                    "cast to one dtype; load it without dtype="
                )
            self.by_torch.append(name)
        if others:
            self.fallbacks.append(f"{part.path}: {len(others)} tensors cast by torch")
        return [p for p, own in found if own != self.dtype and own in dtypes.CASTABLE]

    def _add_host(
        self, part: _native.IndexedFile, which: Sequence[int] | None, casts: list[int]
    ) -> None:
        rest = which
        if casts:
            cast = set(casts)
            rest = [p for p in _positions(part, which) if p not in cast]
            self._read(part, casts, self.dtype)
        if rest is not None and not rest:
            return
        if self.mode == "read" or self.pin_for is not None:
            self._read(part, rest, None)
            return
        try:
            self.plan.map(part, rest, self.shared)
        except ReadError as error:
            # A file system that cannot map (ENODEV), or no address space left.
            if self.mode == "map":
                raise
            self.fallbacks.append(f"read, because mapping was refused: {error}")
            self._read(part, rest, None)
        else:
            self.names += part.names(rest)

    def _read(
        self, part: _native.IndexedFile, which: Sequence[int] | None, dtype: str | None
    ) -> None:
        self.plan.read(part, which, dtype, self.pin_for)
        self.names += part.names(which)

    def _add_device(
        self, part: _native.IndexedFile, which: Sequence[int] | None, casts: set[int]
    ) -> None:
        assert self.allocator is not None
        index = self.device.index
        found, shapes = part.dtypes(which), part.shapes(which)
        targets, sizes = found, part.sizes(which)
        if casts and self.dtype is not None:
            wide = dtypes.to_torch(self.dtype).itemsize
            chosen = [p in casts for p in _positions(part, which)]
            targets = [self.dtype if c else own for c, own in zip(chosen, found, strict=True)]
            sizes = [
                math.prod(shape) * wide if c else size
                for c, shape, size in zip(chosen, shapes, sizes, strict=True)
            ]
        unknown = set(targets) - dtypes.TORCH_NAMES.keys()
        if unknown:
            position = targets.index(unknown.pop())
            raise FormatError(
                "unsupported_dtype",
                f"torch has no dtype for {targets[position]}",
                part.path,
                tensor=part.names(which)[position],
            )
        self.allocator.reserve(index, sizes)
        empty = self.allocator.empty
        made = [empty(index, shape, own) for shape, own in zip(shapes, targets, strict=True)]
        self.plan.copy_to(part, which, index, [address for address, _ in made], targets)
        self.plan.use_stream(index, self.allocator.stream(index))
        self.owners += [owner for _, owner in made]

    def tensors(self) -> dict[str, Any]:
        if not self.on_host:
            tensors = dict(zip(self.order, self.owners, strict=True))
        else:
            tensors = dict(zip(self.names, self.plan.tensors(from_dlpack()), strict=True))
            if self.names != self.order:
                tensors = {name: tensors[name] for name in self.order}
            if self.device.type != "cpu":
                tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        if self.by_torch and self.dtype is not None:
            wanted = dtypes.to_torch(self.dtype)
            for name in self.by_torch:
                tensors[name] = tensors[name].to(wanted)
        return tensors


def _positions(part: _native.IndexedFile, which: Sequence[int] | None) -> Sequence[int]:
    return range(len(part)) if which is None else which


def _pinning_device() -> int:
    import torch

    if not torch.cuda.is_available():
        raise DeviceError("pin_memory=True needs a CUDA driver and a GPU: there is none")
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return torch.cuda.current_device()


def _check_mode(mode: str, device: torch.device, dtype: str | None, pin_memory: bool) -> None:
    if mode not in ("auto", "map", "read"):
        raise ArgumentError(f"mode is {mode!r}; it can be 'auto', 'map' or 'read'")
    if mode == "map":
        against = [
            text
            for text, given in (
                (f"dtype={dtype}", dtype is not None),
                ("pin_memory=True", pin_memory),
                (f"device={str(device)!r}", device.type != "cpu"),
            )
            if given
        ]
        if against:
            raise ArgumentError(
                f"mode='map' hands out the file's own bytes and goes not together with "
                f"{' and '.join(against)}; use mode='auto'"
            )
    if pin_memory and device.type != "cpu":
        raise ArgumentError(f"pin_memory=True is for the CPU, not for {device}")


@functools.cache
def from_dlpack() -> Callable[[object], Any]:
    import torch

    # The C function takes a capsule; the public one is a Python layer around it.
    if hasattr(torch._C, "_from_dlpack"):
        return torch._C._from_dlpack
    from torch.utils.dlpack import from_dlpack as public

    return public


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar on the terminal."""
    from rich import progress

    columns = (progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn())
    with progress.Progress("[bold]loading", *columns, transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
