"""One rank of tensor-parallel vLLM on the CPU: compares all parameters by vLLM's loader and by
weightlift's.

Run `compare_ranks.py RANK RANKS RENDEZVOUS MODEL...` for all ranks at the same time. It compares
the bytes of all parameters and buffers after vLLM has processed them; with slices, it also checks
that not more bytes are read than the parameters have. Then it does the same for the second
checkpoint of each model, which `reload_weights` loads in place, as after a sleep of level 2.
"""

# ruff: noqa: E402 -- vLLM reads the environment when it is imported

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from parameters import differences, tensors_of

torch.accelerator.empty_cache = lambda: None  # it raises an error without an accelerator
# Without AMX vLLM has no kernel for float8 in blocks; nothing is computed here.
torch.cpu._is_amx_tile_supported = lambda: True

from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, get_model_loader
from vllm.model_executor.model_loader.reload import inplace
from vllm.plugins import load_general_plugins

import weightlift

WAYS: list[dict[str, bool]] = [{}, {"slices": False}, {"share": True}]
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")


class Rank:
    def __init__(self, rank: int, ranks: int, rendezvous: str) -> None:
        self.rank, self.ranks, self.rendezvous = rank, ranks, rendezvous
        self.begun = False

    def config(self, model: str, load_format: str, extra: dict[str, bool], **options: Any) -> Any:
        config = EngineArgs(
            model=model,
            load_format=load_format,
            model_loader_extra_config=extra,
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=128,
            dtype="bfloat16",
            **options,
        ).create_engine_config()
        config.parallel_config.tensor_parallel_size = self.ranks
        return config

    def begin(self) -> None:
        """Once, within a configuration."""
        if not self.begun:
            init_distributed_environment(
                self.ranks, self.rank, f"file://{self.rendezvous}", self.rank, "gloo"
            )
            initialize_model_parallel(self.ranks, 1)
            self.begun = True

    def load(self, config: Any) -> tuple[Any, Any, int]:
        """(model, its loader, bytes of its parameters when they were loaded)."""
        self.begin()
        loader = get_model_loader(config.load_config)
        size = 0
        original = loader.load_weights

        def load_weights(module: Any, model_config: Any) -> None:
            nonlocal size
            original(module, model_config)
            size = sum(p.numel() * p.element_size() for p in module.parameters())

        loader.load_weights = load_weights
        module = loader.load_model(vllm_config=config, model_config=config.model_config)
        return module, loader, size


def reloaded(module: Any, config: Any, path: str) -> int:
    """Bytes that ``reload_weights`` reads, by weightlift's loader."""
    before = weightlift.stats().read_bytes
    inplace.reload_weights(config, module, None, path, True)
    return weightlift.stats().read_bytes - before


def compare(rank: Rank, model: str, **options: Any) -> tuple[list[str], Callable[[], list[str]]]:
    """(the differences, a function that compares after another load)."""
    stock = rank.config(model, "auto", {}, **options)
    with set_current_vllm_config(stock):
        wanted, _, _ = rank.load(stock)
    faults = []
    ours: list[tuple[dict[str, bool], Any, Any, int]] = []
    shrunk = "quantization" in options  # layer after layer, while they were loaded
    for extra in WAYS:
        config = rank.config(model, "weightlift", extra, **options)
        with set_current_vllm_config(config):
            found, loader, needed = rank.load(config)
        if wrong := differences(tensors_of(found), tensors_of(wanted)):
            faults.append(f"{model} {extra}: other bytes in {wrong[:4]}")
        report = loader._reader.report
        if not extra and not shrunk and report.bytes > needed * 1.02:
            faults.append(f"{model}: {report.bytes} bytes for {needed} of parameters")
        if extra.get("share"):  # one rank reads tensors that all need whole
            read = torch.tensor([report.read_bytes, ours[0][3]])
            torch.distributed.all_reduce(read)
            if rank.ranks > 1 and int(read[0]) >= int(read[1]):
                faults.append(f"{model}: {read[0]} bytes read by all, {read[1]} without sharing")
        print(
            f"rank {rank.rank} of {rank.ranks}: {Path(model).name} {options or ''} "
            f"{extra or 'slices'}: {len(tensors_of(wanted))} tensors, {report.bytes} bytes "
            f"(with holes {report.read_bytes}) of {loader._reader.offered} for {needed}",
            flush=True,
        )
        ours.append((extra, found, config, report.read_bytes))
    # Layer by layer, fewer gaps between tensors are read.
    same = not shrunk
    return faults, lambda: compare_again(rank, f"{model}.again", wanted, stock, ours, same=same)


def compare_again(
    rank: Rank, path: str, wanted: Any, stock: Any, ours: list[Any], *, same: bool
) -> list[str]:
    """``reload_weights`` of another checkpoint, as after a sleep of level 2; ``same``: it must read
    as many bytes as the first load."""
    try:
        with set_current_vllm_config(stock):
            inplace.reload_weights(stock, wanted, None, path, True)
    except Exception as error:
        print(f"rank {rank.rank} of {rank.ranks}: vLLM cannot reload {path}: {error!r}", flush=True)
        return []
    faults = []
    for extra, found, config, first in ours:
        with set_current_vllm_config(config):
            read = reloaded(found, config, path)
        if wrong := differences(tensors_of(found), tensors_of(wanted)):
            faults.append(f"{path} {extra}: other bytes in {wrong[:4]} when it is loaded again")
        if same and not extra and read != first:
            faults.append(f"{path}: {read} bytes again, {first} at first")
        print(
            f"rank {rank.rank} of {rank.ranks}: {Path(path).name} {extra or 'slices'}: "
            f"{read} bytes",
            flush=True,
        )
    return faults


def main() -> None:
    load_general_plugins()
    assert "weightlift" in _LOAD_FORMAT_TO_MODEL_LOADER, "the entry point has not registered"
    rank = Rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    faults: list[str] = []
    later = []
    for model in sys.argv[4:]:
        ways: list[dict[str, bool]] = [{}]
        if rank.ranks > 1 and Path(model).name in EXPERTS:
            ways.append({"enable_expert_parallel": True})
            ways.append({"enable_expert_parallel": True, "enable_ep_weight_filter": True})
        if Path(model).name == "llama":  # online: layers are made while their tensors come
            ways.append({"quantization": "fp8_per_channel"})
        for options in ways:
            found, again = compare(rank, model, **options)
            faults += found
            later.append(again)
    for again in later:  # a model that vLLM cannot reload affects later ones
        faults += again()
    print("\n".join(faults) or f"rank {rank.rank} of {rank.ranks}: all equal", flush=True)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
