"""The libraries whose files weightlift loads: safetensors and torch."""

from __future__ import annotations

from typing import Any

from .adapter import Job, Load, cast, each_tensor, phases

__all__ = ["empty", "reference", "safe_open", "safetensors", "torch_load"]


def safetensors(job: Job) -> Load:
    # Reads into own memory are compared with each other.
    return reference(job, "pread" if job.mode == "read" else "mmap")


def reference(job: Job, backend: str) -> Load:
    from safetensors import safe_open
    from safetensors.torch import load_file

    # Without the argument, as most users call it, for the default backend.
    how = {} if backend == "mmap" else {"backend": backend}

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in job.files:
            if job.tensor is not None:
                with safe_open(file, framework="pt", device=job.device, **how) as opened:
                    tensors[job.tensor] = opened.get_tensor(job.tensor)
            else:
                tensors.update(load_file(file, device=job.device, **how))
        phases.mark("move")
        return cast(tensors, job)

    return load


def safe_open(job: Job) -> Load:
    from safetensors import safe_open

    return each_tensor(job, safe_open)


def torch_load(job: Job, mmap: bool) -> Load:
    import torch

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in job.files:
            tensors.update(torch.load(file, mmap=mmap, weights_only=True, map_location=job.device))
        phases.mark("move")
        return cast(tensors, job)

    return load


def empty(job: Job) -> Load:
    """No library: a loop over torch.empty, the lower bound for many small tensors."""
    import torch

    import weightlift._native as _native
    from weightlift.core import dtypes

    wanted = []
    for file in job.files:
        part = _native.IndexedFile.open(file)
        for name, dtype, shape in zip(part.names(), part.dtypes(), part.shapes(), strict=True):
            wanted.append((name, shape, dtypes.to_torch(dtype)))
    device = torch.device(job.device)

    def load() -> dict[str, Any]:
        return {
            name: torch.empty(shape, dtype=dtype, device=device) for name, shape, dtype in wanted
        }

    return load
