"""``ModelMixin.from_pretrained(..., background=True)``, compared with the same call without it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import support
import weightlift as wl
from background_support import WIDTH, Block, Gate, Running, gate, inputs, is_plain
from weightlift.core.errors import ArgumentError

__all__ = ["gate"]


class Model(wl.ModelMixin, wl.ConfigMixin):
    config_name = "config.json"
    _keep_in_fp32_modules = ["scale"]  # noqa: RUF012

    @wl.register_to_config
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(WIDTH))
        self.blocks = torch.nn.ModuleList([Block() for _ in range(depth)])
        self.head = torch.nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x * self.scale.to(x.dtype))
        return self.head(x)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Model().save_pretrained(tmp_path / "model", max_shard_size=1000)
    return tmp_path / "model"


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"torch_dtype": torch.float64},
        {"device_map": "cpu", "mode": "read"},
        {"disable_mmap": True},
    ],
    ids=str,
)
def test_from_pretrained(folder: Path, keywords: dict[str, Any]) -> None:
    expected = Model.from_pretrained(folder, **keywords)
    model = Model.from_pretrained(folder, background=True, **keywords)
    report = wl.last_report()
    assert report is not None
    x = inputs().to(expected.head.weight.dtype)
    assert torch.equal(model(x), expected(x))
    assert is_plain(model)
    assert not model.training
    support.assert_same_tensors(model.state_dict(), expected.state_dict())
    assert report.wait().bytes == sum(t.nbytes for t in Model().state_dict().values())
    assert getattr(model, "hf_device_map", None) == getattr(expected, "hf_device_map", None)


def test_it_returns_before_the_tensors_are_there(folder: Path, gate: Gate) -> None:
    """And tells device and dtype without them."""
    expected = Model.from_pretrained(folder, torch_dtype=torch.bfloat16)
    gate.asked.clear()
    model = Model.from_pretrained(folder, torch_dtype=torch.bfloat16, background=True)
    assert (model.device, model.dtype) == (expected.device, expected.dtype)
    assert wl.get_parameter_dtype(model.blocks) == torch.float32  # scale is kept
    assert not gate.asked
    saving = Running(lambda: model.save_pretrained(folder.parent / "saved"))
    assert saving.is_waiting
    gate.let_all()
    saving.end()
    again = Model.from_pretrained(folder.parent / "saved")
    support.assert_same_tensors(
        again.state_dict(), Model.from_pretrained(folder.parent / "saved").state_dict()
    )
    support.assert_same_tensors(model.state_dict(), expected.state_dict())


def test_weights_that_the_checkpoint_lacks(folder: Path) -> None:
    state = {
        k: v for k, v in Model.from_pretrained(folder).state_dict().items() if k != "head.bias"
    }
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    wl.save_file(state, folder / "diffusion_pytorch_model.safetensors")
    model, info = Model.from_pretrained(folder, background=True, output_loading_info=True)
    assert info["missing_keys"] == ["head.bias"]
    assert torch.isfinite(model(inputs())).all()
    assert torch.equal(model.head.weight, state["head.weight"])


def test_copies(folder: Path) -> None:
    expected = Model.from_pretrained(folder)
    for make in (
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.to(torch.float64),
    ):
        made = make(Model.from_pretrained(folder, background=True))
        x = inputs().to(made.head.weight.dtype)
        assert torch.equal(made(x), copy.deepcopy(expected).to(x.dtype)(x))


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"low_cpu_mem_usage": False}, "low_cpu_mem_usage"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({"load_in_4bit": True}, "load_in_4bit"),
        ({"quantization_config": {"quant_type": "int8_weight_only"}}, "quantization_config"),
        ({"verify": True}, "verify"),
        ({"tp_plan": {"head": "colwise"}}, "tp_plan"),
        ({"device_map": {"blocks": "cpu", "": "disk"}}, "disk"),
    ],
    ids=str,
)
def test_what_goes_not_together(folder: Path, keywords: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        Model.from_pretrained(folder, background=True, **keywords)
