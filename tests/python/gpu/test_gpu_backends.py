"""On a real GPU: loads of the backends, compared with the libraries without them.

Run by `make gpu-check`, which sets WEIGHTLIFT_REQUIRE_GPU so that a missing GPU fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import safetensors
import safetensors.torch
import torch

import accelerate_models as models
import weightlift as wl
from backend_support import engine_moves, tensor_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The following device_map keys do not match"),
]


def described(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.device.type == "meta":
        return type(tensor), tensor.dtype, tensor.device
    return type(tensor), tensor.dtype, tensor.device, models.describe(tensor.detach().cpu())[-1]


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0])
def test_safetensors(tmp_path: Path, device: str | int) -> None:
    path = models.write(tmp_path / "checkpoint", "safetensors") / "model.safetensors"

    def opened() -> dict[str, torch.Tensor]:
        with safetensors.safe_open(path, "pt", device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def sliced() -> dict[str, torch.Tensor]:
        with safetensors.safe_open(path, "pt", device) as file:
            return {"": file.get_slice("embed.weight")[2:7, :3]}

    for call in (lambda: safetensors.torch.load_file(path, device), opened, sliced):
        expected = {name: described(tensor) for name, tensor in call().items()}
        moved = 5 * 3 * 4 if call is sliced else tensor_bytes(path)
        with wl.enabled("safetensors"), engine_moves(moved, "safetensors"):
            assert {name: described(tensor) for name, tensor in call().items()} == expected


@pytest.mark.parametrize("form", models.FORMS)
@pytest.mark.parametrize("dtype", models.DTYPES, ids=str)
@pytest.mark.parametrize("place", ["all", "two", "disk"])
def test_accelerate(tmp_path: Path, form: str, dtype: Any, place: str) -> None:
    checkpoint = models.write(tmp_path / "checkpoint", form)
    other = {"all": 0, "two": "cpu", "disk": "disk"}[place]
    device_map = {"": 0} if place == "all" else {
        "embed": 0, "blocks.0": 0, "blocks.1": other, "blocks.2": 0, "head": other, "scale": 0,
        "shift": 0,
    }  # fmt: skip

    def call(folder: Path) -> Any:
        model = accelerate.load_checkpoint_and_dispatch(
            models.build(True),
            checkpoint,
            device_map=device_map,
            offload_folder=folder,
            offload_buffers=True,
            dtype=dtype,
        ).eval()
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        result = model(torch.arange(10, device="cuda"))
        return {name: described(tensor) for name, tensor in tensors.items()}, described(result)

    stock, ours = models.outcomes(call, tmp_path)
    assert isinstance(stock[0], dict), stock
    assert ours == stock
