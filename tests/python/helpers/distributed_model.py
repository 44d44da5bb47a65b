"""Models that ranks of a test can import, and the examples of README.md."""

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


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(8, 24)
        self.down = torch.nn.Linear(24, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(x + self.down(torch.relu(self.up(x)))) * self.scale
        return out


class Net(torch.nn.Module):
    """No dimension of the embedding and the head is a multiple of a world's size."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(13, 8)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.head = torch.nn.Linear(8, 3)  # fewer rows than ranks

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(x)
        return out


class MyModel(wl.ModelMixin, wl.ConfigMixin):
    config_name = "config.json"

    @wl.register_to_config
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(layers))
