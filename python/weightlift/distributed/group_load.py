"""A load by all ranks of a group together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from weightlift.checkpoint.integrity import HashCheck
from weightlift.core import dtypes
from weightlift.core.report import LoadReport
from weightlift.core.settings import Settings
from weightlift.distributed.exchange import Exchange, SharedTensor
from weightlift.distributed.rank_group import RankGroup, describe, digest, require_same
from weightlift.load.allocation import TorchAllocator, empty_on_host, naming_tensor
from weightlift.load.load_plan import LoadPlan
from weightlift.load.options import LoadOptions

if TYPE_CHECKING:
    from weightlift.checkpoint.checkpoint import Checkpoint
    from weightlift.load.destination import SliceRange
    from weightlift.load.running_load import RunningLoad

__all__ = ["GroupLoadPlan", "RunningGroupLoad"]


class GroupLoadPlan:
    """This rank's plan of a group load: tensors that each rank needs whole are read once and
    exchanged; each rank reads the others itself.

    Args:
        rank_group: the ranks of the load.
        checkpoint: the checkpoint, the same on all ranks.
        options: how to load, the same on all ranks.
    """

    def __init__(self, rank_group: RankGroup, checkpoint: Checkpoint, options: LoadOptions) -> None:
        self._rank_group = rank_group
        self._checkpoint = checkpoint
        self._options = dataclasses.replace(
            options, settings=options.settings or Settings.current()
        )
        # One rank verifies each file; the ranks decide later which.
        self._own = LoadPlan(checkpoint, dataclasses.replace(self._options, verify=False))
        # New tensors stay on `meta` until the load starts.
        self._shared: list[SharedTensor] = []
        # Name -> its treatment, the same on all ranks.
        self._outcomes: dict[str, str] = {}

    def add(
        self,
        device: torch.device,
        dtype: str | None = None,
        names: Sequence[str] | None = None,
        targets: Sequence[torch.Tensor] | None = None,
        parts: Sequence[Sequence[SliceRange]] | None = None,
    ) -> None:
        """As ``LoadPlan.add``."""
        self._options.check_target(device, dtype)
        chosen = list(self._checkpoint if names is None else names)
        own: list[int] = []
        for i, name in enumerate(chosen):
            stored, shape = self._checkpoint[name]
            if targets is not None:
                tensor = targets[i]
            else:
                kind = dtypes.to_torch(dtype if dtype and stored in dtypes.FLOATING else stored)
                tensor = torch.empty(shape, dtype=kind, device="meta")
            is_shared = parts is None and self._is_shared(name, stored, device, tensor)
            way = "read once for all" if is_shared else "read by each rank"
            self._outcomes[name] = f"{tensor.dtype} on {device.type}, {way}"
            if is_shared:
                self._shared.append(SharedTensor(name, device, tensor))
            else:
                own.append(i)
        if own:
            self._own.add(
                device,
                dtype,
                [chosen[i] for i in own],
                None if targets is None else [targets[i] for i in own],
                None if parts is None else [parts[i] for i in own],
            )

    @property
    def is_empty(self) -> bool:
        """Always false: the other ranks wait for this one."""
        return False

    def start(self) -> RunningGroupLoad:
        """Waits for all ranks, and starts the load on each.

        Raises:
            CheckpointError: on all ranks, if their plans differ.
        """
        rank_group = self._rank_group
        rank_group.load_started = True
        outcomes = digest(sorted(self._outcomes.items()))
        answers = rank_group.agree(None, (describe(self._checkpoint), outcomes))
        require_same(rank_group, answers, self._outcomes)
        readers = rank_group.readers() if self._shared else None
        own: RunningLoad | Exception
        hashes = None
        shared = self._shared
        try:
            if self._options.verify:
                first, step = sorted(answers).index(dist.get_rank()), len(answers)
                hashes = HashCheck(self._checkpoint.files[first::step])
                hashes.start()
            shared = self._allocate()
            own = self._own.start()
        except Exception as error:  # result() sends it to the other ranks
            own = error
        exchange = None
        if readers is not None:
            exchange = Exchange(self._checkpoint, self._options, shared, rank_group, readers)
        return RunningGroupLoad(rank_group, own, shared, exchange, hashes)

    def _is_shared(
        self, name: str, stored: str, device: torch.device, tensor: torch.Tensor
    ) -> bool:
        """Whether the ranks exchange a tensor: if it is copied, and the engine supports it."""
        scope, options = self._rank_group.scope, self._options
        place = self._checkpoint.place(name)
        wanted = dtypes.file_name(tensor.dtype)
        if scope is None or place is None or place[2] is not None:
            return False
        castable = stored in dtypes.CASTABLE and wanted in dtypes.CASTABLE
        if (
            dtypes.bits(stored) % 8
            or not (stored == wanted or castable)
            or device.type not in ("cpu", "cuda")
            or not tensor.is_contiguous()
        ):
            return False
        # Mapped tensors need no exchange on one node: its ranks share the page cache.
        is_copied = device.type == "cuda" or not tensor.is_meta or stored != wanted
        rewritten = options.mode == "auto" and self._checkpoint.formats[place[0]] == "torch"
        is_read = rewritten or options.mode == "read" or options.pin_memory
        return is_copied or is_read or scope == "group"

    def _allocate(self) -> list[SharedTensor]:
        """The shared tensors, with memory for new ones."""
        new = [shared for shared in self._shared if shared.tensor.is_meta]
        sizes: dict[int, list[int]] = {}
        for shared in new:
            if shared.device.type == "cuda":
                sizes.setdefault(shared.device.index, []).append(shared.tensor.nbytes)
        for index, of_device in sizes.items():
            TorchAllocator().reserve(index, of_device)
        return [self._allocated(t) if t.tensor.is_meta else t for t in self._shared]

    def _allocated(self, shared: SharedTensor) -> SharedTensor:
        found = self._checkpoint.byte_range(shared.name)
        path = "" if found is None else found[0]
        shape, dtype = shared.tensor.shape, shared.tensor.dtype
        with naming_tensor(path, shared.name):
            if shared.device.type == "cuda":
                name = str(dtypes.file_name(dtype))
                _, made = TorchAllocator().empty(shared.device.index, shape, name)
            else:
                made = empty_on_host(shape, dtype, pin_memory=self._options.pin_memory)
        return dataclasses.replace(shared, tensor=made)


class RunningGroupLoad:
    """A load started by ``GroupLoadPlan.start``; all ranks of the group wait for its ``result``.

    Args:
        rank_group: the ranks of the load.
        own: this rank's own load, or its error.
        shared: the tensors that are read once for all ranks.
        exchange: reads and exchanges them.
        hashes: the check of the files that this rank verifies.
    """

    def __init__(
        self,
        rank_group: RankGroup,
        own: RunningLoad | Exception,
        shared: Sequence[SharedTensor],
        exchange: Exchange | None,
        hashes: HashCheck | None,
    ) -> None:
        self._rank_group = rank_group
        self._own = own
        self._shared = shared
        self._exchange = exchange
        self._hashes = hashes
        self._exchanged: LoadReport | None = None

    def result(self) -> dict[str, Any]:
        """Waits for the end on all ranks and returns name -> tensor.

        Raises:
            CheckpointError: on all ranks, if one failed or ended.
        """
        failure = None
        tensors: dict[str, Any] = {}
        try:
            tensors = self._load()
        except Exception as error:
            failure = error
        self._rank_group.agree(failure)
        tensors.update((shared.name, shared.tensor) for shared in self._shared)
        return tensors

    def _load(self) -> dict[str, Any]:
        own, exchange = self._own, self._exchange
        if isinstance(own, Exception):
            if exchange is not None:
                exchange.refuse(own)
            raise own
        has_ended = False
        try:
            if exchange is not None:
                self._exchanged = exchange.run()
                if self._exchanged is None:  # another rank has failed
                    return {}
            tensors = own.result()
            has_ended = True
            if self._hashes is not None:
                self._hashes.result()
            return tensors
        finally:
            if not has_ended:
                own.cancel()
            if self._hashes is not None:
                self._hashes.stop()

    def cancel(self) -> None:
        """Stops this rank's part, and waits until nothing is in flight."""
        if self._hashes is not None:
            self._hashes.stop()
        if not isinstance(self._own, Exception):
            self._own.cancel()

    @property
    def report(self) -> LoadReport:
        """This rank's report of the ended load."""
        if isinstance(self._own, Exception):
            raise RuntimeError("a failed load has no report") from self._own
        report = self._own.report
        return report if self._exchanged is None else report.plus(self._exchanged)
