"""On a real GPU: loads of the transformers backend, compared with the library without it.

Run by `make gpu-check`, which sets WEIGHTLIFT_REQUIRE_GPU so that a missing GPU fails.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import weightlift as wl
from transformers_models import CALLER, CAUSAL, LLAMA, both, made, transformers

__all__ = ["made"]

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("device_map", ["cuda", "auto", {"": 0}])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "tied", "mixtral"])
def test_language_models(made: Callable[..., Path], name: str, dtype: str, device_map: Any) -> None:
    ours, _ = both(CAUSAL, made(name), device_map=device_map, dtype=dtype)
    assert ours.model.device.type == "cuda"
    report = wl.last_report()
    assert report is not None
    assert report.devices == {"cuda:0": report.bytes}


def test_what_the_library_converts(made: Callable[..., Path]) -> None:
    both(transformers.AutoModel, made("dinov2"), device_map="cuda")


def test_parts_on_the_host(made: Callable[..., Path]) -> None:
    device_map = {"model": 0, "model.layers.1": "cpu", "lm_head": "cpu"}
    both(CAUSAL, made("llama"), device_map=device_map, dtype="bfloat16")


def test_device_memory_is_reserved_once(tmp_path: Path) -> None:
    """The library's warm-up reserves the model's bytes, and the engine's allocations would be
    extra."""
    config = transformers.LlamaConfig(**{**LLAMA, "hidden_size": 1024, "vocab_size": 64_000})
    with torch.device("cuda"):
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with wl.enabled(CALLER):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        model = CAUSAL.from_pretrained(tmp_path, device_map="cuda")
        held = torch.cuda.memory_reserved() - before
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    assert nbytes > 500 << 20
    assert held < nbytes + (64 << 20)
