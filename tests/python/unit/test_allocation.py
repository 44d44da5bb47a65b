"""The calls of torch's allocator, with the CPU in place of CUDA: results of torch's functions are
set by hand, as documented."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import weightlift as wl
from support import assert_same
from weightlift import _native
from weightlift.load.allocation import TorchAllocator, from_dlpack

MIB = 1 << 20


class Cuda:
    """Blocks that are asked for, in bytes; ``free`` is what the device has left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[int, int]] = []
        self.free = 100 * MIB
        self.backend = "native"
        self.reserved = self.allocated = self.begun = 0
        empty = torch.empty

        def play(shape: Sequence[int] | int, *, dtype: torch.dtype, device: Any) -> torch.Tensor:
            made = empty(shape, dtype=dtype, device="meta")
            self.asked.append((device.index, made.nbytes))
            if made.nbytes > self.free:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return empty(shape, dtype=dtype)

        monkeypatch.setattr(torch, "empty", play)
        for name, value in {
            "is_available": lambda: True,
            "init": lambda: setattr(self, "begun", self.begun + 1),
            "get_allocator_backend": lambda: self.backend,
            "memory_reserved": lambda device: self.reserved,
            "memory_allocated": lambda device: self.allocated,
            "current_stream": lambda device: SimpleNamespace(cuda_stream=700 + device),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return Cuda(monkeypatch)


def test_what_its_cache_lacks_is_reserved_at_once(cuda: Cuda) -> None:
    allocator = TorchAllocator()
    assert cuda.begun == 1
    cuda.reserved, cuda.allocated = 10 * MIB, 8 * MIB
    # Blocks of up to 1 MiB come from larger blocks that torch shares.
    allocator.reserve(1, [3 * MIB, MIB, 4 * MIB, 10])
    assert cuda.asked == [(1, 5 * MIB)]


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ([MIB] * 50, {}),
        ([2 * MIB], {"reserved": 9 * MIB, "allocated": 7 * MIB}),
        ([20 * MIB], {"backend": "cudaMallocAsync"}),
    ],
)
def test_nothing_is_reserved_where_it_would_not_help(
    cuda: Cuda, sizes: list[int], settings: dict[str, Any]
) -> None:
    vars(cuda).update(settings)
    TorchAllocator().reserve(0, sizes)
    assert cuda.asked == []


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize(
    ("options", "count"),
    [
        ("expandable_segments:True", 0),
        ("garbage_collection_threshold:0.8,max_split_size_mb:64", 0),
        ("backend:cudaMallocAsync", 0),
        ("expandable_segments:False", 1),
    ],
)
def test_blocks_that_torch_would_not_cut(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, variable: str, options: str, count: int
) -> None:
    monkeypatch.setenv(variable, options)
    TorchAllocator().reserve(0, [20 * MIB])
    assert len(cuda.asked) == count


def test_a_block_that_there_is_no_room_for_is_no_error(cuda: Cuda) -> None:
    cuda.free = 15 * MIB
    allocator = TorchAllocator()
    allocator.reserve(0, [10 * MIB, 10 * MIB])
    assert cuda.asked == [(0, 20 * MIB)]
    with pytest.raises(wl.OutOfMemoryError, match=r"^CUDA out of memory\.; load fewer") as caught:
        allocator.empty(0, [16 * MIB], "U8")
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_tensors_are_as_the_file_has_them(cuda: Cuda) -> None:
    allocator = TorchAllocator()
    address, tensor = allocator.empty(0, (3, 5), "BF16")
    assert (tensor.shape, tensor.dtype) == ((3, 5), torch.bfloat16)
    assert address == tensor.data_ptr()
    _, pairs = allocator.empty(0, (3, 6), "F4")  # two numbers are an element of torch's
    assert (pairs.shape, pairs.dtype) == ((3, 3), torch.float4_e2m1fn_x2)
    assert allocator.stream(3) == 703


def test_without_torch_s_own_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as other:
        other.setattr(torch, "_C", SimpleNamespace())
        public = from_dlpack.__wrapped__()
    memory = public(_native.host_memory(5000))
    assert (memory.shape, memory.dtype) == ((5000,), torch.uint8)
    assert_same(memory.fill_(7), torch.full((5000,), 7, dtype=torch.uint8))
