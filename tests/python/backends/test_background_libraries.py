"""``enable(background=True)``: models of transformers and diffusers that load when their
``from_pretrained`` has returned, against the same models without weightlift."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import transformers_models
import weightlift as wl
from background_support import Gate, gate, is_plain, is_waiting
from support import assert_same
from weightlift.backends import early_return
from weightlift.core.errors import ArgumentError

__all__ = ["gate"]

transformers = transformers_models.transformers


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    yield
    wl.disable()


def _assert_same_states(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    mine, others = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(others)
    for name, tensor in mine.items():
        assert_same(tensor, others[name])
    for name, buffer in theirs.named_buffers():
        assert_same(ours.get_buffer(name), buffer)


@transformers_models.walked
@pytest.mark.parametrize("kind", ["llama", "tied", "resnet"])
@pytest.mark.parametrize("keywords", [{}, {"dtype": torch.float16}, {"device_map": "cpu"}], ids=str)
def test_transformers(tmp_path: Path, kind: str, keywords: dict[str, Any], gate: Gate) -> None:
    torch.manual_seed(0)
    transformers_models.MODELS[kind]().save_pretrained(tmp_path)
    cls = type(transformers_models.MODELS[kind]())
    expected = cls.from_pretrained(tmp_path, **keywords)
    with wl.enabled("transformers", background=True):
        model = cls.from_pretrained(tmp_path, **keywords)
    report = wl.last_report()
    assert not gate.asked
    assert is_waiting(model)
    gate.let_all()
    inputs = {"input_ids": torch.arange(6)[None]}
    if kind == "resnet":
        inputs = {"pixel_values": torch.ones(1, 3, 32, 32, dtype=expected.dtype)}
    with torch.inference_mode():
        ours, theirs = model(**inputs).logits, expected(**inputs).logits
    assert_same(ours, theirs)
    assert report is not None
    assert report.wait().bytes > 0
    assert is_plain(model)
    _assert_same_states(model, expected)
    assert (model.device, model.dtype, model.training) == (
        expected.device,
        expected.dtype,
        expected.training,
    )
    transformers_models.assert_same_models(model, expected)


@transformers_models.walked
def test_experts_that_the_library_stacks(tmp_path: Path) -> None:
    """These tensors have arrived before the return; the others arrive later."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**transformers_models.MOE)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with wl.enabled(background=True):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(5)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)
    _assert_same_states(model, expected)
    assert is_plain(model)


@transformers_models.walked
def test_weights_that_are_missing(tmp_path: Path) -> None:
    """The weights of a head that the checkpoint lacks are initialized before the return."""
    torch.manual_seed(0)
    transformers_models.MODELS["llama"]().model.save_pretrained(tmp_path)
    with wl.enabled("transformers", background=True):
        model, info = transformers.LlamaForCausalLM.from_pretrained(
            tmp_path, output_loading_info=True
        )
    assert info["missing_keys"] == {"lm_head.weight"}
    assert model.lm_head.weight.std() > 0
    expected = transformers.LlamaModel.from_pretrained(tmp_path)
    ids = torch.arange(5)[None]
    assert torch.equal(model.model(ids).last_hidden_state, expected(ids).last_hidden_state)


def _unet(**keywords: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        layers_per_block=1,
        **keywords,
    )


@pytest.mark.parametrize("keywords", [{}, {"torch_dtype": torch.float64}], ids=str)
def test_diffusers(tmp_path: Path, keywords: dict[str, Any], gate: Gate) -> None:
    torch.manual_seed(0)
    _unet().save_pretrained(tmp_path, max_shard_size="20KB")
    kind = type(_unet())
    expected = kind.from_pretrained(tmp_path, **keywords)
    with wl.enabled("diffusers", background=True):
        model = kind.from_pretrained(tmp_path, **keywords)
    report = wl.last_report()
    assert not gate.asked
    assert is_waiting(model)
    gate.let_all()
    x = torch.linspace(0, 1, 4 * 64).reshape(1, 4, 8, 8).to(expected.dtype)
    context = torch.ones(1, 2, 8, dtype=expected.dtype)
    with torch.no_grad():
        assert_same(model(x, 3, context).sample, expected(x, 3, context).sample)
    assert report is not None
    assert report.wait().bytes > 0
    _assert_same_states(model, expected)
    assert is_plain(model)
    assert not model.training


def test_what_cannot_go_on_is_loaded_before_the_return(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _unet().save_pretrained(tmp_path)
    kind = type(_unet())
    with wl.enabled(background=True):
        for keywords in ({"low_cpu_mem_usage": False}, {"device_map": "cpu"}):
            model = kind.from_pretrained(tmp_path, **keywords)
            assert not is_waiting(model)
            assert not any(parameter.is_meta for parameter in model.parameters())
    assert not is_waiting(kind.from_pretrained(tmp_path))


def test_enable_and_disable() -> None:
    with pytest.raises(ArgumentError, match="accelerate"):
        wl.enable("accelerate", background=True)
    wl.enable(background=True)
    assert all(early_return.is_enabled(name) for name in ("diffusers", "transformers"))
    wl.enable("diffusers")
    assert not early_return.is_enabled("diffusers")
    assert early_return.is_enabled("transformers")
    with wl.enabled("diffusers", background=True):
        assert early_return.is_enabled("diffusers")
        with wl.enabled("diffusers"):
            assert early_return.is_enabled("diffusers")
    assert not early_return.is_enabled("diffusers")
    with wl.enabled("diffusers", background=True):
        wl.disable()
        assert not early_return.is_enabled("diffusers")
    assert not early_return.is_enabled("transformers")


@transformers_models.walked
def test_a_call_that_fails_after_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancels the load; its threads end."""
    transformers_models.MODELS["llama"]().save_pretrained(tmp_path)
    cls = transformers.LlamaForCausalLM

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("in the library")

    monkeypatch.setattr(cls, "tie_weights", failing)
    before = threading.active_count()
    with wl.enabled("transformers", background=True), pytest.raises(RuntimeError, match="library"):
        cls.from_pretrained(tmp_path)
    monkeypatch.undo()
    assert threading.active_count() == before
    assert copy.deepcopy(cls.from_pretrained(tmp_path)).dtype == torch.float32
