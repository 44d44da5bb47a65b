"""The libraries that loads are measured with, an adapter each.

The measured process imports this package by its path, under the Python of the library's own
environment, where weightlift may not be installed: it imports nothing of it at the top.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from . import files, models, peers, trees
from .adapter import (
    Contender,
    Job,
    Load,
    model_why_not,
    ours_why_not,
    phases,
    reports,
    safetensors_only,
    torch_why_not,
    whole_files,
)

__all__ = ["CONTENDERS", "Contender", "Job", "phases", "reports"]


def _ours(prepare: Callable[[Job], Load], why_not: Callable[[Job], str | None]) -> Contender:
    return Contender("weightlift", "weightlift", why_not, prepare, "weightlift")


def _peer(name: str, module: str, prepare: Callable[[Job], Load], **more: Any) -> Contender:
    more = {"environment": name, **more}
    return Contender(name, module, whole_files, prepare, module, **more)


CONTENDERS: dict[str, Contender] = {
    "weightlift": _ours(files.weightlift, ours_why_not),
    "safetensors": Contender(
        "safetensors", "safetensors", safetensors_only, peers.safetensors, "safetensors.torch"
    ),
    "safetensors-pread": Contender(
        "safetensors",
        "safetensors",
        safetensors_only,
        lambda job: peers.reference(job, "pread"),
        "safetensors.torch",
    ),
    "safetensors-prefetch": _peer(
        "safetensors", "safetensors", peers.safetensors_prefetch, environment="safetensors-0.9"
    ),
    "torch": Contender(
        "torch", "torch", torch_why_not, lambda job: peers.torch_load(job, mmap=True), "torch"
    ),
    "torch-plain": Contender(
        "torch", "torch", torch_why_not, lambda job: peers.torch_load(job, mmap=False), "torch"
    ),
    "fastsafetensors": _peer("fastsafetensors", "fastsafetensors", peers.fastsafetensors),
    "runai-model-streamer": _peer("runai-model-streamer", "runai_model_streamer", peers.runai),
    "instanttensor": _peer("instanttensor", "instanttensor", peers.instanttensor),
    "flashpack": _peer(
        "flashpack",
        "flashpack",
        peers.flashpack,
        reads=lambda job: job.files_as(".flashpack"),
        convert=peers.flashpack_convert,
    ),
    "twin": Contender(
        "weightlift",
        "weightlift",
        torch_why_not,
        files.twin,
        "weightlift",
        reads=lambda job: job.files_as(".safetensors"),
    ),
    "stock": Contender(None, "torch", model_why_not, models.stock),
    "accelerate": Contender("accelerate", "accelerate", model_why_not, models.accelerate),
    "backend": _ours(models.backend, model_why_not),
    "ModelMixin": _ours(models.mixin, model_why_not),
    "ModelMixin-twin": dataclasses.replace(
        _ours(models.mixin_twin, model_why_not), reads=lambda job: job.files_as(".safetensors")
    ),
    "load_into": _ours(models.load_into, model_why_not),
    "construction": dataclasses.replace(_ours(models.construction, model_why_not), exact=False),
    "reading": dataclasses.replace(_ours(models.reading, model_why_not), exact=False),
    "weightlift.safe_open": _ours(files.safe_open, safetensors_only),
    "safetensors.safe_open": Contender(
        "safetensors", "safetensors", safetensors_only, peers.safe_open, "safetensors"
    ),
    "weightlift.flax": _ours(trees.weightlift_flax, trees.flax_why_not),
    "safetensors.flax": Contender(
        "safetensors", "safetensors", trees.flax_why_not, trees.safetensors_flax, "safetensors.flax"
    ),
    "torch.empty": Contender("torch", "torch", safetensors_only, peers.empty, "torch", exact=False),
}
