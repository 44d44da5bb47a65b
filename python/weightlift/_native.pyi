"""The native engine (csrc/bind/module.cc).

Dtypes are the file's names, such as ``"BF16"``. Shapes, strides and element offsets count elements;
positions count the tensors of a file; sizes and other offsets are bytes; ``-1`` is the host, other
devices are CUDA ordinals; streams are ``CUstream``. Errors are those of ``weightlift.core.errors``:
``FormatError`` for bytes that break a format, ``ReadError`` for files that cannot be read,
``DeviceError`` for drivers, ``OutOfMemoryError`` for memory.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import torch

_Ints: TypeAlias = Sequence[int]
_Texts: TypeAlias = Sequence[str]
_Positions: TypeAlias = _Ints | None  # ``None``: all tensors of the file
_Shape: TypeAlias = tuple[int, ...]
_Range: TypeAlias = tuple[int, int]  # [begin, end) in bytes
_Windows: TypeAlias = Sequence[_Range] | None
_Parts: TypeAlias = Sequence[tuple[int, int, int]]  # three integers for each dimension

class Settings:
    """As ``weightlift.Settings``. With 0 or ``"auto"`` the engine chooses the value."""

    def __init__(self) -> None: ...
    threads: int
    io_depth: int
    read_bytes: int
    hole_bytes: int
    chunk_bytes: int
    pinned_bytes: int
    pool_bytes: int
    streams: int
    io_path: str
    cast_place: str
    huge_pages: str
    kernels: bool
    batch_copies: bool
    fp8: tuple[bool, bool, bool]

class IndexedFile:
    """A safetensors file, or the one in ``[begin, begin + bytes)`` of a file. ``names``,
    ``dtypes``, ``shapes`` and ``sizes`` (bytes) are those of the positions ``which``, ``headers``
    name -> (dtype, shape) of all tensors, ``range`` a tensor's bytes in the file, ``metadata`` the
    header's ``__metadata__``, ``find`` a tensor's position. ``resident_bytes`` are those in the
    page cache, ``None`` if the system does not say (cachestat(2)); ``drop_from_page_cache`` evicts
    the file from it (posix_fadvise(2))."""

    @staticmethod
    def open(path: str, begin: int = 0, bytes: int | None = None) -> IndexedFile: ...
    path: Final[str]
    identity: Final[tuple[int, int]]
    size: Final[int]
    def __len__(self) -> int: ...
    def names(self, which: _Positions = None) -> list[str]: ...
    def dtypes(self, which: _Positions = None) -> list[str]: ...
    def shapes(self, which: _Positions = None) -> list[_Shape]: ...
    def sizes(self, which: _Positions = None) -> list[int]: ...
    def headers(self) -> dict[str, tuple[str, _Shape]]: ...
    def find(self, name: str) -> int | None: ...
    def dtype(self, position: int) -> str: ...
    def shape(self, position: int) -> _Shape: ...
    def range(self, position: int) -> _Range: ...
    def metadata(self) -> dict[str, str] | None: ...
    def resident_bytes(self) -> int | None: ...
    def drop_from_page_cache(self) -> None: ...

class Archive:
    """An open zip file of stored (uncompressed) records: (name, begin, bytes, stated CRC-32,
    whether its header is ZIP64), in the order of their bytes. ``find`` returns name -> (begin,
    bytes) of those of the names that exist, in the folder of all records; none if the records have
    no folder in common. ``index`` is of tensors at (name, dtype, shape, begin), which may share
    bytes. ``index_of_plain`` is of the dict in a pickle of ``torch.save``, with its names in its
    order, and (name, base, dtype, shape, stride) of each tied tensor, whose bytes are those of the
    flat tensor ``base`` of the index; ``None`` unless the dict has only contiguous tensors under
    texts, each alone in its storage or tied."""

    @staticmethod
    def open(path: str) -> Archive: ...
    path: Final[str]
    identity: Final[tuple[int, int]]
    size: Final[int]
    def records(self) -> list[tuple[str, int, int, int, bool]]: ...
    def find(self, names: list[str]) -> dict[str, tuple[int, int]]: ...
    def read(self, begin: int, bytes: int) -> bytes: ...
    def index_of_plain(
        self, pickle: bytes
    ) -> tuple[IndexedFile, list[str], list[tuple[str, str, str, _Shape, _Shape]]] | None: ...
    def safetensors(self, begin: int, bytes: int) -> IndexedFile: ...
    def index(self, entries: Sequence[tuple[str, str, _Ints, int]]) -> IndexedFile: ...

def torch_pickle(
    pickle: bytes, tensor: Callable[[str, str, int, _Shape, _Shape, bool], object]
) -> tuple[dict[Any, Any], dict[str, int]] | None:
    """Reads a pickle of ``torch.save`` as data; calls nothing that it names. Returns the dict,
    with ``tensor(record, dtype, offset, shape, stride, contiguous)`` for each tensor, and record ->
    bytes of all storages; ``None`` for every other pickle, valid or not."""

_Place: TypeAlias = tuple[int, str, torch.nn.Module, str]

def module_tensors(
    model: torch.nn.Module, plain_setattr: object
) -> tuple[
    tuple[
        list[torch.Tensor],
        list[bool],
        list[bool],
        list[str],
        list[torch.nn.Module],
        list[str],
        list[dict[str, Any] | None],
    ],
    list[_Place],
    list[torch.nn.Module],
    set[type[torch.nn.Module]],
    bool,
]:
    """The parameters and buffers of a model, each once, and its modules, both in the order of
    ``named_modules``. Returns (columns, ties, modules, classes, has_load_hooks). The columns are:
    the tensor; whether it is a parameter; whether it is persistent, in any of its places; its first
    place: name, module, key; and the module's dict that holds it there, ``None`` if the module's
    class has another ``__setattr__`` than ``plain_setattr``. ``ties`` are the other places: (index
    in the columns, name, module, key). A module in several places appears once for each."""

class Targets:
    """Contiguous target memory, which the caller owns: an address and a dtype for each tensor."""

    def __init__(self, device: int, addresses: _Ints, dtypes: _Texts) -> None: ...

class HostTensors:
    """Contiguous source tensors in host memory, which must not change until the load has ended."""

    def __init__(
        self, names: _Texts, addresses: _Ints, elements: _Ints, dtypes: _Texts
    ) -> None: ...

class SlotsAhead:
    """Begins to pin staging slots for so many bytes that will go to a CUDA device. Does nothing if
    the process does not use the device yet. Its end waits for the slot that is being pinned."""

    def __init__(self, device: int, bytes: int, settings: Settings) -> None: ...
    def stop(self) -> None: ...  # Begins no further slot.

class Plan:
    """A load: add copies, ``prepare``, ``start``, ``wait``, ``finish``, then ``tensors``.

    Waits release the GIL, end after ``seconds`` and return whether the event has come. ``ranks``
    is the place in the order of use of each tensor of the plan, in the order of the calls that
    added them; an index of ``wait_for`` is one in ``ranks``."""

    def __init__(self, settings: Settings) -> None: ...
    def map(
        self, source: IndexedFile, which: _Positions, shared: bool, windows: _Windows = None
    ) -> None:
        """Maps tensors without a copy. ``shared``: other loads may map the same bytes of
        ``source``; ``windows``: the part of each tensor's bytes to populate; all by default."""

    def read(
        self, source: IndexedFile, which: _Positions, dtype: str | None, pin_for: int | None
    ) -> None:
        """Reads tensors into memory of the engine; casts floating-point tensors to ``dtype``.
        ``pin_for``: the CUDA device to pin the memory for."""

    def copy_to(self, source: IndexedFile, which: _Positions, targets: Targets) -> None:
        """Reads tensors into targets, in the order of ``which``, cast to the targets' dtypes."""

    def copy_memory(self, tensors: HostTensors, targets: Targets) -> None: ...
    def slice(self, source: IndexedFile, which: int, parts: _Parts, dtype: str | None) -> None:
        """Reads a part of a tensor into memory of the engine, in the shape of the counts, or by
        ``slice_to`` into one target. ``parts``: (start, step, count); steps are not 0."""

    def slice_to(self, source: IndexedFile, which: int, parts: _Parts, target: Targets) -> None: ...
    def copy_strided(
        self, source: IndexedFile, which: int, offset: int, dimensions: _Parts, target: Targets
    ) -> None:
        """Reads elements of a tensor into one target. ``offset``: the first element;
        ``dimensions``: (extent, stride in the tensor, stride in the target), in elements."""

    def use_stream(self, device: int, stream: int) -> None:
        """Orders the copies to a device after the present work of this stream."""

    def populate(self, now: bool) -> None: ...  # Reads absent mapped pages before the end.
    def order(self, ranks: _Ints) -> None: ...  # Loads in an order of use, for ``wait_for``.
    def prepare_ahead(self, device: int, bytes: int, casts: bool, separate: int) -> None:
        """Begins to pin staging slots for so many bytes that will go to a CUDA device, until
        ``start``; and to load the kernel if the device ``casts`` or at least so many tensors end
        where no other one begins, ``separate``, that it is certainly needed. Does nothing if the
        process does not use the device yet."""

    def prepare(self) -> list[tuple[int, int]]:
        """Schedules the load. Returns (device, bytes) of the scratch memory that ``start`` takes as
        (device, address, owner)."""

    def start(self, scratch: Sequence[tuple[int, int, object]]) -> None: ...
    def wait(self, seconds: float) -> bool: ...  # Waits until the load has ended.
    def wait_for(self, which: _Ints, seconds: float) -> bool:
        """Waits until tensors have arrived. Raises the load's error if it ended before."""

    def wait_for_on_stream(self, which: _Ints, device: int, stream: int, seconds: float) -> bool:
        """The same for tensors on a CUDA device: the host waits until their copies are queued, and
        the stream waits for the copies."""

    def cancel(self) -> None: ...  # Stops the load and waits until nothing is in flight.
    def progress(self) -> tuple[int, int]: ...  # (bytes done, total bytes).
    def finish(self) -> dict[str, Any]:
        """Ends the load and returns its report. Raises the load's first error."""

    def tensors(self, from_dlpack: Callable[[object], Any]) -> list[Any]:
        """The tensors of ``map``, ``read`` and ``slice``, in the order of the calls, each made from
        its DLPack capsule."""

def set_error_factory(factory: Callable[..., BaseException]) -> None: ...  # For engine errors.
def machine() -> dict[str, Any]:
    """Processors, free memory, instruction set and CUDA kernels, without starting CUDA."""

def host_memory(bytes: int) -> object:
    """A DLPack capsule of uint8 on the host, on huge pages if it fills one."""

def driver_report() -> dict[str, Any]:
    """The CUDA driver and its devices; starts CUDA. Raises ``DeviceError`` without a driver."""

def pinned_bytes() -> int: ...  # Bytes pinned by the staging pool now.
def memory_pool() -> tuple[int, int]: ...  # (bytes kept, bytes reused) of deleted tensors' memory.
def use_driver_for_testing(path: str) -> None:
    """Loads this driver library instead of ``libcuda.so.1``; only with WEIGHTLIFT_TESTING."""
