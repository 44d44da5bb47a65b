"""weightlift loads model weights as fast as the hardware allows.

import weightlift as wl

tensors = wl.load_file("model.safetensors", device="cuda")
print(wl.last_report())
"""

import importlib as _importlib
from typing import TYPE_CHECKING, Any

from weightlift.backends import disable, enable, enable_from_environment, enabled
from weightlift.checkpoint import Checkpoint, open_checkpoint
from weightlift.errors import (
    ArgumentError,
    CheckpointError,
    DeviceError,
    FormatError,
    OutOfMemoryError,
    ReadError,
    WeightliftError,
)
from weightlift.files import load_checkpoint, load_file, load_state_dict, safe_open, save_file
from weightlift.modules import load_into
from weightlift.report import LoadReport, Stats, last_report, stats
from weightlift.settings import Settings

if TYPE_CHECKING:
    from weightlift.models.config_mixin import ConfigMixin, register_to_config
    from weightlift.models.hub_mixin import PushToHubMixin
    from weightlift.models.model_mixin import (
        ModelMixin,
        get_parameter_device,
        get_parameter_dtype,
    )

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Checkpoint",
    "CheckpointError",
    "ConfigMixin",
    "DeviceError",
    "FormatError",
    "LoadReport",
    "ModelMixin",
    "OutOfMemoryError",
    "PushToHubMixin",
    "ReadError",
    "Settings",
    "Stats",
    "WeightliftError",
    "__version__",
    "disable",
    "enable",
    "enabled",
    "get_parameter_device",
    "get_parameter_dtype",
    "last_report",
    "load_checkpoint",
    "load_file",
    "load_into",
    "load_state_dict",
    "open_checkpoint",
    "register_to_config",
    "safe_open",
    "save_file",
    "stats",
]

# Imported when they are asked for: they need torch, which the rest does without until it loads.
_LATER = {
    "ConfigMixin": "config_mixin",
    "register_to_config": "config_mixin",
    "PushToHubMixin": "hub_mixin",
    "ModelMixin": "model_mixin",
    "get_parameter_device": "model_mixin",
    "get_parameter_dtype": "model_mixin",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_importlib.import_module(f"weightlift.models.{_LATER[name]}"), name)
    globals()[name] = value
    return value


enable_from_environment()
