"""Decides the device and dtype of each tensor of a model, from the caller's policy."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from weightlift.core import dtypes
from weightlift.core.devices import parse_device
from weightlift.core.errors import ArgumentError
from weightlift.load.destination import SliceRange
from weightlift.module.device_map import (
    AUTOMATIC,
    DeviceMap,
    assign,
    disjoint_map,
    resolve_device_map,
    single_device,
)
from weightlift.module.own_loading import Headers
from weightlift.module.parameters import ParameterRef, is_sharded

if TYPE_CHECKING:
    import torch

    from weightlift.load.prefetch import PrefetchedLoad
    from weightlift.module.offload import Dispatch

__all__ = [
    "Devices",
    "DtypeRule",
    "Placement",
    "PlacementPolicy",
    "check_memory_format",
    "decide",
    "place",
]

# "disk": the tensor stays in its file. ``None``: it stays on its device.
Device: TypeAlias = "torch.device | str | None"


class PlacementPolicy(NamedTuple):
    """The caller's policy for the devices and dtypes of a model's tensors.

    Attributes:
        device_map: ``None`` keeps each tensor on its device (``meta`` becomes the CPU).
        max_memory: device -> bytes, for automatic maps.
        offload: an automatic map may leave tensors that do not fit on the disk.
        dtype: the dtype of floating-point tensors; ``None``: each parameter's own; ``"auto"``: the
            checkpoint's.
        keep_in_fp32: path components whose tensors stay in float32; ``None``: the model's
            ``_keep_in_fp32_modules``.
        models_dtype_on: "disk", or types of devices, on which floating-point tensors get the
            model's dtype, whatever ``dtype`` is.
        memory_format: the memory format of 4-D tensors, such as ``torch.channels_last``.
        dispatch: adds the hooks that move tensors to their use; ``None``: accelerate's, if a
            forward pass must cross devices. A library with its own hooks receives the weights on
            the disk here.
    """

    device_map: DeviceMap | None = None
    max_memory: Mapping[int | str, int | str] | None = None
    offload: bool = False
    dtype: torch.dtype | str | None = None
    keep_in_fp32: Sequence[str] | None = None
    models_dtype_on: frozenset[str] = frozenset()
    memory_format: torch.memory_format | None = None
    dispatch: Dispatch | None = None


def check_memory_format(given: object) -> None:
    """
    Raises:
        ArgumentError: it is neither ``None`` nor one of torch's.
    """
    if given is not None and type(given).__name__ != "memory_format":
        raise ArgumentError(
            f"memory_format is {given!r}; it must be one of torch's, such as torch.channels_last"
        )


class DtypeRule(NamedTuple):
    """The rule for the dtypes of floating-point tensors.

    Attributes:
        wanted: the file's name of the dtype; ``None`` for the file's own.
        keep_models: use the dtype of each tensor of the model instead.
        in_fp32: path components whose tensors are float32 in any case.
        models_on: ``PlacementPolicy.models_dtype_on``.
    """

    wanted: str | None
    keep_models: bool
    in_fp32: frozenset[str]
    models_on: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: torch.nn.Module, policy: PlacementPolicy) -> DtypeRule:
        keep = policy.keep_in_fp32
        if keep is None:
            keep = getattr(model, "_keep_in_fp32_modules", None) or ()
        wanted = dtypes.parse_dtype(policy.dtype)
        return cls(wanted, policy.dtype is None, frozenset(keep), policy.models_dtype_on)

    def target(
        self, name: str, tensor: torch.Tensor, file_dtype: str, device: Device = None
    ) -> str | None:
        """The dtype to cast to on a device; ``None`` for no cast."""
        if file_dtype not in dtypes.FLOATING:
            return None
        of_model = self.keep_models or _type_of(device) in self.models_on
        if of_model and tensor.is_floating_point():
            target = dtypes.file_name(tensor.dtype)
        elif self.is_kept(name):
            target = "F32"
        else:
            target = self.wanted
        return None if target == file_dtype else target

    def is_kept(self, name: str) -> bool:
        return bool(self.in_fp32) and not self.in_fp32.isdisjoint(name.split("."))


def _type_of(device: Device) -> str | None:
    return device if device is None or isinstance(device, str) else device.type


class Devices:
    """The device of each tensor of a model.

    Attributes:
        by_prefix: module prefix -> device or ``"disk"``; ``None`` if all stay on their devices.
    """

    def __init__(
        self, refs: Sequence[ParameterRef], by_prefix: Mapping[str, torch.device | str] | None
    ) -> None:
        self.by_prefix = by_prefix
        self._by_name: dict[str, torch.device | str] | None = None
        if by_prefix is not None and set(by_prefix) != {""}:
            self._by_name = {}
            names = (name for ref in refs for name in ref.names)
            for device, assigned in assign(names, by_prefix).items():
                self._by_name.update(dict.fromkeys(assigned, device))

    @classmethod
    def resolve(
        cls,
        model: torch.nn.Module,
        refs: Sequence[ParameterRef],
        policy: PlacementPolicy,
        headers: Headers,
        rule: DtypeRule,
    ) -> Devices:
        """Resolves a device map; see ``resolve_device_map``."""
        if policy.device_map is None:
            return cls(refs, None)
        if (alone := single_device(policy.device_map)) is not None:
            return cls(refs, {"": alone})
        by_prefix = resolve_device_map(
            model,
            policy.device_map,
            max_memory=policy.max_memory,
            dtype=_dtypes_in_map(policy.dtype, headers),
            keep_in_fp32=rule.in_fp32,
            offload=policy.offload,
        )
        if "disk" in by_prefix.values() and policy.dispatch is None:
            by_prefix = _without_lone_tensors(model, by_prefix, policy.device_map)
        return cls(refs, by_prefix)

    @property
    def are_spread(self) -> bool:
        """Whether a forward pass must cross devices, or reads weights on the disk."""
        spread = set(() if self.by_prefix is None else self.by_prefix.values())
        return len(spread) > 1 or "disk" in spread

    def of(self, refs: Iterable[ParameterRef]) -> Iterable[Device]:
        """The device of each tensor; if it is one for all, it is repeated without end. A tied
        tensor is on the disk only if all its names are."""
        by_name = self._by_name
        if by_name is None:
            return itertools.repeat(None if self.by_prefix is None else self.by_prefix[""])
        return (
            by_name[ref.name]
            if not ref.ties or by_name[ref.name] != "disk"
            else next((by_name[name] for name in ref.names if by_name[name] != "disk"), "disk")
            for ref in refs
        )

    def on_disk_elsewhere(self, refs: Iterable[ParameterRef]) -> Iterator[tuple[str, ParameterRef]]:
        """Names on the disk of tied tensors that are in memory under another name: hooks read
        them."""
        by_name = self._by_name
        if by_name is not None:
            for ref in refs:
                devices = [by_name[name] for name in ref.names] if ref.ties else []
                if "disk" in devices and set(devices) != {"disk"}:
                    for name, device in zip(ref.names, devices, strict=True):
                        if device == "disk":
                            yield name, ref


def _without_lone_tensors(
    model: torch.nn.Module, devices: Mapping[str, torch.device | str], given: DeviceMap
) -> dict[str, torch.device | str]:
    """Moves single tensors of an automatic map from the disk to memory, because hooks load whole
    modules."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    alone = [
        name
        for name, device in disjoint_map(model, devices).items()
        if device == "disk" and name in parameters
    ]
    changed = dict(devices)
    for name in alone:
        if not (isinstance(given, str) and given in AUTOMATIC):
            raise ArgumentError(
                f"device_map leaves the tensor {name!r} on the disk, but not the rest of its "
                "module, and hooks load whole modules: name the module, or give the tensor a device"
            )
        in_memory = (device for device in devices.values() if device != "disk")
        changed[name] = next(in_memory, parse_device("cpu"))
    return changed


def _dtypes_in_map(
    dtype: torch.dtype | str | None, headers: Headers
) -> torch.dtype | dict[str, torch.dtype] | None:
    """The dtype that an automatic device map uses for the size of each tensor."""
    if dtype is None:
        return None
    name = dtypes.parse_dtype(dtype)
    if name is not None:
        return dtypes.to_torch(name)
    return {
        key: dtypes.to_torch(own) for key, (own, _) in headers.items() if own in dtypes.CASTABLE
    }


class Decision(NamedTuple):
    """The placement of one tensor of a model.

    Attributes:
        device: its device; ``None``: it stays in its file.
        cast_to: the file's name of the dtype to cast to, or ``None``.
        in_place: write to the memory of the model's tensor.
        part: the part to load; ``None`` for all of it.
        recast: the dtype to which torch casts at the end, as ``copy_`` does: for casts from or to
            integers and booleans.
    """

    device: torch.device | None
    cast_to: str | None
    in_place: bool = False
    part: Sequence[SliceRange] | None = None
    recast: torch.dtype | None = None


def decide(
    name: str, ref: ParameterRef, file_dtype: str, device: Device, rule: DtypeRule, reuse: bool
) -> Decision:
    """Decides the placement of a tensor.

    Args:
        name: its name in the checkpoint.
        ref: the tensor of the model.
        file_dtype: its dtype in the checkpoint.
        device: its device by the device map.
        rule: the rule for dtypes.
        reuse: the load may write to the model's memory.

    Raises:
        ArgumentError: the device map has a device for a DTensor.
    """
    tensor = ref.tensor
    cast_to = rule.target(name, tensor, file_dtype, device)
    if isinstance(device, str):  # "disk"
        if ref.is_parameter:
            return Decision(None, cast_to)
        device = parse_device("cpu")  # buffers stay (accelerate's offload_buffers=False)
    part = None
    if is_sharded(tensor):
        from weightlift.module.dtensors import device_of, local_part

        if device is not None:
            raise ArgumentError(
                f"device_map={str(device)!r} cannot be combined with DTensors such as "
                f"{ref.name!r}, whose mesh defines the device: leave it out"
            )
        device, part = device_of(tensor), local_part(tensor)
    if device is None:
        device = parse_device("cpu") if tensor.is_meta else tensor.device
    in_place = (
        reuse
        and not tensor.is_meta
        and device == tensor.device
        and (rule.keep_models or tensor.dtype == dtypes.to_torch(cast_to or file_dtype))
    )
    return Decision(device, cast_to, in_place, part, _recast(file_dtype, tensor.dtype))


def _recast(file_dtype: str, own: torch.dtype) -> torch.dtype | None:
    """The dtype that torch must cast to: for casts from or to integers and booleans, which the
    engine does not do."""
    is_number = own.is_floating_point or own.is_complex
    if is_number and (file_dtype in dtypes.FLOATING or file_dtype[0] == "C"):
        return None
    return None if dtypes.file_name(own) == file_dtype else own


class Group(NamedTuple):
    """The key of tensors with the same placement.

    Attributes:
        device: their device.
        cast_to: the file's name of the dtype to cast to, or ``None``.
        in_place: write to the memory of the model's tensors.
        in_parts: load only a part of each.
        is_plain: the model's tensors are plain parameters on ``meta``, and whole floating-point
            tensors replace them.
    """

    device: torch.device
    cast_to: str | None
    in_place: bool
    in_parts: bool
    is_plain: bool = False


class Placement(NamedTuple):
    """The placement of all tensors.

    Attributes:
        groups: group -> (name in the checkpoint, tensor of the model) pairs.
        parts: name in the checkpoint -> the part of a DTensor to load.
        prefetched: names that a prefetched load delivers in the right form.
        on_disk: (name in the file, tensor of the model, dtype at use) of tensors that stay on the
            disk.
        recast: name in the checkpoint -> the dtype to which torch casts at the end.
    """

    groups: dict[Group, list[tuple[str, ParameterRef]]]
    parts: dict[str, Sequence[SliceRange]]
    prefetched: frozenset[str]
    on_disk: list[tuple[str, ParameterRef, str | None]]
    recast: dict[str, torch.dtype]


def place(
    pairs: Sequence[tuple[str, ParameterRef]],
    headers: Headers,
    devices: Devices,
    rule: DtypeRule,
    prefetched: PrefetchedLoad | None,
    *,
    reuse: bool,
) -> Placement:
    """Decides the placement of all tensors of a model; see ``decide``."""
    placement = Placement({}, {}, frozenset(), [], {})
    on_their_way = frozenset[str]() if prefetched is None else prefetched.names
    # Most tensors have the kind of the one before, and its placement.
    last_kind = None
    members: list[tuple[str, ParameterRef]] = []
    arriving: list[str] = []
    arrives = False
    recast: torch.dtype | None = None
    for pair, device in zip(pairs, devices.of(ref for _, ref in pairs), strict=False):
        name, ref = pair
        tensor = ref.tensor
        file_dtype = headers[name][0]
        where = tensor.is_meta or tensor.device
        kind = (where, type(tensor), ref.is_parameter, tensor.dtype, file_dtype, device)
        if kind != last_kind:
            decision = decide(name, ref, file_dtype, device, rule, reuse)
            target, cast_to, in_place, part, recast = decision
            if target is None:
                placement.on_disk.append((name, ref, cast_to))
                continue
            arrives = (
                prefetched is not None
                and part is None
                and prefetched.delivers(target, file_dtype, cast_to)
            )
            is_alike = _is_decided_by_kind(ref, device, rule) and not (in_place and arrives)
            if in_place and arrives and name in on_their_way:
                in_place = False
            if in_place:
                recast = None
            if part is not None:
                placement.parts[name] = part
            is_plain = recast is None and _is_plain(ref, cast_to or file_dtype)
            group = Group(target, cast_to, in_place, part is not None, is_plain)
            members = placement.groups.setdefault(group, [])
            last_kind = kind if is_alike else None
        members.append(pair)
        if arrives:
            arriving.append(name)
        if recast is not None:
            placement.recast[name] = recast
    return placement._replace(prefetched=on_their_way.intersection(arriving))


def _is_plain(ref: ParameterRef, dtype: str) -> bool:
    """Whether a plain parameter on ``meta`` becomes a tensor of this dtype that can have a
    gradient."""
    import torch

    is_plain = ref.is_parameter and type(ref.tensor) is torch.nn.Parameter and ref.tensor.is_meta
    return is_plain and dtype in dtypes.FLOATING and dtype != "F4"


def _is_decided_by_kind(ref: ParameterRef, device: Device, rule: DtypeRule) -> bool:
    """Whether the class, the dtypes and the devices alone decide the placement, and neither names
    nor a mesh."""
    return device != "disk" and not rule.in_fp32 and not is_sharded(ref.tensor)
