"""Checkpoint and placement become one LoadPlan; the engine runs it; tensors come out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from weightlift import _native, dtypes
from weightlift.errors import ArgumentError, DeviceError, OutOfMemoryError, ReadError
from weightlift.report import LoadReport, record
from weightlift.settings import Settings

if TYPE_CHECKING:
    import torch

    from weightlift.checkpoint import Checkpoint

__all__ = ["Allocator", "TorchAllocator", "load_tensors", "run_plan"]

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
        torch.cuda.init()

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
    progress: bool | Progress = False,
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
        progress: ``True`` for a bar, or a function of bytes done and in all.
        allocator: where memory on ``device`` comes from; torch, by default.
        caller: whom ``stats()`` books it on.
    """
    _check_mode(mode, device, dtype, pin_memory)
    settings = Settings.current()
    plan = _native.Plan(settings.native(dtypes.fp8_rules()))
    if settings.populate is not None:
        plan.populate(settings.populate)
    target = _Target(plan, device, dtype, mode, pin_memory, shared, allocator)
    for part in checkpoint.parts:
        which = None
        if names is not None:
            found = (part.find(name) for name in names)
            which = sorted(position for position in found if position is not None)
        target.add(part, which)
    native = run_plan(plan, target.allocator, progress)
    tensors = target.tensors()
    report = LoadReport.from_native(native)
    report.fallbacks += target.fallbacks
    record(report, caller)
    return tensors


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
    show = _bar() if progress is True else progress or None
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
        import torch

        self.plan = plan
        self.device = device
        self.dtype = dtype
        self.mode = mode
        self.shared = shared
        self.fallbacks: list[str] = []
        self.on_host = device.type != "cuda" and allocator is None
        self.allocator = None if self.on_host else allocator or TorchAllocator()
        self.pin_for: int | None = None
        if pin_memory:
            if not torch.cuda.is_available() and allocator is None:
                raise DeviceError("pin_memory=True needs a CUDA driver and a GPU: there is none")
            self.pin_for = torch.cuda.current_device() if allocator is None else 0
        self.names: list[str] = []
        self.owners: list[Any] = []
        self.by_torch: list[str] = []  # casts that the engine does not have
        if device.type not in ("cpu", "cuda"):
            self.fallbacks.append(f"{device}: loaded to the CPU, then moved by torch")

    def add(self, part: _native.IndexedFile, which: Sequence[int] | None) -> None:
        casts: list[int] = []
        if self.dtype is not None:
            casts = self._casts(part, which)
        if self.on_host:
            self._add_host(part, which, casts)
        else:
            self._add_device(part, which, set(casts))

    def _casts(self, part: _native.IndexedFile, which: Sequence[int] | None) -> list[int]:
        """The positions that the engine casts; what only torch can cast is noted."""
        found = part.dtypes()
        positions = range(len(part)) if which is None else which
        casts = [p for p in positions if found[p] != self.dtype and found[p] in dtypes.CASTABLE]
        others = [
            p
            for p in positions
            if found[p] in dtypes.FLOATING and found[p] not in dtypes.CASTABLE
        ]
        if others:
            names = part.names()
            for p in others:
                if found[p] == "F4":
                    raise ArgumentError(
                        f"{part.path}: tensor {names[p]!r}: F4 packs two numbers into a byte and "
                        "cannot be cast to one dtype; load it without dtype="
                    )
                self.by_torch.append(names[p])
            self.fallbacks.append(f"{part.path}: {len(others)} tensors cast by torch")
        return casts

    def _add_host(
        self, part: _native.IndexedFile, which: Sequence[int] | None, casts: list[int]
    ) -> None:
        names = part.names()
        everything = range(len(part)) if which is None else which
        if self.mode == "read" or self.pin_for is not None or len(casts) == len(everything):
            self._read(part, which, [names[p] for p in everything])
            return
        cast = set(casts)
        rest = [p for p in everything if p not in cast] if casts else which
        kept = names if rest is None else [names[p] for p in rest]
        try:
            self.plan.map(part, rest, self.shared)
            self.names += kept
        except ReadError as error:
            # A file system that cannot map (ENODEV), or no address space left.
            if self.mode == "map":
                raise
            self.fallbacks.append(f"read, because mapping was refused: {error}")
            self._read(part, rest, kept)
        if casts:
            self._read(part, casts, [names[p] for p in casts])

    def _read(
        self, part: _native.IndexedFile, which: Sequence[int] | None, names: list[str]
    ) -> None:
        dtype = self.dtype if self.dtype in dtypes.CASTABLE else None
        if self.by_torch and dtype is not None:
            # Those keep the file's dtype until torch casts them.
            own = set(self.by_torch)
            positions = range(len(part)) if which is None else which
            plain = [p for p, name in zip(positions, names, strict=True) if name in own]
            rest = [p for p, name in zip(positions, names, strict=True) if name not in own]
            if plain:
                self.plan.read(part, plain, None, self.pin_for)
                self.names += [name for name in names if name in own]
                which, names = rest, [name for name in names if name not in own]
        self.plan.read(part, which, dtype, self.pin_for)
        self.names += names

    def _add_device(
        self, part: _native.IndexedFile, which: Sequence[int] | None, casts: set[int]
    ) -> None:
        assert self.allocator is not None
        index = self.device.index
        names, found, shapes = part.names(), part.dtypes(), part.shapes()
        positions = range(len(part)) if which is None else which
        targets = [self.dtype if p in casts and self.dtype else found[p] for p in positions]
        for p, target in zip(positions, targets, strict=True):
            if target not in dtypes.TORCH_NAMES:
                # The engine's words for it, and its exception.
                self.plan.read(part, [p], None, None)
        if casts or which is not None:
            sizes = [
                _bytes_of(shapes[p], target) for p, target in zip(positions, targets, strict=True)
            ]
        else:
            sizes = [end - begin for begin, end in map(part.range, positions)]
        self.allocator.reserve(index, sizes)
        empty = self.allocator.empty
        pairs = [empty(index, shapes[p], t) for p, t in zip(positions, targets, strict=True)]
        self.plan.copy_to(part, which, index, [address for address, _ in pairs], targets)
        self.plan.use_stream(index, self.allocator.stream(index))
        self.owners += [owner for _, owner in pairs]
        self.names += [names[p] for p in positions] if which is not None else names

    def tensors(self) -> dict[str, Any]:
        if not self.on_host:
            tensors = dict(zip(self.names, self.owners, strict=True))
        else:
            tensors = dict(zip(self.names, self.plan.tensors(_from_dlpack()), strict=True))
            if self.device.type != "cpu":
                tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        if self.by_torch and self.dtype is not None:
            wanted = dtypes.to_torch(self.dtype)
            for name in self.by_torch:
                tensors[name] = tensors[name].to(wanted)
        return tensors


def _bytes_of(shape: Sequence[int], dtype: str) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count // 2 if dtype == "F4" else count * dtypes.to_torch(dtype).itemsize


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


def _from_dlpack() -> Callable[[object], Any]:
    import torch

    # The C function takes a capsule; torch.from_dlpack is a Python layer around it.
    return getattr(torch._C, "_from_dlpack", torch.from_dlpack)  # type: ignore[no-any-return]


def _bar() -> Progress:
    """A progress bar on the terminal, for as long as it is called."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    bar = Progress(
        "[bold]loading", BarColumn(), DownloadColumn(), TransferSpeedColumn(), transient=True
    )
    task = bar.add_task("loading", total=None)
    bar.start()

    def show(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    return show
