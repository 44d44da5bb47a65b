"""A rank of a small model with every kind of weight loader, as serving engines have them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["HIDDEN", "Serving", "Weights", "assert_same", "bits_of", "checkpoint_of", "empty"]

HIDDEN, WIDE, EXPERTS, WORDS, PADDED = 64, 96, 3, 100, 128
Weights = Iterable[tuple[str, Tensor]]


def checkpoint_of(folder: Path, tensors: dict[str, Tensor], name: str = "m.safetensors") -> Path:
    path = folder / name
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)
    return path


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Parameter:
    made = torch.full(shape, 7, dtype=dtype) if device == "cpu" else torch.empty(shape, dtype=dtype)
    return nn.Parameter(made.to(device), requires_grad=False)


class Serving(nn.Module):
    """A rank of two of a small model, with every kind of weight loader."""

    def __init__(self, device: str, rank: int = 1) -> None:
        super().__init__()
        half = HIDDEN // 2
        self.rank, self.calls = rank, 0
        self.qkv = empty(3 * half, HIDDEN, device=device)
        self.qkv_bias = empty(3 * half, dtype=torch.bfloat16, device=device)
        self.gate_up = empty(2 * WIDE // 2, HIDDEN, dtype=torch.float16, device=device)
        self.down = empty(HIDDEN, WIDE // 2, device=device)
        self.w13 = empty(EXPERTS, WIDE, HIDDEN, device=device)
        self.w2 = empty(EXPERTS, HIDDEN, WIDE // 2, device=device)
        self.transposed = empty(HIDDEN, WIDE, device=device)
        self.columns = empty(HIDDEN, 2 * HIDDEN, device=device)
        self.embed = empty(PADDED // 2, HIDDEN, dtype=torch.bfloat16, device=device)
        self.norm = empty(HIDDEN, device=device)
        self.scale = empty(1, device=device)
        self.table = empty(5, dtype=torch.float64, device=device)
        self.sum = empty(HIDDEN, HIDDEN, device=device)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("bits", torch.zeros(8, dtype=torch.float8_e4m3fn, device=device))

    @staticmethod
    def tensors(generator: torch.Generator) -> dict[str, Tensor]:
        def made(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        found = {}
        for name in "qkv":
            found[f"{name}.weight"] = made(HIDDEN, HIDDEN)
            found[f"{name}.bias"] = made(HIDDEN)
        found["gate.weight"] = made(WIDE, HIDDEN).double()
        found["up.weight"] = made(WIDE, HIDDEN).half()
        found["down.weight"] = made(HIDDEN, WIDE).bfloat16()
        for expert in range(EXPERTS):
            found[f"experts.{expert}.w1"] = made(WIDE, HIDDEN)
            found[f"experts.{expert}.w3"] = made(WIDE, HIDDEN)
            found[f"experts.{expert}.w2"] = made(HIDDEN, WIDE)
        found["transposed"] = made(WIDE, HIDDEN).half()
        found["left"] = made(HIDDEN, HIDDEN)
        found["right"] = made(HIDDEN, HIDDEN).bfloat16()
        found["embed"] = made(WORDS, HIDDEN)
        found["norm"] = made(HIDDEN)
        found["scale"] = made(1).squeeze()
        found["table"] = made(5)
        found["a"], found["b"] = made(HIDDEN, HIDDEN // 2), made(HIDDEN, HIDDEN // 2)
        found["steps"] = torch.tensor(3, dtype=torch.int32)
        found["bits"] = torch.arange(8, dtype=torch.uint8)
        return found

    def load_weights(self, weights: Weights) -> set[str]:
        loaded = set()
        kept: dict[str, Tensor] = {}
        for name, tensor in weights:
            self.calls += 1
            getattr(self, f"load_{name.partition('.')[0]}")(name, tensor, kept)
            loaded.add(name)
        return loaded

    def load_q(self, name: str, tensor: Tensor, kept: object) -> None:
        half, which = HIDDEN // 2, "qkv".index(name[0])
        param = self.qkv if name.endswith("weight") else self.qkv_bias
        part = param.data.narrow(0, which * half, half)
        part.copy_(tensor.narrow(0, self.rank * half, half))

    load_k = load_v = load_q

    def load_gate(self, name: str, tensor: Tensor, kept: object) -> None:
        half = WIDE // 2
        shard = tensor.chunk(2, dim=0)[self.rank]
        at = half if name.startswith("up") else 0
        self.gate_up.data[at : at + half] = shard

    load_up = load_gate

    def load_down(self, name: str, tensor: Tensor, kept: object) -> None:
        half = WIDE // 2
        with torch.no_grad():
            self.down.copy_(tensor[:, self.rank * half : (self.rank + 1) * half])

    def load_experts(self, name: str, tensor: Tensor, kept: object) -> None:
        _, expert, kind = name.split(".")
        half = WIDE // 2
        if kind == "w2":
            self.w2.data[int(expert)].copy_(tensor.narrow(1, self.rank * half, half).contiguous())
            return
        into = self.w13.data[int(expert)]
        at = 0 if kind == "w1" else half
        into.narrow(0, at, half).copy_(tensor.view(2, half, HIDDEN)[self.rank].to(into.dtype))

    def load_transposed(self, name: str, tensor: Tensor, kept: object) -> None:
        self.transposed.data.copy_(tensor.t())

    def load_left(self, name: str, tensor: Tensor, kept: object) -> None:
        at = 0 if name == "left" else HIDDEN
        self.columns.data[:, at : at + HIDDEN].copy_(tensor)

    load_right = load_left

    def load_embed(self, name: str, tensor: Tensor, kept: object) -> None:
        first = self.rank * PADDED // 2
        rows = tensor[first : min(first + PADDED // 2, WORDS)]
        self.embed.data[: len(rows)].copy_(rows)
        self.embed.data[len(rows) :].fill_(0)

    def load_norm(self, name: str, tensor: Tensor, kept: object) -> None:
        assert not self.norm.is_meta
        self.norm.data = tensor

    def load_scale(self, name: str, tensor: Tensor, kept: object) -> None:
        self.scale.data.fill_(tensor.item())

    def load_table(self, name: str, tensor: Tensor, kept: object) -> None:
        self.table.data.copy_(torch.from_numpy(tensor.numpy() * 2))

    def load_a(self, name: str, tensor: Tensor, kept: dict[str, Tensor]) -> None:
        kept[name] = tensor
        if len(kept) == 2:
            self.sum.data.copy_(torch.cat([kept["a"], kept["b"]], dim=1))

    load_b = load_a

    def load_steps(self, name: str, tensor: Tensor, kept: object) -> None:
        self.steps.copy_(tensor)

    def load_bits(self, name: str, tensor: Tensor, kept: object) -> None:
        self.bits.copy_(tensor.view(torch.float8_e4m3fn))


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same(found: nn.Module, wanted: nn.Module) -> None:
    pairs = dict(wanted.named_parameters()) | dict(wanted.named_buffers())
    others = dict(found.named_parameters()) | dict(found.named_buffers())
    assert others.keys() == pairs.keys()
    for name, right in pairs.items():
        left = others[name]
        assert (left.dtype, left.shape, left.device) == (right.dtype, right.shape, right.device)
        assert type(left) is type(right), name
        assert torch.equal(bits_of(left), bits_of(right)), name
