"""Loads that begin before their module is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core import dtypes
from weightlift.load.loading import Loading
from weightlift.load.options import LoadOptions

if TYPE_CHECKING:
    import torch


__all__ = ["PrefetchedLoad"]


class PrefetchedLoad:
    """A load that began before its model was there, in the belief that everything goes to one
    device in one dtype; ``fill`` takes from it what turns out to be as believed."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: str | None,
        names: Sequence[str] | None = None,
        options: LoadOptions = LoadOptions(),
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.names = frozenset(checkpoint if names is None else names)
        self.loading = Loading(checkpoint, options)
        self.loading.add(device, dtype, names)
        self.loading.start()
        self._renamed: Mapping[str, str] = {}

    def rename(self, names: Mapping[str, str]) -> None:
        """From now on under the names that ``checkpoint.renamed`` gives."""
        self.names = frozenset(names.get(name, name) for name in self.names)
        self._renamed = names

    def suits(self, device: torch.device, file_dtype: str, target: str | None) -> bool:
        """Whether what it loads comes as it is wanted: there, and cast to ``target``, if to any."""
        if device != self.device:
            return False
        if file_dtype not in dtypes.FLOATING:
            return True
        return (target or file_dtype) == (self.dtype or file_dtype)

    def result(self) -> dict[str, torch.Tensor]:
        tensors = self.loading.result()
        if self._renamed:
            return {self._renamed.get(name, name): t for name, t in tensors.items()}
        return tensors
