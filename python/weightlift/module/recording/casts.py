"""Decides which chains of casts the engine can do as one cast."""

from __future__ import annotations

import torch

from weightlift.core import dtypes

__all__ = ["casts"]

# dtype -> dtypes that represent each of its values
_HELD_BY = {
    torch.float8_e4m3fn: {torch.float16, torch.bfloat16, torch.float32, torch.float64},
    torch.float8_e5m2: {torch.float16, torch.bfloat16, torch.float32, torch.float64},
    torch.float16: {torch.float32, torch.float64},
    torch.bfloat16: {torch.float32, torch.float64},
    torch.float32: {torch.float64},
}


def casts(own: torch.dtype, through: torch.dtype, to: torch.dtype) -> bool:
    """Whether one cast by the engine equals two casts by torch."""
    if own == through == to:
        return True
    if not _castable(own) or not _castable(to):
        return False
    return through in (own, to) or through in _HELD_BY.get(own, ())


def _castable(dtype: torch.dtype) -> bool:
    return dtypes.file_name(dtype) in dtypes.CASTABLE
