"""Serves the weights of a streamed model through the ring and its thread."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from weightlift.module.streaming.device_side import DeviceSide, Transfer
from weightlift.module.streaming.ring import Block, Ring, Slot
from weightlift.module.streaming.sources import Source
from weightlift.module.streaming.streamed_weight import Lease, Stored

__all__ = ["ALIGNMENT", "BlockOfWeights", "Executor"]

# Alignment in bytes of a weight in a buffer, as in torch's allocators.
ALIGNMENT = 512


class BlockOfWeights:
    """Weights that are read together, and their sources.

    Attributes:
        number, name: the block's number and name.
        bytes: bytes that it takes in a buffer.
        weights: the weights, each with its source.
    """

    def __init__(self, number: int, name: str) -> None:
        self.number, self.name = number, name
        self.bytes = 0
        self.weights: list[tuple[Stored, Source]] = []
        # By the address of the buffer, for as long as the executor has it.
        self._views: dict[int, dict[Stored, torch.Tensor]] = {}

    def add(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, source: Source, key: str
    ) -> Stored:
        stored = Stored(name, tuple(shape), dtype, self.number, self.bytes, key)
        self.weights.append((stored, source))
        count = dtype.itemsize
        for size in shape:
            count *= size
        self.bytes += -(-count // ALIGNMENT) * ALIGNMENT
        return stored

    def views(self, buffer: torch.Tensor) -> dict[Stored, torch.Tensor]:
        """The weights in a buffer. Made once: of small ones that takes longer than to read them."""
        address = buffer.data_ptr()
        views = self._views.get(address)
        if views is None:
            with torch.inference_mode(False):
                views = {stored: stored.view_of(buffer) for stored, _ in self.weights}
            self._views[address] = views
        return views

    def forget(self) -> None:
        """The buffers are given back."""
        self._views.clear()

    def fill(self, buffer: torch.Tensor) -> None:
        """Reads all weights into a buffer, source by source."""
        for source, keys, targets in self._by_source(buffer):
            source.fill(keys, targets)

    def begin(self, buffer: torch.Tensor) -> Callable[[], None]:
        """The same on a CUDA device, as ``Source.begin``."""
        begun: list[Callable[[], None]] = []

        def settle() -> None:
            with contextlib.ExitStack() as all_of_them:
                for one in begun:
                    all_of_them.callback(one)

        try:
            for source, keys, targets in self._by_source(buffer):
                begun.append(source.begin(keys, targets))
        except BaseException:
            settle()
            raise
        return settle

    def _by_source(
        self, buffer: torch.Tensor
    ) -> Iterable[tuple[Source, list[str], list[torch.Tensor]]]:
        views = self.views(buffer)
        found: dict[int, tuple[Source, list[str], list[torch.Tensor]]] = {}
        for stored, source in self.weights:
            _, keys, targets = found.setdefault(id(source), (source, [], []))
            keys.append(stored.key)
            targets.append(views[stored])
        return found.values()


class Executor:
    """Lends weights for the duration of an operation. It lives as long as the weights.

    Args:
        blocks: all streamed blocks, in the order of the modules.
        device: the device of the model.
        buffers: the number of buffers.
        lookahead: the largest number of blocks to read ahead.
        pickles: a weight's replacement in a pickle, if not its values.
    """

    def __init__(
        self,
        blocks: Sequence[BlockOfWeights],
        device: DeviceSide,
        buffers: int,
        lookahead: int,
        *,
        threaded: bool = True,
        pickles: Callable[[Stored], tuple[Callable[..., torch.Tensor], Any] | None] | None = None,
    ) -> None:
        self.device = device.device
        self._side = device
        self._pid = os.getpid()
        self._sources: Mapping[Stored, Source] = {
            stored: source for block in blocks for stored, source in block.weights
        }
        self._pickles = pickles
        largest = max((block.bytes for block in blocks), default=0)
        self.buffer_bytes = largest * buffers
        memory = [device.allocate(largest) for _ in range(buffers)]
        self.ring = Ring(
            [Block(b.number, b.name, b.bytes, b.fill, b.begin) for b in blocks],
            device,
            memory,
            lookahead,
            threaded=threaded and bool(blocks),
        )
        # Runs when the handle and all weights are deleted.
        self._finalizer = weakref.finalize(self, self.ring.stop)
        self._blocks = {block.number: block for block in blocks}

    def lease(self, stored: Stored, *, may_wait: bool) -> Lease:
        """Lends a weight on the device until ``end``.

        Args:
            stored: the weight.
            may_wait: whether the call may wait: the caller has no other lease.

        Raises:
            WeightliftError: the weight cannot be read.
        """
        slot = None
        if os.getpid() == self._pid:  # a fork has no thread, and perhaps a lock held forever
            slot = self.ring.pin(stored.block, may_wait=may_wait)
        if slot is None:
            return _Alone(self._read_alone(stored))
        return _InBuffer(self.ring, slot, self._blocks[stored.block].views(slot.buffer)[stored])

    def _read_alone(self, stored: Stored) -> torch.Tensor:
        tensor = torch.empty(stored.shape, dtype=stored.dtype, device=self.device)
        source = self._sources[stored]
        keys, targets = [stored.key], [tensor]

        def run() -> None:
            source.fill(keys, targets)

        def begin() -> Callable[[], None]:
            return source.begin(keys, targets)

        # The new memory may be that of a tensor that the device still uses.
        after = [self._side.mark()]
        transfer = Transfer(stored.block, tensor, tensor.nbytes, run, begin)
        self._side.wait(self._side.copy(transfer, after))
        return tensor

    def pickled(self, stored: Stored) -> tuple[Callable[..., torch.Tensor], Any] | None:
        return None if self._pickles is None else self._pickles(stored)

    def close(self) -> None:
        """Frees the buffers. Remaining weights are read at each use from now on."""
        self._finalizer()
        if os.getpid() == self._pid:
            self.ring.join()
        for block in self._blocks.values():
            block.forget()


class _Alone:
    """A lease of a weight in its own memory."""

    in_buffer = False

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def end(self) -> None:
        pass


class _InBuffer:
    in_buffer = True

    def __init__(self, ring: Ring, slot: Slot, tensor: torch.Tensor) -> None:
        self._ring, self._slot, self.tensor = ring, slot, tensor

    def end(self) -> None:
        self._ring.unpin(self._slot)
