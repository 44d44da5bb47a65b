"""Other libraries that load files."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .adapter import Job, Load, cast, each_tensor, phases

__all__ = [
    "empty",
    "fastsafetensors",
    "flashpack",
    "flashpack_convert",
    "instanttensor",
    "reference",
    "runai",
    "safe_open",
    "safetensors",
    "safetensors_prefetch",
    "torch_load",
]

# What must outlive a load.
_kept: list[Any] = []


def safetensors(job: Job) -> Load:
    # Own memory is compared with own memory.
    return reference(job, "pread" if job.mode == "read" else "mmap")


def reference(job: Job, backend: str) -> Load:
    from safetensors import safe_open
    from safetensors.torch import load_file

    # As all users call it, where the backend is the default.
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


def _indexed(job: Job) -> str:
    """The device with its number, which some peers do not fill in."""
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


def torch_load(job: Job, mmap: bool) -> Load:
    import torch

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in job.files:
            tensors.update(torch.load(file, mmap=mmap, weights_only=True, map_location=job.device))
        phases.mark("move")
        return cast(tensors, job)

    return load


def fastsafetensors(job: Job) -> Load:
    # By name, here and below: whether a peer is installed is no matter for a type checker.
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
        # Closing would free the memory under the tensors.
        _kept.append((loader, buffers))
        return cast(tensors, job)

    return load


def _streamed(
    job: Job, begin: Callable[[contextlib.ExitStack], Callable[[], Iterable[tuple[str, Any]]]]
) -> Load:
    """For peers whose tensors come one by one, out of what is closed behind the last."""

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


def empty(job: Job) -> Load:
    """No library: a bare loop of torch.empty, the floor of what many small tensors cost."""
    import torch

    from weightlift import _native
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
