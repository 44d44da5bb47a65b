"""Parses device names."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from weightlift.core.errors import DeviceError

if TYPE_CHECKING:
    import torch


__all__ = ["loadable_device", "parse_device"]


# Names that stand for several devices and need a model.
_OF_MODELS = ("auto", "balanced", "balanced_low_0", "sequential", "disk")


def _hint(device: object) -> str:
    if device in _OF_MODELS:
        return " here (load_into and from_pretrained take it as device_map)"
    if str(device).lower() in ("gpu", "nvidia"):
        return " ('cuda' is meant?)"
    near = difflib.get_close_matches(str(device), ("cpu", "cuda", "cuda:0", *_OF_MODELS), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def parse_device(device: torch.device | str | int) -> torch.device:
    """``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``1`` or a ``torch.device``, with its index filled in.

    Raises:
        DeviceError: the device is unknown, or ``meta``.
    """
    import torch

    try:
        if isinstance(device, int) and not isinstance(device, bool):
            if device < 0:
                raise ValueError("negative index")
            parsed = torch.device("cuda", device)
        else:
            parsed = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise DeviceError(
            f"device {device!r} is invalid{_hint(device)}: it can be 'cpu', 'cuda', 'cuda:1', 1 "
            "or a torch.device"
        ) from None
    if parsed.type == "meta":
        raise DeviceError("device 'meta' is invalid: it holds no data; give 'cpu' or 'cuda'")
    if parsed.type == "cuda" and parsed.index is None:
        current = torch.cuda.current_device() if torch.cuda.is_available() else 0
        return torch.device("cuda", current)
    return parsed


def loadable_device(device: torch.device | str | int) -> torch.device:
    """As ``parse_device``; only the CPU and CUDA devices.

    Raises:
        DeviceError: the device is unknown, or of another kind.
    """
    parsed = parse_device(device)
    if parsed.type not in ("cpu", "cuda"):
        raise DeviceError(
            f"device {device!r}: weightlift loads to the CPU and to CUDA devices; load to the "
            f"CPU, then move the tensors with .to({str(parsed)!r})"
        )
    return parsed
