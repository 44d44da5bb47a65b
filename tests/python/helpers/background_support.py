"""Models that load in the background, and tensors that arrive when a test says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import weightlift as wl
from weightlift.load.arriving_load import ArrivingLoad
from weightlift.module.background.load import BackgroundLoad

WIDTH = 16


class Block(torch.nn.Module):
    """A layer with a parameter, a buffer and a submodule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        self.scale = torch.nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x) * self.scale + self.shift)


class Net(torch.nn.Module):
    """Three blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block() for _ in range(3)])
        self.head = torch.nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Uses the weights of a submodule without calling it."""
        first = self.blocks[0].linear
        return torch.nn.functional.linear(x, first.weight, first.bias) * self.blocks[0].scale


def inputs() -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)


def on_meta(kind: type[torch.nn.Module] = Net, *arguments: Any) -> Any:
    with torch.device("meta"):
        return kind(*arguments)


def saved(folder: Path, model: torch.nn.Module | None = None) -> tuple[torch.nn.Module, Path]:
    """A model with its values, and the file that has them."""
    torch.manual_seed(0)
    model = Net() if model is None else model
    path = folder / "model.safetensors"
    safetensors.torch.save_file(
        {name: t.contiguous() for name, t in model.state_dict().items()}, path
    )
    return model.eval(), path


def load(path: Path | str | wl.Checkpoint, **keywords: Any) -> tuple[Any, wl.LoadReport]:
    """A model that loads in the background, and its report."""
    model = on_meta()
    report = wl.load_into(model, path, background=True, **keywords)
    return model.eval(), report


def raw(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The entries of a module's dicts, without triggering a wait."""
    held = {**dict(dict.items(vars(module)["_parameters"]))}
    held.update(dict.items(vars(module)["_buffers"]))
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def is_waiting(model: torch.nn.Module) -> bool:
    """Whether some tensor has not arrived."""
    return any(tensor.is_meta for module in model.modules() for tensor in raw(module).values())


def is_plain(model: torch.nn.Module) -> bool:
    """Whether no trace of a load is left in a model."""
    return all(
        type(vars(module)["_parameters"]) is dict
        and type(vars(module)["_buffers"]) is dict
        and not module._forward_pre_hooks
        for module in model.modules()
    )


class Gate:
    """The tensors that may have arrived; others are not handed out."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self._open: set[str] = set()
        self._is_open = False

    def let(self, *names: str) -> None:
        self._open.update(names)

    def let_all(self) -> None:
        self._is_open = True

    def has(self, names: Sequence[str]) -> bool:
        return self._is_open or self._open.issuperset(names)

    def wait_for(self, names: Sequence[str]) -> None:
        self.asked.append(tuple(names))
        while not self._is_open and not self._open.issuperset(names):
            time.sleep(0.002)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """All modules wait, as if nothing had arrived when they begin to; small files in the page cache
    have."""
    make_modules_wait = BackgroundLoad.make_modules_wait

    def without_what_is_there(load: BackgroundLoad) -> None:
        with monkeypatch.context() as patches:
            patches.setattr(ArrivingLoad, "has", lambda *_: False)
            make_modules_wait(load)

    monkeypatch.setattr(BackgroundLoad, "make_modules_wait", without_what_is_there)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    original = ArrivingLoad.wait_for

    def wait_for(load: ArrivingLoad, names: Sequence[str]) -> None:
        gate.wait_for(names)
        original(load, names)

    has_arrived = ArrivingLoad.has
    monkeypatch.setattr(
        ArrivingLoad, "has", lambda load, names: gate.has(names) and has_arrived(load, names)
    )
    monkeypatch.setattr(ArrivingLoad, "wait_for", wait_for)
    yield gate
    gate.let_all()


class Running:
    """A call on another thread."""

    def __init__(self, call: Any) -> None:
        self.result: Any = None
        self.error: BaseException | None = None

        def run() -> None:
            try:
                self.result = call()
            except BaseException as error:
                self.error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def is_waiting(self) -> bool:
        """Whether it has not ended a little later."""
        self._thread.join(0.05)
        return self._thread.is_alive()

    def end(self) -> Any:
        self._thread.join(20)
        assert not self._thread.is_alive(), "it still waits"
        if self.error is not None:
            raise self.error
        return self.result
