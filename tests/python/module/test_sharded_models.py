"""Models with a part on each rank, which are neither streamed nor loaded in the background."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import weightlift as wl
from background_support import Net, is_plain, on_meta, saved


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A group with only this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield DeviceMesh("cpu", torch.arange(1))
    finally:
        dist.destroy_process_group()


def sharded(mesh: DeviceMesh) -> Any:
    model = on_meta(Net)
    weight = distribute_tensor(model.head.weight.detach(), mesh, [Shard(0)])
    model.head.weight = torch.nn.Parameter(weight)
    return model


def places(model: torch.nn.Module) -> dict[str, int]:
    return {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}


def test_in_the_background(tmp_path: Path, mesh: DeviceMesh) -> None:
    _, path = saved(tmp_path)
    model = sharded(mesh)
    before = places(model)
    with pytest.raises(wl.ArgumentError, match=r"DTensors such as 'head\.weight'"):
        wl.load_into(model, path, background=True)
    assert is_plain(model)
    assert places(model) == before


def test_streamed(tmp_path: Path, mesh: DeviceMesh) -> None:
    _, path = saved(tmp_path)
    model = sharded(mesh)
    before = places(model)
    with pytest.raises(wl.ArgumentError, match=r"'head\.weight' is a DTensor"):
        wl.stream(model, path, device="cpu", memory="1MB")
    assert places(model) == before


def test_in_the_background_by_a_group(tmp_path: Path, mesh: DeviceMesh) -> None:
    _, path = saved(tmp_path)
    model = on_meta(Net)
    before = places(model)
    with pytest.raises(wl.ArgumentError, match="background"):
        wl.load_into(model, path, background=True, group=dist.group.WORLD)
    assert is_plain(model)
    assert places(model) == before
