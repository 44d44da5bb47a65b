"""Checkpoints made by code: the same bytes every time, and none of them in the repository.

The bits are random, but for the highest exponent bit of every 16-bit word, which is zero: so no
bf16, fp16 or fp32 among them is a NaN or an infinity, and casts can be compared bit by bit with
torch's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

_WORD = np.uint64(0xBFFF_BFFF_BFFF_BFFF)
_BLOCK = 32 << 20


class RandomBits:
    """Random bits, at the memory's rate: one random block, changed by another word each time."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.SFC64(seed))
        self._block = self._generator.integers(0, 2**64, _BLOCK // 8, dtype=np.uint64)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        words = np.empty(-(-count // 8), dtype=np.uint64)
        for start in range(0, len(words), len(self._block)):
            part = words[start : start + len(self._block)]
            change = self._generator.integers(0, 2**64, dtype=np.uint64)
            np.bitwise_xor(self._block[: len(part)], change, out=part)
            part &= _WORD
        flat = torch.from_numpy(words.view(np.uint8)[:count])
        return flat.view(dtype).reshape(shape)


def layers(
    bits: RandomBits, count: int, dtype: torch.dtype, first: int = 0
) -> dict[str, torch.Tensor]:
    """Tensors of a decoder's shapes, at most 32 MiB each, of about ``count`` bytes in all."""
    tensors: dict[str, torch.Tensor] = {}
    width = 4096 if dtype.itemsize == 2 else 2896  # 32 MiB
    layer, total = first, 0
    while total < count:
        rest = (count - total) // dtype.itemsize
        rows = min(width, max(1, rest // width))
        names = {
            f"model.layers.{layer}.input_layernorm.weight": (width,),
            f"model.layers.{layer}.mlp.down_proj.weight": (rows, width),
        }
        for name, shape in names.items():
            tensors[name] = bits.tensor(shape, dtype)
            total += tensors[name].nbytes
        layer += 1
    return tensors


def one_file(path: Path, count: int, dtype: torch.dtype, seed: int = 0) -> Path:
    """A checkpoint of about ``count`` bytes in one file; kept if it is there."""
    if not path.exists():
        _save(layers(RandomBits(seed), count, dtype), path)
    return path


def sharded(folder: Path, shards: int, count: int, dtype: torch.dtype, seed: int = 0) -> list[Path]:
    """A checkpoint of about ``count`` bytes in ``shards`` files with an index."""
    index = folder / "model.safetensors.index.json"
    names = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    if not index.exists():
        folder.mkdir(parents=True, exist_ok=True)
        bits = RandomBits(seed)
        weight_map: dict[str, str] = {}
        total = 0
        for n, name in enumerate(names):
            tensors = layers(bits, count // shards, dtype, first=1000 * n)
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
            _save(tensors, folder / name)
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index.write_text(json.dumps(content, indent=1))
    return [folder / name for name in names]


def torch_file(path: Path, count: int, dtype: torch.dtype, seed: int = 0) -> Path:
    """The tensors of ``one_file``, by ``torch.save``."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        torch.save(layers(RandomBits(seed), count, dtype), temporary)
        temporary.replace(path)
    return path


def model(
    folder: Path, build: Callable[[], torch.nn.Module], stem: str, shards: int, dtype: torch.dtype
) -> list[Path]:
    """The weights of a model, with its configuration, as its library names them.

    Args:
        build: makes the model; it is called on ``meta``.
        stem: of the names of the files.
    """
    marker = folder / "config.json"
    if not marker.exists():
        with torch.device("meta"):
            built = build()
        folder.mkdir(parents=True, exist_ok=True)
        bits = RandomBits(0)
        held = {id(t): (name, t) for name, t in reversed(list(built.state_dict().items()))}
        names = sorted(name for name, _ in held.values())
        shapes = {name: tuple(t.shape) for name, t in held.values()}
        largest = sum(t.numel() for _, t in held.values()) // shards + 1
        groups: list[list[str]] = [[]]
        count = 0
        for name in names:
            size = int(np.prod(shapes[name], dtype=np.int64))
            if groups[-1] and count + size > largest and len(groups) < shards:
                groups.append([])
                count = 0
            groups[-1].append(name)
            count += size
        weight_map = {}
        for n, group in enumerate(groups):
            suffix = f"-{n + 1:05}-of-{len(groups):05}" if len(groups) > 1 else ""
            file = f"{stem}{suffix}.safetensors"
            weight_map |= dict.fromkeys(group, file)
            _save({name: bits.tensor(shapes[name], dtype) for name in group}, folder / file)
        if len(groups) > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        config = built.config
        if hasattr(config, "architectures"):
            config.architectures = [type(built).__name__]
        text = config.to_json_string() if hasattr(config, "to_json_string") else None
        marker.write_text(text or built.to_json_string())  # type: ignore[operator]
    return sorted(folder.glob("*.safetensors"))


def llama_1b() -> torch.nn.Module:
    """1.1 B parameters: the shape of TinyLlama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
    )


def unet_860m() -> torch.nn.Module:
    """860 M parameters: the shape of Stable Diffusion 1.5's UNet."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
    )


def llama_many() -> torch.nn.Module:
    """More than 9,000 tensors, and little in them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1000,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
        )
    )


def moe_many(folder: Path) -> list[Path]:
    """A mixture of experts of more than 9,000 tensors, and little in them: each expert apart, as
    checkpoints have them; transformers merges them."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    if not (folder / "config.json").exists():
        config = Qwen3MoeConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=24,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=128,
            num_experts_per_tok=4,
            head_dim=8,
        )
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return sorted(folder.glob("*.safetensors"))


def many_small(path: Path, tensors: int, seed: int = 0) -> Path:
    """``tensors`` bf16 tensors of 1 to 16 KiB each."""
    if not path.exists():
        bits = RandomBits(seed)
        sizes = np.random.Generator(np.random.SFC64(seed + 1)).integers(512, 8193, tensors)
        whole = bits.tensor((int(sizes.sum()),), torch.bfloat16)
        ends = np.cumsum(sizes).tolist()
        parts = [whole[end - size : end] for end, size in zip(ends, sizes.tolist(), strict=True)]
        named = {f"experts.{n // 64}.{n % 64}.weight": part for n, part in enumerate(parts)}
        # One storage under many tensors is what the format forbids.
        _save({name: part.clone() for name, part in named.items()}, path)
    return path


def _save(tensors: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Killed half way, it is made again.
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(path)
