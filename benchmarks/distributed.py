"""Loads by N local processes on gloo, in one run: what every rank reads, and how long it takes.

    python benchmarks/distributed.py FILE.safetensors --ranks 2

Sharded: ``load_into`` a model of FSDP2, against torch.distributed.checkpoint's
HuggingFaceStorageReader, and against safetensors on every rank, then cut. Replicated: with a cast
to float32, with ``group=`` and without. The bytes are those that read(2) and its kin returned, from
``/proc/self/io``; HuggingFaceStorageReader maps, which is not among them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn

import weightlift as wl


def empty_model(path: str, device: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
    model = torch.nn.Module()
    for name, (kind, shape) in wl.open_checkpoint(path).items():
        own = dtype or getattr(
            torch, {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[kind]
        )
        value = torch.nn.Parameter(torch.empty(shape, dtype=own, device=device))
        model.register_parameter(name.replace(".", "/"), value)
    return model


def sharded(path: str, device: str) -> torch.nn.Module:
    model = empty_model(path, device)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, value in list(model.named_parameters()):
        local = distribute_tensor(value.detach(), mesh, [Shard(0)], src_data_rank=None)
        model.register_parameter(name, torch.nn.Parameter(local))
    return model


def slashed(name: str) -> str:
    return name.replace(".", "/")


def ours_sharded(path: str) -> None:
    wl.load_into(sharded(path, "meta"), path, key_map=slashed)


def torch_sharded(path: str) -> None:
    state = {
        name.replace("/", "."): value for name, value in sharded(path, "cpu").state_dict().items()
    }
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(Path(path).parent)))  # type: ignore[attr-defined]


def stock_sharded(path: str) -> None:
    model = sharded(path, "cpu")
    tensors = safetensors.torch.load(Path(path).read_bytes())
    for name, value in model.named_parameters():
        assert isinstance(value, DTensor)
        own = distribute_tensor(
            tensors[name.replace("/", ".")], value.device_mesh, value.placements, src_data_rank=None
        )
        with torch.no_grad():
            value.to_local().copy_(own.to_local())


def ours_replicated(path: str) -> None:
    model = empty_model(path, "meta", torch.float32)
    wl.load_into(model, path, key_map=slashed, group=dist.group.WORLD)


def each_replicated(path: str) -> None:
    wl.load_into(empty_model(path, "meta", torch.float32), path, key_map=slashed)


CONTENDERS: dict[str, Callable[[str], None]] = {
    "sharded, weightlift": ours_sharded,
    "sharded, HuggingFaceStorageReader": torch_sharded,
    "sharded, every rank reads all": stock_sharded,
    "replicated, weightlift with group=": ours_replicated,
    "replicated, every rank reads all": each_replicated,
}


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def run(rank: int, world: int, store: str, path: str, repeat: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    size = Path(path).stat().st_size
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    read: dict[str, float] = {}
    for _ in range(repeat + 1):  # the first warms up
        for name, load in CONTENDERS.items():
            dist.barrier()
            before, began = bytes_read(), time.perf_counter()
            load(path)
            dist.barrier()
            seconds[name].append(time.perf_counter() - began)
            count = torch.tensor(bytes_read() - before)
            dist.all_reduce(count)
            read[name] = int(count) / size
    if rank == 0:
        print(f"{path}: {size / 1e9:.2f} GB, {world} ranks, median of {repeat}")
        for name, times in seconds.items():
            print(
                f"  {name:36} {statistics.median(times[1:]):7.3f} s   {read[name]:5.2f} x the file"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (given.ranks, f"{folder}/store", given.file, given.repeat)
        spawn(run, arguments, given.ranks)  # type: ignore[no-untyped-call]
