"""How tensors are to be loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightlift.core.errors import ArgumentError

if TYPE_CHECKING:
    import torch


__all__ = ["check_mode", "mode_of_backend"]

# What the reference calls its two ways to the bytes.
_BACKENDS = {"mmap": "map", "pread": "read"}


def mode_of_backend(mode: str, backend: str | None) -> str:
    if backend is None:
        return mode
    if backend not in _BACKENDS:
        raise ArgumentError(f"backend {backend!r} is invalid (expected one of: 'mmap', 'pread')")
    named = "auto" if backend == "mmap" else _BACKENDS[backend]
    if mode not in ("auto", _BACKENDS[backend]):
        raise ArgumentError(f"backend={backend!r} and mode={mode!r} contradict each other")
    return named if mode == "auto" else mode


def check_mode(mode: str, device: torch.device, dtype: str | None, pin_memory: bool) -> None:
    if mode not in ("auto", "map", "read"):
        raise ArgumentError(f"mode is {mode!r}; it can be 'auto', 'map' or 'read'")
    if mode == "map":
        against = [
            text
            for text, given in (
                (f"dtype={dtype}", dtype is not None),
                ("pin_memory=True", pin_memory),
                (f"device={str(device)!r}", device.type != "cpu"),
            )
            if given
        ]
        if against:
            raise ArgumentError(
                f"mode='map' hands out the file's own bytes and goes not together with "
                f"{' and '.join(against)}; use mode='auto'"
            )
    if pin_memory and device.type != "cpu":
        raise ArgumentError(f"pin_memory=True is for the CPU, not for {device}")
