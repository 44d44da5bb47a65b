"""The tensors of a checkpoint in transformers' interface, and their loads."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightlift.backends.transformers.shards import Cut
from weightlift.core import dtypes
from weightlift.core.devices import parse_device
from weightlift.core.errors import WeightliftError
from weightlift.load.allocation import Allocator, TorchAllocator
from weightlift.load.destination import SliceRange
from weightlift.load.load_plan import LoadPlan
from weightlift.load.options import LoadOptions, Mode, Progress
from weightlift.load.running_load import RunningLoad

if TYPE_CHECKING:
    import torch

    from weightlift.checkpoint.checkpoint import Checkpoint
    from weightlift.core.report import LoadReport

__all__ = ["CALLER", "Batch", "LoadFailed", "Prefetched", "Slice", "Weights"]

CALLER = "transformers"


class LoadFailed(Exception):
    """The engine failed before any tensor was placed: the library can still load all tensors."""

    def __init__(self, error: WeightliftError) -> None:
        super().__init__(str(error))
        self.error = error


class Weights(Mapping[str, "Slice"]):
    """The tensors of a checkpoint in the library's interface: name -> slice object.

    Attributes:
        checkpoint: the checkpoint.
        headers: name -> (the file's dtype, shape).
        report: the report of all loads so far.
        prefetched: the load that already runs.
    """

    def __init__(self, checkpoint: Checkpoint, mode: Mode) -> None:
        self.checkpoint = checkpoint
        self.headers = checkpoint.headers()
        self.report: LoadReport | None = None
        self._mode = mode
        self.prefetched = Prefetched(None)
        self._batch: Batch | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Slice:
        return Slice(self, name, self.headers[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    @functools.cached_property
    def allocator(self) -> Allocator:
        return TorchAllocator()

    def plan(self, devices: set[torch.device], casts: bool, progress: Progress | None) -> LoadPlan:
        """A load of these tensors."""
        on_host = {device.type for device in devices} <= {"cpu"}
        mode = "auto" if self._mode == "map" and (casts or not on_host) else self._mode
        return LoadPlan(
            self.checkpoint,
            LoadOptions(mode, progress=progress or False, caller=CALLER),
            allocator=self.allocator if any(d.type == "cuda" for d in devices) else None,
        )

    def start(self, batch: Batch) -> None:
        """Starts the load of the slices."""
        batch.start()
        self._batch = batch

    def prefetch(self, batch: Batch) -> None:
        """Starts a load before the library's requests are known."""
        batch.start()
        self.prefetched = Prefetched(batch)

    def drop_prefetched(self) -> None:
        """Drops unclaimed tensors."""
        self.prefetched.cancel()
        self.prefetched = Prefetched(None)

    def tensor(self, name: str) -> torch.Tensor:
        # The library's threads call this concurrently.
        with self._lock:
            if self._batch is not None:
                batch, self._batch = self._batch, None
                self._tensors = batch.result()
            tensor = self._tensors.get(name)
            if tensor is None:  # not predicted
                batch = Batch(self)
                batch.add(name, parse_device("cpu"), None)
                batch.start()
                tensor = batch.result()[name]
        return tensor

    def close(self) -> None:
        """Ends started loads that were not requested."""
        with self._lock:
            if self._batch is not None:
                self._batch.cancel()
                self._batch = None
            self.drop_prefetched()


class Prefetched:
    """A load that started before the library's requests were known.

    A caller claims a tensor and then takes it, once. Without a matching load nothing can be
    claimed.

    Args:
        batch: the load, started.
    """

    def __init__(self, batch: Batch | None) -> None:
        self._batch = batch
        self._claimed: set[str] = set()
        self._arrived: dict[str, torch.Tensor] | None = None
        self._error: WeightliftError | None = None

    def claim(self, name: str, device: torch.device, cast: str | None) -> bool:
        """Claims a tensor for the caller; ``False`` if it does not arrive on this device in this
        dtype."""
        if self._batch is None or name in self._claimed:
            return False
        if not self._batch.brings(name, device, cast):
            return False
        self._claimed.add(name)
        return True

    def take(self, names: Sequence[str], progress: Progress | None) -> dict[str, torch.Tensor]:
        """Waits for claimed tensors.

        Raises:
            WeightliftError: the load failed or was cancelled; the same error for all callers.
        """
        if self._error is not None:
            raise self._error
        if self._arrived is None:
            try:
                self._arrived = self._wait(progress)
            except WeightliftError as error:
                self._error = error
                raise
        arrived = self._arrived
        return {name: arrived.pop(name) for name in names}

    def _wait(self, progress: Progress | None) -> dict[str, torch.Tensor]:
        if self._batch is None:
            raise WeightliftError("the prefetched load was cancelled")
        self._batch.show(progress)
        return self._batch.result()

    def cancel(self) -> None:
        """Ends the load; taken tensors stay valid."""
        if self._batch is not None:
            self._batch.cancel()
        self._batch, self._arrived = None, None


class Slice:
    """A tensor of ``Weights``, with the interface of safetensors' slices."""

    __slots__ = ("_header", "_name", "_weights")

    def __init__(self, weights: Weights, name: str, header: tuple[str, tuple[int, ...]]) -> None:
        self._weights, self._name, self._header = weights, name, header

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._weights.tensor(self._name)
        return tensor if index is Ellipsis else tensor[index]

    def get_shape(self) -> list[int]:
        return list(self._header[1])

    def get_dtype(self) -> str:
        return self._header[0]


class Batch:
    """Tensors that one plan loads, each to its device and dtype."""

    def __init__(self, weights: Weights, progress: Progress | None = None) -> None:
        self._weights = weights
        self._progress = progress
        self._groups: dict[tuple[torch.device, str | None], dict[str, None]] = {}
        self._parts: dict[tuple[torch.device, str | None], dict[str, Sequence[SliceRange]]] = {}
        self._into: dict[tuple[torch.device, bool], list[_Into]] = {}
        self._joined: list[tuple[str, int, list[torch.Tensor]]] = []
        self._by_torch: dict[str, torch.dtype] = {}
        self._claimed: list[str] = []
        self._running: RunningLoad | None = None

    def add(
        self, name: str, device: torch.device, dtype: torch.dtype | None, cut: Cut | None = None
    ) -> None:
        """Adds a tensor, or a part of it; ``dtype=None`` leaves it the file's."""
        own = self._weights.headers[name][0]
        cast = None if dtype is None else dtypes.file_name(dtype)
        if dtype is not None and cast != own:
            # The library casts each tensor by itself, also those that share their bytes.
            if (
                own not in dtypes.CASTABLE
                or cast not in dtypes.CASTABLE
                or self._weights.checkpoint.is_view(name)
            ):
                self._by_torch[name] = dtype
                cast = None
        else:
            cast = None
        if cut is None or cut.pieces is None:
            if self._weights.prefetched.claim(name, device, cast):
                self._claimed.append(name)
            else:
                self._groups.setdefault((device, cast), {})[name] = None
        elif len(cut.pieces) == 1:
            self._parts.setdefault((device, cast), {})[name] = cut.pieces[0]
        else:
            self._add_pieces(name, device, dtypes.to_torch(cast or own), cut)

    def _add_pieces(self, name: str, device: torch.device, dtype: torch.dtype, cut: Cut) -> None:
        import torch

        pieces = []
        for ranges in cut.pieces or ():
            shape = [count for _, _, count in ranges]
            pieces.append(torch.empty(shape, dtype=dtype, device=device))
            self.add_into(name, device, pieces[-1], ranges)
        self._joined.append((name, cut.dimension, pieces))

    def add_into(
        self,
        name: str,
        device: torch.device,
        target: torch.Tensor,
        ranges: Sequence[SliceRange] | None,
    ) -> None:
        """Adds a tensor, or a part of it, with a target tensor."""
        into = _Into(name, target, ranges)
        self._into.setdefault((device, ranges is not None), []).append(into)

    def start(self) -> None:
        if not self._groups and not self._parts and not self._into:
            return
        every = [*self._groups, *self._parts]
        plan = self._weights.plan(
            {device for device, _ in (*every, *self._into)},
            any(cast is not None for _, cast in every),
            self._progress,
        )
        for (device, cast), names in self._groups.items():
            plan.add(device, cast, list(names))
        for (device, cast), parts in self._parts.items():
            plan.add(device, cast, list(parts), parts=list(parts.values()))
        for (device, _), into in self._into.items():
            ranges = [one.ranges for one in into if one.ranges is not None]
            targets = [one.target for one in into]
            plan.add(device, None, [one.name for one in into], targets, ranges or None)
        self._running = plan.start()

    def brings(self, name: str, device: torch.device, cast: str | None) -> bool:
        """Whether the started batch loads a tensor to this device in this dtype."""
        return name in self._groups.get((device, cast), ())

    def show(self, progress: Progress | None) -> None:
        """From now on calls ``progress`` with the progress of the started load."""
        if progress is not None and self._running is not None:
            self._running.show(progress)

    def result(self) -> dict[str, torch.Tensor]:
        """Waits for the end and returns name -> tensor."""
        import torch

        tensors: dict[str, torch.Tensor] = {}
        if self._claimed:
            tensors = self._weights.prefetched.take(self._claimed, self._progress)
        running, self._running = self._running, None
        if running is not None:
            tensors |= running.result()
            report, before = running.report, self._weights.report
            self._weights.report = report if before is None else before.plus(report)
        while self._joined:
            name, dimension, pieces = self._joined.pop()
            tensors[name] = torch.cat(pieces, dimension)
        for name, dtype in self._by_torch.items():
            tensors[name] = tensors[name].to(dtype)
        return tensors

    def cancel(self) -> None:
        if self._running is not None:
            self._running.cancel()
            self._running = None


@dataclasses.dataclass(slots=True)
class _Into:
    name: str
    target: torch.Tensor
    ranges: Sequence[SliceRange] | None
