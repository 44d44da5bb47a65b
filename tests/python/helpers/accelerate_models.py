"""A model for accelerate in every form of checkpoint; calls with the backend and without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import safetensors.torch
import torch
from accelerate.utils import OffloadedWeightsLoader

import weightlift as wl
from support import bits

CALLER = "accelerate"


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(8, 16)
        self.norm = torch.nn.BatchNorm1d(16)
        self.down = torch.nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)))


class Shift(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("by", torch.zeros(8))
        self.register_buffer("own", torch.arange(8.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.by + self.own.to(x.dtype)  # no load casts it


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 8)
        self.blocks = torch.nn.ModuleList([Block() for _ in range(3)])
        self.head = torch.nn.Linear(8, 10, bias=False)
        self.scale = torch.nn.Parameter(torch.ones(8), requires_grad=False)
        self.shift = Shift()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shift(self.embed(x) * self.scale)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Tied(Model):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
        if tensor.is_floating_point()
        else torch.full_like(tensor, 7)
        for name, tensor in Model().state_dict().items()
    }


def write(folder: Path, form: str, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A checkpoint in one of the forms that accelerate reads; returns what to pass."""
    tensors = weights() if tensors is None else tensors
    folder.mkdir()
    kind, sharded = form.removesuffix("-sharded"), form.endswith("-sharded")

    def save(part: dict[str, torch.Tensor], path: Path) -> None:
        if kind == "safetensors":
            safetensors.torch.save_file(part, path, {"format": "pt"})
        else:
            torch.save(part, path)

    stem, extension = {
        "safetensors": ("model", "safetensors"),
        "bin": ("pytorch_model", "bin"),
    }[kind]
    if not sharded:
        save(tensors, folder / f"{stem}.{extension}")
        return folder
    names = list(tensors)
    weight_map = {}
    for number in range(3):
        file = f"{stem}-{number + 1:05}-of-00003.{extension}"
        part = {name: tensors[name] for name in names[number::3]}
        save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = folder / f"{stem}.{extension}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


FORMS = ["safetensors", "safetensors-sharded", "bin", "bin-sharded"]
MAPS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "cpu": {"": "cpu"},
    "parts": {
        "embed": "cpu", "blocks.0": "cpu", "blocks.1": "cpu", "blocks.2": "cpu",
        "head": "cpu", "scale": "cpu", "shift": "cpu",
    },
    "disk": {
        "embed": "cpu", "blocks.0": "disk", "blocks.1": "cpu", "blocks.2": "disk",
        "head": "disk", "scale": "cpu", "shift": "cpu",
    },
}  # fmt: skip
ON_DISK = ("blocks.0", "blocks.2", "head")
DTYPES = [None, "float16", torch.bfloat16]


def build(meta: bool, kind: type[Model] = Model) -> Model:
    torch.manual_seed(1)
    if meta:
        with accelerate.init_empty_weights():
            return kind()
    return kind()


def describe(tensor: torch.Tensor) -> tuple[Any, ...]:
    data = None if tensor.device.type == "meta" else bits(tensor)
    return (
        type(tensor), tensor.dtype, tuple(tensor.shape), tensor.device, tensor.requires_grad, data,
    )  # fmt: skip


def describe_all(model: torch.nn.Module) -> dict[str, Any]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: describe(tensor) for name, tensor in tensors}


def offloaded(folder: Path | None) -> dict[str, Any]:
    """The tensors that accelerate would read from an offload folder."""
    if folder is None or not (folder / "index.json").exists():
        return {}
    found = OffloadedWeightsLoader(save_folder=folder)
    return {name: found[name] for name in found}


def outcomes(call: Callable[[Path], Any], tmp_path: Path) -> tuple[Any, Any]:
    """The results of a call without and with the backend, each with its own folder."""

    def outcome(folder: Path) -> Any:
        try:
            return call(folder)
        except Exception as error:
            return type(error), str(error).replace(str(folder), "")

    stock = outcome(tmp_path / "stock")
    with wl.enabled(CALLER):
        return stock, outcome(tmp_path / "ours")
