"""Writes the same tensors as files of all forms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import split_torch_state_dict_into_shards

__all__ = ["FORMS", "changed", "filled", "write"]

FORMS = ("shards", "one file", "bin", "bin shards")


def filled(model: torch.nn.Module) -> None:
    """Random numbers for every tensor, because constant tensors such as biases could be
    confused."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape))


def changed(tensors: Mapping[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    """Tensors that do not fit the model: one is missing, one is extra, and, unless ``how`` is
    ``"uneven"``, one has a wrong shape."""
    made = dict(sorted(tensors.items()))
    names = list(made)
    if len(names) > 2:
        made.pop(names[len(names) // 2])
    if how != "uneven":
        name = names[-1]
        made[name] = torch.ones((*made[name].shape, 2), dtype=made[name].dtype)
    made["surplus.weight"] = torch.ones(3)
    return made


def write(
    folder: Path, form: str, tensors: Mapping[str, torch.Tensor], names: tuple[str, str]
) -> None:
    """Writes weights as the libraries name them.

    Args:
        form: one of ``FORMS``.
        names: the names of a single file without the suffix, for safetensors and for torch.
    """
    pickled = form.startswith("bin")
    suffix = "bin" if pickled else "safetensors"
    stem = names[pickled]
    if not form.endswith("shards"):
        _save(dict(tensors), folder / f"{stem}.{suffix}")
        return
    total = sum(tensor.nbytes for tensor in tensors.values())
    split = split_torch_state_dict_into_shards(
        dict(tensors),
        filename_pattern=f"{stem}{{suffix}}.{suffix}",
        max_shard_size=max(total // 3, 1),
    )
    for file, held in split.filename_to_tensors.items():
        _save({name: tensors[name] for name in held}, folder / file)
    if split.is_sharded:
        index: dict[str, Any] = {
            "metadata": split.metadata,
            "weight_map": split.tensor_to_filename,
        }
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
