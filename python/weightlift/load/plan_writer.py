"""Turns destinations into entries of the engine's plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import weightlift._native as _native
from weightlift.checkpoint.checkpoint import indexed_files, locate
from weightlift.checkpoint.integrity import HashCheck
from weightlift.core import dtypes
from weightlift.core.errors import (
    ArgumentError,
    DeviceError,
    FormatError,
    OutOfMemoryError,
    ReadError,
)
from weightlift.core.report import format_count
from weightlift.core.settings import Settings
from weightlift.load.allocation import Allocator, TorchAllocator, empty_on_host, naming_tensor
from weightlift.load.arriving_load import ArrivingLoad, Told, ranks_of
from weightlift.load.destination import Destination, SliceRange
from weightlift.load.options import LoadOptions
from weightlift.load.outputs import Outputs
from weightlift.load.plans import new_plan, start_plan
from weightlift.load.running_load import RunningLoad

if TYPE_CHECKING:
    import torch

    from weightlift.checkpoint.checkpoint import Checkpoint

__all__ = ["PlanWriter"]


class _Selection(NamedTuple):
    """Tensors of one file, and their numbers in the outputs.

    Attributes:
        file: the indexed file.
        positions: the tensors' positions in the file; ``None`` for all.
        numbers: their numbers.
    """

    file: _native.IndexedFile
    positions: Sequence[int] | None
    numbers: Sequence[int]

    def take(self, indices: Sequence[int]) -> _Selection:
        """A part of the selection, by indices into ``numbers``."""
        positions = self.positions
        return _Selection(
            self.file,
            indices if positions is None else [positions[i] for i in indices],
            [self.numbers[i] for i in indices],
        )

    def name(self, index: int) -> str:
        """The tensor's name in the file."""
        return self.file.names([index if self.positions is None else self.positions[index]])[0]


class _OnDevice(NamedTuple):
    """Tensors that get memory on a CUDA device.

    Attributes:
        destination, selection: which, and where to.
        shapes, dtypes, sizes: of the tensors on the device; sizes in bytes.
        staged: the bytes that go to the device, at least: a cast runs on either side.
        device_casts: whether the device certainly casts some of them.
    """

    destination: Destination
    selection: _Selection
    shapes: Sequence[Sequence[int]]
    dtypes: Sequence[str]
    sizes: Sequence[int]
    staged: int
    device_casts: bool


class PlanWriter:
    """Writes destinations into a plan of the engine; ``add`` them, then ``start``.

    Args:
        checkpoint: the checkpoint.
        options: how to load.
        settings: the settings of this load.
        shared: other loads may map the same tensors of ``checkpoint`` while these are alive.
        allocator: allocates memory on CUDA devices; torch by default.
        cast_to: the dtypes to cast to.
        in_order: ``start_in_order`` will start the plan.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: LoadOptions,
        settings: Settings,
        *,
        shared: bool = False,
        allocator: Allocator | None = None,
        cast_to: Sequence[str | None] = (),
        in_order: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self._files = indexed_files(checkpoint)
        self._options = options
        self._settings = settings
        self._shared = shared
        self._given_allocator = allocator
        self._pin_for = _pinning_device() if options.pin_memory else None
        fp8 = next((dtype for dtype in cast_to if dtype and dtype.startswith("F8")), None)
        self._native = new_plan(settings, fp8)
        self._outputs = Outputs()
        self._on_devices: list[_OnDevice] = []
        self._fallbacks = list(checkpoint.fallbacks)
        self._told = Told([], []) if in_order else None

    @property
    def _allocator(self) -> Allocator:
        if self._given_allocator is None:
            self._given_allocator = TorchAllocator()
        return self._given_allocator

    def add(self, destination: Destination) -> None:
        """Adds one destination."""
        first = len(self._outputs.tensors)
        checkpoint = self._checkpoint
        is_whole = all(given is None for given in destination[2:])
        if is_whole and checkpoint.is_plain:
            for number, file in enumerate(self._files):
                numbers = self._outputs.hand_out_all(file.names())
                self._add_file(destination, number, _Selection(file, None, numbers))
        else:
            names = list(checkpoint) if destination.names is None else destination.names
            if destination.parts is None:
                self._add_names(destination, names)
            else:
                self._add_parts(destination, names, destination.parts)
        if not destination.is_native:
            device = destination.device
            self._fallbacks.append(f"{device}: loaded to the CPU, then torch moved the tensors")
            self._outputs.move(range(first, len(self._outputs.tensors)), device)

    def start(self, hashes: HashCheck | None = None) -> RunningLoad:
        """Allocates device memory and starts the engine; ``hashes`` are computed in parallel."""
        self._allocate_on_devices()
        if hashes is not None:
            hashes.start()
        try:
            start_plan(self._native, self._given_allocator)
        except BaseException:
            if hashes is not None:
                hashes.stop()
            raise
        return RunningLoad(self._native, self._outputs, self._fallbacks, self._options, hashes)

    def start_in_order(self, order: Sequence[str]) -> ArrivingLoad:
        """As ``start``, for tensors that the caller takes one by one. ``order`` has the names of
        all tensors in their order of use."""
        if self._told is None:
            raise RuntimeError("this plan was not made to be started in an order")
        self._allocate_on_devices()
        self._native.order(ranks_of(self._told, self._outputs.numbers(), order))
        start_plan(self._native, self._given_allocator)
        allocator = self._given_allocator
        return ArrivingLoad(
            self._native, self._outputs, self._told, self._fallbacks, self._options, allocator
        )

    def _add_names(self, destination: Destination, names: Sequence[str]) -> None:
        """Adds whole tensors, file by file."""
        # For each file, position -> number.
        chosen: dict[int, dict[int, int]] = {}
        in_place: dict[int, dict[int, tuple[int, torch.Tensor]]] = {}
        outputs = self._outputs
        for i, name in enumerate(names):
            target = None if destination.targets is None else destination.targets[i]
            place = self._checkpoint.place(name)
            if place is None:
                self._add_in_memory(destination, name, target)
                continue
            part, position, view = place
            if target is not None and view is None:
                own = self._files[part].dtype(position)
                if _writes_directly(own, target, destination):
                    if part not in in_place:
                        in_place[part] = {}
                    made = outputs.new(target)
                    in_place[part][position] = made, target
                    outputs.hand_out(name, made)
                    continue
            if part not in chosen:
                chosen[part] = {}
            positions = chosen[part]
            number = positions.get(position)
            if number is None:
                number = positions[position] = outputs.new()
            outputs.hand_out(name, number, view)
            if target is not None:
                outputs.copy_into(target)
        if in_place and not destination.on_host:
            self._prepare_for(destination, self._sizes_in_place(in_place))
        for part in sorted({*chosen, *in_place}):
            if part in in_place:
                self._write_in_place(destination, part, in_place[part])
            if part in chosen:
                ordered = sorted(chosen[part])
                numbers = [chosen[part][position] for position in ordered]
                file = self._files[part]
                self._add_file(destination, part, _Selection(file, ordered, numbers))

    def _add_in_memory(
        self, destination: Destination, name: str, target: torch.Tensor | None
    ) -> None:
        """Adds a tensor that torch read when the checkpoint was opened."""
        outputs = self._outputs
        number = outputs.new(self._checkpoint.in_memory[name].to(destination.device))
        outputs.hand_out(name, number)
        if target is not None:
            outputs.copy_into(target)
        elif destination.dtype is not None:
            outputs.cast(number, destination.dtype)

    def _write_in_place(
        self, destination: Destination, part: int, chosen: dict[int, tuple[int, torch.Tensor]]
    ) -> None:
        positions = sorted(chosen)
        targets = {position: chosen[position][1] for position in positions}
        for position, target in targets.items():
            if target.data_ptr() == 0 and target.numel():  # such as a subclass around others
                name = self._files[part].names([position])[0]
                raise ArgumentError(
                    f"tensor {name!r}: its target has no memory of its own: load into plain tensors"
                )
        addresses = [targets[position].data_ptr() for position in positions]
        own = [str(dtypes.file_name(targets[position].dtype)) for position in positions]
        self._native.copy_to(
            self._files[part],
            positions,
            _native.Targets(destination.device_index, addresses, own),
        )
        if self._told is not None:
            numbers = [chosen[position][0] for position in positions]
            self._told.add(numbers, destination.device_index)
        self._use_stream(destination)

    def _add_file(self, destination: Destination, part: int, selection: _Selection) -> None:
        """Adds tensors of one file, with own memory or mapped."""
        casts: Sequence[int] = ()
        if destination.dtype is not None:
            casts = self._note_casts(selection, destination.dtype)
        if not destination.on_host:
            self._add_on_device(destination, selection, casts)
            return
        if len(casts) == len(selection.numbers) > 0:
            self._read(selection, destination.dtype)
            return
        if casts:
            self._read(selection.take(casts), destination.dtype)
            kept = {*range(len(selection.numbers))}.difference(casts)
            selection = selection.take(sorted(kept))
        if selection.positions is None or selection.numbers:
            self._add_on_host(part, selection)

    def _note_casts(self, selection: _Selection, dtype: str) -> Sequence[int]:
        """The tensors that the engine casts; schedules the other casts with torch."""
        owns = selection.file.dtypes(selection.positions)
        if {*owns} <= dtypes.CASTABLE - {dtype}:
            return range(len(owns))
        casts = []
        by_torch = 0
        for i, own in enumerate(owns):
            if own == dtype:
                continue
            if own in dtypes.CASTABLE:
                casts.append(i)
            elif own == "F4":
                raise ArgumentError(
                    f"{selection.file.path}: tensor {selection.name(i)!r}: F4 packs two numbers "
                    "into a byte and cannot be cast to one dtype; load it without dtype="
                )
            elif own in dtypes.FLOATING:
                self._outputs.cast(selection.numbers[i], dtype)
                by_torch += 1
        if by_torch:
            self._fallbacks.append(
                f"{selection.file.path}: torch cast {format_count(by_torch, 'tensor')}"
            )
        return casts

    def _add_on_host(self, part: int, selection: _Selection) -> None:
        """Maps tensors, or reads them."""
        mode = self._options.mode
        # Users torch.save back onto the file that they loaded, which truncates it.
        rewritten = mode == "auto" and self._checkpoint.formats[part] == "torch"
        if mode == "read" or rewritten or self._pin_for is not None:
            self._read(selection, None)
            return
        try:
            self._native.map(selection.file, selection.positions, self._shared)
        except ReadError as error:
            # The file system cannot map (ENODEV), or no address space is left.
            if mode == "map":
                raise
            self._fallbacks.append(f"read instead of mapped: {error}")
            self._read(selection, None)
        else:
            self._expect(selection)

    def _expect(self, selection: _Selection) -> None:
        """Declares the next tensors that the engine makes, on the host."""
        self._outputs.expect(selection.numbers)
        if self._told is not None:
            self._told.add(selection.numbers, -1)

    def _read(self, selection: _Selection, dtype: str | None) -> None:
        self._native.read(selection.file, selection.positions, dtype, self._pin_for)
        self._expect(selection)

    def _add_on_device(
        self, destination: Destination, selection: _Selection, casts: Sequence[int]
    ) -> None:
        """Adds tensors on a CUDA device; ``_allocate_on_devices`` allocates their memory."""
        file, positions = selection.file, selection.positions
        shapes, made_dtypes = file.shapes(positions), file.dtypes(positions)
        sizes = file.sizes(positions)
        staged = sum(sizes)
        device_casts = False
        if casts and destination.dtype is not None:
            width = dtypes.to_torch(destination.dtype).itemsize
            made_dtypes, sizes = list(made_dtypes), list(sizes)
            for i in casts:
                made_dtypes[i] = destination.dtype
                size, sizes[i] = sizes[i], math.prod(shapes[i]) * width
                device_casts = device_casts or self._casts_on_device(size, sizes[i])
            staged = min(staged, sum(sizes))
        for i, dtype in enumerate(made_dtypes):
            if dtype not in dtypes.TORCH_NAMES:
                text = f"torch has no dtype for {dtype}"
                raise FormatError("unsupported_dtype", text, file.path, tensor=selection.name(i))
        self._on_devices.append(
            _OnDevice(destination, selection, shapes, made_dtypes, sizes, staged, device_casts)
        )

    def _casts_on_device(self, size: int, made: int) -> bool:
        """Whether the device casts ``size`` bytes of the file to ``made`` bytes."""
        place = self._settings.cast_place
        return made > 0 and (place == "device" or (place != "host" and made >= size))

    def _allocate_on_devices(self) -> None:
        """Reserves memory once per device: the query of torch's cache takes up to a millisecond,
        and a checkpoint may have a hundred files."""
        sizes: dict[int, list[int]] = {}
        staged: dict[int, int] = {}
        casting = set()
        for wanted in self._on_devices:
            index = wanted.destination.device_index
            sizes.setdefault(index, []).extend(wanted.sizes)
            staged[index] = staged.get(index, 0) + wanted.staged
            if wanted.device_casts:
                casting.add(index)
        for index, count in staged.items():
            self._native.prepare_ahead(
                index, count, index in casting, _separate(sizes[index], count)
            )
        for index, of_device in sizes.items():
            self._allocator.reserve(index, of_device)
        for wanted in self._on_devices:
            self._allocate_on_device(wanted)
        self._on_devices.clear()

    def _allocate_on_device(self, wanted: _OnDevice) -> None:
        """Allocates on a CUDA device and adds the copies."""
        destination, selection = wanted.destination, wanted.selection
        file, index, empty = selection.file, destination.device_index, self._allocator.empty
        made: list[tuple[int, Any]] = []
        try:
            for shape, dtype in zip(wanted.shapes, wanted.dtypes, strict=True):
                made.append(empty(index, shape, dtype))
        except OutOfMemoryError:
            missing = len(made)
            made.clear()  # the traceback would keep them, and a second try would fail too
            with naming_tensor(file.path, selection.name(missing)):
                raise
        addresses = [address for address, _ in made]
        targets = _native.Targets(index, addresses, wanted.dtypes)
        self._native.copy_to(file, selection.positions, targets)
        if self._told is not None:
            self._told.add(selection.numbers, index)
        self._use_stream(destination)
        tensors = self._outputs.tensors
        for number, (_, owner) in zip(selection.numbers, made, strict=True):
            tensors[number] = owner

    def _use_stream(self, destination: Destination) -> None:
        if not destination.on_host:
            index = destination.device_index
            self._native.use_stream(index, self._allocator.stream(index))

    def _add_parts(
        self,
        destination: Destination,
        names: Sequence[str],
        parts: Sequence[Sequence[SliceRange]],
    ) -> None:
        """Adds parts of tensors. The engine reads a part straight to its place if it can."""
        if not destination.on_host:
            self._prepare_for(destination, self._sizes_of_parts(destination, names, parts))
            if destination.targets is None:
                self._reserve_parts(destination, names, parts)
        whole = 0
        for i, (name, ranges) in enumerate(zip(names, parts, strict=True)):
            target = None if destination.targets is None else destination.targets[i]
            whole += not self._add_part(destination, name, ranges, target)
        self._use_stream(destination)
        if whole:
            self._fallbacks.append(f"loaded {format_count(whole, 'tensor')} whole to cut parts out")

    def _prepare_for(
        self, destination: Destination, copies: Iterable[tuple[int, str, str | None]]
    ) -> None:
        """Begins to prepare the device for copies that get no memory in ``_allocate_on_devices``:
        (bytes in the file, dtype there, dtype on the device)."""
        staged = 0
        casts = False
        for size, own, wanted in copies:
            made = size
            if wanted != own and {own, wanted} <= dtypes.CASTABLE:
                made = size * dtypes.bits(str(wanted)) // dtypes.bits(own)
                casts = casts or self._casts_on_device(size, made)
            staged += min(size, made)
        self._native.prepare_ahead(destination.device_index, staged, casts, 0)

    def _sizes_in_place(
        self, in_place: dict[int, dict[int, tuple[int, torch.Tensor]]]
    ) -> Iterator[tuple[int, str, str | None]]:
        """As ``_prepare_for`` takes them."""
        for part, chosen in in_place.items():
            sizes = self._files[part].sizes([*chosen])
            owns = self._files[part].dtypes([*chosen])
            for size, own, (_, target) in zip(sizes, owns, chosen.values(), strict=True):
                yield size, own, dtypes.file_name(target.dtype)

    def _sizes_of_parts(
        self,
        destination: Destination,
        names: Sequence[str],
        parts: Sequence[Sequence[SliceRange]],
    ) -> Iterator[tuple[int, str, str | None]]:
        """As ``_prepare_for`` takes them: the parts that the engine reads."""
        for i, (name, ranges) in enumerate(zip(names, parts, strict=True)):
            own = self._checkpoint[name][0]
            wanted = destination.dtype if own in dtypes.FLOATING else None
            if destination.targets is not None:
                wanted = dtypes.file_name(destination.targets[i].dtype)
            if dtypes.bits(own) % 8 == 0:
                yield _elements(ranges) * dtypes.bits(own) // 8, own, wanted or own

    def _reserve_parts(
        self,
        destination: Destination,
        names: Sequence[str],
        parts: Sequence[Sequence[SliceRange]],
    ) -> None:
        sizes = [
            _elements(ranges) * dtypes.bits(destination.dtype or self._checkpoint[name][0]) // 8
            for name, ranges in zip(names, parts, strict=True)
        ]
        self._allocator.reserve(destination.device_index, sizes)

    def _add_part(
        self,
        destination: Destination,
        name: str,
        ranges: Sequence[SliceRange],
        target: torch.Tensor | None,
    ) -> bool:
        """Adds a part of a tensor; ``False`` if only torch can cut it out of the whole."""
        outputs = self._outputs
        own = self._checkpoint[name][0]
        place = locate(self._checkpoint, name) if dtypes.bits(own) % 8 == 0 else None
        final = destination.dtype if destination.dtype and own in dtypes.FLOATING else own
        if target is not None:
            final = own  # torch casts while it copies, unless the target has this dtype
            if place is not None and _writes_directly(own, target, destination):
                outputs.hand_out(name, outputs.new(target))
                self._slice(place, ranges, destination, target, dtypes.file_name(target.dtype))
                return True
        made = own
        if place is None:
            tensor = self._cut(name, ranges).to(destination.device)
        else:
            made = final if {own, final} <= dtypes.CASTABLE else own
            with naming_tensor(place[0].path, name):
                tensor = self._empty(destination, [count for _, _, count in ranges], made)
            self._slice(place, ranges, destination, tensor, made)
        number = outputs.new(tensor)
        outputs.hand_out(name, number)
        if made != final:
            outputs.cast(number, final)
        if target is not None:
            outputs.copy_into(target)
        return place is not None

    def _slice(
        self,
        place: tuple[_native.IndexedFile, int],
        ranges: Sequence[SliceRange],
        destination: Destination,
        tensor: torch.Tensor,
        dtype: str | None,
    ) -> None:
        """Adds a part that the engine reads from the file."""
        file, position = place
        if tensor.numel() > 0:
            made = dtype or file.dtype(position)
            target = _native.Targets(destination.device_index, [tensor.data_ptr()], [made])
            self._native.slice_to(file, position, ranges, target)

    def _empty(self, destination: Destination, shape: Sequence[int], dtype: str) -> torch.Tensor:
        if destination.on_host:
            pin_memory = self._options.pin_memory
            return empty_on_host(shape, dtypes.to_torch(dtype), pin_memory=pin_memory)
        made: torch.Tensor = self._allocator.empty(destination.device_index, shape, dtype)[1]
        return made

    def _cut(self, name: str, ranges: Sequence[SliceRange]) -> torch.Tensor:
        """A part that only torch can cut, in own memory."""
        import torch

        writer = PlanWriter(
            self._checkpoint, LoadOptions(caller=self._options.caller), self._settings
        )
        writer.add(Destination(torch.device("cpu"), names=[name]))
        whole: torch.Tensor = writer.start().result()[name]
        for dimension, (start, step, count) in enumerate(ranges):
            whole = whole.narrow(dimension, start, step * (count - 1) + 1 if count else 0)
            whole = whole[(slice(None),) * dimension + (slice(None, None, step),)]
        return whole.clone(memory_format=torch.contiguous_format)


def _writes_directly(own: str, target: torch.Tensor, destination: Destination) -> bool:
    """Whether the engine can write a tensor with the file's dtype ``own`` to the target."""
    wanted = dtypes.file_name(target.dtype)
    castable = own in dtypes.CASTABLE and wanted in dtypes.CASTABLE
    return (own == wanted or castable) and target.is_contiguous() and destination.is_native


def _separate(sizes: Sequence[int], staged: int) -> int:
    """How many tensors certainly adjoin no next one on the device, where memory is given out in
    steps of 512 bytes. Counted only for small tensors, of which a slot holds many."""
    if len(sizes) << 20 <= staged:
        return 0
    return sum(size % 512 != 0 for size in sizes)


def _elements(ranges: Sequence[SliceRange]) -> int:
    return math.prod(count for _, _, count in ranges)


def _pinning_device() -> int:
    import torch

    if not torch.cuda.is_available():
        raise DeviceError("pin_memory=True needs a CUDA driver and a GPU, and there is none")
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return torch.cuda.current_device()
