"""Adapters for loaders other than safetensors and torch, for which the package has adapters.

    weightlift bench FILE --adapters benchmarks/peers.py --against fastsafetensors,flashpack

Each loader has a lock file in benchmarks/environments and, after `make bench-env`, its own virtual
environment in .bench.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from contenders import Contender, Job, Load, cast, phases, whole_files

__all__ = ["CONTENDERS"]

# Objects that must outlive a load.
_kept: list[Any] = []


def _indexed(job: Job) -> str:
    """The device with its index, which some peers need."""
    return "cuda:0" if job.device == "cuda" else job.device


def safetensors_prefetch(job: Job) -> Load:
    from safetensors import safe_open

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in job.files:
            with safe_open(file, framework="pt", device=_indexed(job)) as opened:
                phases.mark("index")
                names = list(opened.keys())
                loader = opened.prefetch(device=_indexed(job))
                tensors.update({name: loader.take(name) for name in names})
                phases.mark("move")
        return cast(tensors, job)

    return load


def fastsafetensors(job: Job) -> Load:
    # Imported by name here and below, so that type checking does not depend on installed peers.
    library = importlib.import_module("fastsafetensors")

    def load() -> dict[str, Any]:
        loader = library.SafeTensorsFileLoader(
            library.SingleGroup(), _indexed(job), nogds=not job.on_cuda
        )
        loader.add_filenames({0: list(job.files)})
        phases.mark("index")
        buffers = loader.copy_files_to_device()
        phases.mark("move")
        tensors = {name: buffers.get_tensor(name) for name in loader.get_keys()}
        # Closing would free the tensors' memory.
        _kept.append((loader, buffers))
        return cast(tensors, job)

    return load


def _streamed(
    job: Job, begin: Callable[[contextlib.ExitStack], Callable[[], Iterable[tuple[str, Any]]]]
) -> Load:
    """For peers that give tensors one by one and are closed after the last."""

    def load() -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            stream = begin(stack)
            phases.mark("index")
            tensors = dict(stream())
            phases.mark("move")
        return cast(tensors, job)

    return load


def instanttensor(job: Job) -> Load:
    library = importlib.import_module("instanttensor")

    def begin(stack: contextlib.ExitStack) -> Any:
        opened = library.safe_open(list(job.files), framework="pt", device=_indexed(job))
        return stack.enter_context(opened).tensors

    return _streamed(job, begin)


def runai(job: Job) -> Load:
    library = importlib.import_module("runai_model_streamer")

    def begin(stack: contextlib.ExitStack) -> Any:
        streamer = stack.enter_context(library.SafetensorsStreamer())
        streamer.stream_files(list(job.files), device=job.device)
        return streamer.get_tensors

    return _streamed(job, begin)


def flashpack_convert(job: Job) -> None:
    from safetensors.torch import load_file

    pack_to_file = importlib.import_module("flashpack.serialization").pack_to_file
    for file, packed in zip(job.files, job.files_as(".flashpack"), strict=True):
        temporary = Path(packed).with_suffix(".tmp")
        pack_to_file(load_file(file), str(temporary), None)
        temporary.replace(packed)


def flashpack(job: Job) -> Load:
    if job.mode == "read":
        os.environ["FLASHPACK_CPU_PARALLEL_READ"] = "1"
    library = importlib.import_module("flashpack.deserialization")

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in job.files_as(".flashpack"):
            metadata = library.get_flashpack_file_metadata(file)
            phases.mark("index")
            storage, _ = library.read_flashpack_file(file, job.device, metadata=metadata)
            phases.mark("move")
            tensors.update(library.iterate_from_flash_tensor(storage, metadata))
        return cast(tensors, job)

    return load


def _peer(name: str, module: str, prepare: Callable[[Job], Load], **more: Any) -> Contender:
    more = {"environment": name, **more}
    return Contender(name, module, whole_files, prepare, module, **more)


CONTENDERS = {
    "safetensors-prefetch": _peer(
        "safetensors", "safetensors", safetensors_prefetch, environment="safetensors-0.9"
    ),
    "fastsafetensors": _peer("fastsafetensors", "fastsafetensors", fastsafetensors),
    "runai-model-streamer": _peer("runai-model-streamer", "runai_model_streamer", runai),
    "instanttensor": _peer("instanttensor", "instanttensor", instanttensor),
    "flashpack": _peer(
        "flashpack",
        "flashpack",
        flashpack,
        reads=lambda job: job.files_as(".flashpack"),
        convert=flashpack_convert,
    ),
}
