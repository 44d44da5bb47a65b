"""The hooks for SGLang against a small stand-in of SGLang's loader."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import weightlift as wl
from weightlift.backends.sglang import register

STAND_IN = Path(__file__).parents[1] / "helpers" / "fake_sglang"


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of the hooks and the loader."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    yield SimpleNamespace(
        hooks=importlib.import_module("sglang.srt.plugins.hook_registry"),
        loader=importlib.import_module("sglang.srt.model_loader.loader"),
    )
    for name in [n for n in sys.modules if n == "sglang" or n.startswith("sglang.")]:
        del sys.modules[name]


class Rank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(64, 32), requires_grad=False)
        self.scale = nn.Parameter(torch.zeros(1), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name == "mtp.scale":
                self.scale.data.copy_(tensor)
            else:
                at = 0 if name == "gate" else 32
                self.up.data[at : at + 32].copy_(tensor.chunk(2)[1])


TENSORS = {"gate": torch.randn(64, 32), "x.up": torch.randn(64, 32)}
SLICES = 2 * 32 * 32 * 4 + 4


def checkpoint(folder: Path) -> Path:
    save_file({"gate": TENSORS["gate"]}, folder / "model-1.safetensors")
    save_file({"x.up": TENSORS["x.up"]}, folder / "model-2.safetensors")
    save_file({"mtp.scale": torch.tensor([3.0])}, folder / "mtp.safetensors")
    return folder


class Late(Rank):
    """Allocates its weight when all parts have arrived, and processes it at once, like engines that
    quantize while they load."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(64, 32, device="meta"), requires_grad=False)
        self.came: list[tuple[str, Tensor]] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for item in weights:
            super().load_weights([item])  # on meta, to count the elements
            self.came += [item] if item[0] in TENSORS else []
            if len(self.came) == len(TENSORS) and self.up.is_meta:
                self.up = nn.Parameter(torch.zeros(64, 32), requires_grad=False)
                super().load_weights(self.came)
                self.came.clear()
                self.up.data = (self.up * 2).t().contiguous()


def load(sglang: Any, folder: Path, load_format: str = "AUTO", kind: type[Rank] = Rank) -> Rank:
    config = SimpleNamespace(
        load_format=sglang.loader.LoadFormat[load_format],
        draft_model_idx=None,
        model_loader_extra_config={},
    )
    loader = sglang.loader.DefaultModelLoader(config)
    source = loader.Source(str(folder), model_config=SimpleNamespace(hf_config=None))
    model = kind()
    loader.load_model(model, [source])
    return model


def assert_filled(model: Rank) -> None:
    wanted = type(model)()
    wanted.load_weights([*TENSORS.items(), ("mtp.scale", torch.tensor([3.0]))])
    assert torch.equal(model.up, wanted.up)
    assert torch.equal(model.scale, wanted.scale)
    assert model.scale_after == 3.0


def of_sglang() -> int:
    sums = wl.stats().by_caller.get("sglang")
    return sums.bytes if sums else 0


@pytest.mark.parametrize(("way", "moved"), [("slices", SLICES), ("whole", 2 * 64 * 32 * 4 + 4)])
def test_the_model_is_filled(
    sglang: Any, way: str, moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTLIFT_SGLANG", way)
    register()
    sglang.hooks.HookRegistry.apply_hooks()
    before = of_sglang()
    assert_filled(load(sglang, checkpoint(tmp_path)))
    assert of_sglang() - before == moved


@pytest.mark.parametrize(("way", "moved"), [("slices", SLICES), ("whole", 2 * 64 * 32 * 4 + 4)])
def test_a_layer_that_is_processed_while_its_model_loads(
    sglang: Any, way: str, moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTLIFT_SGLANG", way)
    register()
    sglang.hooks.HookRegistry.apply_hooks()
    before = of_sglang()
    model = load(sglang, checkpoint(tmp_path), kind=Late)
    assert model.up.shape == (32, 64)
    assert_filled(model)
    assert of_sglang() - before == moved


@pytest.mark.parametrize("way", ["slices", "whole"])
def test_what_is_not_ours_falls_back(
    sglang: Any, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTLIFT_SGLANG", way)
    register()
    sglang.hooks.HookRegistry.apply_hooks()
    before = of_sglang()
    assert_filled(load(sglang, checkpoint(tmp_path), "NPCACHE"))
    (tmp_path / "bin").mkdir()
    torch.save({**TENSORS, "mtp.scale": torch.tensor([3.0])}, tmp_path / "bin" / "pytorch.bin")
    assert_filled(load(sglang, tmp_path / "bin"))
    assert of_sglang() == before


def test_without_being_asked_nothing_is_hooked(
    sglang: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WEIGHTLIFT_SGLANG", raising=False)
    register()
    monkeypatch.setenv("WEIGHTLIFT_SGLANG", "yes")
    register()
    assert "it can be 'slices' or 'whole'" in caplog.text
    assert sglang.hooks.HookRegistry.hooks == []


def test_a_version_that_is_not_known_is_left_alone(
    sglang: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WEIGHTLIFT_SGLANG", "slices")
    monkeypatch.delattr(sglang.hooks, "HookType")
    register()
    assert "unknown hooks" in caplog.text


def test_options_that_are_not_known_fall_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightlift.backends import sglang as backend

    asked: list[dict[str, Any]] = []

    def original(loader: Any, source: Any, **options: Any) -> Iterator[tuple[str, Tensor]]:
        asked.append(options)
        return iter([("up", torch.ones(2))])

    iterate: Any = backend._iterate
    loader = SimpleNamespace(load_config=SimpleNamespace(load_format="auto", draft_model_idx=None))
    found = dict(iterate(original, loader, None, resolved_source=None, shards=[1]))
    assert found.keys() == {"up"}
    assert asked == [{"resolved_source": None, "shards": [1]}]
    assert caplog.messages == [
        "weightlift does not support shards of this SGLang's loader: SGLang's own loader is used"
    ]
