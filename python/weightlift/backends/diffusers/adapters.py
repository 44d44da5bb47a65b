"""LoRA and textual inversion: modules that call ``safetensors.torch.load_file``."""

from __future__ import annotations

from typing import Any

from weightlift.backends import is_enabled
from weightlift.backends.diffusers.context import NAME
from weightlift.backends.hooks import signature_text
from weightlift.backends.safetensors import load_file_adapters

__all__ = ["safetensors_module"]


class _ModuleProxy(type):
    """A class that stands for a module, apart from what it has itself."""

    module: Any

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.module, name)


def safetensors_module(module: Any) -> type:
    """The name ``safetensors`` in a module that calls ``safetensors.torch.load_file``: for LoRA
    and textual inversion."""
    from safetensors import torch as of_torch

    def load_file(*args: Any, **kwargs: Any) -> Any:
        original_call = of_torch.load_file
        adapter = load_file_adapters(NAME).get(signature_text(original_call))
        fast = original_call if adapter is None or not is_enabled(NAME) else adapter(original_call)
        return fast(*args, **kwargs)

    torch = _ModuleProxy("torch", (), {"module": of_torch, "load_file": staticmethod(load_file)})
    return _ModuleProxy("safetensors", (), {"module": module, "torch": torch})
