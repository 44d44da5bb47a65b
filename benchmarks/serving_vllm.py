"""Compares vLLM's own loader with weightlift on the CPU: seconds and bytes of ``load_weights``.

Run `serving_vllm.py RANK RANKS RENDEZVOUS FOLDER [ROUNDS]` in the environment of tests/serving, for
all ranks at the same time. The models go to FOLDER. Warm loads are interleaved, and the median of
the ratios counts. For cold loads, the files are dropped from the page cache before each load, and
the bytes are those from the device (/proc/self/io), which are 0 if the file system keeps its files
in memory.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "serving"))

import compare_ranks
import make_models
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader import get_model_loader
from vllm.plugins import load_general_plugins
from vllm.utils.torch_utils import set_default_torch_dtype

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**LARGE, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "llama": ("Llama", {**LARGE, "num_hidden_layers": 16, "vocab_size": 32000}),
    "qwen3": ("Qwen3", {**LARGE, "head_dim": 256, "vocab_size": 32000}),
}
FORMATS = ("auto", "weightlift")


def drop(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def from_the_device() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def load(rank: compare_ranks.Rank, folder: Path, load_format: str) -> tuple[float, int]:
    """(seconds, bytes from the device) of ``load_weights``."""
    config = rank.config(str(folder), load_format, {})
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        rank.begin()
        loader = get_model_loader(config.load_config)
        model = loader.create_model(vllm_config=config, model_config=config.model_config)
        for parameter in model.parameters():
            parameter.data.zero_()  # backs its memory
        torch.distributed.barrier()
        before, begun = from_the_device(), time.perf_counter()
        loader.load_weights(model, config.model_config)
        return time.perf_counter() - begun, from_the_device() - before


def measure(rank: compare_ranks.Rank, folder: Path, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"model": folder.name, "ranks": rank.ranks, "rank": rank.rank}
    for load_format in FORMATS:
        gc.collect()  # mapped pages are not dropped
        with set_current_vllm_config(rank.config(str(folder), load_format, {})):
            rank.begin()
        torch.distributed.barrier()
        if rank.rank == 0:
            drop(folder)
        seconds, count = load(rank, folder, load_format)
        found[f"cold {load_format}"] = {"seconds": round(seconds, 3), "device_bytes": count}
    times: dict[str, list[float]] = {load_format: [] for load_format in FORMATS}
    for _ in range(rounds):
        for load_format in FORMATS:
            times[load_format].append(load(rank, folder, load_format)[0])
    for load_format in FORMATS:
        found[f"warm {load_format}"] = round(statistics.median(times[load_format]), 4)
    ratios = [a / w for a, w in zip(times["auto"], times["weightlift"], strict=True)]
    found["auto_over_weightlift"] = round(statistics.median(ratios), 2)
    return found


def main() -> None:
    load_general_plugins()
    rank = compare_ranks.Rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    folder = Path(sys.argv[4])
    rounds = int(sys.argv[5]) if len(sys.argv) > 5 else 7
    for name, (kind, options) in MODELS.items():
        path = folder / name
        if not (path / "config.json").exists():
            if rank.rank:
                sys.exit("run it with one rank first: it makes the models")
            make_models.make(path, kind, options, max_shard_size="200MB")
        print(json.dumps(measure(rank, path, rounds)), flush=True)


if __name__ == "__main__":
    main()
