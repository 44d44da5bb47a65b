"""Tensors with several names: device maps that put the names in different places, and checkpoints
that have different values for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import weightlift as wl


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embedding(tokens)) * self.scale)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    state = Tied().state_dict()
    del state["head.weight"]
    save_file(state, path)
    return path


def empty() -> Tied:
    with torch.device("meta"):
        return Tied()


@pytest.mark.parametrize(
    "device_map",
    [
        {"head": "disk", "": "cpu"},
        {"embedding": "disk", "": "cpu"},
        {"embedding": "disk", "head": "disk", "": "cpu"},
        {"embedding": "disk", "middle": "disk", "": "cpu"},
        {"middle": "disk", "head": "disk", "": "cpu"},
    ],
    ids=lambda given: " ".join(name for name, device in given.items() if device == "disk"),
)
@pytest.mark.parametrize("kind", ["meta", "real"])
def test_a_map_that_splits_tied_weights(file: Path, device_map: dict[str, Any], kind: str) -> None:
    whole = Tied()
    whole.load_state_dict(load_file(file), strict=False)
    model = empty() if kind == "meta" else Tied()
    wl.load_into(model, file, device_map=device_map)
    tokens = torch.arange(3)
    for _ in range(2):  # hooks bring and take tensors
        assert torch.equal(model(tokens), whole(tokens))


def test_a_lone_tensor_on_the_disk_is_refused_before_anything_is_read(file: Path) -> None:
    model = empty()
    loads = wl.stats().loads
    with pytest.raises(wl.ArgumentError, match="'scale' on the disk"):
        wl.load_into(model, file, device_map={"scale": "disk", "": "cpu"})
    assert wl.stats().loads == loads
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["meta", "real"])
@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_tied_names_with_different_values(tmp_path: Path, kind: str, form: str) -> None:
    model = Tied()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["head.weight"] += 1
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.bin")
    (save_file if form == "safetensors" else torch.save)(state, path)
    loaded = empty() if kind == "meta" else Tied()
    with pytest.warns(
        UserWarning, match=r"embedding\.weight, head\.weight.*other values for embed"
    ):
        wl.load_into(loaded, path)
    model.load_state_dict(state)
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(loaded.head.weight, model.head.weight)


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_tied_names_with_the_same_values_are_no_reason_to_warn(tmp_path: Path, form: str) -> None:
    model = Tied()
    state = dict(model.state_dict())
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.bin")
    if form == "safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    loaded = empty()
    wl.load_into(loaded, path)
    assert torch.equal(loaded.head.weight, model.head.weight)
