"""Checks tied tensors for which a checkpoint has several values."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from weightlift.core.devices import parse_device
from weightlift.load.load_tensors import load_tensors
from weightlift.load.options import LoadOptions

if TYPE_CHECKING:
    import torch

    from weightlift.checkpoint.checkpoint import Checkpoint
    from weightlift.module.own_loading import Headers
    from weightlift.module.parameters import ParameterRef

__all__ = ["warn_of_unequal_ties"]


def warn_of_unequal_ties(
    pairs: Sequence[tuple[str, ParameterRef]],
    checkpoint: Checkpoint,
    headers: Headers,
    options: LoadOptions,
) -> None:
    """Warns of tied tensors whose names have different values in the checkpoint; the model can
    have only one of them.

    Args:
        pairs: (loaded name, tensor of the model).
        checkpoint: the checkpoint.
        headers: its headers.
        options: how to load.
    """
    for name, ref in pairs:
        if not ref.ties:
            continue
        unequal = [
            other
            for other in ref.names
            if other != name
            and headers.get(other) == headers[name]
            and not _are_equal(checkpoint, name, other, options)
        ]
        if unequal:
            warnings.warn(
                f"the model ties {', '.join(ref.names)}, but the checkpoint has other values for "
                f"{', '.join(unequal)} than for {name}: those of {name} are loaded; untie them "
                "before the load to keep both",
                UserWarning,
                stacklevel=4,
            )


def _are_equal(checkpoint: Checkpoint, one: str, other: str, options: LoadOptions) -> bool:
    import torch

    if checkpoint.place(one) is not None and checkpoint.place(one) == checkpoint.place(other):
        return True
    how = LoadOptions(settings=options.settings, caller=options.caller)
    tensors = load_tensors(checkpoint, parse_device("cpu"), how, names=[one, other])
    return torch.equal(_bits(tensors[one]), _bits(tensors[other]))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)
