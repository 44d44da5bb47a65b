"""Moves a module's tensors from the CPU to a CUDA device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightlift.core import dtypes
from weightlift.load.load_tensors import copy_to_device
from weightlift.module.parameters import parameter_refs, set_all

if TYPE_CHECKING:
    import torch


__all__ = ["move"]


def move(
    model: torch.nn.Module,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    caller: str = "weightlift",
) -> None:
    """Copies a model's CPU tensors to a CUDA device through the staging ring.

    Tensors that the engine does not copy (strided tensors, gradients, dtypes without a file format)
    stay for ``torch.nn.Module.to``. Tied tensors stay tied.

    Args:
        model: the model; its parameters keep their identity.
        device: the device, with its index filled in.
        dtype: the dtype of floating-point tensors.
    """
    import torch

    name = dtypes.parse_dtype(dtype)
    refs = {
        ref.name: ref
        for ref in parameter_refs(model)
        if ref.tensor.device.type == "cpu"
        and ref.tensor.is_contiguous()
        and dtypes.file_name(ref.tensor.dtype) is not None
        and type(ref.tensor) in (torch.Tensor, torch.nn.Parameter)
    }
    if not refs:
        return
    tensors = {key: ref.tensor.detach() for key, ref in refs.items()}
    copies = copy_to_device(tensors, device, name, caller=caller)
    set_all((refs[key], value) for key, value in copies.items())
