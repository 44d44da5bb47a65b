"""Memory for a load. On devices torch allocates, unless the caller gives another allocator."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import weightlift._native as _native
from weightlift.core import dtypes
from weightlift.core.errors import DeviceError, OutOfMemoryError

if TYPE_CHECKING:
    import torch

__all__ = ["Allocator", "TorchAllocator", "empty_on_host", "from_dlpack", "naming_tensor"]

# torch's caching allocator serves larger requests from large blocks, with a cudaMalloc each, in
# multiples of kMinBlockSize (c10/cuda/CUDACachingAllocator.cpp, kSmallSize and kMinBlockSize).
_OWN_BLOCK_BYTES = 1 << 20
_UNIT_BYTES = 512
_HUGE_PAGE_BYTES = 2 << 20


class Allocator(Protocol):
    """Allocates device memory, and names the stream that orders its use.

    ``empty`` returns the address and its owner: the tensor, if torch allocates.
    """

    def empty(self, device: int, shape: Sequence[int], dtype: str) -> tuple[int, Any]: ...
    def stream(self, device: int) -> int: ...
    def reserve(self, device: int, sizes: Sequence[int]) -> None: ...


class TorchAllocator:
    """torch's caching allocator, which keeps its own statistics and frees the memory."""

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
        # Looked up once: a load may have 100,000 tensors.
        self._out_of_memory = torch.OutOfMemoryError
        self._empty = torch.empty
        self._device = functools.cache(functools.partial(torch.device, "cuda"))

    def empty(self, device: int, shape: Sequence[int], dtype: str) -> tuple[int, Any]:
        if dtype == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        try:
            tensor = self._empty(shape, dtype=dtypes.to_torch(dtype), device=self._device(device))
        except self._out_of_memory as error:
            raise OutOfMemoryError(
                f"{error}; load fewer tensors, use a smaller dtype, or more devices (device_map=)"
            ) from error
        return tensor.data_ptr(), tensor

    def stream(self, device: int) -> int:
        import torch

        return int(torch.cuda.current_stream(device).cuda_stream)

    def reserve(self, device: int, sizes: Sequence[int]) -> None:
        """Allocates one block for the bytes that torch's cache lacks; torch then cuts the tensors
        out of it. One cudaMalloc per tensor made loads several times slower (transformers
        #36380)."""
        import torch

        large = sum(-(-size // _UNIT_BYTES) for size in sizes if size > _OWN_BLOCK_BYTES)
        large *= _UNIT_BYTES
        config = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
        # With these, torch never cuts a tensor out of a large block.
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
                return  # smaller allocations may still fit


def empty_on_host(
    shape: Sequence[int], dtype: torch.dtype, *, pin_memory: bool = False
) -> torch.Tensor:
    """A CPU tensor, on huge pages if it fills one: on small pages a load spends most of its time
    in page faults.

    Raises:
        OutOfMemoryError: the tensor is larger than the memory that the process can still get.
    """
    import torch

    size = math.prod(shape) * dtype.itemsize
    if pin_memory or size < _HUGE_PAGE_BYTES:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=pin_memory)
    memory: torch.Tensor = from_dlpack()(_native.host_memory(size))
    return memory.view(dtype).reshape(tuple(shape))


@contextlib.contextmanager
def naming_tensor(path: str, name: str) -> Iterator[None]:
    """Adds the file and the tensor to an out-of-memory error. torch's error stays its cause: the
    backends raise that."""
    try:
        yield
    except OutOfMemoryError as error:
        text = f"{path}: tensor {name!r}: {error}"
        raise OutOfMemoryError(text) from (error.__cause__ or error)


@functools.cache
def from_dlpack() -> Callable[[object], Any]:
    import torch

    # The C function skips the Python layer of torch.from_dlpack.
    if hasattr(torch._C, "_from_dlpack"):
        return torch._C._from_dlpack
    from torch.utils.dlpack import from_dlpack as public

    return public
