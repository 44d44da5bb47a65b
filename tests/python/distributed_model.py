"""A model class that ranks of a test can import."""

from __future__ import annotations

import torch

import weightlift as wl


class Feed(wl.ModelMixin, wl.ConfigMixin):
    config_name = "config.json"

    @wl.register_to_config
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = torch.nn.Linear(width, 3 * width)
        self.down = torch.nn.Linear(3 * width, width)
