"""diffusers' offloads with and without the backend: the same results and model attributes; the
weights for computing come from the streaming executor."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from diffusers.hooks import apply_group_offloading

import weightlift as wl
from accelerate_models import describe, describe_all
from streams_support import streams
from weightlift.module.streaming.streamed_weight import StreamedWeight

LIBRARY = "diffusers"


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    ).eval()  # fmt: skip


def run(model: UNet2DModel) -> Any:
    generator = torch.Generator().manual_seed(1)
    return describe(model(torch.rand(1, 3, 8, 8, generator=generator), 7).sample.detach())


@contextmanager
def watched() -> Iterator[list[type]]:
    """The classes of the weights with which convolutions compute."""
    seen: list[type] = []
    convolve = torch.nn.functional.conv2d

    def noted(x: Any, weight: Any, *rest: Any, **how: Any) -> Any:
        seen.append(type(weight))
        return convolve(x, weight, *rest, **how)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(torch.nn.functional, "conv2d", noted)
        yield seen


LEVELS = {
    "leaves": {"offload_type": "leaf_level"},
    "blocks": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "pairs": {"offload_type": "block_level", "num_blocks_per_group": 2},
}


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("by_method", [True, False])
def test_from_cpu_to_cpu(tmp_path: Path, level: str, place: str, by_method: bool) -> None:
    def call(folder: Path, streamed: bool) -> Any:
        model = unet()
        options: dict[str, Any] = {"onload_device": torch.device("cpu"), **LEVELS[level]}
        if place == "disk":
            options["offload_to_disk_path"] = str(folder)
        if by_method:
            model.enable_group_offload(**options)
        else:
            apply_group_offloading(model, **options)
        before = {name: (type(t), t.dtype, t.shape) for name, t in model.state_dict().items()}
        with torch.no_grad(), watched() as seen:
            results = [run(model) for _ in range(3)]
        assert (StreamedWeight in seen) == (streamed and place == "disk")
        after = {name: (type(t), t.dtype, t.shape) for name, t in model.state_dict().items()}
        assert before == after
        assert streams(1) == (streamed and place == "disk")
        tensors = describe_all(model) if place == "memory" else None  # diffusers leaves nothing
        return results, model.device, model.dtype, tensors, sorted(p.name for p in folder.iterdir())

    for name in ("stock", "ours"):
        (tmp_path / name).mkdir()
    with torch.no_grad():
        expected = run(unet())
    stock, *stock_rest = call(tmp_path / "stock", False)
    with wl.enabled(LIBRARY):
        ours, *our_rest = call(tmp_path / "ours", True)
    assert our_rest == stock_rest
    # diffusers maps a file's weights unchanged, and torch may add misaligned values in another
    # order, so its results differ from those of the model in memory. weightlift's do not.
    assert ours == [expected] * 3
    if place == "memory":
        assert stock == ours


def offloaded(folder: Path) -> UNet2DModel:
    model = unet()
    model.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(folder)
    )
    return model


def test_nothing_falls_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTLIFT_STRICT", "1")
    with wl.enabled(LIBRARY), torch.no_grad():
        model = offloaded(tmp_path)
        run(model)
        del model
        assert streams(0) == 0
    assert not [line for line in caplog.messages if "itself" in line]


def test_disable_restores_diffusers_own_way(tmp_path: Path) -> None:
    with torch.no_grad():
        expected = run(unet())
        with wl.enabled(LIBRARY):
            model = offloaded(tmp_path)
            with watched() as seen:
                assert run(model) == expected
            assert StreamedWeight in seen
        assert streams(0) == 0
        with watched() as seen:
            assert run(model) == expected
        assert StreamedWeight not in seen


def test_gradients_are_diffusers_affair(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def call(folder: Path) -> Any:
        model = offloaded(folder)
        return [run(model) for _ in range(2)]

    stock = call(tmp_path / "stock")
    with wl.enabled(LIBRARY), caplog.at_level(logging.WARNING, "weightlift"):
        assert call(tmp_path / "ours") == stock
    said = [line for line in caplog.messages if "brings offloaded weights in itself" in line]
    assert len(said) == 1
    assert "gradients" in said[0]


def test_files_that_are_written_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import safetensors.torch

    def call(folder: Path) -> Any:
        with torch.no_grad():
            model = offloaded(folder)
            first = run(model)
            for path in folder.iterdir():
                tensors = safetensors.torch.load_file(path)
                new = {name: tensor * 2 for name, tensor in tensors.items()}
                safetensors.torch.save_file(new, path.with_suffix(".new"))
                path.with_suffix(".new").replace(path)
            return first, run(model), run(model)

    stock = call(tmp_path / "stock")
    assert stock[0] != stock[1]
    with wl.enabled(LIBRARY), caplog.at_level(logging.WARNING, "weightlift"):
        assert call(tmp_path / "ours") == stock
    assert len([line for line in caplog.messages if "written to" in line]) == 1


def test_an_exception_within_a_forward(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no such luck")

    with wl.enabled(LIBRARY), torch.no_grad():
        expected = run(unet())
        model = offloaded(tmp_path)
        hook = model.mid_block.register_forward_hook(fail)
        with pytest.raises(ValueError, match="no such luck"):
            run(model)
        hook.remove()
        assert run(model) == expected


def test_another_dtype_after_the_offload() -> None:
    """A model in memory: diffusers uses its weights."""

    def call() -> Any:
        model = unet()
        model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        with torch.no_grad():
            first = run(model)
            model.conv_in.weight.mul_(2)
            return first, run(model)

    stock = call()
    with wl.enabled(LIBRARY):
        assert call() == stock


def test_sequential_offload_of_a_model_by_accelerate(tmp_path: Path) -> None:
    """The call of ``enable_sequential_cpu_offload``, with the CPU as the device."""
    import accelerate

    def call() -> Any:
        torch.manual_seed(0)
        model = AutoencoderKL(
            block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",), latent_channels=2,
        ).eval()  # fmt: skip
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
        with torch.no_grad():
            x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
            results = [describe(model(x).sample) for _ in range(2)]
        return results, model.device, {p.device.type for p in model.parameters()}

    stock = call()
    with wl.enabled(LIBRARY, "accelerate"):
        assert call() == stock
