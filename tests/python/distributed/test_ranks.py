"""Loading by several processes on gloo, against safetensors, ``distribute_tensor`` and
``torch.distributed.checkpoint``.

All checks of a world run in one set of processes; each is a function ``check_*``, and the tests
examine its outcome on every rank.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

import weightlift as wl
from distributed_model import Feed, Net
from distributed_support import TIMEOUT, failure_of, init, run_checks, total
from support import anonymous_bytes, assert_same, sparse_file
from weightlift.distributed.rank_group import RankGroup
from weightlift.distributed.shared_copies import is_of_whole_tensor, share_copies
from weightlift.load.options import LoadOptions
from weightlift.module.recording.reader import CheckpointReader, sources_of
from weightlift.module.recording.recorder import Recorder


def on_meta(make: Callable[[], torch.nn.Module] = Net) -> torch.nn.Module:
    with torch.device("meta"):
        return make()


def large_tensors() -> dict[str, torch.Tensor]:
    """Loads with several rounds of an exchange, in pieces of all kinds."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (1, 700, 512), "b": (300_001,), "c": (2, 1_000_000), "d": (), "e": (0, 4)}
    shapes.update({f"small.{i}": (100 + i, 3) for i in range(40)})
    return {k: torch.randn(v, generator=generator).bfloat16() for k, v in shapes.items()}


class Large(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.small = torch.nn.ParameterList()
        for name, tensor in large_tensors().items():
            new = torch.nn.Parameter(torch.zeros(tensor.shape, dtype=dtype))
            if name.startswith("small."):
                self.small.append(new)
            else:
                setattr(self, name, new)


def write_checkpoints(folder: Path) -> None:
    torch.manual_seed(0)
    state = Net().state_dict()
    names = list(state)
    half = len(names) // 2
    (folder / "net").mkdir()
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        safetensors.torch.save_file({name: state[name] for name in part}, folder / "net" / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "net" / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(state | {"head.weight": torch.randn(8, 3).t()}, folder / "net.bin")
    safetensors.torch.save_file(large_tensors(), folder / "large.safetensors")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for file in sorted((folder / "net").glob("*.safetensors")):
        state.update(safetensors.torch.load_file(file))
    return state


def own_bytes(model: torch.nn.Module) -> int:
    """The bytes that this rank holds in own memory: parts of DTensors."""
    return sum(
        t.to_local().nbytes
        for t in model.parameters()
        if isinstance(t, DTensor) and not all(p.is_replicate() for p in t.placements)
    )


def assert_is(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """The model, each shard and as a whole, equals torch's result for ``state``."""
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, DTensor):
            assert tensor.shape == state[name].shape
            assert_same(tensor.full_tensor(), state[name])
            if "_StridedShard" not in str(tensor.placements):  # distribute_tensor makes none
                theirs = distribute_tensor(state[name], tensor.device_mesh, tensor.placements)
                assert_same(tensor.to_local(), theirs.to_local())
        else:
            assert_same(tensor, state[name])


def mesh_of(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)


def shard_fully(model: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


PLAN: dict[str, ParallelStyle] = {
    "blocks.*.up": ColwiseParallel(),
    "blocks.*.down": RowwiseParallel(),
}


def check_fsdp_on_meta(folder: Path) -> None:
    model = shard_fully(on_meta(), mesh_of())
    report = wl.load_into(model, folder / "net")
    assert_is(model, stored(folder))
    assert report.bytes - report.mapped_bytes == own_bytes(model)
    expected = Net()
    expected.load_state_dict(stored(folder))
    tokens = torch.arange(13)
    torch.testing.assert_close(model(tokens), expected(tokens))


def check_bytes_read(folder: Path) -> None:
    """All ranks together read the file once, and no rank holds more than its part."""
    taken = []
    for _ in range(3):  # the first load makes memory that allocators and gloo keep
        large = on_meta(Large)
        scalars = {p for p in large.parameters() if p.dim() == 0}  # fully_shard takes none
        model = fully_shard(large, mesh=mesh_of(), ignored_params=scalars)
        before = anonymous_bytes()
        report = wl.load_into(model, folder / "large.safetensors")
        taken.append(anonymous_bytes() - before - own_bytes(model))
    assert min(taken) <= 1 << 20
    assert_is(model, large_tensors())
    size = sum(t.nbytes for t in large_tensors().values())
    assert report.bytes - report.mapped_bytes == own_bytes(model)
    assert total(report.bytes - report.mapped_bytes) == size - 2
    assert total(report.read_bytes) <= 1.02 * size


def check_fsdp_in_place(folder: Path) -> None:
    torch.manual_seed(dist.get_rank())
    model = shard_fully(Net(), mesh_of())
    model(torch.arange(13)).sum().backward()  # the root holds whole parameters now
    model.reshard()  # type: ignore[operator]
    pointers = [p.to_local().data_ptr() for p in model.parameters()]
    model(torch.arange(13))
    wl.load_into(model, folder / "net")
    assert [p.to_local().data_ptr() for p in model.parameters()] == pointers
    assert_is(model, stored(folder))
    expected = Net()
    expected.load_state_dict(stored(folder))
    torch.testing.assert_close(model(torch.arange(13)), expected(torch.arange(13)))


def check_fsdp_cast(folder: Path) -> None:
    state = stored(folder)
    narrow = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
    model = shard_fully(on_meta(), mesh_of())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    wl.load_into(model, folder / "net", dtype=torch.bfloat16)
    assert_is(model, narrow)
    assert not any(p.requires_grad for p in model.parameters())
    # Real tensors of another dtype: filled in place with their own dtype, or replaced with the
    # requested one.
    model = shard_fully(Net().to(torch.float16), mesh_of())
    wl.load_into(model, folder / "net")
    assert_is(model, {k: v.half() if v.is_floating_point() else v for k, v in state.items()})
    identities = [id(p) for p in model.parameters()]
    wl.load_into(model, folder / "net", dtype=torch.bfloat16)
    assert [id(p) for p in model.parameters()] == identities
    assert_is(model, narrow)


def check_torch_distributed_checkpoint(folder: Path) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    theirs = shard_fully(Net(), mesh_of())
    state = theirs.state_dict()
    state = {name: value for name, value in state.items() if value.dim()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder / "net")))
    ours = shard_fully(on_meta(), mesh_of())
    wl.load_into(ours, folder / "net")
    for name, value in ours.state_dict().items():
        if isinstance(value, DTensor):
            assert_same(value.to_local(), state[name].to_local())


def check_tensor_parallel(folder: Path) -> None:
    model = parallelize_module(on_meta(), mesh_of(), PLAN)
    report = wl.load_into(model, folder / "net")
    assert_is(model, stored(folder))
    assert report.bytes - report.mapped_bytes == own_bytes(model)
    expected = Net()
    expected.load_state_dict(stored(folder))
    torch.testing.assert_close(model(torch.arange(13)), expected(torch.arange(13)))


def check_placements(folder: Path) -> None:
    """Every placement over every dimension, uneven and empty parts among them."""
    world = dist.get_world_size()
    meshes = [mesh_of()] if world == 2 else [mesh_of(), mesh_of(2, world // 2)]
    kinds = [Replicate(), Shard(0), Shard(1)]
    state = {
        f"{rows}x{columns}": torch.randn(
            rows, columns, generator=torch.Generator().manual_seed(rows * columns)
        )
        for rows, columns in ((7, 5), (1, 9), (9, 1), (8, 4))
    }
    path = folder / f"placements-{world}.safetensors"
    if dist.get_rank() == 0:
        safetensors.torch.save_file(state, path)
    dist.barrier()
    for mesh in meshes:
        placements = (
            [(a,) for a in kinds] if mesh.ndim == 1 else [(a, b) for a in kinds for b in kinds]
        )
        for placement in placements:
            for device in ("meta", "cpu"):
                model = torch.nn.Module()
                for name, value in state.items():
                    empty = distribute_tensor(
                        torch.zeros_like(value, device=device), mesh, placement
                    )
                    model.register_parameter(name, torch.nn.Parameter(empty))
                wl.load_into(model, path)
                assert_is(model, state)


def check_fsdp_and_tensor_parallel(folder: Path) -> None:
    if dist.get_world_size() != 4:
        return
    mesh = mesh_of(2, 2, names=("dp", "tp"))
    model = parallelize_module(on_meta(), mesh["tp"], PLAN)
    model = shard_fully(model, mesh["dp"])
    assert "_StridedShard" in str(model.blocks[0].up.weight.placements)  # type: ignore[index,union-attr]
    report = wl.load_into(model, folder / "net")
    assert report.bytes - report.mapped_bytes == own_bytes(model)
    assert_is(model, stored(folder))
    expected = Net()
    expected.load_state_dict(stored(folder))
    torch.testing.assert_close(model(torch.arange(13)), expected(torch.arange(13)))


def check_torch_file(folder: Path) -> None:
    """A transposed weight is loaded whole and cut."""
    model = shard_fully(on_meta(), mesh_of())
    report = wl.load_into(model, folder / "net.bin")
    assert_is(model, torch.load(folder / "net.bin", weights_only=True))
    assert any("loaded 1 tensor whole" in text for text in report.fallbacks)


def check_replicated_on_a_node(folder: Path) -> None:
    with torch.device("meta"):
        model = Large()
    report = wl.load_into(model, folder / "large.safetensors", group=dist.group.WORLD)
    # One mapping for all: nothing is read and nothing is sent.
    assert report.read_bytes == 0
    assert report.mapped_bytes == sum(t.nbytes for t in large_tensors().values())
    assert_is(model, large_tensors())


def check_replicated_copies(folder: Path) -> None:
    size = sum(t.nbytes for t in large_tensors().values())
    wide = {name: t.float() for name, t in large_tensors().items()}
    for options in ({"dtype": "float32"}, {"scope": "group", "mode": "read"}, {"mode": "read"}):
        with torch.device("meta"):
            model = Large()
        seen: list[tuple[int, int]] = []
        report = wl.load_into(
            model,
            folder / "large.safetensors",
            group=dist.group.WORLD,
            progress=lambda done, total, seen=seen: seen.append((done, total)),
            **options,  # type: ignore[arg-type]
        )
        assert_is(model, wide if "dtype" in options else large_tensors())
        assert report.bytes == size
        assert total(report.read_bytes) == size
        assert abs(report.read_bytes - size / dist.get_world_size()) <= 2 << 20
        assert seen[-1][0] == seen[-1][1]
    model = Large(torch.float32)
    pointers = [p.data_ptr() for p in model.parameters()]
    report = wl.load_into(model, folder / "large.safetensors", group=mesh_of())
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert_is(model, wide)
    assert total(report.read_bytes) == size


def check_two_nodes(folder: Path) -> None:
    """Each rank reads for itself, whatever its group."""
    world, rank = dist.get_world_size(), dist.get_rank()
    size = sum(t.nbytes for t in large_tensors().values())
    model = on_meta(Large)
    with mock.patch("weightlift.distributed.rank_group._node_id", return_value=f"node {rank % 2}"):
        report = wl.load_into(
            model, folder / "large.safetensors", mode="read", group=dist.group.WORLD
        )
    assert_is(model, large_tensors())
    assert total(report.read_bytes) == 2 * size
    assert abs(report.read_bytes - size / (world // 2)) <= 2 << 20


def check_a_group_of_one(folder: Path) -> None:
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    model = on_meta(Large)
    report = wl.load_into(model, folder / "large.safetensors", mode="read", group=alone)
    assert_is(model, large_tensors())
    assert report.read_bytes == sum(t.nbytes for t in large_tensors().values())


def check_replicated_targets_that_are_not_contiguous(folder: Path) -> None:
    """Each rank reads such a tensor; the others are read once."""
    path = folder / f"turned-{dist.get_world_size()}.safetensors"
    tensors = {"plain": torch.ones(600, 512), "turned": torch.arange(1200.0).view(40, 30)}
    if dist.get_rank() == 0:
        safetensors.torch.save_file(tensors, path)
    dist.barrier()
    model = torch.nn.Module()
    model.plain = torch.nn.Parameter(torch.zeros(600, 512))
    model.turned = torch.nn.Parameter(torch.zeros(30, 40).t())
    report = wl.load_into(model, path, mode="read", group=dist.group.WORLD)
    assert not model.turned.is_contiguous()
    assert_is(model, tensors)
    assert report.bytes == sum(t.nbytes for t in tensors.values())


def check_verify(folder: Path) -> None:
    group, path = dist.group.WORLD, folder / "large.safetensors"
    sums = path.with_name("SHA256SUMS")

    def load() -> torch.nn.Module:
        model = on_meta(Large)
        wl.load_into(model, path, mode="read", group=group, verify=True)
        return model

    text = failure_of(load)
    assert "large.safetensors: its SHA-256 is unknown" in text
    for digest in (hashlib.sha256(path.read_bytes()).hexdigest(), "0" * 64):
        if dist.get_rank() == 0:
            sums.write_text(f"{digest}  {path.name}\n")
        dist.barrier()
        if digest == "0" * 64:
            text = failure_of(load)
            assert "rank 0: FormatError: " in text  # one of them reads it for that
            assert "SHA256SUMS says 000" in text
        else:
            assert_is(load(), large_tensors())
        dist.barrier()
    if dist.get_rank() == 0:
        sums.unlink()
    dist.barrier()


def check_a_rank_outside_of_the_mesh(folder: Path) -> None:
    mesh = DeviceMesh("cpu", [0])
    model = torch.nn.Module()
    empty = distribute_tensor(torch.zeros(13, 8, device="meta"), mesh, [Shard(0)])
    model.weight = torch.nn.Parameter(empty)
    where = folder / "net" / "model-00001-of-00002.safetensors"
    wl.load_into(model, where, strict=False, key_map={"embedding.weight": "weight"})
    local = model.weight.to_local()
    if dist.get_rank() == 0:
        assert_same(local, stored(folder)["embedding.weight"])
    else:
        assert local.numel() == 0


def check_replicated_beside_sharded(folder: Path) -> None:
    model = parallelize_module(on_meta(), mesh_of(), PLAN)
    report = wl.load_into(
        model, folder / "net", dtype="float64", group=dist.group.WORLD, scope="group"
    )
    state = stored(folder)
    assert_is(model, {k: v.double() if v.is_floating_point() else v for k, v in state.items()})
    local = {
        k: v.to_local() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()
    }
    assert report.bytes == sum(local[k].numel() * v.itemsize for k, v in state.items())


def own_copy(folder: Path, name: str) -> Path:
    """As if the rank were on its own node."""
    copied = folder / f"node-{dist.get_world_size()}-{dist.get_rank()}-{name}"
    shutil.copytree(folder / "net", copied)
    shutil.copy(folder / "large.safetensors", copied.with_suffix(".safetensors"))
    return copied


def check_a_truncated_file(folder: Path) -> None:
    copied = own_copy(folder, "truncated")
    shard = copied / "model-00002-of-00002.safetensors"
    checkpoint = wl.open_checkpoint(copied)
    if dist.get_rank() == 1:
        os.truncate(shard, shard.stat().st_size - 1000)
    model = shard_fully(on_meta(), mesh_of())
    text = failure_of(lambda: wl.load_into(model, checkpoint))
    assert "loaded anything: rank 1: ReadError" in text
    assert str(shard.name) in text
    assert all(p.device.type == "meta" for p in model.parameters())

    path = copied.with_suffix(".safetensors")
    checkpoint = wl.open_checkpoint(path)
    if dist.get_rank() == 1:
        os.truncate(path, 2_000_000)
    large = on_meta(Large)
    text = failure_of(lambda: wl.load_into(large, checkpoint, mode="read", group=dist.group.WORLD))
    assert "loaded anything: rank 1: ReadError" in text
    assert all(p.device.type == "meta" for p in large.parameters())


def check_a_missing_file(folder: Path) -> None:
    copied = own_copy(folder, "missing")
    if dist.get_rank() == 1:
        (copied / "model-00002-of-00002.safetensors").unlink()
    model = shard_fully(on_meta(), mesh_of())
    text = failure_of(lambda: wl.load_into(model, copied))
    assert "rank 1: " in text
    assert "model-00002-of-00002.safetensors" in text
    assert "rank 0" not in text


def check_different_checkpoints(folder: Path) -> None:
    copied = own_copy(folder, "different")
    file = copied / "model-00002-of-00002.safetensors"
    if dist.get_rank() == 1:
        tensors = safetensors.torch.load_file(file)
        safetensors.torch.save_file({k: v.double() for k, v in tensors.items()}, file)
    model = shard_fully(on_meta(), mesh_of())
    text = failure_of(lambda: wl.load_into(model, copied))
    assert re.search(
        r"different checkpoints: rank 0 has .*node-\d-0.*, rank 1 has .*node-\d-1", text
    )
    assert all(p.to_local().device.type == "meta" for p in model.parameters())


def check_different_dtypes(folder: Path) -> None:
    model = on_meta()
    dtype = "bfloat16" if dist.get_rank() == 1 else "float16"
    text = failure_of(
        lambda: wl.load_into(model, folder / "net", dtype=dtype, group=dist.group.WORLD)
    )
    assert "torch.float16" in text
    assert "torch.bfloat16" in text
    assert "on rank 1" in text


def check_a_model_that_does_not_fit_on_one_rank(folder: Path) -> None:
    model = on_meta()
    if dist.get_rank() == 1:
        model.extra = torch.nn.Linear(1, 1, device="meta")
    text = failure_of(lambda: wl.load_into(model, folder / "net", group=dist.group.WORLD))
    assert "rank 1: CheckpointError" in text
    assert "extra.weight" in text


def check_bad_arguments(folder: Path) -> None:
    model = shard_fully(on_meta(), mesh_of())
    text = failure_of(lambda: wl.load_into(model, folder / "net", device_map="cpu"))
    assert "device_map='cpu' cannot be combined with DTensors" in text
    partial = torch.nn.Module()
    where = folder / "net" / "model-00001-of-00002.safetensors"
    partial.weight = torch.nn.Parameter(
        DTensor.from_local(torch.zeros(13, 8), mesh_of(), [Partial()])
    )
    names = {"embedding.weight": "weight"}
    text = failure_of(lambda: wl.load_into(partial, where, strict=False, key_map=names))
    assert "(Partial(sum),)" in text
    assert "are not evenly spaced" in text
    # Every rank has stretches of rows here and there.
    strided = [_StridedShard(0, split_factor=2)]
    shape = {"shape": torch.Size([13, 8]), "stride": (8, 1)}
    local = torch.zeros(7, 8)
    partial.weight = torch.nn.Parameter(DTensor.from_local(local, mesh_of(), strided, **shape))
    text = failure_of(lambda: wl.load_into(partial, where, strict=False, key_map=names))
    assert "a rank's rows of dimension 0 are not evenly spaced" in text
    group, mapped = dist.group.WORLD, {"mode": "map", "dtype": "bfloat16"}
    text = failure_of(lambda: wl.load_into(on_meta(), folder / "net", group=group, **mapped))
    assert "mode='map' returns the file's own bytes" in text
    with pytest.raises(ValueError, match="scope is 'world'"):
        wl.load_into(on_meta(), folder / "net", group=dist.group.WORLD, scope="world")
    with pytest.raises(ValueError, match=r"not a torch\.distributed\.ProcessGroup"):
        wl.load_into(on_meta(), folder / "net", group=0)  # type: ignore[arg-type]


def check_meshes(folder: Path) -> None:
    world = dist.get_world_size()
    with pytest.raises(RuntimeError, match=rf"[Mm]esh.*{2 * world}|{2 * world}.*[Mm]esh"):
        mesh_of(2 * world)  # torch says it
    model = parallelize_module(on_meta(), mesh_of(), PLAN)
    others = [rank for rank in range(world) if rank != world - 1]
    smaller = dist.new_group(others)
    if dist.get_rank() in others:
        with pytest.raises(wl.ArgumentError) as caught:
            wl.load_into(model, folder / "net", group=smaller)
        assert "'blocks.0.up.weight' is a DTensor on" in str(caught.value)
        assert f"whose ranks [{world - 1}] are not in group=" in str(caught.value)
    else:
        with pytest.raises(wl.ArgumentError, match="not a torch"):
            wl.load_into(model, folder / "net", group=smaller)
    dist.barrier()
    plan = {"up": ColwiseParallel()}
    some = DeviceMesh("cpu", others)
    if dist.get_rank() == world - 1:
        with pytest.raises(wl.ArgumentError, match=rf"without rank {world - 1}"):
            Feed.from_pretrained(folder / "net", device_mesh=some, tp_plan=plan)
    square = mesh_of(1, world, names=("dp", "tp"))
    with pytest.raises(wl.ArgumentError, match="tensor parallelism needs one dimension"):
        Feed.from_pretrained(folder / "net", device_mesh=square, tp_plan=plan)
    dist.barrier()


def check_no_memory_for_what_is_exchanged(folder: Path) -> None:
    path = folder / "sparse.safetensors"
    size = 1 << 41  # more than any machine of a test has
    header = {"big": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    if dist.get_rank() == 0:
        sparse_file(path, header, size)
    dist.barrier()
    model = torch.nn.Module()
    empty = torch.empty(size, dtype=torch.uint8, device="meta")
    model.big = torch.nn.Parameter(empty, requires_grad=False)
    text = failure_of(lambda: wl.load_into(model, path, mode="read", group=dist.group.WORLD))
    assert re.search(
        r"rank 1: OutOfMemoryError: .*sparse\.safetensors: tensor 'big': .*load fewer", text
    )


def check_different_dtypes_of_shards(folder: Path) -> None:
    model = shard_fully(on_meta(), mesh_of())
    dtype = "bfloat16" if dist.get_rank() == 1 else "float16"
    text = failure_of(lambda: wl.load_into(model, folder / "net", dtype=dtype))
    assert "the ranks load different things" in text
    assert "torch.bfloat16" in text
    assert "on rank 1" in text


def check_from_pretrained(folder: Path) -> None:
    where = folder / "feed"
    if dist.get_rank() == 0 and not where.exists():
        torch.manual_seed(3)
        Feed(width=8).save_pretrained(where)
    dist.barrier()
    whole = safetensors.torch.load_file(next(where.glob("*.safetensors")))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = Feed.from_pretrained(where, device_mesh=mesh_of(), tp_plan=plan)
    assert isinstance(model.up.weight, DTensor)
    assert_is(model, whole)
    last = wl.last_report()
    assert last is not None
    assert last.bytes - last.mapped_bytes == own_bytes(model)
    text = failure_of(lambda: Feed.from_pretrained(where, device_mesh=mesh_of()))
    assert (
        "rank 1: ArgumentError: device_mesh= needs tp_plan=, because Feed has no _tp_plan" in text
    )
    for argument in ({"device_map": "cpu"}, {"low_cpu_mem_usage": False}):
        with pytest.raises(wl.ArgumentError, match=r"device_mesh=.* tp_plan="):
            Feed.from_pretrained(where, device_mesh=mesh_of(), tp_plan=plan, **argument)
    dist.barrier()


def check_weights_that_are_not_there(folder: Path) -> None:
    """They are the same on all ranks, and initialized as in one process."""
    where = folder / f"fresh-{dist.get_world_size()}-{dist.get_rank()}"
    torch.manual_seed(5)
    Feed(width=8).save_pretrained(where)
    file = where / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(file)
    safetensors.torch.save_file({k: v for k, v in state.items() if k != "up.weight"}, file)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    torch.manual_seed(dist.get_rank())
    model = Feed.from_pretrained(where, device_mesh=mesh_of(), tp_plan=plan)
    torch.manual_seed(0)
    alone = Feed.from_pretrained(where)
    assert isinstance(model.up.weight, DTensor)
    assert_is(model, dict(alone.state_dict()))


def check_recorded_copies_of_whole_tensors(folder: Path) -> None:
    """A serving engine's rank: tensors that all need are read once, slices by each rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tensors = large_tensors()
    checkpoint = wl.open_checkpoint(folder / "large.safetensors")
    reader = CheckpointReader(checkpoint)
    recorder = Recorder(
        reader, held=lambda copy: is_of_whole_tensor(copy, recorder.sources[copy.name].shape)
    )
    rows = 700 // ranks
    slices = torch.zeros(1, rows, 512, dtype=torch.bfloat16)
    merged = torch.zeros(2, 2_300_000, dtype=torch.float32)
    own = torch.zeros(101, 3, dtype=torch.bfloat16)
    scalar = torch.zeros(())
    with recorder.watching():
        given = {
            name: recorder.placeholder(name, source)
            for name, source in sources_of(checkpoint).items()
            if source is not None
        }
        slices.copy_(given["a"][:, rank * rows : (rank + 1) * rows])
        merged[0, :300_001].copy_(given["b"])
        merged[1, 300_000:].view(2, -1).copy_(given["c"])
        own.copy_(given["small.1"] if rank == 0 else given["small.2"][:101])
        scalar.copy_(given["d"])
    group = RankGroup([dist.group.WORLD], "node")
    held = recorder.take_held()
    assert [copy.name for copy in held] == ["b", "c"] + ["small.1"] * (rank == 0) + ["d"]
    rest, report = share_copies(held, checkpoint, LoadOptions(), group)
    assert [copy.name for copy in rest] == ["small.1"] * (rank == 0)
    recorder.put_back(rest)
    recorder.finish()
    assert torch.equal(slices, tensors["a"][:, rank * rows : (rank + 1) * rows])
    assert torch.equal(merged[0, :300_001], tensors["b"].float())
    assert torch.equal(merged[1, 300_000:], tensors["c"].float().reshape(-1))
    assert torch.equal(own, tensors["small.1"] if rank == 0 else tensors["small.2"][:101])
    assert torch.equal(scalar, tensors["d"].float())
    together = sum(tensors[name].nbytes for name in "bcd")
    assert report.bytes == together
    assert total(report.read_bytes) == together
    group.close()


def check_that_a_failure_before_the_exchange_reaches_all(folder: Path) -> None:
    group = RankGroup([dist.group.WORLD], "node")
    checkpoint = wl.open_checkpoint(folder / "large.safetensors")
    if dist.get_rank() == 1:
        group.gather(group.groups, ValueError("its weights do not fit"))
        dist.barrier()  # as failure_of
        return
    text = failure_of(lambda: share_copies([], checkpoint, LoadOptions(), group))
    assert "loaded anything: rank 1: ValueError: its weights do not fit" in text


CHECKS = {name: value for name, value in globals().items() if name.startswith("check_")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("distributed")
    write_checkpoints(made)
    return made


@pytest.fixture(scope="module", params=[2, 4])
def outcomes(request: pytest.FixtureRequest, folder: Path) -> Callable[[str], list[str]]:
    return run_checks(request.param, folder, CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_on_every_rank(outcomes: Callable[[str], list[str]], check: str) -> None:
    for rank, outcome in enumerate(outcomes(check)):
        assert outcome == "passed", f"rank {rank}: {outcome}"


def run_rank_of_a_killed_one(rank: int, world: int, folder: Path) -> None:
    init(rank, world, folder / "store-killed")
    mesh = mesh_of()
    sharded = shard_fully(on_meta(), DeviceMesh.from_group(dist.new_group(), "cpu"))
    large = on_meta(Large)

    def die(done: int, total: int) -> None:
        if rank == 2 and done > total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    began = time.monotonic()
    told = []
    loads: list[Callable[[], object]] = [
        lambda: wl.load_into(
            large, folder / "large.safetensors", mode="read", group=mesh, progress=die
        ),
        lambda: wl.load_into(sharded, folder / "net"),
    ]
    for load in loads:
        with pytest.raises(wl.CheckpointError) as caught:
            load()
        told.append(str(caught.value))
    assert all(p.device.type == "meta" for p in (*large.parameters(), *sharded.parameters()))
    seconds = time.monotonic() - began
    (folder / f"killed-{rank}").write_text(json.dumps([seconds, *told]))
    time.sleep(2)  # its own end must not be what the others notice
    os._exit(0)


def test_a_killed_rank_is_named_by_the_others(folder: Path) -> None:
    context = mp.get_context("spawn")
    ranks = [
        context.Process(target=run_rank_of_a_killed_one, args=(rank, 3, folder))
        for rank in range(3)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(90)
    assert [process.exitcode for process in ranks] == [0, 0, -signal.SIGKILL]
    for rank in (0, 1):
        seconds, *told = json.loads((folder / f"killed-{rank}").read_text())
        assert seconds < TIMEOUT
        assert len(told) == 2
        for text in told:
            assert "the load ended: rank 2 is gone" in text


def test_without_a_process_group(tmp_path: Path) -> None:
    Feed().save_pretrained(tmp_path)
    with pytest.raises(wl.ArgumentError, match=r"call torch\.distributed\.init_process_group"):
        Feed.from_pretrained(tmp_path, tp_plan={"up": ColwiseParallel()})
