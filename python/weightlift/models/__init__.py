"""Base classes for models: ``ModelMixin``, ``ConfigMixin``, ``PushToHubMixin``."""

from __future__ import annotations

import importlib
from typing import Any

# Imported on first access: ModelMixin needs torch.
_HOMES = {
    "ConfigMixin": "config_mixin",
    "FrozenDict": "config_mixin",
    "register_to_config": "config_mixin",
    "PushToHubMixin": "hub_mixin",
    "ModelMixin": "model_mixin",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
