"""Small model classes, each written once and derived from either library's base classes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

import weightlift as wl


class Scale(nn.Parameter):
    """A parameter of a subclass, which has more than its values."""

    axis: int

    def __new__(cls, data: torch.Tensor, requires_grad: bool = True, axis: int = 0) -> Scale:
        made = super().__new__(cls, data, requires_grad)
        made.axis = axis
        return made


class Setter(nn.Module):
    """A module with a method for memory-efficient attention."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[bool, Any]] = []
        self.inner = nn.Identity()

    def set_use_memory_efficient_attention_xformers(self, valid: bool, op: Any = None) -> None:
        self.told.append((valid, op))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(nn.functional.silu(self.norm(x)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.ModuleList([nn.Linear(width, 3 * width), nn.Linear(width, width)])
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        into, out = self.attention
        query, key, value = into(self.norm(x)).chunk(3, dim=-1)
        y = x + out(nn.functional.scaled_dot_product_attention(query, key, value))
        return y + self.mlp(y)


class Former(nn.Module):
    """An attention block that may be in a checkpoint under the names of diffusers before 0.16."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._from_deprecated_attn_block = True
        self.group_norm = nn.GroupNorm(2, width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.1)])


def classes(model: Any, config: Any, register: Callable[..., Any]) -> SimpleNamespace:
    """The classes, derived from one library's ``ModelMixin`` and ``ConfigMixin``."""

    class UNet(model, config):
        """Convolutions and normalisation, down and up again."""

        _supports_gradient_checkpointing = True
        _no_split_modules: ClassVar = ["Residual"]

        @register
        def __init__(self, channels=(4, 8), in_channels=3, layers=1) -> None:
            super().__init__()
            self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
            self.down = nn.ModuleList()
            for narrow, wide in itertools.pairwise(channels):
                self.down.extend([Residual(narrow) for _ in range(layers)])
                self.down.append(nn.Conv2d(narrow, wide, 3, stride=2, padding=1))
            self.middle = Residual(channels[-1])
            self.batch_norm = nn.BatchNorm2d(channels[-1])
            self.up = nn.ConvTranspose2d(channels[-1], channels[0], 2, stride=2)
            self.conv_out = nn.Conv2d(channels[0], in_channels, 1, bias=False)

        def forward(self, x):
            x = self.conv_in(x)
            for layer in self.down:
                x = layer(x)
            return self.conv_out(self.up(self.batch_norm(self.middle(x))))

    class Transformer(model, config):
        """Tied embeddings."""

        _no_split_modules: ClassVar = ["Block"]

        @register
        def __init__(self, width=8, words=11, depth=2) -> None:
            super().__init__()
            self.embedding = nn.Embedding(words, width)
            self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, words, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    class Buffers(model, config):
        """No parameters at all."""

        _no_split_modules: ClassVar = []

        @register
        def __init__(self, length=5) -> None:
            super().__init__()
            self.register_buffer("steps", torch.arange(length))
            self.register_buffer("betas", torch.linspace(0, 1, length))
            self.register_buffer("mask", torch.arange(length) > 2)
            self.register_buffer("none", None)

        def forward(self, x):
            return x * self.betas + self.steps

    class Mixed(model, config):
        """Some weights stay in float32."""

        _keep_in_fp32_modules: ClassVar = ["norm", "scale"]
        _no_split_modules: ClassVar = []

        @register
        def __init__(self, width=4) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.normal = nn.Linear(width, width)
            self.inner = nn.ModuleDict({"norm": nn.LayerNorm(width), "linear": nn.Linear(width, 2)})
            self.scale = nn.Parameter(torch.ones(width))
            self.register_buffer("shift", torch.randn(width))

        def forward(self, x):
            x = self.normal(self.norm(x.float()).to(self.normal.weight.dtype))
            return self.inner["linear"](x)

    class Nested(model, config):
        """Values within values in the config."""

        _no_split_modules: ClassVar = []

        @register
        def __init__(self, stages=({"width": 3, "acts": ["relu"]},), ends=None, eps=1e-5) -> None:
            super().__init__()
            widths = [stage["width"] for stage in stages] + [(ends or {}).get("width", 2)]
            self.steps = nn.ModuleDict(
                {
                    f"step{n}": nn.Linear(first, second)
                    for n, (first, second) in enumerate(itertools.pairwise(widths))
                }
            )

        def forward(self, x):
            for step in self.steps.values():
                x = step(x)
            return x

    class Deprecating(model, config):
        """An argument that was renamed."""

        _deprecated_kwargs: ClassVar = ["size"]
        _no_split_modules: ClassVar = []

        @register
        def __init__(self, width=3, **kwargs) -> None:
            super().__init__()
            width = kwargs.pop("size", None) or width
            self.register_to_config(width=width)
            self.linear = nn.Linear(width, width)

        def forward(self, x):
            return self.linear(x)

    class Tolerant(model, config):
        """Checkpoints may have more tensors than it needs."""

        _keys_to_ignore_on_load_unexpected: ClassVar = [r"^extra\.", r"_ids$"]
        _no_split_modules: ClassVar = []

        @register
        def __init__(self, width=3) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width)

        def forward(self, x):
            return self.linear(x)

    class Direct(model, config):
        """Parameters that are made here, of several kinds."""

        _no_split_modules: ClassVar = []

        @register
        def __init__(self, width=4) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(2, width) / width**0.5)
            self.zero = nn.Parameter(torch.zeros(width))
            self.scalar = nn.Parameter(torch.tensor(math.pi))
            self.empty = nn.Parameter(torch.empty(0, width))
            self.frozen = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)
            self.several = nn.ParameterList([torch.randn(2), torch.randn(3)])
            self.none = nn.Parameter(torch.ones(1)) if width < 0 else None

        def forward(self, x):
            return self.table @ x + self.scalar

    class Recurrent(model, config):
        """Modules that also keep lists of their weights."""

        _no_split_modules: ClassVar = []

        @register
        def __init__(self, width=3) -> None:
            super().__init__()
            self.lstm = nn.LSTM(width, width, 2, bidirectional=True)
            self.gru = nn.GRU(2 * width, width)

        def forward(self, x):
            return self.gru(self.lstm(x)[0])[0]

    class Rotary(model, config):
        """Buffers that are computed and not saved."""

        _no_split_modules: ClassVar = []

        @register
        def __init__(self, width=4, base=100.0) -> None:
            super().__init__()
            frequencies = base ** -(torch.arange(width) / width)
            self.register_buffer("frequencies", frequencies, persistent=False)
            self.register_buffer("count", torch.tensor(7), persistent=True)
            self.linear = nn.Linear(width, width)
            self.attribute = torch.arange(width)

        def forward(self, x):
            return self.linear(x * self.frequencies)

    class Own(model, config):
        """Parameters of a subclass, and parametrised ones."""

        _no_split_modules: ClassVar = []

        @register
        def __init__(self, width=4) -> None:
            super().__init__()
            self.scale = Scale(torch.randn(width), axis=1)
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 3))

        def forward(self, x):
            return self.conv(x)

    class Whole(model, config):
        """A model inside a model, a module in two places, modules with xFormers methods."""

        _no_split_modules: ClassVar = ["Transformer"]

        @register
        def __init__(self, width=8, words=5) -> None:
            super().__init__()
            self.text = Transformer(width=width, words=words, depth=1)
            self.first = Block(width)
            self.again = nn.ModuleList([self.first])
            self.hearing = nn.Sequential(Setter(), nn.Sequential(Setter()))
            self.one = self.other = nn.Parameter(torch.randn(3))

        def forward(self, tokens):
            return self.text.head(self.first(self.text.embedding(tokens)))

    class Aged(model, config):
        """Old checkpoints have other names for it."""

        _no_split_modules: ClassVar = []

        @register
        def __init__(self, width=4) -> None:
            super().__init__()
            self.attention = Former(width)
            self.inner = nn.ModuleList([Former(width)])

    return SimpleNamespace(**{name: made for name, made in locals().items() if name[0].isupper()})


OURS = classes(wl.ModelMixin, wl.ConfigMixin, wl.register_to_config)
THEIRS = classes(diffusers.ModelMixin, diffusers.ConfigMixin, register_to_config)

# Class, arguments, and what its forward takes.
MADE: dict[str, tuple[dict[str, Any], torch.Tensor | None]] = {
    "UNet": ({"channels": [4, 6, 8]}, torch.ones(2, 3, 16, 16)),
    "Transformer": ({"words": 13}, torch.arange(6).reshape(2, 3)),
    "Buffers": ({"length": 6}, torch.ones(6)),
    "Mixed": ({}, torch.ones(2, 4)),
    "Nested": (
        {"stages": [{"width": 3, "acts": ["relu", None]}, {"width": 5}], "ends": {"width": 4}},
        torch.ones(2, 3),
    ),
    "Deprecating": ({"size": 5}, torch.ones(2, 5)),
    "Tolerant": ({"width": 2}, torch.ones(2, 2)),
    "Direct": ({"width": 3}, torch.ones(3)),
    "Recurrent": ({}, torch.ones(2, 1, 3)),
    "Rotary": ({"base": 10.0}, torch.ones(2, 4)),
    "Own": ({}, torch.ones(1, 2, 8)),
    "Whole": ({}, torch.arange(3).reshape(1, 3)),
    "Aged": ({}, None),
}
# Models whose tensors share memory, which diffusers saves only as .bin.
TIED = ("Transformer", "Whole")


def made(library: SimpleNamespace, name: str, **more: Any) -> Any:
    """A model with other values than those that ``__init__`` gives it."""
    model = getattr(library, name)(**{**MADE[name][0], **more})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():  # positive, for they may be variances
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
            elif tensor.dtype != torch.bool:
                tensor += 3
    return model
