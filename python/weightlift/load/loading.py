"""Checkpoint and placement become one LoadPlan; the engine runs it; tensors come out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import weightlift._native as _native
from weightlift.checkpoint.integrity import HashCheck
from weightlift.core import dtypes, gc_pause
from weightlift.core.errors import (
    ArgumentError,
    DeviceError,
    FormatError,
    OutOfMemoryError,
    ReadError,
)
from weightlift.core.report import LoadReport, record
from weightlift.core.settings import Settings
from weightlift.load import plans
from weightlift.load.allocation import (
    Allocator,
    TorchAllocator,
    empty_on_host,
    from_dlpack,
    naming_tensor,
)
from weightlift.load.options import LoadOptions, Progress
from weightlift.load.plans import cancel_plan, new_plan, run_plan, start_plan

if TYPE_CHECKING:
    import torch

    from weightlift.checkpoint.checkpoint import Checkpoint
    from weightlift.checkpoint.torch_file import View

__all__ = ["Loading", "SliceRange", "copy_to_device", "load_tensors"]

# What a load makes: (group, name), or (group, part, position) for what views look at.
_Key: TypeAlias = "tuple[int, str] | tuple[int, int, int]"
# (start, step, count) of each dimension: a part of a tensor.
SliceRange: TypeAlias = "tuple[int, int, int]"


def load_tensors(
    checkpoint: Checkpoint,
    device: torch.device,
    options: LoadOptions = LoadOptions(),
    *,
    dtype: str | None = None,
    names: Sequence[str] | None = None,
    shared: bool = False,
    allocator: Allocator | None = None,
) -> dict[str, Any]:
    """Loads tensors of a checkpoint to one device, in the order of the files; see ``Loading``.

    Args:
        checkpoint: what there is.
        device: where to; its index is filled in.
        options: how.
        dtype: the file's name of a floating-point dtype to cast floating-point tensors to.
        names: which tensors; all by default.
        shared: others may get the same tensors from ``checkpoint`` while these live.
        allocator: where memory on CUDA devices comes from; torch, by default.
    """
    loading = Loading(checkpoint, options, shared=shared, allocator=allocator)
    loading.add(device, dtype, names)
    loading.start()
    return loading.result()


def copy_to_device(
    tensors: Mapping[str, torch.Tensor],
    device: torch.device,
    dtype: str | None = None,
    *,
    settings: Settings | None = None,
    allocator: Allocator | None = None,
    caller: str = "weightlift",
) -> dict[str, Any]:
    """Copies contiguous CPU tensors to a CUDA device, through the staging ring.

    Args:
        tensors: of dtypes that the format has; they must not change meanwhile.
        device: its index is filled in.
        dtype: the file's name of a dtype to cast to what the engine casts.
    """
    plan = new_plan(settings or Settings.current(), dtype)
    allocator = allocator or TorchAllocator()
    sources = [dtypes.file_name(tensor.dtype) for tensor in tensors.values()]
    found = [source for source in sources if source is not None]
    targets = [dtype if dtype and own in dtypes.CASTABLE else own for own in found]
    # Of F4, an element of torch's is two of the format's.
    doubled = [2 if own == "F4" else 1 for own in found]
    shapes = [
        (*t.shape[:-1], t.shape[-1] * n) if n != 1 else tuple(t.shape)
        for t, n in zip(tensors.values(), doubled, strict=True)
    ]
    sizes = [
        t.numel() * dtypes.to_torch(target).itemsize
        for t, target in zip(tensors.values(), targets, strict=True)
    ]
    allocator.reserve(device.index, sizes)
    made = [
        allocator.empty(device.index, shape, target)
        for shape, target in zip(shapes, targets, strict=True)
    ]
    plan.copy_memory(
        list(tensors),
        [tensor.data_ptr() for tensor in tensors.values()],
        [tensor.numel() * n for tensor, n in zip(tensors.values(), doubled, strict=True)],
        found,
        device.index,
        [address for address, _ in made],
        targets,
    )
    plan.use_stream(device.index, allocator.stream(device.index))
    record(run_plan(plan, allocator), caller=caller)
    return {name: owner for name, (_, owner) in zip(tensors, made, strict=True)}


class _Group(NamedTuple):
    """Tensors with one destination."""

    device: torch.device
    dtype: str | None
    names: Sequence[str] | None
    targets: Sequence[torch.Tensor] | None
    parts: Sequence[Sequence[SliceRange]] | None

    @property
    def on_host(self) -> bool:
        return self.device.type != "cuda"


class Loading:
    """A load from its plan to its tensors: ``add`` what goes where, ``start``, ``result``.

    All files and all devices are one plan, so that every link is busy to the end.

    Args:
        checkpoint: what there is.
        options: how it is loaded.
        shared: others may get the same tensors from ``checkpoint`` while these live.
        allocator: where memory on CUDA devices comes from; torch, by default.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: LoadOptions = LoadOptions(),
        *,
        shared: bool = False,
        allocator: Allocator | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._options = options
        self._mode = options.mode
        self._pin_memory = options.pin_memory
        self._shared = shared
        self._progress = options.progress
        self._settings = options.settings or Settings.current()
        self._allocator = allocator
        self._caller = options.caller
        self._groups: list[_Group] = []
        self._fallbacks: list[str] = list(checkpoint.fallbacks)
        self._hashes = HashCheck(checkpoint.files) if options.verify else None
        self._pin_for: int | None = None
        self._plan: _native.Plan | None = None
        # Of what the plan makes on the host, and of what was allocated: the key of each tensor.
        # A key is (group, name), or (group, part, position) for the base of views.
        self._made: list[_Key] = []
        self._tensors: dict[_Key, Any] = {}
        self._order: list[tuple[str, _Key, View | None]] = []
        # What the engine does not do: casts between rare dtypes, and copies into targets that are
        # not contiguous or of a dtype it has no cast to.
        self._by_torch: list[tuple[_Key, str]] = []
        self._copies: list[tuple[str, torch.Tensor]] = []
        self._native: dict[str, Any] = {}

    def add(
        self,
        device: torch.device,
        dtype: str | None = None,
        names: Sequence[str] | None = None,
        targets: Sequence[torch.Tensor] | None = None,
        parts: Sequence[Sequence[SliceRange]] | None = None,
    ) -> None:
        """Adds tensors with one destination.

        Args:
            device: where to; its index is filled in.
            dtype: the file's name of a floating-point dtype to cast floating-point tensors to.
            names: which tensors; all by default. A name is added once for a device.
            targets: tensors of the names' shapes on ``device`` to write to; they give the dtypes.
            parts: of each of the names, what is loaded, in memory of its own; steps are positive.
        """
        self._options.check_target(device, dtype)
        self._groups.append(_Group(device, dtype, names, targets, parts))

    @gc_pause.paused()
    def start(self) -> None:
        """Plans, and starts the engine's threads; small loads run in ``result``."""
        if self._pin_memory:
            self._pin_for = _pinning_device()
        wanted = {group.dtype for group in self._groups}
        fp8 = next((dtype for dtype in wanted if dtype and dtype.startswith("F8")), None)
        self._plan = new_plan(self._settings, fp8)
        for number, group in enumerate(self._groups):
            if not group.on_host and self._allocator is None:
                self._allocator = TorchAllocator()
            if group.device.type not in ("cpu", "cuda"):
                self._fallbacks.append(f"{group.device}: loaded to the CPU, then moved by torch")
            if group.parts is None:
                self._add_group(number, group)
            else:
                self._add_parts(number, group)
        if self._hashes is not None:
            self._hashes.start()
        start_plan(self._plan, self._allocator)

    @gc_pause.paused()
    def result(self) -> dict[str, Any]:
        """Waits for the end: name -> tensor, in the order of the files where one destination takes
        them all, else group by group."""
        assert self._plan is not None
        try:
            native = plans.finish_plan(self._plan, self._progress)
            if self._hashes is not None:
                self._hashes.result()
        finally:
            if self._hashes is not None:
                self._hashes.stop()
        made = self._plan.tensors(from_dlpack())
        self._tensors.update(zip(self._made, made, strict=True))
        tensors = self._collect()
        self._native = record(native, self._fallbacks, self._caller)
        return tensors

    def show(self, progress: Progress) -> None:
        """Tells this, from now on, how far the load is."""
        self._progress = progress

    @property
    def has_work(self) -> bool:
        return bool(self._groups)

    @property
    def report(self) -> LoadReport:
        """Of a load that has ended."""
        return LoadReport.from_native(self._native)

    def cancel(self) -> None:
        """Stops a load that was started, and waits until nothing is in flight."""
        if self._hashes is not None:
            self._hashes.stop()
        if self._plan is not None:
            cancel_plan(self._plan)

    def _add_group(self, number: int, group: _Group) -> None:
        checkpoint = self._checkpoint
        if group.names is None and checkpoint.is_plain and group.targets is None:
            for part, file in enumerate(checkpoint.parts):
                names = file.names()
                keys: list[_Key] = [(number, name) for name in names]
                self._order += [(name, key, None) for name, key in zip(names, keys, strict=True)]
                self._add_part(part, group, None, keys, None)
            return
        wanted: dict[int, dict[int, tuple[_Key, torch.Tensor | None]]] = {}
        for i, name in enumerate(checkpoint if group.names is None else group.names):
            target = None if group.targets is None else group.targets[i]
            place = checkpoint.place(name)
            if place is None:  # read by torch when the checkpoint was opened
                self._tensors[(number, name)] = checkpoint.in_memory[name].to(group.device)
                self._order.append((name, (number, name), None))
                if target is not None:
                    self._copies.append((name, target))
                elif group.dtype is not None:
                    self._by_torch.append(((number, name), group.dtype))
                continue
            part, position, view = place
            key: _Key = (number, name)
            if view is not None:
                key = (number, part, position)
                if target is not None:
                    self._copies.append((name, target))
                    target = None
            self._order.append((name, key, view))
            wanted.setdefault(part, {})[position] = (key, target)
        for part in sorted(wanted):
            chosen = sorted(wanted[part].items())
            keys = [key for _, (key, _) in chosen]
            which = [position for position, _ in chosen]
            targets = [target for _, (_, target) in chosen]
            given = targets if group.targets is not None else None
            self._add_part(part, group, which, keys, given)

    def _add_parts(self, number: int, group: _Group) -> None:
        """Plans parts of tensors: what the engine can cut goes straight to its place."""
        assert self._plan is not None
        assert group.names is not None
        assert group.parts is not None
        index = -1 if group.on_host else group.device.index
        cut = 0
        if index >= 0 and group.targets is None:
            assert self._allocator is not None
            sizes = [
                math.prod(count for _, _, count in ranges)
                * dtypes.bits(group.dtype or self._checkpoint[name][0])
                // 8
                for name, ranges in zip(group.names, group.parts, strict=True)
            ]
            self._allocator.reserve(index, sizes)
        for i, (name, ranges) in enumerate(zip(group.names, group.parts, strict=True)):
            key: _Key = (number, name)
            self._order.append((name, key, None))
            place = self._checkpoint.find(name)
            own = self._checkpoint[name][0]
            whole_bytes = dtypes.bits(own) % 8 == 0
            into = None if group.targets is None else group.targets[i]
            if into is not None:
                wanted = dtypes.file_name(into.dtype)
            else:
                wanted = group.dtype if group.dtype and own in dtypes.FLOATING else own
            direct = own == wanted or (own in dtypes.CASTABLE and wanted in dtypes.CASTABLE)
            if into is not None and not (
                direct and place is not None and whole_bytes and into.is_contiguous()
            ):
                self._copies.append((name, into))
                into, wanted, direct = None, own, True
            if place is None or not whole_bytes:
                cut += 1
                self._tensors[key] = self._cut(name, ranges).to(group.device)
                direct = own == wanted
            else:
                dtype = wanted if direct and wanted != own else None
                if into is None:
                    counts = [count for _, _, count in ranges]
                    into = self._empty(name, group.device, counts, dtype or own)
                self._tensors[key] = into
                if into.numel() > 0:
                    self._plan.slice(*place, ranges, dtype, index, into.data_ptr())
            if not direct and wanted is not None:
                self._by_torch.append((key, wanted))
        if index >= 0:
            assert self._allocator is not None
            self._plan.use_stream(index, self._allocator.stream(index))
        if cut:
            self._fallbacks.append(f"{cut} tensors loaded whole to cut their parts out of them")

    def _cut(self, name: str, ranges: Sequence[SliceRange]) -> torch.Tensor:
        """A part of what only torch can cut, in memory of its own."""
        import torch

        cpu = torch.device("cpu")
        whole: torch.Tensor = load_tensors(
            self._checkpoint, cpu, LoadOptions(caller=self._caller), names=[name]
        )[name]
        for dimension, (start, step, count) in enumerate(ranges):
            whole = whole.narrow(dimension, start, step * (count - 1) + 1 if count else 0)
            whole = whole[(slice(None),) * dimension + (slice(None, None, step),)]
        return whole.clone(memory_format=torch.contiguous_format)

    def _empty(
        self, name: str, device: torch.device, shape: Sequence[int], dtype: str
    ) -> torch.Tensor:
        """Memory for a tensor of a file."""
        import torch

        found = self._checkpoint.find(name)
        assert found is not None
        with naming_tensor(found[0].path, name):
            if device.type == "cuda":
                assert self._allocator is not None
                made: torch.Tensor = self._allocator.empty(device.index, shape, dtype)[1]
                return made
            kind = dtypes.to_torch(dtype)
            if not self._pin_memory:
                return empty_on_host(shape, kind)
            return torch.empty(tuple(shape), dtype=kind, pin_memory=True)

    def _add_part(
        self,
        part: int,
        group: _Group,
        which: Sequence[int] | None,
        keys: Sequence[_Key],
        targets: Sequence[torch.Tensor | None] | None,
    ) -> None:
        file = self._checkpoint.parts[part]
        if targets is not None:
            assert which is not None
            which, keys = self._fill(file, group, which, keys, targets)
        casts = self._casts(file, group, which, keys) if group.dtype is not None else []
        if group.on_host:
            self._add_host(part, group, which, keys, casts)
        else:
            self._add_device(file, group, which, keys, set(casts))

    def _fill(
        self,
        file: _native.IndexedFile,
        group: _Group,
        which: Sequence[int],
        keys: Sequence[_Key],
        targets: Sequence[torch.Tensor | None],
    ) -> tuple[Sequence[int], Sequence[_Key]]:
        """Plans what goes straight into targets; returns the rest, which torch copies there."""
        direct: list[int] = []
        addresses: list[int] = []
        wanted: list[str] = []
        rest: list[int] = []
        rest_keys: list[_Key] = []
        for position, own, key, target in zip(
            which, file.dtypes(which), keys, targets, strict=True
        ):
            into = None if target is None else dtypes.file_name(target.dtype)
            castable = own in dtypes.CASTABLE and into in dtypes.CASTABLE
            if (
                target is not None
                and into is not None
                and (own == into or castable)
                and target.is_contiguous()
                and group.device.type in ("cpu", "cuda")
            ):
                direct.append(position)
                addresses.append(target.data_ptr())
                wanted.append(into)
                self._tensors[key] = target
            else:
                rest.append(position)
                rest_keys.append(key)
                if target is not None:
                    self._copies.append((str(key[1]), target))
        if direct:
            assert self._plan is not None
            index = -1 if group.on_host else group.device.index
            self._plan.copy_to(file, direct, index, addresses, wanted)
            if index >= 0:
                assert self._allocator is not None
                self._plan.use_stream(index, self._allocator.stream(index))
        return rest, rest_keys

    def _casts(
        self,
        file: _native.IndexedFile,
        group: _Group,
        which: Sequence[int] | None,
        keys: Sequence[_Key],
    ) -> list[int]:
        """The positions that the engine casts; what only torch can cast is noted."""
        casts = []
        others = 0
        positions = _positions(file, which)
        for position, own, key in zip(positions, file.dtypes(which), keys, strict=True):
            if own == group.dtype:
                continue
            if own in dtypes.CASTABLE:
                casts.append(position)
            elif own == "F4":
                raise ArgumentError(
                    f"{file.path}: tensor {file.names([position])[0]!r}: F4 packs two numbers into "
                    "a byte and cannot be cast to one dtype; load it without dtype="
                )
            elif own in dtypes.FLOATING:
                assert group.dtype is not None
                self._by_torch.append((key, group.dtype))
                others += 1
        if others:
            self._fallbacks.append(f"{file.path}: {others} tensors cast by torch")
        return casts

    def _add_host(
        self,
        part: int,
        group: _Group,
        which: Sequence[int] | None,
        keys: Sequence[_Key],
        casts: list[int],
    ) -> None:
        assert self._plan is not None
        file = self._checkpoint.parts[part]
        if casts:
            by_position = dict(zip(_positions(file, which), keys, strict=True))
            cast = set(casts)
            which = [position for position in by_position if position not in cast]
            keys = [by_position[position] for position in which]
            self._read(file, casts, [by_position[position] for position in casts], group.dtype)
        if which is not None and not which:
            return
        # People torch.save back onto the very file they loaded, which truncates it.
        rewritten = self._mode == "auto" and self._checkpoint.formats[part] == "torch"
        if self._mode == "read" or rewritten or self._pin_for is not None:
            self._read(file, which, keys, None)
            return
        try:
            self._plan.map(file, which, self._shared)
        except ReadError as error:
            # A file system that cannot map (ENODEV), or no address space left.
            if self._mode == "map":
                raise
            self._fallbacks.append(f"read, because mapping was refused: {error}")
            self._read(file, which, keys, None)
        else:
            self._made += keys

    def _read(
        self,
        file: _native.IndexedFile,
        which: Sequence[int] | None,
        keys: Sequence[_Key],
        dtype: str | None,
    ) -> None:
        assert self._plan is not None
        self._plan.read(file, which, dtype, self._pin_for)
        self._made += keys

    def _add_device(
        self,
        file: _native.IndexedFile,
        group: _Group,
        which: Sequence[int] | None,
        keys: Sequence[_Key],
        casts: set[int],
    ) -> None:
        assert self._allocator is not None
        assert self._plan is not None
        index = group.device.index
        found, shapes = file.dtypes(which), file.shapes(which)
        targets, sizes = found, file.sizes(which)
        if casts and group.dtype is not None:
            wide = dtypes.to_torch(group.dtype).itemsize
            chosen = [p in casts for p in _positions(file, which)]
            targets = [group.dtype if c else own for c, own in zip(chosen, found, strict=True)]
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
                file.path,
                tensor=file.names(which)[position],
            )
        self._allocator.reserve(index, sizes)
        empty = self._allocator.empty
        made: list[tuple[int, Any]] = []
        try:
            for shape, own in zip(shapes, targets, strict=True):
                made.append(empty(index, shape, own))
        except OutOfMemoryError:
            position = len(made)
            made.clear()  # the traceback would keep them, and a second try find no more room
            with naming_tensor(file.path, file.names(which)[position]):
                raise
        self._plan.copy_to(file, which, index, [address for address, _ in made], targets)
        self._plan.use_stream(index, self._allocator.stream(index))
        self._tensors.update(zip(keys, (owner for _, owner in made), strict=True))

    def _collect(self) -> dict[str, Any]:
        moved = [
            None if group.device.type == "cuda" or group.device.type == "cpu" else group.device
            for group in self._groups
        ]
        for key, tensor in self._tensors.items():
            device = moved[key[0]]
            if device is not None:
                self._tensors[key] = tensor.to(device)
        # Casts first: a base is cast before it is viewed.
        for key, dtype in self._by_torch:
            tensor = self._tensors[key]
            if tensor.is_floating_point():
                self._tensors[key] = tensor.to(dtypes.to_torch(dtype))
        result: dict[str, Any] = {}
        for name, key, view in self._order:
            tensor = self._tensors[key]
            if view is not None:
                tensor = tensor.as_strided(view.shape, view.stride, view.offset)
            result[name] = tensor
        for name, target in self._copies:
            target.copy_(result[name])
            result[name] = target
        return result


def _positions(part: _native.IndexedFile, which: Sequence[int] | None) -> Sequence[int]:
    return range(len(part)) if which is None else which


def _pinning_device() -> int:
    import torch

    if not torch.cuda.is_available():
        raise DeviceError("pin_memory=True needs a CUDA driver and a GPU: there is none")
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return torch.cuda.current_device()
