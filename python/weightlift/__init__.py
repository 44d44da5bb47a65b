"""weightlift loads model weights as fast as the hardware allows.

import weightlift as wl

tensors = wl.load_file("model.safetensors", device="cuda")
print(wl.last_report())
"""

from weightlift.backends import disable, enable, enable_from_environment, enabled
from weightlift.checkpoint import Checkpoint
from weightlift.errors import (
    ArgumentError,
    CheckpointError,
    DeviceError,
    FormatError,
    OutOfMemoryError,
    ReadError,
    WeightliftError,
)
from weightlift.files import load_file, safe_open, save_file
from weightlift.report import LoadReport, Stats, last_report, stats
from weightlift.settings import Settings

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Checkpoint",
    "CheckpointError",
    "DeviceError",
    "FormatError",
    "LoadReport",
    "OutOfMemoryError",
    "ReadError",
    "Settings",
    "Stats",
    "WeightliftError",
    "__version__",
    "disable",
    "enable",
    "enabled",
    "last_report",
    "load_file",
    "safe_open",
    "save_file",
    "stats",
]

enable_from_environment()
