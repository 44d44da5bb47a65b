"""The native engine (csrc/bind/module.cc).

Dtypes are the file's names, such as ``"BF16"``. Shapes, strides and element offsets count elements;
positions count the tensors of a file; sizes and other offsets are bytes; ``-1`` is the host, other
devices are CUDA ordinals. Errors are those of ``weightlift.core.errors``: ``FormatError`` and
``ReadError`` for files, ``DeviceError`` for drivers, ``OutOfMemoryError`` for memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

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
    @staticmethod
    def open(path: str, begin: int = 0, bytes: int | None = None) -> IndexedFile:
        """Opens a safetensors file, or the one in ``[begin, begin + bytes)`` of a file.

        Raises:
            FormatError: the bytes break the format.
            ReadError: the file cannot be read.
        """

    @property
    def path(self) -> str: ...
    @property
    def identity(self) -> tuple[int, int]: ...
    @property
    def size(self) -> int: ...
    def __len__(self) -> int: ...
    def names(self, which: Sequence[int] | None = None) -> list[str]:
        """Names of these positions; of all by default. So too ``dtypes``, ``shapes`` and ``sizes``
        (bytes)."""

    def dtypes(self, which: Sequence[int] | None = None) -> list[str]: ...
    def shapes(self, which: Sequence[int] | None = None) -> list[tuple[int, ...]]: ...
    def sizes(self, which: Sequence[int] | None = None) -> list[int]: ...
    def headers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of all tensors."""

    def find(self, name: str) -> int | None:
        """The position of a tensor."""

    def dtype(self, position: int) -> str: ...
    def shape(self, position: int) -> tuple[int, ...]: ...
    def range(self, position: int) -> tuple[int, int]:
        """[begin, end) of a tensor's bytes in the file."""

    def metadata(self) -> dict[str, str] | None:
        """The header's ``__metadata__``."""

    def resident_bytes(self) -> int | None:
        """Bytes in the page cache; ``None`` if the system does not say (cachestat(2))."""

    def drop_from_page_cache(self) -> None:
        """Evicts the file from the page cache (posix_fadvise(2))."""

class Archive:
    """An open zip file of stored (uncompressed) records."""

    @staticmethod
    def open(path: str) -> Archive: ...
    @property
    def path(self) -> str: ...
    @property
    def identity(self) -> tuple[int, int]: ...
    @property
    def size(self) -> int: ...
    def records(self) -> list[tuple[str, int, int, int, bool]]:
        """(name, begin, bytes, stated CRC-32, whether its header is ZIP64), in the order of their
        bytes."""

    def read(self, begin: int, bytes: int) -> bytes:
        """Reads bytes of the file."""

    def safetensors(self, begin: int, bytes: int) -> IndexedFile:
        """The safetensors file in these bytes."""

    def index(self, entries: Sequence[tuple[str, str, Sequence[int], int]]) -> IndexedFile:
        """An index of tensors with known places: (name, dtype, shape, begin). They may share
        bytes."""

def torch_pickle(
    pickle: bytes, tensor: Callable[[str, str, int, tuple[int, ...], tuple[int, ...], bool], object]
) -> tuple[dict[Any, Any], dict[str, int]] | None:
    """Reads a pickle of ``torch.save`` as data; calls nothing that it names.

    Returns:
        The dict, with ``tensor(record, dtype, offset, shape, stride, contiguous)`` for each tensor,
        and record -> bytes of all storages. ``None`` for every other pickle, valid or not.
    """

class Targets:
    """Contiguous target memory on one device, which the caller owns: an address and a dtype for
    each tensor."""

    def __init__(self, device: int, addresses: Sequence[int], dtypes: Sequence[str]) -> None:
        """``device``: a CUDA ordinal; -1 is the host."""

class HostTensors:
    """Contiguous source tensors in host memory, which must not change until the load has ended."""

    def __init__(
        self,
        names: Sequence[str],
        addresses: Sequence[int],
        elements: Sequence[int],
        dtypes: Sequence[str],
    ) -> None: ...

class SlotsAhead:
    def __init__(self, device: int, bytes: int, settings: Settings) -> None:
        """Begins to pin staging slots for so many bytes that will go to a CUDA device. Does nothing
        if the process does not use the device yet."""

    def stop(self) -> None:
        """Begins no further slot. The object's end waits for the one that is being pinned."""

class Plan:
    """A load: add copies, ``prepare``, ``start``, ``wait``, ``finish``, then ``tensors``."""

    def __init__(self, settings: Settings) -> None: ...
    def map(
        self,
        source: IndexedFile,
        which: Sequence[int] | None,
        shared: bool,
        windows: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Maps tensors of a file without a copy.

        Args:
            source: the file.
            which: positions; ``None`` for all.
            shared: other loads may map the same bytes of ``source``.
            windows: [begin, end) of the tensor's bytes to populate; all by default.
        """

    def read(
        self,
        source: IndexedFile,
        which: Sequence[int] | None,
        dtype: str | None,
        pin_for: int | None,
    ) -> None:
        """Reads tensors into memory of the engine; casts floating-point tensors to ``dtype``.
        ``pin_for``: the CUDA device to pin the memory for."""

    def copy_to(self, source: IndexedFile, which: Sequence[int] | None, targets: Targets) -> None:
        """Reads tensors into targets, in the order of ``which``, cast to the targets' dtypes."""

    def copy_memory(self, tensors: HostTensors, targets: Targets) -> None:
        """Copies tensors in host memory to targets."""

    def slice(
        self,
        source: IndexedFile,
        which: int,
        parts: Sequence[tuple[int, int, int]],
        dtype: str | None,
    ) -> None:
        """Reads a part of a tensor into memory of the engine, in the shape of the counts.
        ``parts``: (start, step, count) for each dimension; steps are not 0."""

    def slice_to(
        self,
        source: IndexedFile,
        which: int,
        parts: Sequence[tuple[int, int, int]],
        target: Targets,
    ) -> None:
        """Reads a part of a tensor into one target."""

    def copy_strided(
        self,
        source: IndexedFile,
        which: int,
        offset: int,
        dimensions: Sequence[tuple[int, int, int]],
        target: Targets,
    ) -> None:
        """Reads elements of a tensor into one target. ``offset``: the first element;
        ``dimensions``: (extent, stride in the tensor, stride in the target), in elements."""

    def use_stream(self, device: int, stream: int) -> None:
        """Orders the copies to a device after the present work of this stream (a ``CUstream``)."""

    def populate(self, now: bool) -> None:
        """Whether mapped pages that are not resident are read before the load ends."""

    def order(self, ranks: Sequence[int]) -> None:
        """Loads in an order of use, for ``wait_for``. ``ranks``: the place of each tensor of the
        plan, in the order of the calls that added them."""

    def prepare_ahead(self, device: int, bytes: int, casts: bool, separate: int) -> None:
        """Begins to pin staging slots for so many bytes that will go to a CUDA device, until
        ``start``; and to load the kernel if the device ``casts`` or at least so many tensors end
        where no other one begins, ``separate``, that it is certainly needed. Does nothing if the
        process does not use the device yet."""

    def prepare(self) -> list[tuple[int, int]]:
        """Schedules the load. Returns (device, bytes) of the scratch memory for ``start``."""

    def start(self, scratch: Sequence[tuple[int, int, object]]) -> None:
        """Starts the load. ``scratch``: (device, address, owner) for each entry of ``prepare``."""

    def wait(self, seconds: float) -> bool:
        """Waits at most so long, without the GIL; whether the load has ended."""

    def wait_for(self, which: Sequence[int], seconds: float) -> bool:
        """Waits at most so long for tensors, by their index in ``ranks``; whether they have
        arrived. Raises the load's error if it ended before."""

    def wait_for_on_stream(
        self, which: Sequence[int], device: int, stream: int, seconds: float
    ) -> bool:
        """The same for tensors on a CUDA device: the host waits until their copies are queued, and
        the stream waits for the copies."""

    def cancel(self) -> None:
        """Stops the load and waits until nothing is in flight."""

    def progress(self) -> tuple[int, int]:
        """(bytes done, total bytes)."""

    def finish(self) -> dict[str, Any]:
        """Ends the load and returns its report. Raises the load's first error."""

    def tensors(self, from_dlpack: Callable[[object], Any]) -> list[Any]:
        """The tensors of ``map``, ``read`` and ``slice``, in the order of the calls, each made from
        its DLPack capsule."""

def set_error_factory(factory: Callable[..., BaseException]) -> None:
    """Sets the function that makes exceptions from the engine's errors."""

def machine() -> dict[str, Any]:
    """Processors, free memory, instruction set and CUDA kernels, without starting CUDA."""

def host_memory(bytes: int) -> object:
    """A DLPack capsule of uint8 on the host, on huge pages if it fills one."""

def driver_report() -> dict[str, Any]:
    """The CUDA driver and its devices; starts CUDA. Raises ``DeviceError`` without a driver."""

def pinned_bytes() -> int:
    """Bytes pinned by the staging pool now."""

def memory_pool() -> tuple[int, int]:
    """(bytes kept, bytes reused since import) of the memory of deleted tensors."""

def use_driver_for_testing(path: str) -> None:
    """Loads this driver library instead of ``libcuda.so.1``; only with WEIGHTLIFT_TESTING."""
