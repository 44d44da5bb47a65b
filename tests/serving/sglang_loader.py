"""SGLang's own loader and models, on the CPU: `sglang_loader.py WAY FOLDER MODEL...`.

SGLang's DefaultModelLoader fills each of two ranks of each model, and of a small one made here (WAY
stock). Then, in separate processes, it does so with weightlift's hooks, which SGLang finds by its
entry point (WAY slices or whole). The bytes of all parameters and buffers must be those of the
stock loader, which are kept in FOLDER. The modules are SGLang's own; its kernels, which are
published only for CUDA, are replaced by stubs that nothing calls.
"""

# ruff: noqa: E402 -- SGLang imports kernels, and torchvision's operators, that are built for CUDA

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch

if sys.argv[1] != "stock":
    os.environ["WEIGHTLIFT_SGLANG"] = sys.argv[1]
for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")


class Kernels(MetaPathFinder, Loader):
    """A stub for `sgl_kernel`: the package indexes have none that a CPU can import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "sgl_kernel":
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        def kernel(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return MagicMock(name=name)

        module.__getattr__ = kernel  # type: ignore[method-assign]


sys.meta_path.insert(0, Kernels())

from parameters import differences, tensors_of
from safetensors.torch import save_file
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import get_parallel
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
    # SGLang's arguments need the configuration of a model.
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


def group(rank: int, size: int) -> Any:
    """A group of ranks that need not communicate."""
    return SimpleNamespace(
        rank_in_group=rank,
        world_size=size,
        ranks=list(range(size)),
        is_first_rank=rank == 0,
        is_last_rank=rank == size - 1,
        cpu_group=None,
        device_group=None,
    )


def load_model(folder: Path, rank: int) -> Any:
    """A model of SGLang's, one rank of two."""
    arguments = ServerArgs(
        model_path=str(folder), device="cpu", tp_size=2, dtype="bfloat16", skip_tokenizer_init=True
    )
    set_global_server_args_for_scheduler(arguments)
    alone, both = group(0, 1), group(rank, 2)
    ranks = dict.fromkeys(("tp_rank", "attn_tp_rank", "moe_tp_rank"), rank)
    others = ("pp_rank", "moe_ep_rank", "attn_dp_rank", "attn_cp_rank")
    groups = dict.fromkeys(("tp_group", "attn_tp_group", "moe_tp_group"), both)
    none = dict.fromkeys(("pp_group", "moe_ep_group", "attn_cp_group"), alone)
    with get_parallel().override(**ranks, **dict.fromkeys(others, 0), **groups, **none):
        return DefaultModelLoader(LoadConfig()).load_model(
            model_config=ModelConfig.from_server_args(arguments),
            device_config=DeviceConfig("cpu", 0),
        )


def plain(model: Any) -> dict[str, torch.Tensor]:
    """Without the classes of SGLang's parameters."""
    return {
        name: tensor.data.as_subclass(torch.Tensor).clone()
        for name, tensor in tensors_of(model).items()
    }


def compare(name: str, found: Any, wanted: dict[str, torch.Tensor]) -> None:
    if wrong := differences(tensors_of(found), wanted):
        sys.exit(f"sglang {name}: other bytes in {wrong[:4]}")


def compare_models(way: str, folders: list[Path], wanted: dict[str, Any]) -> None:
    """What the hooked loader makes, and the bytes that it reads."""
    for folder in folders:
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for rank in range(2):
            name = f"{folder.name}, rank {rank} of 2"
            before = weightlift.stats().bytes
            found = load_model(folder, rank)
            read = weightlift.stats().bytes - before
            compare(f"{way}: {name}", found, wanted[name])
            needed = sum(p.nbytes for p in found.parameters())
            if not read or (way == "slices" and read > needed * 1.02):
                sys.exit(f"sglang {way}: {name}: {read} bytes for {needed}")
            print(f"sglang {way}: {name}: {read} bytes of {stored}, for {needed}", flush=True)


def compare_own(way: str, folder: Path, wanted: dict[str, Any]) -> None:
    """The small model, whose slices are known."""
    before = weightlift.stats().bytes
    found = load(folder)
    read = weightlift.stats().bytes - before
    compare(way, found, wanted["own"])
    slices = 3 * 32 * 64 * 4 + 64 * 96 * 4 + 4 * 32 * 64 * 4 + 4
    whole = 7 * 64 * 64 * 4 + 64 * 192 * 4 + 4
    if read != (slices if way == "slices" else whole):
        sys.exit(f"sglang {way}: {read} bytes were read; slices {slices}, whole {whole}")
    print(f"sglang {way}: all equal, {read} bytes of {whole}")


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    way, folder, models = sys.argv[1], Path(sys.argv[2]), [Path(path) for path in sys.argv[3:]]
    kept = folder / "stock.pt"
    if way == "stock":
        write(folder)
    load_plugins()
    set_global_server_args_for_scheduler(ServerArgs(model_path=str(folder), device="cpu"))
    if way == "stock":
        stock = {"own": plain(load(folder))}
        for path in models:
            for rank in range(2):
                stock[f"{path.name}, rank {rank} of 2"] = plain(load_model(path, rank))
        torch.save(stock, kept)
        return
    wanted = torch.load(kept)
    compare_own(way, folder, wanted)
    compare_models(way, models, wanted)


if __name__ == "__main__":
    main()
