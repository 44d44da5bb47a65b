"""Converts Flax weights with diffusers 0.39: writes a folder for each case, with the weights that
flax wrote and the tensors that diffusers made from them. Runs in a separate environment, which
``tests/python/models/test_flax_oracle.py`` sets up before it compares.

    python convert.py FOLDER
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import diffusers
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.modeling_flax_pytorch_utils import (
    convert_pytorch_state_dict_to_flax,
    rename_key,
)
from diffusers.models.modeling_pytorch_flax_utils import load_flax_checkpoint_in_pytorch_model
from flax.traverse_util import flatten_dict
from safetensors.torch import save_file

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
}
VAE = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
}
CONTROL = {
    "sample_size": 8,
    "in_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "conditioning_embedding_out_channels": (8, 8, 16, 16),
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "unet": ("FlaxUNet2DConditionModel", "UNet2DConditionModel", UNET),
    "vae": ("FlaxAutoencoderKL", "AutoencoderKL", VAE),
    "controlnet": ("FlaxControlNetModel", "ControlNetModel", CONTROL),
}


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    # Arrays of one byte may share it, because Python has each such `bytes` object once.
    copies = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    save_file(copies, path)


def random_like(tree: Any, rng: np.random.Generator) -> Any:
    """A tree of the same structure with random values, because a new model has zeros and ones in
    too many places."""
    return jax.tree_util.tree_map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), tree
    )


def of_a_model(name: str, folder: Path) -> None:
    flax_class, torch_class, config = MODELS[name]
    model = getattr(diffusers, flax_class)(**config)

    def torch_model(saved: Path) -> Any:
        cls = getattr(diffusers, torch_class)
        return cls.from_config(cls.load_config(saved))

    rng = np.random.default_rng(0)
    initial = model.init_weights(jax.random.PRNGKey(0))
    for dtype in ("float32", "bfloat16"):
        params = random_like(initial, rng)
        if dtype == "bfloat16":
            params = model.to_bf16(params)
        here = folder / f"{name}-{dtype}"
        model.save_pretrained(here, params)
        # from_pretrained(from_flax=True) of 0.39 calls this, and then fails over its result.
        loaded = load_flax_checkpoint_in_pytorch_model(
            torch_model(here), here / "diffusion_flax_model.msgpack"
        )
        save_tensors(dict(loaded.state_dict()), here / "torch.safetensors")

    # The way back.
    torch.manual_seed(0)
    tensors = dict(torch_model(here).state_dict())
    back = flatten_dict(convert_pytorch_state_dict_to_flax(tensors, model))
    here = folder / f"{name}-to-flax"
    here.mkdir()
    save_tensors(tensors, here / "torch.safetensors")
    save_tensors(
        {"/".join(path): torch.from_numpy(np.array(leaf)) for path, leaf in back.items()},
        here / "flax.safetensors",
    )
    paths = ["/".join(path) for path in flatten_dict(initial)]
    (here / "paths.json").write_text(json.dumps(paths))


class AnyShape:
    """Compares equal to every shape."""

    shape: Any

    def __init__(self) -> None:
        self.shape = self

    def __eq__(self, _: object) -> bool:
        return True

    def __ne__(self, _: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


class Names(dict[str, Any]):
    """Records the names that are requested, and has none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __contains__(self, name: object) -> bool:
        self.asked.append(str(name))
        return False


class AnyModel:
    """Has any parameter."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names

    def state_dict(self) -> dict[str, Any]:
        return self.names

    def load_state_dict(self, tensors: dict[str, Any]) -> None:
        self.loaded = tensors


PARTS = [
    *("conv_1", "linear_0", "blocks_10_attn_2", "layers_3", "to_out_0", "time_embedding", "a.b_2"),
    *("time_embedding_1", "_7", "x__3", "norm1", "net_2_proj_11", "0", "1_2_3", "no_number"),
]
WEIGHTS = ("kernel", "kernel", "scale", "weight")
OTHERS = ("bias", "embedding", "kernel_1", "time_embedding", "mean_2")
DTYPES = ("float32", "float16", "bfloat16", "int32", "uint8", "bool", "int8")


def random_array(random: random.Random, rng: np.random.Generator) -> Any:
    smallest = 0 if random.random() < 0.1 else 1
    shape = [random.randint(smallest, 4) for _ in range(random.randint(0, 5))]
    numbers = np.asarray(rng.standard_normal(shape) * 10)
    return numbers.astype(jnp.dtype(random.choice(DTYPES)))


def random_tree(random: random.Random, rng: np.random.Generator, depth: int = 3) -> Any:
    leaves = random.sample([random.choice(WEIGHTS), *OTHERS], k=random.randint(1, 3))
    modules = random.sample(PARTS, k=random.randint(1, 3)) if depth else []
    return {
        **{leaf: random_array(random, rng) for leaf in leaves},
        **{module: random_tree(random, rng, depth - 1) for module in modules},
    }


def of_trees(folder: Path) -> None:
    rng = np.random.default_rng(1)
    for number in range(40):
        tree = random_tree(random.Random(number), rng)
        here = folder / f"tree-{number:02}"
        here.mkdir()
        # Small enough that arrays are cut into chunks.
        flax.serialization.MAX_CHUNK_SIZE = 64 if number % 2 else 2**30
        file = here / "flax_model.msgpack"
        file.write_bytes(flax.serialization.msgpack_serialize(tree))
        names = Names()
        load_flax_checkpoint_in_pytorch_model(AnyModel(names), file)
        if len(set(names.asked)) != len(names.asked):
            file.unlink()  # two leaves with one name, of which one is lost
            here.rmdir()
            continue
        model = AnyModel({name: AnyShape() for name in names.asked})
        load_flax_checkpoint_in_pytorch_model(model, file)
        save_tensors(model.loaded, here / "torch.safetensors")


def of_names(folder: Path) -> None:
    random_ = random.Random(2)
    parts = ["a", "ab", "0", "1", "10", "x_1", "b2", "b.3", "é.4", "-.5", "to_q"]
    names = {
        ".".join(random_.choices(parts, k=random_.randint(1, 7))) + ".bias" for _ in range(3000)
    }
    (folder / "names.json").write_text(json.dumps({name: rename_key(name) for name in names}))


if __name__ == "__main__":
    jax.tree_map = jax.tree_util.tree_map  # diffusers uses this name, which jax has removed
    target = Path(sys.argv[1])
    for model_name in MODELS:
        of_a_model(model_name, target)
    of_trees(target)
    of_names(target)
