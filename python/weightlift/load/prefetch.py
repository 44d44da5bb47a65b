"""Loads that start before their module is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from weightlift.core import dtypes
from weightlift.load.load_plan import LoadPlan, Running
from weightlift.load.options import LoadOptions

if TYPE_CHECKING:
    import torch

    from weightlift.checkpoint.checkpoint import Checkpoint
    from weightlift.core.report import LoadReport

__all__ = ["PrefetchedLoad"]


class PrefetchedLoad(NamedTuple):
    """A load that runs while its module is built, for tensors that are expected to go to one device
    in one dtype. ``fill`` takes from it the tensors for which this holds.

    Attributes:
        running: the load.
        device: the device of its tensors.
        dtype: the file's name of the dtype to cast floating-point tensors to, or ``None``.
        names: the names of its tensors.
        renames: name in the checkpoint -> name here, where they differ.
    """

    running: Running
    device: torch.device
    dtype: str | None
    names: frozenset[str]
    renames: Mapping[str, str] = MappingProxyType({})

    @classmethod
    def start(
        cls,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: str | None,
        names: Sequence[str] | None = None,
        options: LoadOptions = LoadOptions(),
    ) -> PrefetchedLoad:
        """Starts the load; ``names`` is all tensors by default."""
        plan = LoadPlan(checkpoint, options)
        plan.add(device, dtype, names)
        return cls(plan.start(), device, dtype, frozenset(checkpoint if names is None else names))

    def renamed(self, renames: Mapping[str, str]) -> PrefetchedLoad:
        """The same load with the names of ``Checkpoint.renamed``."""
        names = frozenset(renames.get(name, name) for name in self.names)
        return self._replace(names=names, renames=renames)

    def delivers(self, device: torch.device, file_dtype: str, cast_to: str | None) -> bool:
        """Whether this load delivers a tensor with the file's dtype to ``device``, cast to
        ``cast_to``."""
        if device != self.device:
            return False
        if file_dtype not in dtypes.FLOATING:
            return True
        return (cast_to or file_dtype) == (self.dtype or file_dtype)

    def result(self) -> dict[str, Any]:
        """Waits for the end and returns name -> tensor."""
        tensors = self.running.result()
        if self.renames:
            return {self.renames.get(name, name): tensor for name, tensor in tensors.items()}
        return tensors

    def cancel(self) -> None:
        """Stops the load and waits until nothing is in flight."""
        self.running.cancel()

    @property
    def report(self) -> LoadReport:
        """The report of the ended load."""
        return self.running.report
