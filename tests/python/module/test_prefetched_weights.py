"""Weights that hooks request one by one are read before, and are never another hook's."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import support
import weightlift as wl
from weightlift.module.prefetched_weights import PrefetchedWeights

NAMES = [f"w{number}" for number in range(12)]


class Source:
    """Records each thread's reads; ``slow``: the seconds of a read."""

    def __init__(self, slow: float = 0.0) -> None:
        self.slow = slow
        self.read: list[tuple[str, bool]] = []
        self.broken: set[str] = set()

    def load(self, name: str, ahead: bool) -> str:
        time.sleep(self.slow)
        if name in self.broken:
            raise wl.ReadError(5, "Input/output error", name)
        self.read.append((name, ahead))
        return f"value of {name}"


def threads() -> int:
    return sum(thread.name == "weightlift-ahead" for thread in threading.enumerate())


def threads_that_stay() -> int:
    """Threads of earlier tests' models end some time after the models."""
    gc.collect()
    end = time.monotonic() + 5
    while threads() and time.monotonic() < end:
        time.sleep(0.01)
    return threads()


def test_the_order_is_learned() -> None:
    source = Source(0.002)
    ahead = PrefetchedWeights(NAMES, source.load, lambda _: 0)
    order = NAMES[::-1] + NAMES[3:5]
    for step in range(4):
        source.read.clear()
        for name in order:
            assert ahead.get(name) == f"value of {name}"
            time.sleep(0.006)  # the use of the weight
        early = sum(early for _, early in source.read)
        assert step < 2 or early >= len(order) - 3, source.read


def test_any_order_gives_the_right_ones() -> None:
    source = Source()
    ahead = PrefetchedWeights(NAMES, source.load, lambda _: 0)
    numbers = random.Random(1)
    for _ in range(500):
        name = numbers.choice(NAMES)
        assert ahead.get(name) == f"value of {name}"


def test_memory_of_its_own_is_bounded() -> None:
    source = Source()
    for size, most in ((40 << 20, 1), (10 << 20, 6), (100 << 20, 0)):
        ahead = PrefetchedWeights(NAMES, source.load, lambda _, size=size: size)
        for name in [*NAMES, *NAMES]:
            ahead.get(name)
            time.sleep(0.005)
            assert len(ahead._shared._ready) <= most


def test_an_error_is_raised_by_who_asks() -> None:
    source = Source()
    ahead = PrefetchedWeights(NAMES, source.load, lambda _: 0)
    for name in NAMES:
        ahead.get(name)
    source.broken = {"w5"}
    for name in NAMES:
        if name == "w5":
            time.sleep(0.01)
            with pytest.raises(wl.ReadError, match="w5"):
                ahead.get(name)
        else:
            assert ahead.get(name) == f"value of {name}"
    source.broken = set()
    assert ahead.get("w5") == "value of w5"


def test_threads_that_ask_at_once() -> None:
    source = Source()
    ahead = PrefetchedWeights(NAMES, source.load, lambda _: 0)
    wrong: list[Any] = []

    def run(seed: int) -> None:
        numbers = random.Random(seed)
        for _ in range(200):
            name = numbers.choice(NAMES)
            if (found := ahead.get(name)) != f"value of {name}":
                wrong.append((name, found))

    running = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(30)
    assert not wrong
    assert not any(thread.is_alive() for thread in running)


def test_its_thread_ends_with_it() -> None:
    ahead = PrefetchedWeights(NAMES, Source().load, lambda _: 0)
    for _ in range(2):
        ahead.get("w0")
    found = next(t for t in threading.enumerate() if t.name == "weightlift-ahead")
    del ahead
    gc.collect()
    found.join(10)
    assert not found.is_alive()


def on_meta(width: int) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(8)))


def test_a_model_on_the_disk_reads_ahead(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(8)))
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    loaded, mapped = on_meta(32), on_meta(32)
    wl.load_into(mapped, path)
    before = threads_that_stay()
    wl.load_into(loaded, path, device_map={"": "disk"})
    x = torch.ones(1, 32)
    for _ in range(4):
        support.assert_same(loaded(x).detach(), mapped(x).detach())
    assert threads() == before + 1


def test_a_file_that_is_replaced_under_accelerates_hooks(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    path = tmp_path / "model.safetensors"
    models = [nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))) for _ in range(2)]
    safetensors.torch.save_file(models[0].state_dict(), path)
    index = {
        name: {"safetensors_file": str(path), "weight_name": name, "dtype": "float32"}
        for name in models[0].state_dict()
    }
    x = torch.ones(4, 8)
    with wl.enabled("accelerate"):
        with torch.device("meta"):
            loaded = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
        accelerate.dispatch_model(loaded, {"": "disk"}, offload_index=index)
        for _ in range(3):
            assert torch.allclose(loaded(x), models[0](x))
        safetensors.torch.save_file(models[1].state_dict(), tmp_path / "other")
        (tmp_path / "other").replace(path)
        assert torch.allclose(loaded(x), models[1](x))
    assert torch.allclose(loaded(x), models[1](x))  # by its own code


def test_accelerates_own_files_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerate = pytest.importorskip("accelerate")
    state = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))).state_dict()
    accelerate.utils.offload_state_dict(tmp_path, state)
    loader = accelerate.utils.OffloadedWeightsLoader(save_folder=tmp_path)
    asked: list[int] = []
    advise = os.posix_fadvise

    def noted(*args: int) -> None:
        asked.append(args[3])
        advise(*args)

    monkeypatch.setattr(os, "posix_fadvise", noted)

    def read_all() -> None:
        for name, tensor in state.items():
            assert torch.equal(loader[name], tensor)
            time.sleep(0.002)

    with wl.enabled("accelerate"):
        for _ in range(3):
            read_all()
        time.sleep(0.02)
    assert set(asked) == {os.POSIX_FADV_WILLNEED}
    count = len(asked)
    read_all()
    time.sleep(0.02)
    assert len(asked) == count  # by its own code
