"""Tensors that a model has under several names, and a checkpoint under more than one of them."""

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
    """Warns of tied tensors whose names have different values in the checkpoint: the model can
    have one of them.

    Args:
        pairs: (name that is loaded, tensor of the model).
        checkpoint: what there is.
        headers: of it.
        options: how it is loaded.
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
                f"the model has one tensor under the names {', '.join(ref.names)}, and the "
                f"checkpoint other values for {', '.join(unequal)} than for {name}: those of "
                f"{name} are loaded; untie them before the load to keep both",
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
