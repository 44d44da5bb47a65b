"""A rank of tensor parallel vLLM on the CPU: every parameter by the stock loader and by ours.

`compare_ranks.py RANK RANKS RENDEZVOUS MODEL...`, for each rank at the same time. Compared are the
bytes of all parameters and buffers after vLLM has processed them; of slices, also that no more is
read than the parameters take. Then the same again for the second checkpoint of each model, which
`reload_weights` loads in place, as after a sleep of level 2.
"""

# ruff: noqa: E402 -- vLLM reads the environment when it is imported

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.accelerator.empty_cache = lambda: None  # it raises where there is no accelerator
# Without AMX vLLM has no kernel for float8 in blocks; nothing is computed here.
torch.cpu._is_amx_tile_supported = lambda: True

from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, get_model_loader
from vllm.plugins import load_general_plugins

WAYS: list[dict[str, bool]] = [{}, {"slices": False}]


class Rank:
    def __init__(self, rank: int, ranks: int, rendezvous: str) -> None:
        self.rank, self.ranks, self.rendezvous = rank, ranks, rendezvous
        self.begun = False

    def load(self, model: str, load_format: str, extra: dict[str, bool]) -> tuple[Any, Any, int]:
        """(model, its loader, bytes of its parameters when they were loaded)."""
        config = EngineArgs(
            model=model,
            load_format=load_format,
            model_loader_extra_config=extra,
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=128,
            dtype="bfloat16",
        ).create_engine_config()
        config.parallel_config.tensor_parallel_size = self.ranks
        with set_current_vllm_config(config):
            if not self.begun:
                init_distributed_environment(
                    self.ranks, self.rank, f"file://{self.rendezvous}", self.rank, "gloo"
                )
                initialize_model_parallel(self.ranks, 1)
                self.begun = True
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


def tensors_of(module: Any) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def compare(rank: Rank, model: str) -> list[str]:
    wanted, _, _ = rank.load(model, "auto", {})
    faults = []
    for extra in WAYS:
        found, loader, needed = rank.load(model, "weightlift", extra)
        ours, theirs = tensors_of(found), tensors_of(wanted)
        wrong = sorted(ours.keys() ^ theirs.keys())
        wrong += [n for n in theirs if not torch.equal(bytes_of(ours[n]), bytes_of(theirs[n]))]
        if wrong:
            faults.append(f"{model} {extra}: other bytes in {wrong[:4]}")
        report = loader._reader.report
        if not extra and report.bytes > needed * 1.02:
            faults.append(f"{model}: {report.bytes} bytes for {needed} of parameters")
        print(
            f"rank {rank.rank} of {rank.ranks}: {Path(model).name} {extra or 'slices'}: "
            f"{len(theirs)} tensors, {report.bytes} bytes of {loader._reader.offered} for {needed}",
            flush=True,
        )
    return faults


def main() -> None:
    load_general_plugins()
    assert "weightlift" in _LOAD_FORMAT_TO_MODEL_LOADER, "the entry point has not registered"
    rank = Rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    faults = [fault for model in sys.argv[4:] for fault in compare(rank, model)]
    print("\n".join(faults) or f"rank {rank.rank} of {rank.ranks}: all equal", flush=True)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
