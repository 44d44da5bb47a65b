"""transformers' own parallelism with the backend, compared with the library without it: the same
local shards, read once by all ranks together."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import weightlift as wl
from distributed_support import assert_same_model, failure_of, run_checks, total
from weightlift.backends.transformers import compat, weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers
    from transformers.distributed import DistributedConfig

DENSE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}
MOE = {
    **DENSE,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "head_dim": 8,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", DENSE),
    "tied": ("Llama", {**DENSE, "tie_word_embeddings": True}),
    "phi3": ("Phi3", DENSE),  # gate and up are one tensor, from which a rank takes two pieces
    "qwen3_moe": ("Qwen3Moe", MOE),
    "mixtral": ("Mixtral", MOE),
}


def model_class(name: str) -> Any:
    return getattr(transformers, f"{MODELS[name][0]}ForCausalLM")


def write_models(folder: Path) -> None:
    for name, (family, arguments) in MODELS.items():
        torch.manual_seed(sum(map(ord, name)))
        config = getattr(transformers, f"{family}Config")(**arguments)
        model_class(name)(config).save_pretrained(folder / name)


def load(where: Path, name: str, **arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tp_plan.*", FutureWarning)
        return model_class(name).from_pretrained(where, **arguments)


def needed(model: torch.nn.Module) -> float:
    """The bytes that this rank needs from the checkpoint, in the file's dtype."""
    unique = {id(p): p for p in model.parameters()}.values()
    return sum(4 * (p.to_local() if isinstance(p, DTensor) else p).numel() for p in unique)


def assert_same_load(
    folder: Path, name: str, placed: Callable[[torch.nn.Module], bool], **arguments: Any
) -> wl.LoadReport:
    theirs = load(folder / name, name, **arguments)
    with wl.enabled("transformers"):
        before = wl.stats().by_caller.get("transformers")
        ours = load(folder / name, name, **arguments)
        after = wl.stats().by_caller["transformers"]
    assert after.loads > (before.loads if before else 0)
    assert after.fallbacks == (before.fallbacks if before else 0)
    assert placed(ours)
    assert_same_model(ours, theirs)
    report = wl.last_report()
    assert report is not None
    assert report.bytes == needed(ours)
    if "dtype" in arguments:  # grouped products in bfloat16 need larger experts
        return report
    tokens = torch.arange(12).reshape(1, 12)
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits)
    return report


def has_parts(model: torch.nn.Module) -> bool:
    return any(
        isinstance(p, DTensor) and math.prod(p.to_local().shape) < p.numel()
        for p in model.parameters()
    )


def check_tp_plan_auto(folder: Path) -> None:
    for name in MODELS:
        assert_same_load(folder, name, has_parts, tp_plan="auto")
        assert_same_load(folder, name, has_parts, tp_plan="auto", dtype=torch.bfloat16)


def check_expert_parallel(folder: Path) -> None:
    world = dist.get_world_size()
    config = DistributedConfig(tp_size=world, ep_size=world)
    for name in ("qwen3_moe", "mixtral"):

        def experts_are_cut(model: Any) -> bool:
            held = model.model.layers[0].mlp.experts.gate_up_proj
            return bool(held.to_local().shape[0] == 8 // world)

        assert_same_load(folder, name, experts_are_cut, distributed_config=config)


def check_fsdp(folder: Path) -> None:
    world = dist.get_world_size()
    config = DistributedConfig(fsdp_size=world)
    report = assert_same_load(folder, "llama", has_parts, distributed_config=config)
    size = (folder / "llama" / "model.safetensors").stat().st_size
    assert total(report.bytes) <= 1.02 * size
    if world == 4:
        config = DistributedConfig(fsdp_size=2, tp_size=2)
        for name in ("llama", "phi3", "qwen3_moe"):
            assert_same_load(folder, name, has_parts, distributed_config=config)


def check_a_truncated_file(folder: Path) -> None:
    import shutil

    own = folder / f"own-{dist.get_world_size()}-{dist.get_rank()}"
    shutil.copytree(folder / "llama", own)
    file = own / "model.safetensors"
    if dist.get_rank() == 1:
        os.truncate(file, file.stat().st_size - 1000)
    with wl.enabled("transformers"):
        text = failure_of(lambda: load(own, "llama", tp_plan="auto"))
    assert "rank 1: " in text
    assert "model.safetensors" in text
    assert "rank 0: " not in text


def check_damaged_on_every_rank(folder: Path) -> None:
    """The ranks need not agree on anything: the library raises its own error."""
    import shutil

    own = folder / f"damaged-{dist.get_world_size()}-{dist.get_rank()}"
    shutil.copytree(folder / "llama", own)
    os.truncate(own / "model.safetensors", 20)
    for enabled in (False, True):
        with (
            wl.enabled("transformers") if enabled else contextlib.nullcontext(),
            pytest.raises(safetensors.SafetensorError, match="header"),
        ):
            load(own, "llama", tp_plan="auto")
    dist.barrier()


def check_a_failure_amid(folder: Path) -> None:
    error = wl.ReadError(5, "the disk has gone", "somewhere")
    fails = mock.patch.object(weights.Batch, "result", side_effect=error)
    with wl.enabled("transformers"), fails if dist.get_rank() == 1 else contextlib.nullcontext():
        text = failure_of(lambda: load(folder / "llama", "llama", tp_plan="auto"))
    assert "rank 1: ReadError: " in text
    assert "the disk has gone" in text


def check_what_falls_back(folder: Path) -> None:
    where = folder / f"stock-{dist.get_world_size()}-{dist.get_rank()}"
    where.mkdir()
    state = safetensors.torch.load_file(folder / "llama" / "model.safetensors")
    torch.save({**state, "epoch": 3}, where / "pytorch_model.bin")
    (where / "config.json").write_bytes((folder / "llama" / "config.json").read_bytes())
    unknown = mock.patch.object(compat, "is_walked", return_value=False)
    cases = (where, contextlib.nullcontext()), (folder / "llama", unknown)
    for path, case in cases:
        theirs = load(path, "llama", tp_plan="auto")
        before = wl.stats().bytes
        with wl.enabled("transformers"), case:
            ours = load(path, "llama", tp_plan="auto")
        assert wl.stats().bytes == before
        assert has_parts(ours)
        assert_same_model(ours, theirs)


CHECKS = {name: value for name, value in globals().items() if name.startswith("check_")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("transformers")
    write_models(made)
    return made


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.deep)])
def outcomes(request: pytest.FixtureRequest, folder: Path) -> Callable[[str], list[str]]:
    return run_checks(request.param, folder, CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_on_every_rank(outcomes: Callable[[str], list[str]], check: str) -> None:
    for rank, outcome in enumerate(outcomes(check)):
        assert outcome == "passed", f"rank {rank}: {outcome}"
