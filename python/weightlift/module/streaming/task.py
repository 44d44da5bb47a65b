"""The plan of a stream: the weights that stay, those that are read, and their source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from weightlift.module.order_of_use import learn_order, order_of_use, which_model
from weightlift.module.parameters import ParameterRef
from weightlift.module.streaming.device_side import DeviceSide
from weightlift.module.streaming.executor import ALIGNMENT, BlockOfWeights, Executor
from weightlift.module.streaming.originals import assign, parameter_like
from weightlift.module.streaming.residency import Piece, Share, cut, share_out
from weightlift.module.streaming.sources import Source
from weightlift.module.streaming.streamed_weight import StreamedWeight, streamed_parameter

__all__ = ["Task", "Wanted"]


class Wanted(NamedTuple):
    """A weight that may be streamed.

    Attributes:
        ref: its reference in the model.
        dtype: its dtype on the device.
        key: its key in its source.
    """

    ref: ParameterRef
    dtype: torch.dtype
    key: str

    @property
    def bytes(self) -> int:
        return -(-self.ref.tensor.numel() * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


class Task:
    """A planned stream.

    Args:
        model: the model.
        side: its device.
        memory: the budget in bytes.
        lookahead: the number of blocks to read ahead.
        wanted: the weights that may be streamed, by name, in the order of the modules.
        fixed: bytes of weights that stay in any case.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        side: DeviceSide,
        memory: int,
        lookahead: int,
        wanted: Mapping[str, Wanted],
        fixed: int,
    ) -> None:
        self.model, self.side = model, side
        self._lookahead = lookahead
        self._memory = memory
        self._wanted = wanted
        self.which = which_model(model)
        order = order_of_use(self.which, list(wanted))
        sizes = {name: wanted[name].bytes for name in order}
        self.pieces: list[Piece] = cut(sizes, memory, lookahead)
        self.share: Share = share_out(self.pieces, memory, fixed, lookahead)
        self.fixed = fixed
        self.source: Source | None = None
        self.blocks: list[BlockOfWeights] = []
        self.executor = Executor((), side, 0, lookahead)

    @property
    def streamed(self) -> list[str]:
        return [
            name
            for number, piece in enumerate(self.pieces)
            if number not in self.share.resident
            for name in piece.weights
        ]

    @property
    def streamed_bytes(self) -> int:
        resident = self.share.resident
        return sum(p.bytes for number, p in enumerate(self.pieces) if number not in resident)

    def install(self) -> None:
        """Puts streamed weights into the model, by the current share."""
        stored = {}
        self.blocks = []
        for number, piece in enumerate(self.pieces):
            if number in self.share.resident or self.source is None:
                continue
            block = BlockOfWeights(len(self.blocks), piece.name or type(self.model).__name__)
            self.blocks.append(block)
            for name in piece.weights:
                ref, dtype, key = self._wanted[name]
                stored[name] = block.add(name, ref.tensor.shape, dtype, self.source, key)
        side, share = self.side, self.share
        self.executor = Executor(self.blocks, side, share.buffers, self._lookahead)
        for name, weight in stored.items():
            ref = self._wanted[name].ref
            streamed = StreamedWeight(self.executor, weight)
            assign(ref, streamed_parameter(streamed, ref.tensor.requires_grad, vars(ref.tensor)))

    def learn_order(self, uses: Iterable[int]) -> None:
        """Has later models of this kind be cut in the order of this step's first uses.

        Args:
            uses: pieces; those that it has not used are left where they are.
        """
        used = list(uses)
        if len(used) < len(self.pieces):
            return  # not the whole model: what is left out may be used next
        learn_order(self.which, (name for piece in used for name in self.pieces[piece].weights))

    def share_again(self, uses: Mapping[int, int]) -> bool:
        """Decides again which weights stay, by their uses; ``False`` if nothing changes.

        Args:
            uses: piece -> number of uses in a step.
        """
        before = self.share
        after = share_out(self.pieces, self._memory, self.fixed, self._lookahead, uses)
        if after.resident == before.resident or self.source is None:
            return False
        self.executor.close()
        self.share = after
        for number in before.resident - after.resident:  # their memory is needed
            for name in self.pieces[number].weights:
                ref, dtype, _ = self._wanted[name]
                empty = torch.empty(ref.tensor.shape, dtype=dtype, device="meta")
                ref.tensor = parameter_like(ref.tensor, empty)
        for number in sorted(after.resident - before.resident):
            self._make_resident(self.pieces[number])
        self.install()
        return True

    def _make_resident(self, piece: Piece) -> None:
        wanted = [self._wanted[name] for name in piece.weights]
        values = [
            torch.empty(want.ref.tensor.shape, dtype=want.dtype, device=self.side.device)
            for want in wanted
        ]
        if self.source is not None:
            self.source.fill([want.key for want in wanted], values)
        for want, value in zip(wanted, values, strict=True):
            assign(want.ref, parameter_like(want.ref.tensor, value))

    def owners(self) -> dict[int, list[torch.nn.Module]]:
        """Piece -> the modules that hold its weights."""
        return {
            number: list(
                {id(m): m for m in (self._wanted[n].ref.module for n in piece.weights)}.values()
            )
            for number, piece in enumerate(self.pieces)
        }
