"""Easily mistaken arguments: the error names the right call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import weightlift as wl
from weightlift.core.devices import parse_device

TENSORS = {"first.weight": torch.ones(2, 3), "first.bias": torch.zeros(2)}


def model() -> torch.nn.Module:
    return torch.nn.ModuleDict({"first": torch.nn.Linear(3, 2)})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "swapped": (lambda path: wl.load_into(path, model()), "the model comes first"),  # type: ignore[arg-type]
    "a class": (lambda path: wl.load_into(torch.nn.Linear, path), "an instance of the class"),  # type: ignore[arg-type]
    "into a dict": (lambda path: wl.load_into({}, path), "load_checkpoint returns a dict"),  # type: ignore[arg-type]
    "into nothing": (lambda path: wl.load_into(None, path), "torch.nn.Module"),  # type: ignore[arg-type]
    "a dict": (lambda path: wl.load_into(model(), TENSORS), "load_state_dict"),  # type: ignore[arg-type]
    "a model": (lambda path: wl.load_into(model(), model()), "the checkpoint is a model"),  # type: ignore[arg-type]
    "memory of no map": (
        lambda path: wl.load_into(model(), path, max_memory={"cpu": "1GB"}),
        "max_memory is for automatic device maps .* and device_map is None",
    ),
    "memory of a device": (
        lambda path: wl.load_into(model(), path, device_map="cpu", max_memory={"cpu": "1GB"}),
        "device_map is 'cpu': give one of them, or leave out max_memory",
    ),
    "a state dict saved": (
        lambda path: wl.save_checkpoint(model(), path.parent / "new"),  # type: ignore[arg-type]
        r"module.state_dict\(\)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_arguments(mistake: str, path: Path) -> None:
    call, meant = MISTAKES[mistake]
    with pytest.raises(wl.WeightliftError, match=meant):
        call(path)


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("atuo", "did you mean 'auto'"),
        ("gpu", "can be 'cpu', 'cuda'"),
        ("cdua", "did you mean 'cuda'"),
        ("cpuu", "did you mean 'cpu'"),
        ("mps", r"load to the CPU, then move the tensors with .to\('mps'\)"),
        ("xpu:1", r"with .to\('xpu:1'\)"),
    ],
)
def test_devices(device: str, said: str, path: Path) -> None:
    for call in (
        lambda: wl.load_file(path, device=device),
        lambda: wl.load_checkpoint(path, device),
        lambda: wl.load_into(model(), path, device_map=device),
        lambda: wl.load_into(model(), path, device_map={"": device}),
        lambda: wl.safe_open(path, device=device).get_tensors(),
    ):
        with pytest.raises(wl.DeviceError, match=said) as caught:
            call()
        assert len(str(caught.value)) < 200


def test_a_device_that_only_a_model_takes() -> None:
    for device in ("auto", "balanced", "disk"):
        with pytest.raises(wl.DeviceError, match="load_into and from_pretrained take it"):
            parse_device(device)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_fsdp_wrapped_module."])
def test_names_of_wrapped_models(prefix: str, tmp_path: Path) -> None:
    wrapped = tmp_path / "wrapped.safetensors"
    save_file({prefix + name: tensor for name, tensor in TENSORS.items()}, wrapped)
    said = rf"begin with '{prefix}'; open_checkpoint\(..., prefix='{prefix}'\)"
    with pytest.raises(wl.CheckpointError, match=said):
        wl.load_into(model(), wrapped)
    found = model()
    wl.load_into(found, wl.open_checkpoint(wrapped, prefix=prefix))
    assert torch.equal(found.state_dict()["first.weight"], TENSORS["first.weight"])


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module"])
def test_wrapped_models(wrapper: str, path: Path) -> None:
    inside = torch.nn.Module()
    inside.add_module(wrapper, model())
    with pytest.raises(wl.CheckpointError, match=f"the model's names begin with '{wrapper}.'"):
        wl.load_into(inside, path)


def test_a_name_with_a_typo(path: Path) -> None:
    other = torch.nn.ModuleDict({"frist": torch.nn.Linear(3, 2)})
    with pytest.raises(wl.CheckpointError, match=r"'first.bias' resembles 'frist.bias'.*key_map="):
        wl.load_into(other, path)
    more = torch.nn.ModuleDict({"other": torch.nn.Linear(3, 2)})
    with pytest.raises(wl.CheckpointError, match="strict=False loads what matches"):
        wl.load_into(more, path)


def test_paths(tmp_path: Path) -> None:
    for path in ("./nothing", str(tmp_path / "nothing"), "a/b/c"):
        with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
            wl.open_checkpoint(path)
        with pytest.raises(FileNotFoundError) as caught:
            wl.load_checkpoint(path)
        assert "Repo id" not in str(caught.value)
    with pytest.raises(TypeError, match="load_file"):
        wl.load("model.safetensors")  # type: ignore[arg-type]


def test_other_kinds_of_devices_are_the_libraries_affair(path: Path) -> None:
    """The backends leave them to the library, which loads to these devices."""
    from weightlift.backends.fallback import FallbackToLibrary
    from weightlift.backends.safetensors import usable_device

    for device in ("mps", "xpu:1"):
        with pytest.raises(FallbackToLibrary, match=f"does not load to {device[:3]}"):
            usable_device(device)
