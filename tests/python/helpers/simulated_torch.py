"""torch tensors in the memory of simulated CUDA devices."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

import simulated
import support


class Allocator(simulated.SimulatedAllocator):
    """Makes torch tensors in device memory: reading their data is a fault."""

    def __init__(self, driver: Any) -> None:
        super().__init__(driver)
        self.blocks: dict[int, simulated.SimulatedTensor] = {}

    def empty(self, device: int, shape: Sequence[int], dtype: str) -> tuple[int, Any]:
        address, block = super().empty(device, shape, dtype)
        self.blocks[address] = block
        memory = (ctypes.c_uint8 * block.size).from_address(address)
        flat = torch.frombuffer(memory, dtype=support.DTYPES[dtype])
        return address, flat.view(tuple(shape))
