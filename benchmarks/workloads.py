"""The measured loads: their files, contenders and targets."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench_data import (
    llama_1b,
    llama_many,
    many_layers,
    many_small,
    model,
    model_by_torch,
    moe_file,
    moe_many,
    one_file,
    pipeline,
    sharded,
    torch_file,
    unet_860m,
    unet_deep,
)
from judges import (
    OURS,
    Judge,
    cast_to_device,
    faster_at_least,
    faster_than_each,
    microseconds_a_tensor,
    never_slower,
    overlapped,
    ratio_at_most,
    seconds_at_most,
    share_of_ceiling,
    within_longer_part,
    within_memory,
)
from weightlift.bench.conditions import BACKED, NOT_BACKED
from weightlift.bench.measure import Job

REFERENCE = "safetensors"
PEERS = (
    "safetensors-prefetch",
    "fastsafetensors",
    "runai-model-streamer",
    "instanttensor",
    "flashpack",
)
FILES = (OURS, REFERENCE, "safetensors-pread", *PEERS)
ON_CUDA = (OURS, REFERENCE, *PEERS)
OWN_MEMORY = (OURS, "safetensors-pread", *PEERS)
TORCH = (OURS, "twin", "torch", "torch-plain")
GB = 10**9
MakeJob = Callable[[Path, float], Job]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A load whose figure has a target.

    Attributes:
        what: the description.
        job: makes the files in a folder, at a scale, and returns the load.
        judge: computes the figure; gets the rates of ``floors.py``.
        floor: the work that sets the lower bound: ``"mapped"``, touch the mapped files;
            ``"memory"``, read the files from the page cache and get new memory for the result, both
            with all threads; ``"disk"``, read the files from the disk; ``"link"``, send them to the
            GPU.
        memory: the state of free memory at the start of a load: see ``bench.conditions``.
        rounds: a factor on the number of rounds. Short loads vary more, and more rounds of them
            cost little; casts vary with the new memory that their process gets.
    """

    what: str
    job: MakeJob
    judge: Judge
    contenders: tuple[str, ...] = FILES
    floor: str | None = None
    cold: bool = False
    touched: bool = True
    rounds: float = 1
    memory: str = BACKED


def _sized(count: float, scale: float) -> tuple[int, str]:
    size = int(count * scale)
    return size, f"{size // 10**6}mb"


def _file(name: str, count: float, stored: torch.dtype, **job: Any) -> MakeJob:
    """A job on a file of about ``count`` times the scale bytes; ``job`` has further fields."""

    def make(data: Path, scale: float) -> Job:
        size, label = _sized(count, scale)
        return Job(
            OURS, (str(one_file(data / f"{name}-{label}.safetensors", size, stored)),), **job
        )

    return make


def _one_tensor(data: Path, scale: float) -> Job:
    from safetensors import safe_open

    job = _file("bf16", 2 * GB, torch.bfloat16)(data, scale)
    with safe_open(job.files[0], framework="pt") as opened:
        names = sorted(name for name in opened.keys() if "proj" in name)  # noqa: SIM118
    return dataclasses.replace(job, tensor=names[len(names) // 2])


def _shards(data: Path, scale: float) -> Job:
    """16 GB if the memory is twice as large and the disk has space for another form of them, else
    4."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    roomy = memory > 48 * GB and shutil.disk_usage(data).free > 60 * GB
    size, label = _sized((16 if roomy else 4) * GB, scale)
    return Job(OURS, tuple(map(str, sharded(data / f"shards-{label}", 4, size, torch.bfloat16))))


def _many_layers(data: Path, scale: float) -> Job:
    count = max(2, int(1000 * scale))
    return Job(OURS, (str(many_layers(data / f"layers-{count}.safetensors", count)),))


def _small(device: str) -> MakeJob:
    def make(data: Path, scale: float) -> Job:
        count = max(1, int(100_000 * scale))
        return Job(OURS, (str(many_small(data / f"small-{count}.safetensors", count)),), device)

    return make


def _experts(device: str) -> MakeJob:
    def make(data: Path, scale: float) -> Job:
        size, label = _sized(2 * GB, scale)
        return Job(OURS, (str(moe_file(data / f"moe-{label}.safetensors", size)),), device)

    return make


def _bin(name: str, count: float, stored: torch.dtype, **job: Any) -> MakeJob:
    """A job on a file of ``torch.save``, with the same tensors as safetensors beside it."""

    def make(data: Path, scale: float) -> Job:
        twin = _file(name, count, stored, **job)(data, scale)
        size, _ = _sized(count, scale)
        path = torch_file(Path(twin.files[0]).with_suffix(".bin"), size, stored)
        return dataclasses.replace(twin, files=(str(path),))

    return make


def _folder(data: Path, name: str, scale: float) -> Path:
    return data / (name if scale == 1 else f"{name}-{scale:g}")


def _model(
    name: str,
    build: Callable[[float], torch.nn.Module],
    where: str,
    stored: torch.dtype,
    shards: int = 1,
    **job: Any,
) -> MakeJob:
    """A job on a model's folder; ``where`` is its class as ``module:Class``."""

    def make(data: Path, scale: float) -> Job:
        folder = _folder(data, name, scale)
        stem = "diffusion_pytorch_model" if where.startswith("diffusers") else "model"
        files = model(folder, lambda: build(scale), stem, shards, stored)
        return Job("stock", tuple(map(str, files)), folder=str(folder), model=where, **job)

    return make


def _moe(data: Path, scale: float) -> Job:
    folder = _folder(data, "moe-9000", scale)
    files = tuple(map(str, moe_many(folder, scale)))
    where = "transformers:Qwen3MoeForCausalLM"
    return Job("stock", files, dtype="bfloat16", folder=str(folder), model=where)


def _unet_by_torch(mode: str) -> MakeJob:
    def make(data: Path, scale: float) -> Job:
        unet = _model(*_UNET, dtype="float32", mode=mode)(data, scale)
        folder = _folder(data, "unet-860m-bin", scale)
        files = tuple(map(str, model_by_torch(folder, Path(unet.folder or ""))))
        return dataclasses.replace(unet, files=files, folder=str(folder))

    return make


def _pipeline(data: Path, scale: float) -> Job:
    unet = _model(*_UNET)(data, scale)
    folder = _folder(data, "pipeline", scale)
    files = tuple(map(str, pipeline(folder, Path(unet.folder or ""), scale)))
    where = "diffusers:StableDiffusionXLPipeline"
    return Job("stock", files, dtype="float32", folder=str(folder), model=where)


_LLAMA = ("llama-1b", llama_1b, "transformers:LlamaForCausalLM", torch.bfloat16, 5)
_UNET = ("unet-860m", unet_860m, "diffusers:UNet2DConditionModel", torch.float32)
_DEEP = ("unet-deep", unet_deep, "diffusers:UNet2DConditionModel", torch.float32)
_MANY = ("llama-9000", llama_many, "transformers:LlamaForCausalLM", torch.bfloat16)

BYTES = {
    "same-bf16": Workload(
        "bf16, every page touched",
        _file("bf16", 2 * GB, torch.bfloat16),
        never_slower(1.05),
        floor="mapped",
    ),
    "same-fp32": Workload(
        "fp32, every page touched",
        _file("fp32", 3 * GB, torch.float32),
        never_slower(1.05),
        (OURS, REFERENCE),
        floor="mapped",
    ),
    "shards": Workload(
        "bf16 in 4 shards, every page touched",
        _shards,
        never_slower(1.05),
        floor="mapped",
    ),
    "read-bf16": Workload(
        "bf16, into own memory",
        _file("bf16", 2 * GB, torch.bfloat16, mode="read"),
        never_slower(1.05),
        OWN_MEMORY,
        floor="memory",
        rounds=1.8,
    ),
    "one-tensor": Workload(
        "open the file, read one tensor",
        _one_tensor,
        ratio_at_most(1.05, REFERENCE),
        (OURS, REFERENCE),
        rounds=3,
    ),
    "cast-down": Workload(
        "fp32 -> bf16",
        _file("fp32", 3 * GB, torch.float32, dtype="bfloat16"),
        faster_than_each(2.5),
        floor="memory",
        rounds=1.8,
    ),
    "cast-up": Workload(
        "bf16 -> fp32",
        _file("bf16", 2 * GB, torch.bfloat16, dtype="float32"),
        faster_than_each(2.5),
        (OURS, REFERENCE),
        floor="memory",
        rounds=1.8,
    ),
    # Only the calls: the pages are the same for all contenders, and touching them would hide the
    # calls.
    "small-100k": Workload(
        "100,000 tensors of 1 to 16 KiB, the call alone",
        _small("cpu"),
        ratio_at_most(0.4, REFERENCE),
        touched=False,
    ),
    "get-tensor": Workload(
        "100,000 tensors of 1 to 16 KiB, one by one by safe_open, the calls alone",
        _small("cpu"),
        ratio_at_most(1.05, "safetensors.safe_open", "weightlift.safe_open"),
        ("weightlift.safe_open", "safetensors.safe_open"),
        touched=False,
    ),
    "moe-18k": Workload(
        "18,867 tensors in the shapes of a mixture of experts, every page touched",
        _experts("cpu"),
        never_slower(1.05),
        floor="mapped",
    ),
    "cold-bf16": Workload(
        "bf16, not in the page cache",
        _file("bf16", 2 * GB, torch.bfloat16),
        faster_than_each(2.0),
        floor="disk",
        cold=True,
    ),
    "import": Workload(
        "import, on top of torch's",
        lambda *_: Job(OURS, what="import"),
        seconds_at_most(0.05),
        (OURS, REFERENCE),
    ),
    "bin-read": Workload(
        ".bin, bf16, into own memory",
        _bin("bf16", 2 * GB, torch.bfloat16),
        ratio_at_most(1.05, "twin"),
        TORCH,
        floor="memory",
        rounds=1.8,
    ),
    "bin-map": Workload(
        ".bin, bf16, mapped",
        _bin("bf16", 2 * GB, torch.bfloat16, mode="map"),
        ratio_at_most(1.05, "twin"),
        TORCH,
        floor="mapped",
    ),
    "bin-fp32": Workload(
        ".bin, fp32, mapped",
        _bin("fp32", 3 * GB, torch.float32, mode="map"),
        ratio_at_most(1.05, "twin"),
        TORCH,
        floor="mapped",
    ),
    "bin-cast": Workload(
        ".bin, fp32 -> bf16",
        _bin("fp32", 3 * GB, torch.float32, dtype="bfloat16"),
        ratio_at_most(1.05, "twin"),
        TORCH,
        floor="memory",
        rounds=1.8,
    ),
}
MODELS = {
    "into-same": Workload(
        "load_into, 1.1 B parameters in 5 shards, against mapping the files",
        _model(*_LLAMA, dtype="bfloat16"),
        ratio_at_most(1.05, OURS, "load_into"),
        ("load_into", OURS, "accelerate"),
        floor="mapped",
    ),
    "into-cast": Workload(
        "load_into, 1.1 B parameters, bf16 -> fp32",
        _model(*_LLAMA, dtype="float32"),
        faster_than_each(2.5, "load_into"),
        ("load_into", "stock", "accelerate"),
        floor="memory",
        rounds=1.8,
    ),
    "into-9000": Workload(
        "load_into, a model of more than 9,000 tensors, the call alone",
        _model(*_MANY, dtype="bfloat16"),
        microseconds_a_tensor(20, "load_into"),
        ("load_into", "accelerate"),
        touched=False,
    ),
    "transformers-same": Workload(
        "transformers, 1.1 B parameters in 5 shards, bf16 kept",
        _model(*_LLAMA, dtype="bfloat16"),
        ratio_at_most(1.05, "stock", "backend"),
        ("backend", "stock"),
        floor="mapped",
    ),
    "transformers-cast": Workload(
        "transformers, 1.1 B parameters, bf16 -> fp32",
        _model(*_LLAMA, dtype="float32"),
        faster_at_least(2.5, "stock", "backend"),
        ("backend", "stock"),
        floor="memory",
        rounds=1.8,
    ),
    "transformers-moe": Workload(
        "transformers, a mixture of experts of more than 9,000 tensors, the call alone",
        _moe,
        ratio_at_most(0.5, "stock", "backend"),
        ("backend", "stock"),
        touched=False,
    ),
    "unet-same": Workload(
        "diffusers, the UNet of Stable Diffusion 1.5, fp32",
        _model(*_UNET, dtype="float32"),
        ratio_at_most(1.05, "stock", "ModelMixin"),
        ("ModelMixin", "backend", "stock"),
        floor="mapped",
    ),
    "unet-cast": Workload(
        "diffusers, the UNet of Stable Diffusion 1.5, fp32 -> bf16",
        _model(*_UNET, dtype="bfloat16"),
        within_memory(1.05, "ModelMixin", faster_at_least(2.5, "stock", "ModelMixin")),
        ("ModelMixin", "backend", "stock"),
        floor="memory",
        rounds=1.8,
    ),
    "unet-bin": Workload(
        "diffusers, the UNet of Stable Diffusion 1.5 in a .bin, fp32, mapped",
        _unet_by_torch("map"),
        ratio_at_most(1.05, "ModelMixin-twin", "ModelMixin"),
        ("ModelMixin", "ModelMixin-twin", "backend", "stock"),
        floor="mapped",
    ),
    "unet-bin-read": Workload(
        "diffusers, the UNet of Stable Diffusion 1.5 in a .bin, fp32, into own memory",
        _unet_by_torch("read"),
        ratio_at_most(1.05, "ModelMixin-twin", "ModelMixin"),
        ("ModelMixin", "ModelMixin-twin", "backend", "stock"),
        floor="memory",
        rounds=1.8,
    ),
    "overlap": Workload(
        "a UNet of many layers, fp32 -> bf16: its weights are read while it is built",
        _model(*_DEEP, dtype="bfloat16"),
        overlapped(0.05, "ModelMixin", ("construction", "reading")),
        ("ModelMixin", "construction", "reading", "stock"),
        touched=False,
        rounds=1.8,
    ),
    "overlap-cold": Workload(
        "the same, not in the page cache: the disk is busy while the processor builds",
        _model(*_DEEP, dtype="bfloat16"),
        overlapped(0.05, "ModelMixin", ("construction", "reading")),
        ("ModelMixin", "construction", "reading", "stock"),
        cold=True,
        touched=False,
        rounds=1.8,
    ),
    "layers-cold": Workload(
        "fp32, not in the page cache: a stack of layers runs on one thread while it loads",
        _file("fp32", 4 * GB, torch.float32),
        within_longer_part(1.15, "layers", ("layers-load", "layers-run")),
        ("layers", "layers-load", "layers-run", "layers-after"),
        cold=True,
        touched=False,
    ),
    "layers-1000": Workload(
        "1,000 modules of fp32 that run while they load, and after it",
        _many_layers,
        ratio_at_most(1.05, "layers-after", "layers"),
        ("layers", "layers-after"),
        touched=False,
        rounds=1.8,
    ),
    "pipeline": Workload(
        "diffusers, a pipeline of four components, fp32, not in the page cache",
        _pipeline,
        faster_at_least(2.0, "stock", "backend"),
        ("backend", "stock"),
        floor="disk",
        cold=True,
    ),
    "flax": Workload(
        "the UNet of Stable Diffusion 1.5, from torch's weights to a tree of jax arrays",
        _model(*_UNET),
        within_memory(
            1.1,
            "weightlift.flax",
            faster_at_least(2.0, "safetensors.flax", "weightlift.flax"),
        ),
        ("weightlift.flax", "safetensors.flax"),
        floor="memory",
        rounds=1.8,
    ),
}
# The casts after the host has taken free memory: they must not be slower than the reference.
NOT_BACKED_STATE = {
    f"{name}-unbacked": dataclasses.replace(
        workload,
        what=f"{workload.what}, memory not backed",
        judge=ratio_at_most(1.0, reference, ours),
        contenders=(ours, reference),
        memory=NOT_BACKED,
    )
    for name, ours, reference in (
        ("cast-down", OURS, REFERENCE),
        ("cast-up", OURS, REFERENCE),
        ("into-cast", "load_into", "stock"),
        ("transformers-cast", "backend", "stock"),
        ("unet-cast", "ModelMixin", "stock"),
    )
    for workload in ({**BYTES, **MODELS}[name],)
}
CPU = {**BYTES, **MODELS, **NOT_BACKED_STATE}
CUDA = {
    "cuda-same": Workload(
        "bf16",
        _file("bf16", 8 * GB, torch.bfloat16, device="cuda"),
        share_of_ceiling(95),
        ON_CUDA,
        floor="link",
    ),
    "cuda-shards": Workload(
        "bf16 in 4 shards",
        lambda data, scale: dataclasses.replace(_shards(data, scale), device="cuda"),
        share_of_ceiling(95),
        ON_CUDA,
        floor="link",
    ),
    "cuda-cast": Workload(
        "fp32 -> bf16",
        _file("fp32", 4 * GB, torch.float32, device="cuda", dtype="bfloat16"),
        cast_to_device(1.1),
        ON_CUDA,
        floor="link",
    ),
    "cuda-cold": Workload(
        "bf16, not in the page cache",
        _file("bf16", 8 * GB, torch.bfloat16, device="cuda"),
        never_slower(1.0),
        ON_CUDA,
        floor="disk",
        cold=True,
    ),
    "cuda-moe-18k": Workload(
        "18,867 tensors in the shapes of a mixture of experts",
        _experts("cuda"),
        never_slower(1.0),
        ON_CUDA,
        floor="link",
    ),
    "cuda-small-100k": Workload(
        "100,000 tensors of 1 to 16 KiB",
        _small("cuda"),
        ratio_at_most(2, "torch.empty"),
        (*ON_CUDA, "torch.empty"),
    ),
}
