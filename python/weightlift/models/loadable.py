"""The interface of a model's class that ``from_pretrained`` uses."""

from __future__ import annotations

from typing import ClassVar

import torch

from weightlift.models.config_mixin import ConfigMixin

__all__ = ["LoadableModel"]


class LoadableModel(torch.nn.Module, ConfigMixin):
    """For the type checker: a class that derives from ``ModelMixin`` and ``ConfigMixin``, of this
    package or of diffusers.

    Attributes:
        config_name: the name of the configuration's file.
        _keys_to_ignore_on_load_unexpected: patterns of names that may be in a checkpoint.
        _keep_in_fp32_modules: components of names whose tensors stay in float32.
    """

    config_name: ClassVar[str | None] = "config.json"
    _keys_to_ignore_on_load_unexpected: list[str] | None = None
    _keep_in_fp32_modules: list[str] | None = None
