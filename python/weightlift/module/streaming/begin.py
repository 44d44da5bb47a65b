"""Selects the weights to stream, and their source: a checkpoint's files, or host memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core import dtypes
from weightlift.core.errors import ArgumentError
from weightlift.load.options import LoadOptions
from weightlift.module.fill import fill
from weightlift.module.matching import MatchPolicy, match
from weightlift.module.own_loading import modules_with_own_loading
from weightlift.module.parameters import ParameterRef, gather, set_all
from weightlift.module.placement import DtypeRule, PlacementPolicy
from weightlift.module.streaming.device_side import DeviceSide
from weightlift.module.streaming.originals import assign, parameter_like, places
from weightlift.module.streaming.sources import FileSource, HostSource, settings_for
from weightlift.module.streaming.task import Task, Wanted

__all__ = ["of_a_checkpoint", "of_the_host"]


def of_a_checkpoint(
    model: torch.nn.Module,
    refs: list[ParameterRef],
    checkpoint: Checkpoint,
    side: DeviceSide,
    memory: int,
    dtype: torch.dtype | str | None,
    lookahead: int,
) -> Task:
    """Loads the weights that stay on the device; the others stay in the files."""
    headers = checkpoint.headers()
    gathered = gather(model)
    own = {
        id(module)
        for _, top in modules_with_own_loading(model, gathered, headers)
        for module in top.modules()
    }
    found = match(
        model, refs, checkpoint, headers, MatchPolicy(strict=not own, has_arguments=False)
    )
    placement = PlacementPolicy(dtype=dtype)
    rule = DtypeRule.of(model, placement)
    wanted: dict[str, Wanted] = {}
    fixed = 0
    pairs = {id(ref): name for name, ref in found.pairs}
    for ref in refs:
        name = pairs.get(id(ref))
        target = None if name is None else rule.target(name, ref.tensor, headers[name][0])
        kind = ref.tensor.dtype
        if name is not None and headers[name][0] in dtypes.TORCH_NAMES:
            kind = dtypes.to_torch(target or headers[name][0])
        if (
            name is None
            or id(ref.module) in own
            or not _is_plain(ref.tensor)
            or not _keeps_kind(headers[name][0], ref.tensor.dtype)
        ):
            fixed += ref.tensor.numel() * kind.itemsize
        else:
            wanted[ref.name] = Wanted(ref, kind, name)
    task = Task(model, side, memory, lookahead, wanted, fixed)
    streamed = {*task.streamed}
    device_map = {
        name: "disk" if ref.name in streamed else side.device for ref in refs for name in ref.names
    }
    on_meta = _put_on_meta(refs)
    kept = PlacementPolicy(device_map=device_map, dtype=dtype, dispatch=lambda *_: None)
    # Own memory: the streamed reads would evict the pages of a mapping.
    how = LoadOptions(mode="read")
    matching = MatchPolicy(compare_ties=True, has_arguments=False)
    fill(model, checkpoint, kept, matching, how, gathered=gathered._replace(refs=on_meta))
    # The caller may close the checkpoint.
    mine = checkpoint.renamed(lambda name: name)
    task.source = FileSource(mine, settings_for(task.streamed_bytes))
    return task


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether shape and dtype describe the tensor completely."""
    return type(tensor) is torch.nn.Parameter


def _keeps_kind(file_dtype: str, own: torch.dtype) -> bool:
    """Whether torch would not cast between integers, booleans and numbers."""
    if file_dtype in dtypes.FLOATING:
        return own.is_floating_point and file_dtype != "F4"
    return dtypes.file_name(own) == file_dtype


def _put_on_meta(refs: Sequence[ParameterRef]) -> list[ParameterRef]:
    """Replaces real tensors that the checkpoint has with tensors on ``meta``; the real ones stay
    unchanged."""
    for ref in refs:
        if ref.tensor.is_meta or not ref.persistent:
            continue
        with torch.no_grad():
            empty = torch.empty_like(ref.tensor, device="meta")
        if ref.is_parameter:
            assign(ref, parameter_like(ref.tensor, empty))
            continue
        for module, key in places(ref):
            module._buffers[key] = empty
        ref.tensor = empty
    return list(refs)


def of_the_host(
    model: torch.nn.Module,
    refs: list[ParameterRef],
    side: DeviceSide,
    memory: int,
    dtype: torch.dtype | str | None,
    lookahead: int,
) -> Task:
    """Moves the weights that stay to the device; the others stay in host memory."""
    rule = DtypeRule.of(model, PlacementPolicy(dtype="auto" if dtype is None else dtype))
    wanted: dict[str, Wanted] = {}
    moved: list[tuple[ParameterRef, torch.dtype]] = []
    fixed = 0
    for ref in refs:
        tensor = ref.tensor
        if tensor.is_meta:
            raise ArgumentError(
                f"{ref.name!r} is on meta and has no data: give stream() the checkpoint that has it"
            )
        own = dtypes.file_name(tensor.dtype)
        target = None if own is None else rule.target(ref.name, tensor, own)
        kind = tensor.dtype if target is None else dtypes.to_torch(target)
        if tensor.device == side.device and kind == tensor.dtype:
            continue  # already on its device
        if ref.is_parameter and _is_plain(tensor) and tensor.device.type == "cpu":
            wanted[ref.name] = Wanted(ref, kind, ref.name)
        else:
            moved.append((ref, kind))
            fixed += tensor.numel() * kind.itemsize
    task = Task(model, side, memory, lookahead, wanted, fixed)
    streamed = {*task.streamed}
    source = HostSource({name: want.ref.tensor for name, want in wanted.items()})
    stays = [(want.ref, want.dtype) for name, want in wanted.items() if name not in streamed]
    for ref, kind in [*stays, *moved]:
        value = ref.tensor.detach().to(side.device, kind)
        if ref.is_parameter:
            assign(ref, parameter_like(ref.tensor, value))
        else:
            set_all([(ref, value)])
    task.source = source
    return task
