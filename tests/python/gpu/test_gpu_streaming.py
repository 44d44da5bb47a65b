"""Streaming to a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightlift as wl

pytestmark = pytest.mark.gpu

WIDTH, LAYERS = 256, 12


def stack() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).eval()


@pytest.mark.parametrize("source", ["file", "host"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_is_the_whole_model(tmp_path: Path, source: str, dtype: torch.dtype | None) -> None:
    original = stack()
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    x = torch.randn(4, WIDTH, device="cuda", dtype=dtype)
    if source == "file":
        with torch.device("meta"):
            model = stack()
    else:
        model = stack()
        model.load_state_dict(original.state_dict())
    checkpoint = tmp_path / "model.safetensors" if source == "file" else None
    size = sum(p.numel() for p in original.parameters()) * (dtype or torch.float32).itemsize
    with (
        torch.no_grad(),
        wl.stream(model, checkpoint, device="cuda", memory=size // 2, dtype=dtype) as handle,
    ):
        assert handle.streamed_bytes
        results = [model(x) for _ in range(20)]  # the host is ahead of the device
        expected = original.to("cuda", dtype)(x)
        assert all(torch.equal(result, expected) for result in results)
    assert {p.device.type for p in model.parameters()} == {"meta" if source == "file" else "cpu"}
