"""Weights that others' hooks put into a model's modules while these run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from weightlift.core.errors import ArgumentError
from weightlift.module.streaming.device_side import device_side
from weightlift.module.streaming.executor import ALIGNMENT, BlockOfWeights, Executor
from weightlift.module.streaming.residency import Piece, cut, share_out
from weightlift.module.streaming.sources import Source
from weightlift.module.streaming.streamed_weight import Stored, StreamedWeight

__all__ = ["Needed", "WeightsOnDemand"]

_LOOKAHEAD = 2
# Of a block, where modules allow; small models are cut finer, or nothing of them would be streamed.
_BLOCK_BYTES = 64 << 20
_LEAST_BLOCKS = 16


class Needed(NamedTuple):
    """A weight that is asked for.

    Attributes:
        shape, dtype: as it is used.
        source, key: where it is read.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Source
    key: str

    @property
    def bytes(self) -> int:
        count = math.prod(self.shape) * self.dtype.itemsize
        return -(-count // ALIGNMENT) * ALIGNMENT


class WeightsOnDemand:
    """The weights of a model of which nothing but a few buffers is on the device: those that will
    be used next are read into them, ahead of use, as in ``stream``.

    The largest weights stay on the device where buffers of their size would take more of it.

    Args:
        needed: name -> weight, in the order of the modules. Names of the same weight share it.
        device: where it is used, the CPU or a CUDA device.

    Raises:
        WeightliftError: it cannot be streamed to this device, or what stays cannot be read.
        torch.OutOfMemoryError: there is no room for a single block.
    """

    def __init__(self, needed: Mapping[str, Needed], device: torch.device) -> None:
        side = device_side(device)
        self._one_name: dict[str, str] = {}
        found: dict[tuple[int, str, torch.dtype], str] = {}
        for name, need in needed.items():
            self._one_name[name] = found.setdefault((id(need.source), need.key, need.dtype), name)
        sizes = {name: needed[name].bytes for name in found.values()}
        self._stored: dict[str, Stored] = {}
        self._resident: dict[str, torch.Tensor] = {}
        self._made: dict[str, torch.nn.Parameter] = {}
        with torch.inference_mode(False):
            try:
                self.executor = self._begun(needed, side, sizes, _LOOKAHEAD)
            except torch.OutOfMemoryError:
                self._stored.clear()
                self._resident.clear()
                self.executor = self._begun(needed, side, sizes, 0)

    def _begun(
        self, needed: Mapping[str, Needed], side: Any, sizes: Mapping[str, int], lookahead: int
    ) -> Executor:
        block_bytes = max(ALIGNMENT, min(_BLOCK_BYTES, sum(sizes.values()) // _LEAST_BLOCKS))
        # `cut` is told of a budget, a part of which are buffers.
        pieces = cut(sizes, 4 * (lookahead + 1) * block_bytes, lookahead)
        share = share_out(pieces, _least_memory(pieces, lookahead), 0, lookahead)
        blocks: list[BlockOfWeights] = []
        for number, piece in enumerate(pieces):
            if number in share.resident:
                self._read(needed, side.device, piece)
                continue
            block = BlockOfWeights(len(blocks), piece.name)
            blocks.append(block)
            for name in piece.weights:
                shape, dtype, source, key = needed[name]
                self._stored[name] = block.add(name, shape, dtype, source, key)
        return Executor(blocks, side, share.buffers, lookahead)

    def _read(self, needed: Mapping[str, Needed], device: torch.device, piece: Piece) -> None:
        by_source: dict[int, list[str]] = {}
        for name in piece.weights:
            by_source.setdefault(id(needed[name].source), []).append(name)
            self._resident[name] = torch.empty(
                needed[name].shape, dtype=needed[name].dtype, device=device
            )
        for names in by_source.values():
            keys = [needed[name].key for name in names]
            needed[names[0]].source.fill(keys, [self._resident[name] for name in names])

    def __contains__(self, name: str) -> bool:
        return name in self._one_name

    @property
    def streamed_bytes(self) -> int:
        """Of weights that are read again and again."""
        return sum(block.bytes for block in self.executor.ring.blocks.values())

    @property
    def device_bytes(self) -> int:
        """What all this takes on the device."""
        return self.executor.buffer_bytes + sum(t.nbytes for t in self._resident.values())

    def parameter(self, name: str, requires_grad: bool) -> torch.nn.Parameter:
        """A weight, to be used as any. Its gradient, where one is asked for, is its own alone: the
        next parameter of this name knows nothing of it.

        Raises:
            KeyError: nobody said that it is needed.
        """
        name = self._one_name[name]
        recorded = requires_grad and torch.is_grad_enabled()
        made = None if recorded else self._made.get(name)
        if made is None or made.requires_grad != requires_grad:
            made = self._new(name, requires_grad)
            if not recorded:
                self._made[name] = made
        return made

    def _new(self, name: str, requires_grad: bool) -> torch.nn.Parameter:
        with torch.inference_mode(False):
            resident = self._resident.get(name)
            if resident is not None:
                return torch.nn.Parameter(resident, requires_grad)
            weight = StreamedWeight(self.executor, self._stored[name])
            made: Any = torch.nn.Parameter(weight, requires_grad)
        made._weights, made._stored, made._shadow = weight._weights, weight._stored, weight._shadow
        return made  # type: ignore[no-any-return]

    def close(self) -> None:
        """Gives the buffers back. Weights that somebody holds are read at each use from now on."""
        self._made.clear()
        self._resident.clear()
        self.executor.close()


def _least_memory(pieces: Sequence[Piece], lookahead: int) -> int:
    """With which as many buffers as are filled ahead have room for what does not stay."""
    sizes = sorted((piece.bytes for piece in pieces), reverse=True)
    if not sizes:
        raise ArgumentError("there is nothing to stream")
    kept, least = 0, sum(sizes)
    for size in sizes:
        least = min(least, kept + (lookahead + 1) * size)
        kept += size
    return least
