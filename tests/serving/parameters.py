"""The parameters and buffers of two models, byte by byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["differences", "tensors_of"]


def tensors_of(module: Any) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def differences(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of those that differ."""
    wrong = sorted(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        left, right = ours[name], theirs[name]
        if left.is_meta or right.is_meta:
            same = left.is_meta == right.is_meta
        else:
            same = torch.equal(bytes_of(left), bytes_of(right))
        if not same:
            wrong.append(name)
    return wrong
