"""One rank of ``weightlift bench --distributed``.

``torchrun -m weightlift.bench.measure_ranks JOB`` runs it.

All ranks load at once, between two barriers, in the same random order. ``/proc/self/io`` counts the
bytes of read(2) and similar calls; mapped bytes are the file pages that the process holds. Both
peaks are the largest of samples, one every 5 ms and one at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import random
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from weightlift.bench.conditions import BackedMemory, prepare_files, settle
from weightlift.checkpoint.open_checkpoint import open_checkpoint
from weightlift.core import dtypes
from weightlift.core.report import last_report, stats
from weightlift.load_into import load_into

__all__ = ["CONTENDERS", "Job", "Load"]

_POLL_SECONDS = 0.005


@dataclasses.dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        files: the files of one checkpoint, all ``.safetensors``.
        model: the transformers class and its folder, if the checkpoint is a model's.
        contenders: of ``CONTENDERS``.
        out: where rank 0 writes the figures.
    """

    files: list[str]
    model: tuple[str, str] | None
    contenders: list[str]
    repeat: int
    out: str


@dataclasses.dataclass
class Load:
    """One load by all ranks.

    Attributes:
        seconds: from barrier to barrier.
        read_bytes: by all ranks together; ``engine_bytes``: the same by weightlift's count;
            ``received_bytes``: bytes from other ranks by weightlift's count.
        mapped_bytes: the largest sample of file pages, by all ranks together. It is exact where
            the model holds its mapping; a mapping that ends with the load may be missed.
        peak_bytes: the largest sample of anonymous memory, of the rank that took most;
            ``held_bytes``: the size of the result.
    """

    seconds: float
    read_bytes: int
    mapped_bytes: int
    peak_bytes: int
    held_bytes: int
    engine_bytes: int
    received_bytes: int


class _Checkpoint:
    """The job's files in the forms that the contenders need."""

    def __init__(self, job: Job, folder: str) -> None:
        self.folder = folder  # with only these files
        self.files = [str(Path(folder, Path(file).name)) for file in job.files]
        for file, link in zip(job.files, self.files, strict=True):
            Path(link).symlink_to(Path(file).resolve())
        self.file_bytes = sum(Path(file).stat().st_size for file in job.files)
        self.model = job.model
        self.tensors = {
            name: (Path(folder, Path(file).name), *header)
            for file in self.files
            for name, header in open_checkpoint(file).items()
        }
        weight_map = {name: file.name for name, (file, _, _) in self.tensors.items()}
        if len(self.files) > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
        self.path = folder if len(self.files) > 1 else self.files[0]
        self.mesh: DeviceMesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def whole(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return {name: value for file in self.files for name, value in load_file(file).items()}

    def empty(self, device: str = "meta") -> torch.nn.Module:
        return _module(
            {
                name: torch.empty(shape, dtype=dtypes.to_torch(kind), device=device)
                for name, (_, kind, shape) in self.tensors.items()
            }
        )

    def fully_sharded(self, model: torch.nn.Module) -> torch.nn.Module:
        others = {p for p in model.parameters() if p.dim() == 0 or not p.is_floating_point()}
        fully_shard(model, mesh=self.mesh, ignored_params=others)
        return model

    def tensor_parallel(self) -> torch.nn.Module:
        """Weights cut by rows and by columns in turn; the rest on all ranks."""
        model = self.empty()
        cuts = 0
        for name, value in list(model.named_parameters()):
            if value.dim() > 1:
                placed = distribute_tensor(
                    value.detach(), self.mesh, [Shard(cuts % 2)], src_data_rank=None
                )
                setattr(model, name, torch.nn.Parameter(placed, value.requires_grad))
                cuts += 1
        return model


def _module(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = torch.nn.Module()
    for name, value in tensors.items():
        parameter = torch.nn.Parameter(value, requires_grad=value.is_floating_point())
        model.register_parameter(_key(name), parameter)
    return model


def _key(name: str) -> str:
    return name.replace(".", "/")


def _replicated_by_group(checkpoint: _Checkpoint) -> torch.nn.Module:
    model = checkpoint.empty()
    group = dist.group.WORLD
    load_into(model, checkpoint.path, key_map=_key, mode="read", group=group)
    return model


def _replicated_mapping(checkpoint: _Checkpoint) -> torch.nn.Module:
    model = checkpoint.empty()
    load_into(model, checkpoint.path, key_map=_key, group=dist.group.WORLD)
    return model


def _replicated_by_each(checkpoint: _Checkpoint) -> torch.nn.Module:
    model = checkpoint.empty("cpu")
    state = {_key(name): value for name, value in checkpoint.whole().items()}
    model.load_state_dict(state)
    return model


def _fsdp_ours(checkpoint: _Checkpoint) -> torch.nn.Module:
    model = checkpoint.fully_sharded(checkpoint.empty())
    load_into(model, checkpoint.path, key_map=_key)
    return model


def _fsdp_reader(checkpoint: _Checkpoint) -> torch.nn.Module:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    model = checkpoint.fully_sharded(checkpoint.empty()).to_empty(device="cpu")
    state = {name.replace("/", "."): value for name, value in model.state_dict().items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(checkpoint.folder))  # type: ignore[attr-defined]
    return model


def _fsdp_of_whole(checkpoint: _Checkpoint) -> torch.nn.Module:
    if checkpoint.model is not None:
        name, folder = checkpoint.model
        cls = getattr(importlib.import_module("transformers"), name)
        return checkpoint.fully_sharded(cls.from_pretrained(folder, dtype="auto"))
    return checkpoint.fully_sharded(_module(checkpoint.whole()))


def _tensor_parallel_ours(checkpoint: _Checkpoint) -> torch.nn.Module:
    model = checkpoint.tensor_parallel()
    load_into(model, checkpoint.path, key_map=_key)
    return model


def _tensor_parallel_slices(checkpoint: _Checkpoint) -> torch.nn.Module:
    """As transformers does it."""
    model = checkpoint.tensor_parallel()
    with contextlib.ExitStack() as opened:
        files = {
            Path(file): opened.enter_context(safe_open(file, "pt")) for file in checkpoint.files
        }
        for name, (file, _, shape) in checkpoint.tensors.items():
            part = files[file].get_slice(name)
            old = getattr(model, _key(name))
            if not isinstance(old, DTensor):
                new = part[...] if shape else files[file].get_tensor(name)
                setattr(model, _key(name), torch.nn.Parameter(new, old.requires_grad))
                continue
            placement = old.placements[0]
            if not isinstance(placement, Shard):
                raise ValueError(f"{name}: this comparison slices sharded tensors, not {placement}")
            count, start = placement.local_shard_size_and_offset(
                shape[placement.dim], old.device_mesh.size(), dist.get_rank()
            )
            index = (slice(None),) * placement.dim + (slice(start, start + count),)
            local = part[index].contiguous()
            made = DTensor.from_local(
                local.clone(), old.device_mesh, old.placements, shape=old.shape, stride=old.stride()
            )
            setattr(model, _key(name), torch.nn.Parameter(made, old.requires_grad))
    return model


CONTENDERS: dict[str, dict[str, Callable[[_Checkpoint], torch.nn.Module]]] = {
    "replicated": {
        "weightlift, group=": _replicated_by_group,
        "weightlift, mapped": _replicated_mapping,
        "safetensors, each rank": _replicated_by_each,
    },
    "FSDP2": {
        "weightlift": _fsdp_ours,
        "HuggingFaceStorageReader": _fsdp_reader,
        "whole on each, then cut": _fsdp_of_whole,
    },
    "tensor parallel": {
        "weightlift": _tensor_parallel_ours,
        "safetensors' slices": _tensor_parallel_slices,
    },
}


def _status(*fields: str) -> list[int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return [int(found[field].split()[0]) * 1024 for field in fields]


def _read_so_far() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@contextlib.contextmanager
def _peaks() -> Iterator[list[int]]:
    """The peaks of anonymous memory and file pages, less the values before."""
    before = _status("RssAnon", "RssFile")
    peaks = [0, 0]
    over = threading.Event()

    def note() -> None:
        now = _status("RssAnon", "RssFile")
        peaks[:] = [max(peak, a - b) for peak, a, b in zip(peaks, now, before, strict=True)]

    def watch() -> None:
        while not over.wait(_POLL_SECONDS):
            note()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
        note()
    finally:
        over.set()
        thread.join()


def _held(model: torch.nn.Module) -> int:
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in model.parameters()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def _measure(load: Callable[[_Checkpoint], torch.nn.Module], checkpoint: _Checkpoint) -> Load:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory would count as held before
    dist.barrier()
    if dist.get_rank() == 0:
        with BackedMemory(checkpoint.file_bytes * dist.get_world_size()) as memory:
            memory.hold()
            prepare_files(checkpoint.files, cold=False)
    dist.barrier()
    before = _read_so_far()
    counted, report = stats(), last_report()
    with _peaks() as peaks:
        dist.barrier()
        began = time.perf_counter()
        model = load(checkpoint)
        for tensor in model.parameters():  # a mapping has not been read before it is touched
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            local.detach().reshape(-1).view(torch.uint8)[::4096].sum()
        dist.barrier()
        seconds = time.perf_counter() - began
    engine = stats().read_bytes - counted.read_bytes
    last = last_report()
    ours = last is not None and last is not report
    others = last.bytes - last.read_bytes - last.mapped_bytes if last and ours else 0
    read = _read_so_far() - before
    # Includes what this measurement reads from /proc: about 2 KB every 5 ms.
    mine = [seconds, read, peaks[1], peaks[0], _held(model), engine, others]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    times, reads, mapped, peak, held, engines, received = zip(*every, strict=True)
    return Load(
        max(times), sum(reads), sum(mapped), max(peak), max(held), sum(engines), sum(received)
    )


def main(job: Job) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    own = Path(folder[0], str(dist.get_rank()))
    own.mkdir()
    checkpoint = _Checkpoint(job, str(own))
    flat = [(kind, name) for kind, group in CONTENDERS.items() for name in group]
    chosen = [(kind, name) for kind, name in flat if kind in job.contenders]
    found: dict[str, dict[str, list[Load]]] = {kind: {} for kind in job.contenders}
    order = random.Random(0)  # the same on all ranks
    if dist.get_rank() == 0:
        settle(job.files)
    for number in range(job.repeat + 1):  # the first warms up
        for kind, name in order.sample(chosen, len(chosen)):
            load = _measure(CONTENDERS[kind][name], checkpoint)
            if number:
                found[kind].setdefault(name, []).append(load)
    if dist.get_rank() == 0:
        figures = {
            kind: {name: [dataclasses.asdict(one) for one in group[name]] for name in group}
            for kind, group in (
                (kind, {name: found[kind][name] for name in CONTENDERS[kind]}) for kind in found
            )
        }
        Path(job.out).write_text(json.dumps(figures))
    dist.barrier()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Job(**json.loads(sys.argv[1])))
