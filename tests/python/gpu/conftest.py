"""What all GPU tests need: a GPU."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("WEIGHTLIFT_REQUIRE_GPU"):
        pytest.fail("no GPU, and WEIGHTLIFT_REQUIRE_GPU is set")
    pytest.skip("needs an NVIDIA GPU; run by `make gpu-check`")
