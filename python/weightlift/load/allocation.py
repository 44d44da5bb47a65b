"""Memory for a load: on devices torch's, unless a caller brings another."""

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

# torch's caching allocator cuts what is larger than this out of a block of its own, with a
# cudaMalloc each, in units of the other (c10/cuda/CUDACachingAllocator.cpp, kSmallSize and
# kMinBlockSize).
_OWN_BLOCK_BYTES = 1 << 20
_UNIT_BYTES = 512
_HUGE_PAGE_BYTES = 2 << 20


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
        # Said once: there may be a hundred thousand tensors.
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
        """Gets one block for what is missing in torch's cache, so that the tensors to come are cut
        out of it: a cudaMalloc a tensor made loads several times slower (transformers #36380)."""
        import torch

        large = sum(-(-size // _UNIT_BYTES) for size in sizes if size > _OWN_BLOCK_BYTES)
        large *= _UNIT_BYTES
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


def empty_on_host(
    shape: Sequence[int], dtype: torch.dtype, *, pin_memory: bool = False
) -> torch.Tensor:
    """A CPU tensor, on huge pages where it fills one: on small ones, most of the time of a load
    into it goes into page faults.

    Raises:
        OutOfMemoryError: it is larger than what the process can still have.
    """
    import torch

    size = math.prod(shape) * dtype.itemsize
    if pin_memory or size < _HUGE_PAGE_BYTES:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=pin_memory)
    memory: torch.Tensor = from_dlpack()(_native.host_memory(size))
    return memory.view(dtype).reshape(tuple(shape))


@contextlib.contextmanager
def naming_tensor(path: str, name: str) -> Iterator[None]:
    """Says which tensor there is no memory for. The cause stays torch's error where there is one:
    the backends raise that."""
    try:
        yield
    except OutOfMemoryError as error:
        text = f"{path}: tensor {name!r}: {error}"
        raise OutOfMemoryError(text) from (error.__cause__ or error)


@functools.cache
def from_dlpack() -> Callable[[object], Any]:
    import torch

    # The C function takes a capsule; the public one is a Python layer around it.
    if hasattr(torch._C, "_from_dlpack"):
        return torch._C._from_dlpack
    from torch.utils.dlpack import from_dlpack as public

    return public
