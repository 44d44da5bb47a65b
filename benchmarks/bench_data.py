"""Checkpoints made by code: the same bytes every time, and none of them in the repository.

The bits are random, but for the highest exponent bit of every 16-bit word, which is zero: so no
bf16, fp16 or fp32 among them is a NaN or an infinity, and casts can be compared bit by bit with
torch's.
"""

from __future__ import annotations

import json
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
