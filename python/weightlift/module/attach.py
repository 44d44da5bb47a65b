"""Puts loaded tensors into a module, and handles the module's other tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core import dtypes
from weightlift.module.parameters import ParameterRef, adopt_all, is_sharded, set_all, set_one
from weightlift.module.placement import Devices, DtypeRule, Placement

if TYPE_CHECKING:
    import torch

    from weightlift.module.recorded_loading import OwnLoading

__all__ = ["attach", "attach_own", "bump_versions", "initialize", "move_unmatched"]

Initialize = Callable[[Sequence[str]], Mapping[str, "torch.Tensor"]]


def attach(
    placement: Placement,
    tensors: dict[str, torch.Tensor],
    checkpoint: Checkpoint,
    memory_format: torch.memory_format | None,
    *,
    exclusive: bool,
) -> None:
    """Puts tensors into the model. Tensors that stay in a file become ``meta`` tensors.

    Args:
        placement: what goes where.
        tensors: name in the checkpoint -> tensor; emptied by this call.
        checkpoint: the checkpoint of the tensors.
        memory_format: the memory format of tensors with 4 dimensions.
        exclusive: no other object uses the tensors of a plain checkpoint.
    """
    storages: set[int] = set()

    def take(name: str) -> torch.Tensor:
        tensor = tensors.pop(name)
        if name in placement.recast:
            return tensor.to(placement.recast[name])
        return _unshared(tensor, storages) if checkpoint.is_view(name) else tensor

    taken = tensors.pop if checkpoint.is_plain and not placement.recast else take
    adopt = exclusive and checkpoint.is_plain
    for group, members in placement.groups.items():
        if group.in_place:
            continue
        if adopt and memory_format is None and group.is_plain:
            adopt_all(members, taken)
        else:
            values = ((ref, taken(name)) for name, ref in members)
            set_all(values, memory_format, adopt=adopt)
    for name, ref, cast_to in placement.on_disk:
        # accelerate's hooks cast a tensor to the dtype of the one that it replaces.
        held = dtypes.to_torch(cast_to or checkpoint[name][0])
        if ref.tensor.dtype != held or not ref.tensor.is_meta:
            set_one(ref, ref.tensor.detach().to("meta", held), None)


def _unshared(tensor: torch.Tensor, storages: set[int]) -> torch.Tensor:
    """Copies a tensor that shares memory in the file but is a separate parameter in the model."""
    address = tensor.untyped_storage().data_ptr()
    if address in storages:
        return tensor.clone()
    storages.add(address)
    return tensor


def bump_versions(placement: Placement, own: OwnLoading | None, names: Collection[str]) -> None:
    """Increases the autograd versions of written tensors as torch would: once for each of their
    ``names``. Modules with their own loading have done it already."""
    import torch

    told = frozenset() if own is None else frozenset(id(ref) for _, ref in own.matched)
    tensors: list[torch.Tensor] = []
    for group, members in placement.groups.items():
        if not group.in_place:
            continue
        for _, ref in members:
            if ref.tensor.is_inference() or (told and id(ref) in told):
                continue
            tensors.append(ref.tensor)
            if ref.ties:
                others = sum(name in names for name in ref.names) - 1
                tensors += [ref.tensor] * others
    if tensors:
        torch.autograd.graph.increment_version(tensors)


def attach_own(
    own: OwnLoading,
    devices: Devices,
    rule: DtypeRule,
    memory_format: torch.memory_format | None,
) -> dict[str, torch.Tensor]:
    """Moves tensors that modules made themselves; returns those that stay on the disk."""
    made = dict(own.values_by_name())
    if not rule.keep_models:
        made.update((ref.name, ref.tensor.detach()) for ref in own.filled)
    refs = [ref for ref in own.refs if ref.name in made]
    return initialize(refs, lambda names: {n: made[n] for n in names}, devices, rule, memory_format)


def initialize(
    refs: Sequence[ParameterRef],
    values_of: Initialize,
    devices: Devices,
    rule: DtypeRule,
    memory_format: torch.memory_format | None,
) -> dict[str, torch.Tensor]:
    """Initializes tensors that the checkpoint lacks; returns those that stay on the disk."""
    offloaded: dict[str, torch.Tensor] = {}
    values = values_of([ref.name for ref in refs])
    for ref, device in zip(refs, devices.of(refs), strict=False):
        value = values[ref.name].detach()
        if is_sharded(ref.tensor):
            from weightlift.module.dtensors import device_of, initialized

            value, device = initialized(value, ref.tensor), device_of(ref.tensor)
        target = "F32" if rule.is_kept(ref.name) else rule.wanted
        if value.is_floating_point() and not rule.keep_models and target is not None:
            value = value.to(dtypes.to_torch(target))
        if device == "disk" and ref.is_parameter:
            offloaded.update(dict.fromkeys(ref.names, value))
            set_one(ref, ref.tensor.detach().to("meta", value.dtype), None)
        else:
            on_host = device is None or device == "disk"
            set_one(ref, value.to("cpu" if on_host else device), memory_format)
    return offloaded


def move_unmatched(refs: Sequence[ParameterRef], devices: Devices) -> None:
    """Moves tensors that the checkpoint lacks to the device of their module."""
    for ref, device in zip(refs, devices.of(refs), strict=False):
        tensor = ref.tensor
        if device is None or device == "disk" or tensor.is_meta:
            continue
        if tensor.device != device:
            if ref.is_parameter:
                tensor.data = tensor.data.to(device)
            else:
                set_one(ref, tensor.to(device), None)
