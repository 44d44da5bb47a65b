"""Devices as people name them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightlift.core.errors import DeviceError

if TYPE_CHECKING:
    import torch


__all__ = ["parse_device"]


def parse_device(device: torch.device | str | int) -> torch.device:
    """``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``1`` or a ``torch.device``, with its index filled in.

    Raises:
        DeviceError: no such device, or none that tensors can be loaded to.
    """
    import torch

    try:
        if isinstance(device, int) and not isinstance(device, bool):
            if device < 0:
                raise ValueError("an index below zero")
            parsed = torch.device("cuda", device)
        else:
            parsed = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise DeviceError(f"device {device!r} is invalid: {error}") from None
    if parsed.type == "meta":
        raise DeviceError("device 'meta' is invalid: it holds no data, and a load brings some")
    if parsed.type == "cuda" and parsed.index is None:
        current = torch.cuda.current_device() if torch.cuda.is_available() else 0
        return torch.device("cuda", current)
    return parsed
