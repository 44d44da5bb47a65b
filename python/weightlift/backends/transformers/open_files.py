"""Whether a load of transformers goes through the engine, and its files opened for it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightlift.backends.transformers import compat
from weightlift.backends.transformers.weights import Weights
from weightlift.checkpoint.checkpoint import Checkpoint

__all__ = ["fallback_reason", "open_checkpoint", "weights_of"]


def fallback_reason(model: Any, files: Sequence[str], config: Any, sharded: bool) -> str | None:
    """Why this load is the library's own, where it is."""
    import torch

    integrations = importlib.import_module("transformers.integrations")
    endings = {Path(file).suffix for file in files}
    if endings != {".safetensors"} and endings != {".bin"}:
        return f"files named {', '.join(sorted(endings))}"
    if integrations.is_deepspeed_zero3_enabled():
        return "DeepSpeed ZeRO-3"
    if integrations.is_fsdp_enabled():
        return "FSDP"
    if getattr(model, "_pp_stage", None) is not None:
        return "pipeline parallel"
    if sharded and not compat.is_walked(config):
        return "tensor parallel, of quantized weights or by a walk that is not known"
    devices = set((config.device_map or {}).values())
    if "disk" in devices:
        devices.discard("disk")
        if not compat.is_walked(config):
            return "offload to the disk, of quantized weights or by a walk that is not known"
    for device in devices:
        kind = "cuda" if isinstance(device, int) else torch.device(device).type
        if kind == "cuda" and not (torch.version.cuda and torch.cuda.is_available()):
            return f"device {device}, and torch has no CUDA device"
        if kind not in ("cpu", "cuda"):
            return f"device {device}"
    return None


def open_checkpoint(files: Sequence[str]) -> Checkpoint:
    if files[0].endswith(".safetensors"):
        return Checkpoint.from_files(files)
    from weightlift.checkpoint.files import CheckpointFiles, ShardFile
    from weightlift.checkpoint.open_checkpoint import open_files

    shards = tuple(ShardFile(Path(file).name, file, "torch") for file in files)
    # "" is the top of the file, where the library looks, and nowhere else.
    return open_files(CheckpointFiles(shards, "torch", str(Path(files[0]).parent)), "")


def weights_of(checkpoint: Checkpoint, files: Sequence[str], disable_mmap: bool | None) -> Weights:
    library = importlib.import_module("transformers.modeling_utils")
    on_hf_mount = getattr(library, "_is_on_hf_mount", lambda file: False)  # 5.13
    if disable_mmap or any(map(on_hf_mount, files)):
        return Weights(checkpoint, "read")
    # As the library does, which maps them; elsewhere they are read.
    return Weights(checkpoint, "map" if files[0].endswith(".bin") else "auto")
