"""The native engine; csrc/bind/module.cc. Dtypes are the file's names, such as ``"BF16"``."""

from collections.abc import Callable, Sequence
from typing import Any

class Settings:
    """Zero lets the engine decide for the machine."""

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
        """A safetensors file, or the one that lies in ``[begin, begin + bytes)`` of a file."""

    @property
    def path(self) -> str: ...
    @property
    def identity(self) -> tuple[int, int]: ...
    @property
    def size(self) -> int: ...
    def __len__(self) -> int: ...
    def names(self, which: Sequence[int] | None = None) -> list[str]: ...
    def dtypes(self, which: Sequence[int] | None = None) -> list[str]: ...
    def shapes(self, which: Sequence[int] | None = None) -> list[tuple[int, ...]]: ...
    def sizes(self, which: Sequence[int] | None = None) -> list[int]: ...
    def find(self, name: str) -> int | None: ...
    def dtype(self, position: int) -> str: ...
    def shape(self, position: int) -> tuple[int, ...]: ...
    def range(self, position: int) -> tuple[int, int]: ...
    def metadata(self) -> dict[str, str] | None: ...
    def resident_bytes(self) -> int | None: ...
    def drop_from_page_cache(self) -> None: ...

class Archive:
    """A zip file of stored records, open."""

    @staticmethod
    def open(path: str) -> Archive: ...
    @property
    def path(self) -> str: ...
    @property
    def identity(self) -> tuple[int, int]: ...
    @property
    def size(self) -> int: ...
    def records(self) -> list[tuple[str, int, int, int, bool]]:
        """(name, begin, bytes, CRC-32 as stated, whether its header is a ZIP64 one), in the order
        of their bytes."""

    def read(self, begin: int, bytes: int) -> bytes: ...
    def safetensors(self, begin: int, bytes: int) -> IndexedFile:
        """The safetensors file that lies there."""

    def index(self, entries: Sequence[tuple[str, str, Sequence[int], int]]) -> IndexedFile:
        """Tensors whose places in the file are known: (name, dtype, shape, begin). They may share
        bytes."""

def torch_pickle(
    pickle: bytes, tensor: Callable[[str, str, int, tuple[int, ...], tuple[int, ...], bool], object]
) -> tuple[dict[Any, Any], dict[str, int]] | None:
    """What torch.save pickled, without calling anything that it names: the dict, in which a tensor
    is ``tensor(record, dtype, offset, shape, stride, contiguous)``; and record -> bytes of all
    storages. ``None`` where it is not what torch.save writes of plain tensors, good or bad."""

class Targets:
    """Where tensors go on one device: contiguous memory that the caller owns."""

    def __init__(self, device: int, addresses: Sequence[int], dtypes: Sequence[str]) -> None:
        """``device``: a CUDA ordinal; -1 is the host."""

class HostTensors:
    """Contiguous tensors in this process's memory; they stay as they are until the load has
    ended."""

    def __init__(
        self,
        names: Sequence[str],
        addresses: Sequence[int],
        elements: Sequence[int],
        dtypes: Sequence[str],
    ) -> None: ...

class Plan:
    def __init__(self, settings: Settings) -> None: ...
    def map(
        self,
        source: IndexedFile,
        which: Sequence[int] | None,
        shared: bool,
        windows: Sequence[tuple[int, int]] | None = None,
    ) -> None: ...
    def read(
        self,
        source: IndexedFile,
        which: Sequence[int] | None,
        dtype: str | None,
        pin_for: int | None,
    ) -> None: ...
    def copy_to(
        self, source: IndexedFile, which: Sequence[int] | None, targets: Targets
    ) -> None: ...
    def copy_memory(self, tensors: HostTensors, targets: Targets) -> None: ...
    def slice(
        self,
        source: IndexedFile,
        which: int,
        parts: Sequence[tuple[int, int, int]],
        dtype: str | None,
    ) -> None:
        """Into memory of the engine's. ``parts``: (start, step, count) for each dimension."""

    def slice_to(
        self,
        source: IndexedFile,
        which: int,
        parts: Sequence[tuple[int, int, int]],
        target: Targets,
    ) -> None: ...
    def copy_strided(
        self,
        source: IndexedFile,
        which: int,
        offset: int,
        dimensions: Sequence[tuple[int, int, int]],
        target: Targets,
    ) -> None: ...
    def use_stream(self, device: int, stream: int) -> None: ...
    def populate(self, now: bool) -> None: ...
    def order(self, ranks: Sequence[int]) -> None:
        """Loads tensors in this order, and tells of each when it has arrived. ``ranks``: of each
        tensor that the plan was told of, in the order of the calls, its place."""

    def prepare(self) -> list[tuple[int, int]]: ...
    def start(self, scratch: Sequence[tuple[int, int, object]]) -> None: ...
    def wait(self, seconds: float) -> bool: ...
    def wait_for(self, which: Sequence[int], seconds: float) -> bool:
        """Whether tensors have arrived, for which it is waited so long; by their numbers in
        ``ranks``. Raises the load's error where it has ended without them."""

    def wait_for_on_stream(
        self, which: Sequence[int], device: int, stream: int, seconds: float
    ) -> bool:
        """The same for tensors on a CUDA device that are used on a stream of it: the host waits
        until their copies are queued, and the stream for the copies."""

    def cancel(self) -> None: ...
    def progress(self) -> tuple[int, int]: ...
    def finish(self) -> dict[str, Any]: ...
    def tensors(self, from_dlpack: Callable[[object], Any]) -> list[Any]: ...

def set_error_factory(factory: Callable[..., BaseException]) -> None: ...
def machine() -> dict[str, Any]: ...
def host_memory(bytes: int) -> object: ...
def driver_report() -> dict[str, Any]: ...
def pinned_bytes() -> int: ...
def memory_pool() -> tuple[int, int]: ...
def use_driver_for_testing(path: str) -> None:
    """Only in builds with WEIGHTLIFT_TESTING."""
