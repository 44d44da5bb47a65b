"""Checkpoints by ``load_checkpoint`` and ``load_state_dict``, against safetensors and diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models import model_loading_utils
from safetensors.torch import load_file, save_file

import weightlift as wl

TENSORS = {
    "unet.a": torch.arange(6.0).reshape(2, 3),
    "unet.ema.a": torch.ones(2),
    "vae.b": torch.arange(4),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    return path


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("prefix", "ignore", "names"),
    [
        ("unet.", None, {"a": "unet.a", "ema.a": "unet.ema.a"}),
        ("unet.", "unet.ema.", {"a": "unet.a"}),
        (None, ["*.a"], {"vae.b": "vae.b"}),
        (None, ["vae.", "*.ema.*"], {"unet.a": "unet.a"}),
    ],
)
def test_prefix_and_ignore(
    file: Path, prefix: str | None, ignore: str | list[str] | None, names: dict[str, str]
) -> None:
    found = wl.load_checkpoint(file, prefix=prefix, ignore=ignore)
    assert_equal(found, {name: TENSORS[old] for name, old in names.items()})


def test_nothing_left_is_an_error(file: Path) -> None:
    with pytest.raises(wl.CheckpointError, match=r"no tensor is left with prefix='clip\.'"):
        wl.load_checkpoint(file, prefix="clip.")


def test_an_open_checkpoint_has_its_arguments_already(file: Path) -> None:
    checkpoint = wl.open_checkpoint(file)
    assert_equal(wl.load_checkpoint(checkpoint), load_file(file))
    with pytest.raises(wl.ArgumentError, match="open already"):
        wl.load_checkpoint(checkpoint, prefix="unet.")


def test_a_map_of_devices(file: Path) -> None:
    found = wl.load_checkpoint(file, device_map={"unet": "cpu", "vae": "cpu"})
    assert_equal(found, load_file(file))


def test_load_state_dict(file: Path) -> None:
    assert wl.load_state_dict(TENSORS) is TENSORS
    assert_equal(wl.load_state_dict(str(file)), model_loading_utils.load_state_dict(str(file)))
    meta = wl.load_state_dict(file, map_location="meta")
    assert {name: (t.shape, t.dtype, t.device.type) for name, t in meta.items()} == {
        name: (t.shape, t.dtype, "meta") for name, t in TENSORS.items()
    }
