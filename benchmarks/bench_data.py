"""Makes checkpoints with the same bytes every time, so that the repository contains none.

The bits are random, except that the highest exponent bit of each 16-bit word is zero. So no bf16,
fp16 or fp32 value is a NaN or an infinity, and casts can be compared bit by bit with torch's.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

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
    """Tensors with a decoder's shapes, at most 32 MiB each, about ``count`` bytes in total."""
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
    """A checkpoint of about ``count`` bytes in one file; an existing file is kept."""
    if not path.exists():
        _save(layers(RandomBits(seed), count, dtype), path)
    return path


def many_layers(path: Path, count: int, width: int = 512, seed: int = 0) -> Path:
    """``count`` modules of one fp32 tensor each, half of them square; an existing file is kept."""
    if not path.exists():
        bits = RandomBits(seed)
        tensors = {}
        for layer in range(count // 2):
            prefix = f"model.layers.{layer}"
            tensors[f"{prefix}.input_layernorm.weight"] = bits.tensor((width,), torch.float32)
            tensors[f"{prefix}.mlp.down_proj.weight"] = bits.tensor((width, width), torch.float32)
        _save(tensors, path)
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
    """The weights and the configuration of a model, with the file names of its library.

    Args:
        build: makes the model; called on ``meta``.
        stem: the beginning of the file names.
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


def model_by_torch(folder: Path, of: Path) -> list[Path]:
    """The weights of a model that ``model`` made, written by ``torch.save``, with links to the
    model's other files."""
    _link(folder, of)
    made = [file.with_suffix(".bin") for file in sorted(folder.glob("*.safetensors"))]
    for file in made:
        if not file.exists():
            temporary = file.with_suffix(".tmp")
            torch.save(load_file(file.with_suffix(".safetensors")), temporary)
            temporary.replace(file)
    return made


def _link(folder: Path, of: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in of.iterdir():
        if not (folder / file.name).exists():
            os.link(file, folder / file.name)


def _wide(width: int, scale: float, step: int) -> int:
    """The width that scales a square weight's size by ``scale``."""
    return max(step, round(width * math.sqrt(scale) / step) * step)


def llama_1b(scale: float = 1) -> torch.nn.Module:
    """1.1 B parameters: the shape of TinyLlama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=_wide(2048, scale, 64),
            intermediate_size=_wide(5632, scale, 64),
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
    )


def unet_860m(scale: float = 1) -> torch.nn.Module:
    """860 M parameters: the shape of Stable Diffusion 1.5's UNet."""
    return _unet(scale, 2, (320, 640, 1280, 1280), cross_attention_dim=768)


def unet_deep(scale: float = 1) -> torch.nn.Module:
    """17,766 tensors with 600 M parameters; constructing the model takes seconds."""
    return _unet(scale, 72, (64, 128, 192, 192), cross_attention_dim=768)


def _unet(scale: float, layers: int, widths: tuple[int, ...], **more: Any) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=64,
        attention_head_dim=8,
        block_out_channels=tuple(_wide(width, scale, 32) for width in widths),
        layers_per_block=layers,
        **more,
    )


def llama_many(scale: float = 1) -> torch.nn.Module:
    """More than 9,000 small tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=max(1, int(1000 * scale)),
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
        )
    )


def moe_many(folder: Path, scale: float = 1) -> list[Path]:
    """A mixture of experts with more than 9,000 small tensors. As in real checkpoints, each expert
    is separate; transformers merges them."""
    if not (folder / "config.json").exists():
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        config = Qwen3MoeConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=max(1, int(24 * scale)),
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=128,
            num_experts_per_tok=4,
            head_dim=8,
        )
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return sorted(folder.glob("*.safetensors"))


def moe_file(path: Path, count: int, tensors: int = 18_867, seed: int = 0) -> Path:
    """About ``count`` bytes with the names of Qwen3-30B-A3B and smaller shapes: 128 experts in each
    layer, of three matrices each, in bf16; 18,867 tensors."""
    if not path.exists():
        layers = max(1, tensors // 393)
        rows = max(1, round(math.sqrt(count / 2 / (layers * 128 * 3) / (2048 / 768))))
        hidden = round(rows * 2048 / 768)
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (1024, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (1024, hidden),
        }
        for n in range(layers):
            layer = f"model.layers.{n}"
            for expert in range(128):
                for part, shape in (
                    ("gate_proj", (rows, hidden)),
                    ("up_proj", (rows, hidden)),
                    ("down_proj", (hidden, rows)),
                ):
                    shapes[f"{layer}.mlp.experts.{expert}.{part}.weight"] = shape
            shapes[f"{layer}.mlp.gate.weight"] = (128, hidden)
            for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
                shapes[f"{layer}.self_attn.{part}.weight"] = (hidden, hidden)
            for part in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{layer}.{part}.weight"] = (hidden,)
            for part in ("q_norm", "k_norm"):
                shapes[f"{layer}.self_attn.{part}.weight"] = (128,)
        bits = RandomBits(seed)
        _save({name: bits.tensor(shape, torch.bfloat16) for name, shape in shapes.items()}, path)
    return path


def pipeline(folder: Path, unet: Path, scale: float = 1) -> list[Path]:
    """Stable Diffusion with two text encoders, without tokenizers: four components in fp32, 5.7 GB.

    Args:
        folder: the pipeline's folder.
        unet: the folder of a UNet that ``model`` made; the pipeline shares its files.
    """
    if (folder / "model_index.json").exists():
        return sorted(folder.rglob("*.safetensors"))
    from diffusers import AutoencoderKL, EulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def text(cls: type[Any], width: int, layers: int) -> torch.nn.Module:
        width = _wide(width, scale, 64)
        config = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            projection_dim=width,
        )
        built: torch.nn.Module = cls(config)
        return built

    widths = (128, 256, 512, 512)
    parts: dict[str, tuple[str, str, Callable[[], torch.nn.Module], str]] = {
        "text_encoder": (
            "transformers",
            "CLIPTextModel",
            functools.partial(text, CLIPTextModel, 768, 12),
            "model",
        ),
        "text_encoder_2": (
            "transformers",
            "CLIPTextModelWithProjection",
            functools.partial(text, CLIPTextModelWithProjection, 1024, 24),
            "model",
        ),
        "vae": (
            "diffusers",
            "AutoencoderKL",
            lambda: AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=tuple(_wide(width, scale, 32) for width in widths),
                layers_per_block=2,
                latent_channels=4,
            ),
            "diffusion_pytorch_model",
        ),
    }
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline"}
    for name, (library, cls, build, stem) in parts.items():
        model(folder / name, build, stem, 1, torch.float32)
        index[name] = [library, cls]
    _link(folder / "unet", unet)
    EulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    index |= {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }
    absent = ("tokenizer", "tokenizer_2", "image_encoder", "feature_extractor")
    index |= {key: [None, None] for key in absent}
    (folder / "model_index.json").write_text(json.dumps(index))
    return sorted(folder.rglob("*.safetensors"))


def many_small(path: Path, tensors: int, seed: int = 0) -> Path:
    """``tensors`` bf16 tensors of 1 to 16 KiB each."""
    if not path.exists():
        bits = RandomBits(seed)
        sizes = np.random.Generator(np.random.SFC64(seed + 1)).integers(512, 8193, tensors)
        whole = bits.tensor((int(sizes.sum()),), torch.bfloat16)
        ends = np.cumsum(sizes).tolist()
        parts = [whole[end - size : end] for end, size in zip(ends, sizes.tolist(), strict=True)]
        named = {f"experts.{n // 64}.{n % 64}.weight": part for n, part in enumerate(parts)}
        # The format forbids tensors that share a storage.
        _save({name: part.clone() for name, part in named.items()}, path)
    return path


def _save(tensors: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Killed half way, it is made again.
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(path)
