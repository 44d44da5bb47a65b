"""SGLang's own loader and hooks, on the CPU: `sglang_loader.py WAY FOLDER`, WAY slices or whole.

A rank of two of a small model is filled by SGLang's DefaultModelLoader, then by the same with the
hooks of weightlift, which SGLang finds by its entry point; the bytes are compared.
"""

# ruff: noqa: E402 -- torchvision's operators are built for CUDA; SGLang imports what names them

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")

from safetensors.torch import save_file
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

import weightlift


class Rank(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Parameter(torch.zeros(96, 64), requires_grad=False)
        self.down = torch.nn.Parameter(torch.zeros(64, 96, dtype=torch.bfloat16))
        self.experts = torch.nn.Parameter(torch.zeros(4, 32, 64), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name[0] in "qkv":
                at = "qkv".index(name[0]) * 32
                self.qkv.data[at : at + 32].copy_(tensor[32:])
            elif name == "down":
                self.down.data.copy_(tensor.narrow(1, 96, 96))
            elif name.startswith("experts."):
                self.experts.data[int(name.split(".")[1])].copy_(tensor.narrow(0, 32, 32))
            else:
                self.scale.data.fill_(tensor.item())


def write(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (64, 64), "k": (64, 64), "v": (64, 64), "down": (64, 192), "scale": ()}
    shapes.update({f"experts.{i}": (64, 64) for i in range(4)})
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    names = sorted(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    # SGLang's arguments want some model's configuration.
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    for number in range(2):
        part = {name: tensors[name] for name in names[number::2]}
        save_file(part, folder / f"model-{number + 1:05}-of-00002.safetensors")


def load(folder: Path) -> Rank:
    model = Rank()
    loader = DefaultModelLoader(LoadConfig())
    model_config: Any = SimpleNamespace(
        model_path=str(folder), revision=None, hf_config=SimpleNamespace(), quantization=None
    )
    weights = loader._get_all_weights(model_config, model)
    DefaultModelLoader.load_weights_and_postprocess(model, weights, torch.device("cpu"))
    return model


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    way, folder = sys.argv[1], Path(sys.argv[2])
    write(folder)
    set_global_server_args_for_scheduler(ServerArgs(model_path=str(folder), device="cpu"))
    wanted = load(folder)
    os.environ["WEIGHTLIFT_SGLANG"] = way
    load_plugins()
    before = weightlift.stats().bytes
    found = load(folder)
    read = weightlift.stats().bytes - before
    for (name, left), (_, right) in zip(
        found.named_parameters(), wanted.named_parameters(), strict=True
    ):
        if not torch.equal(left, right):
            sys.exit(f"sglang {way}: other bytes in {name}")
    slices = 3 * 32 * 64 * 4 + 64 * 96 * 4 + 4 * 32 * 64 * 4 + 4
    whole = 7 * 64 * 64 * 4 + 64 * 192 * 4 + 4
    if read != (slices if way == "slices" else whole):
        sys.exit(f"sglang {way}: {read} bytes were read; slices {slices}, whole {whole}")
    print(f"sglang {way}: all equal, {read} bytes of {whole}")


if __name__ == "__main__":
    main()
