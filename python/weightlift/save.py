"""``save_file``: all of a file or nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from weightlift.core.atomic import atomic_file
from weightlift.core.requirements import require

if TYPE_CHECKING:
    import torch


__all__ = ["save_file"]


def save_file(
    tensors: Mapping[str, torch.Tensor],
    filename: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
) -> None:
    """Saves tensors as a ``.safetensors`` file, all of it or nothing.

    The file is written under a temporary name in the same folder, flushed to the disk, given the
    mode that the umask allows, and renamed; the folder is flushed too. Killed anywhere, the old
    file or the new one is there. Saving over a file whose mapping is in use is safe: the mapping
    keeps the old one.

    Args:
        tensors: contiguous tensors that share no memory, as ``safetensors.torch.save_file`` wants.
        filename: the file.
        metadata: text for the header.
    """
    require("torch", "save_file")
    from safetensors.torch import save_file as reference_save_file

    with atomic_file(filename) as temporary:
        reference_save_file(dict(tensors), temporary, metadata=metadata)
