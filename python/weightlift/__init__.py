"""weightlift loads model weights to the CPU, to pinned memory or to CUDA devices.

import weightlift as wl

tensors = wl.load_file("model.safetensors", device="cuda")
print(wl.last_report())
"""

import importlib as _importlib
import sys as _sys
from typing import TYPE_CHECKING, Any

from weightlift.backends import disable, enable, enabled
from weightlift.backends import enable_from_environment as _enable_from_environment
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.open_checkpoint import open_checkpoint
from weightlift.core.errors import (
    ArgumentError,
    CheckpointError,
    DeviceError,
    FileClosedError,
    FormatError,
    LoadCancelledError,
    OutOfMemoryError,
    ReadError,
    WeightliftError,
)
from weightlift.core.report import LoadReport, Stats, last_report, stats
from weightlift.core.requirements import missing_library as _missing_library
from weightlift.core.settings import Settings
from weightlift.core.version import __version__
from weightlift.load_file import load, load_checkpoint, load_file, load_model, load_state_dict
from weightlift.load_into import load_into
from weightlift.safe_open import safe_open
from weightlift.save import save, save_file, save_model

if TYPE_CHECKING:
    from weightlift.models.config_mixin import ConfigMixin, register_to_config
    from weightlift.models.hub_mixin import PushToHubMixin
    from weightlift.models.model_mixin import ModelMixin, get_parameter_device, get_parameter_dtype
    from weightlift.models.saving import save_checkpoint

__all__ = [
    "ArgumentError",
    "Checkpoint",
    "CheckpointError",
    "ConfigMixin",
    "DeviceError",
    "FileClosedError",
    "FormatError",
    "LoadCancelledError",
    "LoadReport",
    "ModelMixin",
    "OutOfMemoryError",
    "PushToHubMixin",
    "ReadError",
    "Settings",
    "Stats",
    "StreamHandle",
    "WeightliftError",
    "__version__",
    "disable",
    "enable",
    "enabled",
    "get_parameter_device",
    "get_parameter_dtype",
    "last_report",
    "load",
    "load_checkpoint",
    "load_file",
    "load_into",
    "load_model",
    "load_state_dict",
    "open_checkpoint",
    "record",
    "register_to_config",
    "safe_open",
    "save",
    "save_checkpoint",
    "save_file",
    "save_model",
    "stats",
    "stream",
]

# Imported on first access: these modules import torch.
_LATER = {
    "ConfigMixin": "models.config_mixin",
    "register_to_config": "models.config_mixin",
    "PushToHubMixin": "models.hub_mixin",
    "ModelMixin": "models.model_mixin",
    "get_parameter_device": "models.model_mixin",
    "get_parameter_dtype": "models.model_mixin",
    "record": "module.recording",
    "StreamHandle": "module.streaming",
    "stream": "module.streaming",
    "save_checkpoint": "models.saving",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        # With both, Python's traceback names the nearest.
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}", name=name, obj=_sys.modules[__name__]
        )
    try:
        value = getattr(_importlib.import_module(f"weightlift.{_LATER[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("weightlift"):
            raise
        raise _missing_library(error.name, f"weightlift.{name}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


_enable_from_environment()
