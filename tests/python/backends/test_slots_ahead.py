"""Backends that know the device before they open the files: slots are pinned while they do."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import simulated
from simulated import FirstOpened, Switch, first_opened, machine, six_mib
from weightlift import Settings

__all__ = ["first_opened", "machine", "six_mib"]

pytestmark = simulated.pytestmark

_DEVICE = torch.device("cuda", 0)


class _Opened(Exception):
    """The files are open; the load would start."""


def _stops(*_: Any, **__: Any) -> Any:
    raise _Opened


def _safetensors(patch: pytest.MonkeyPatch, path: Path) -> None:
    module = importlib.import_module("weightlift.backends.safetensors")
    patch.setattr(module, "usable_device", lambda device: _DEVICE)
    patch.setattr(module, "load_tensors", _stops)
    module._load_file("safetensors", _stops)(path, "cuda:0")


def _diffusers_model(patch: pytest.MonkeyPatch, path: Path) -> None:
    module = importlib.import_module("weightlift.backends.diffusers.calls")
    patch.setattr(module, "PrefetchedLoad", types.SimpleNamespace(start=_stops))
    early = {"device": _DEVICE, "dtype": "BF16", "keep": frozenset(), "mode": "auto"}
    module.Call(None, early).found([path], sharded=False)


def _diffusers_state_dict(patch: pytest.MonkeyPatch, path: Path) -> None:
    module = importlib.import_module("weightlift.backends.diffusers.state_dicts")
    patch.setattr(module, "engine_device", lambda device: _DEVICE)
    patch.setattr(module, "load_all", _stops)

    def load_state_dict(
        checkpoint_file: Path,
        dduf_entries: None = None,
        disable_mmap: bool = False,
        map_location: str = "cpu",
    ) -> None:
        raise AssertionError("the library's own way")

    module.load_state_dict(load_state_dict)(path, map_location="cuda:0")


def _accelerate(patch: pytest.MonkeyPatch, path: Path) -> None:
    module = importlib.import_module("weightlift.backends.accelerate")
    call = types.SimpleNamespace(device_map={"": 0}, load=_stops)
    token = module._current.set(call)
    try:
        # For a file without accelerate's metadata, its own error.
        module._load_state_dict(_stops)(str(path))
    finally:
        module._current.reset(token)


def _transformers_prefetch(patch: pytest.MonkeyPatch, path: Path) -> None:
    module = importlib.import_module("weightlift.backends.transformers.prefetch")
    patch.setattr(module, "weights_of", _stops)
    module._start(None, types.SimpleNamespace(options={}), [str(path)], _DEVICE)


def _transformers_load(patch: pytest.MonkeyPatch, path: Path) -> None:
    module = importlib.import_module("weightlift.backends.transformers.calls")
    patch.setattr(module, "fallback_reason", lambda *_: None)
    patch.setattr(module, "weights_of", _stops)
    patch.setattr(module.compat, "is_walked", lambda config: True)
    config = types.SimpleNamespace(device_map={"": 0})
    module._load(_stops, torch.nn.Linear(1, 1), None, [str(path)], config)


@pytest.mark.parametrize(
    "load",
    [
        _safetensors,
        _diffusers_model,
        _diffusers_state_dict,
        _accelerate,
        _transformers_prefetch,
        _transformers_load,
    ],
    ids=lambda load: load.__name__[1:],
)
def test_slots_are_pinned_while_a_backend_opens_files(
    machine: Switch,
    six_mib: Path,
    first_opened: FirstOpened,
    monkeypatch: pytest.MonkeyPatch,
    load: Callable[[pytest.MonkeyPatch, Path], None],
) -> None:
    first_opened.wanted = 2  # an eighth of the file, where the load may cast
    with machine(1) as driver, Settings(chunk_bytes="256KiB", pinned_bytes="512KiB"):
        first_opened.driver = driver
        driver.hold_context(0)
        with pytest.raises(_Opened):
            load(monkeypatch, six_mib)
        assert first_opened.seen == 2
