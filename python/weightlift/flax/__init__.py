"""Flax models and jax arrays on the engine; needs ``pip install 'weightlift[flax]'`` and torch.

Linen models derive from ``FlaxModelMixin`` and ``ConfigMixin``. For NNX models call ``load_params``
with the shapes of their state.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightlift.flax.files import load_file, save_file
    from weightlift.flax.model_mixin import (
        FlaxModelMixin,
        flax_register_to_config,
        register_to_config,
    )
    from weightlift.flax.params import load_params, save_params

__all__ = [
    "FlaxModelMixin",
    "flax_register_to_config",
    "load_file",
    "load_params",
    "register_to_config",
    "save_file",
    "save_params",
]

# Imported on first access: the import of jax takes seconds.
_LATER = {
    "FlaxModelMixin": "model_mixin",
    "flax_register_to_config": "model_mixin",
    "load_file": "files",
    "load_params": "params",
    "register_to_config": "model_mixin",
    "save_file": "files",
    "save_params": "params",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_LATER[name]}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("jax", "jaxlib", "flax", "ml_dtypes", "msgpack"):
            raise
        raise ImportError(
            f"weightlift.flax.{name} needs {missing}: pip install 'weightlift[flax]'",
            name=missing,
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value
