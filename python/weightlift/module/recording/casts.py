"""Which casts of a chain the engine does as one."""

from __future__ import annotations

import torch

from weightlift.core import dtypes

__all__ = ["casts"]

# dtype -> those that hold each of its values
_HELD_BY = {
    torch.float8_e4m3fn: {torch.float16, torch.bfloat16, torch.float32, torch.float64},
    torch.float8_e5m2: {torch.float16, torch.bfloat16, torch.float32, torch.float64},
    torch.float16: {torch.float32, torch.float64},
    torch.bfloat16: {torch.float32, torch.float64},
    torch.float32: {torch.float64},
}


def casts(own: torch.dtype, through: torch.dtype, to: torch.dtype) -> bool:
    """Whether the engine's one cast from ``own`` gives what two casts of torch's would."""
    if own == through == to:
        return True
    if not _castable(own) or not _castable(to):
        return False
    return through in (own, to) or through in _HELD_BY.get(own, ())


def _castable(dtype: torch.dtype) -> bool:
    return dtypes.file_name(dtype) in dtypes.CASTABLE
