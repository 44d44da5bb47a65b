"""Loads of the transformers backend to simulated CUDA devices, compared with the library on the
CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import simulated
import support
from simulated import Policy, Switch, machine
from simulated_torch import Allocator
from transformers_models import (
    MOE,
    conversion_mapping,
    made,
    modeling_utils,
    transformers,
    walked,
)
from weightlift.backends.transformers import walk
from weightlift.backends.transformers import weights as weights_of
from weightlift.checkpoint.checkpoint import Checkpoint, indexed_files

__all__ = ["machine", "made"]

pytestmark = [*simulated.pytestmark, walked]


MAPS: dict[str, dict[str, Any]] = {
    "one device": {"": 0},
    "two devices and the host": {
        "model.embed_tokens": "cuda:1",
        "model.layers.0": torch.device("cuda", 0),
        "model.layers.1": 1,
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": 0,
    },
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device_map", MAPS)
def test_mixtures(
    machine: Switch,
    made: Callable[..., Path],
    device_map: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    folder = made("mixtral", max_shard_size="30KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE)).to(dtype)
    config = modeling_utils.LoadStateDictConfig(
        device_map=MAPS[device_map],
        dtype=dtype,
        weight_mapping=conversion_mapping.get_model_conversion_mapping(model),
    )
    with machine(2, seed, Policy.RANDOM) as driver:
        checkpoint = Checkpoint([indexed_files(Checkpoint.from_file(file))[0] for file in files])
        weights = weights_of.Weights(checkpoint, "auto")
        allocator = weights.allocator = Allocator(driver)
        info, _ = walk.walk_tensors(model, weights, config, None)
        assert info.missing_keys == set()
        assert weights.report is not None
        used = {name for name, count in weights.report.devices.items() if count}
        assert used == ({"cuda:0"} if device_map == "one device" else {"cuda:0", "cuda:1", "cpu"})
        from transformers.integrations.accelerate import expand_device_map

        devices = expand_device_map(MAPS[device_map], list(theirs))
        for name, tensor in model.state_dict().items():
            if devices[name] == "cpu":
                support.assert_same(tensor, theirs[name])
                continue
            block = allocator.blocks[tensor.data_ptr()]
            assert (
                block.device
                == (
                    torch.device("cuda", 1)
                    if devices[name] in (1, "cuda:1")
                    else torch.device("cuda", 0)
                ).index
            )
            assert (tensor.dtype, tensor.shape) == (dtype, theirs[name].shape)
            assert block.bits() == support.bits(theirs[name])
        del model, tensor
        allocator.blocks.clear()
