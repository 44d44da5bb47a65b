"""Models that move to simulated CUDA devices, compared with ``torch.nn.Module.to`` on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import simulated
import support
import weightlift as wl
from simulated import Policy, Switch, machine
from simulated_torch import Allocator
from weightlift.load import load_tensors
from weightlift.module.move import move

__all__ = ["machine"]

pytestmark = simulated.pytestmark


class Model(wl.ModelMixin, wl.ConfigMixin):
    config_name = "config.json"

    @wl.register_to_config
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = torch.nn.Linear(width, 3 * width)
        self.tied = torch.nn.Linear(width, 3 * width)
        self.tied.weight = self.first.weight
        self.halves = torch.nn.Parameter(torch.randn(width).half())
        self.turned = torch.nn.Parameter(torch.randn(4, 6).t())
        self.register_buffer("steps", torch.arange(5))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_move(
    machine: Switch, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Model()
    sources = copy.deepcopy(model)
    expected = copy.deepcopy(model).to(dtype=dtype) if dtype else sources
    parameters = dict(model.named_parameters())
    with machine(2, seed, Policy.RANDOM) as driver:
        allocator = Allocator(driver)
        monkeypatch.setattr(load_tensors, "TorchAllocator", lambda: allocator)
        move(model, torch.device("cuda", 1), dtype)
        assert all(model.get_parameter(name) is p for name, p in parameters.items())
        assert model.tied.weight is model.first.weight
        moved = dict(model.state_dict())
        # Tensors that the engine does not copy stay, and torch moves them.
        support.assert_same(moved.pop("turned"), parameters["turned"].detach())
        assert moved.keys() == expected.state_dict().keys() - {"turned"}
        for name, tensor in moved.items():
            theirs = expected.state_dict()[name]
            block = allocator.blocks[tensor.data_ptr()]
            assert (block.device, tensor.dtype, tensor.shape) == (1, theirs.dtype, theirs.shape)
            assert block.bits() == support.bits(theirs)
        report = wl.last_report()
        assert report is not None
        copied = sum(t.nbytes for t in (*sources.parameters(), *sources.buffers()))
        assert report.bytes == copied - sources.turned.nbytes  # the tied one once
        del model, moved, tensor, parameters
        allocator.blocks.clear()


def test_what_has_nothing_to_copy(machine: Switch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Module()
    model.turned = torch.nn.Parameter(torch.randn(4, 6).t())
    with machine() as driver:
        monkeypatch.setattr(load_tensors, "TorchAllocator", lambda: Allocator(driver))
        move(model, torch.device("cuda", 0))
        assert driver.ledger().external_allocations == 0


@pytest.mark.parametrize(
    ("call", "index", "dtype"),
    [
        (lambda model: model.cuda(1), 1, torch.float32),
        (lambda model: model.cuda(), 0, torch.float32),
        (lambda model: model.to("cuda:1", torch.float16), 1, torch.float16),
    ],
)
def test_models_go_through_the_ring(
    machine: Switch, monkeypatch: pytest.MonkeyPatch, call: Any, index: int, dtype: torch.dtype
) -> None:
    """Moved before torch's call, which finds them on the device."""
    model = Model()
    expected = model.first.bias.detach().to(dtype)
    with machine(2) as driver:
        allocator = Allocator(driver)
        found = []

        def to(self: Any, device: Any = None, *rest: Any) -> Any:
            found.append((torch.device(device), allocator.blocks[self.first.bias.data_ptr()]))
            return self

        monkeypatch.setattr(load_tensors, "TorchAllocator", lambda: allocator)
        monkeypatch.setattr(torch.nn.Module, "to", to)
        assert call(model) is model
        ((device, block),) = found
        assert (device, block.device) == (torch.device("cuda", index), index)
        assert block.bits() == support.bits(expected)
        del block, model
        found.clear()
        allocator.blocks.clear()
