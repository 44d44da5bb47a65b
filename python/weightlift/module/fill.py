"""Tensors of a checkpoint into a module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core import dtypes, gc_pause
from weightlift.core.devices import parse_device
from weightlift.core.errors import ArgumentError
from weightlift.core.report import LoadReport, set_last_report
from weightlift.load.destination import SliceRange
from weightlift.load.load_plan import LoadPlan, Planned
from weightlift.load.options import LoadOptions
from weightlift.load.prefetch import PrefetchedLoad
from weightlift.module.device_map import assign, resolve_device_map, single_device
from weightlift.module.matching import MatchPolicy, check_keys, match
from weightlift.module.offload import DiskWeights
from weightlift.module.own_loading import (
    OwnLoading,
    modules_with_own_loading,
    record_own_loading,
)
from weightlift.module.parameters import (
    ParameterRef,
    is_sharded,
    local_tensor,
    parameter_refs,
    set_all,
    set_one,
)
from weightlift.module.placement import PlacementPolicy

if TYPE_CHECKING:
    import torch


__all__ = ["NewLoad", "fill"]

# Makes the plan of a load; with the ranks of a group, one that they share.
NewLoad: TypeAlias = Callable[[Checkpoint, LoadOptions], Planned]


@gc_pause.paused()
def fill(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    placement: PlacementPolicy = PlacementPolicy(),
    matching: MatchPolicy = MatchPolicy(),
    options: LoadOptions = LoadOptions(),
    *,
    prefetched: PrefetchedLoad | None = None,
    new_load: NewLoad = LoadPlan,
    refs: Sequence[ParameterRef] | None = None,
) -> LoadReport:
    """``load_into`` for callers that have more to say.

    Args:
        model: on ``meta`` or real.
        checkpoint: what there is.
        placement: where tensors go.
        matching: what becomes of those that are on one side alone.
        options: how they are loaded.
        prefetched: a load of ``checkpoint`` that runs already.
        new_load: makes the plan of the load; of ``distributed.collective.group_load``.
        refs: of the model's tensors, if they are known.
    """
    keep_in_fp32 = placement.keep_in_fp32
    if keep_in_fp32 is None:
        keep_in_fp32 = getattr(model, "_keep_in_fp32_modules", None) or ()
    dtype, device_map, early = placement.dtype, placement.device_map, prefetched
    memory_format, initialize = placement.memory_format, matching.initialize
    rule = _DtypeRule(dtypes.parse_dtype(dtype), dtype is None, frozenset(keep_in_fp32))
    tensors = parameter_refs(model) if refs is None else refs
    headers = checkpoint.headers()
    own = None
    if special := modules_with_own_loading(model, headers):
        own = record_own_loading(model, special, checkpoint, headers, options)
        tensors = own.refs
    matched, rest, missing, unexpected, mismatched, errors = _match(tensors, headers, own)
    empty = [t.name for t in rest if not t.persistent and t.tensor.is_meta]
    if matching.ignore_missing is not None:
        missing = [name for name in missing if not matching.ignore_missing(name)]
    if matching.ignore_unexpected is not None:
        unexpected = [name for name in unexpected if not matching.ignore_unexpected(name)]
    check_keys(checkpoint, model, missing, unexpected, mismatched, empty, matching, errors)
    devices: Mapping[str, torch.device | str] | None = None
    if device_map is not None and (alone := single_device(device_map)) is not None:
        devices = {"": alone}
    elif device_map is not None:
        devices = resolve_device_map(
            model,
            device_map,
            max_memory=placement.max_memory,
            dtype=_planned_dtypes(dtype, headers),
            keep_in_fp32=keep_in_fp32,
            offload=placement.offload,
        )
    where = _devices_of(tensors, devices)
    reuse = not options.pin_memory and memory_format is None
    places = _sort(matched, where, headers, rule, early, reuse)
    plan = new_load(checkpoint, options)
    places.add_to(plan, checkpoint)
    arrived, report = _run(plan, early, places.believed)
    views: set[int] = set()

    def taken(name: str) -> torch.Tensor:
        value = arrived.pop(name)
        if name in places.recast:
            return value.to(places.recast[name])
        return _apart(value, views) if checkpoint.is_view(name) else value

    take = arrived.pop if checkpoint.is_plain and not places.recast else taken
    unshared = checkpoint.is_plain and new_load is LoadPlan  # nobody else has what it makes
    for (_, _, in_place, _), group in places.groups.items():
        if not in_place:
            set_all(((slot, take(name)) for name, slot in group), memory_format, adopt=unshared)
    offloaded: dict[str, torch.Tensor] = {}
    recorded: frozenset[int] = frozenset()
    if own is not None:
        offloaded.update(_place_own(own, where, rule, memory_format))
        report = report.plus(own.report)
        recorded = frozenset(id(ref) for _, ref in own.matched)  # whose versions have moved on
    for (_, _, in_place, _), group in places.groups.items():
        if in_place:
            _move_versions_on((r for _, r in group if id(r) not in recorded), headers)
    if initialize is not None:
        bare = [t for t in rest if t.persistent and t.tensor.is_meta]
        if bare:
            offloaded |= _initialize(bare, where, initialize, rule, memory_format)
    # What was matched has its data, or is read where it is used.
    report.meta_keys = [
        t.name for t in rest if t.tensor.is_meta and getattr(t.module, t.key).is_meta
    ]
    if devices is not None:
        _move_rest(rest, where)
        on_disk = DiskWeights(checkpoint, places.on_disk, options.caller)
        placement.dispatch(model, devices, on_disk, offloaded)
    report.error_msgs = [f"{name}: a buffer on meta that no checkpoint holds" for name in empty]
    report.missing_keys = missing
    report.unexpected_keys = unexpected
    report.mismatched_keys = mismatched
    set_last_report(report)
    return report


def _match(
    tensors: Sequence[ParameterRef],
    headers: Mapping[str, tuple[str, tuple[int, ...]]],
    own: OwnLoading | None,
) -> tuple[
    list[tuple[str, ParameterRef]],
    list[ParameterRef],
    list[str],
    list[str],
    list[tuple[str, tuple[int, ...], tuple[int, ...]]],
    list[str],
]:
    """(name in the checkpoint, tensor of the model) for all that is to be loaded; the model's other
    tensors; missing names; unexpected ones; mismatched ones; what modules complain about."""
    claimed = frozenset() if own is None else own.claimed
    others = tensors if own is None else own.others()
    free = headers if own is None else {n: h for n, h in headers.items() if n not in claimed}
    matched, rest, missing, mismatched = match(others, free)
    unexpected: list[str] = []
    if len(matched) < len(free):
        known = {t.name for t in tensors if t.persistent}
        known.update(name for t in tensors if t.ties and t.persistent for name in t.names)
        unexpected = [name for name in free if name not in known]
    if own is None:
        return matched, rest, missing, unexpected, mismatched, []
    inside, errors = own.mismatched(headers)
    return (
        [*own.matched, *matched],
        [*rest, *own.rest()],
        [*own.missing, *missing],
        [*own.unexpected, *unexpected],
        [*inside, *mismatched],
        errors,
    )


class _DtypeRule(NamedTuple):
    """In which dtype floating-point tensors are wanted: ``wanted`` (``None`` for the file's), or
    that of each tensor of the model; in float32 under the path components ``keep``."""

    wanted: str | None
    own: bool
    keep: frozenset[str]

    def target(self, name: str, tensor: torch.Tensor, file_dtype: str) -> str | None:
        """What to cast to; ``None`` for nothing."""
        if file_dtype not in dtypes.FLOATING:
            return None
        if self.own and tensor.is_floating_point():
            target = dtypes.file_name(tensor.dtype)
        elif self.kept(name):
            target = "F32"
        else:
            target = self.wanted
        return None if target == file_dtype else target

    def kept(self, name: str) -> bool:
        return bool(self.keep) and not self.keep.isdisjoint(name.split("."))


# (device, cast to, in place, a part of each)
_Destination: TypeAlias = "tuple[torch.device, str | None, bool, bool]"


class _Places(NamedTuple):
    """What goes where.

    Attributes:
        groups: the names in the checkpoint and the model's tensors of each destination.
        parts: of each DTensor's name, what this rank has of it.
        believed: names of what an early load brings as it is wanted.
        on_disk: what stays in its file: name in the model -> name there, dtype at use.
        recast: of names whose dtype or whose tensor's is not a floating one, the tensor's: as
            ``copy_`` does.
    """

    groups: dict[_Destination, list[tuple[str, ParameterRef]]]
    parts: dict[str, Sequence[SliceRange]]
    believed: set[str]
    on_disk: dict[str, tuple[str, str | None]]
    recast: dict[str, torch.dtype]

    def add_to(self, plan: Planned, checkpoint: Checkpoint) -> None:
        for (device, target, in_place, in_parts), group in self.groups.items():
            names = [name for name, _ in group if name not in self.believed]
            ranges = [self.parts[name] for name in names] if in_parts else None
            if in_place:
                targets = [local_tensor(slot.tensor) for _, slot in group]
                plan.add(device, None, names, targets, ranges)
            elif len(names) == len(checkpoint) and not in_parts:
                plan.add(device, target)  # in the order of the files, which is planned sooner
            elif names:
                plan.add(device, target, names, parts=ranges)


def _sort(
    matched: Sequence[tuple[str, ParameterRef]],
    where: Callable[[Iterable[ParameterRef]], Iterator[torch.device | str | None]],
    headers: Mapping[str, tuple[str, tuple[int, ...]]],
    rule: _DtypeRule,
    early: PrefetchedLoad | None,
    reuse: bool,
) -> _Places:
    places = _Places({}, {}, set(), {}, {})
    groups, parts, believed = places.groups, places.parts, places.believed
    cpu = parse_device("cpu")
    begun = frozenset() if early is None else early.names
    # Most tensors are of the same kind as the one before, and go where that one went.
    usual = None
    group: list[tuple[str, ParameterRef]] = []
    suited = False
    recast: torch.dtype | None = None
    for (name, slot), device in zip(matched, where(slot for _, slot in matched), strict=True):
        file_dtype = headers[name][0]
        tensor = slot.tensor
        on_meta = tensor.is_meta
        kind = (on_meta, type(tensor), tensor.dtype, file_dtype, device)
        if kind == usual:
            group.append((name, slot))
            if suited and name in begun:
                believed.add(name)
            if recast is not None:
                places.recast[name] = recast
            continue
        recast = _recast(file_dtype, tensor.dtype)
        target = rule.target(name, tensor, file_dtype)
        if isinstance(device, str) and not slot.is_parameter:
            device = cpu  # buffers are not offloaded (accelerate's offload_buffers=False)
        if isinstance(device, str):  # "disk"
            places.on_disk.update(dict.fromkeys(slot.names, (name, target)))
            # accelerate's hooks cast what they read to the dtype of what they replace.
            held = dtypes.to_torch(target or file_dtype)
            if tensor.dtype != held or not on_meta:
                set_one(slot, tensor.detach().to("meta", held), None)
            continue
        if is_sharded(tensor):
            from weightlift.module.dtensors import device_of, local_part

            if device is not None:
                raise ArgumentError(
                    f"device_map={str(device)!r} goes not together with DTensors such as "
                    f"{slot.name!r}: their mesh says where they are"
                )
            part = local_part(tensor)
            if part is not None:
                parts[name] = part
            device = device_of(tensor)
        device = device or (cpu if on_meta else tensor.device)
        in_part = name in parts
        in_place = False
        suited = early is not None and not in_part and early.delivers(device, file_dtype, target)
        if suited and name in begun:
            believed.add(name)
        elif reuse and not on_meta and device == tensor.device:
            in_place = rule.own or tensor.dtype == dtypes.to_torch(target or file_dtype)
        if recast is not None and not in_place:
            places.recast[name] = recast
        group = groups.setdefault((device, target, in_place, in_part), [])
        group.append((name, slot))
        # What is in place depends on its device, what stays on the disk on whether it is a
        # parameter, and the dtype of some on their names.
        alike = on_meta and kind[-1] != "disk" and not rule.keep and not is_sharded(tensor)
        usual = kind if alike else None
    return places


def _recast(file_dtype: str, own: torch.dtype) -> torch.dtype | None:
    """What an integer or a boolean becomes, or a number that goes into one; ``None`` for the rest,
    which the engine casts."""
    floating = own.is_floating_point or own.is_complex
    if floating and (file_dtype in dtypes.FLOATING or file_dtype[0] == "C"):
        return None
    return None if dtypes.file_name(own) == file_dtype else own


def _place_own(
    own: OwnLoading,
    where: Callable[[Iterable[ParameterRef]], Iterator[torch.device | str | None]],
    rule: _DtypeRule,
    memory_format: torch.memory_format | None,
) -> dict[str, torch.Tensor]:
    """What modules made themselves goes where it belongs; those that stay on disk are returned."""
    made = dict(own.values_by_name())
    if not rule.own:
        made.update((ref.name, ref.tensor.detach()) for ref in own.filled)
    refs = [ref for ref in own.refs if ref.name in made]
    return _initialize(refs, where, lambda names: {n: made[n] for n in names}, rule, memory_format)


def _move_versions_on(refs: Iterable[ParameterRef], names: Collection[str]) -> None:
    """Tells autograd that tensors were written to: as often as torch writes to them, which is once
    for each name that a checkpoint has."""
    import torch

    tensors = [
        ref.tensor
        for ref in refs
        if not ref.tensor.is_inference()
        for name in (ref.names if ref.ties else (ref.name,))
        if not ref.ties or name in names
    ]
    if tensors:
        torch.autograd.graph.increment_version(tensors)


def _initialize(
    bare: Sequence[ParameterRef],
    where: Callable[[Iterable[ParameterRef]], Iterator[torch.device | str | None]],
    initialize: Callable[[Sequence[str]], Mapping[str, torch.Tensor]],
    rule: _DtypeRule,
    memory_format: torch.memory_format | None,
) -> dict[str, torch.Tensor]:
    """Gives values to what the checkpoint does not hold; those that stay on disk are returned."""
    offloaded: dict[str, torch.Tensor] = {}
    fresh = initialize([slot.name for slot in bare])
    for slot, device in zip(bare, where(bare), strict=True):
        value = fresh[slot.name].detach()
        if is_sharded(slot.tensor):
            from weightlift.module.dtensors import device_of, initialized

            value, device = initialized(value, slot.tensor), device_of(slot.tensor)
        target = "F32" if rule.kept(slot.name) else rule.wanted
        if value.is_floating_point() and not rule.own and target is not None:
            value = value.to(dtypes.to_torch(target))
        if device == "disk" and slot.is_parameter:
            offloaded.update(dict.fromkeys(slot.names, value))
            set_one(slot, slot.tensor.detach().to("meta", value.dtype), None)
        else:
            away = device is None or device == "disk"
            set_one(slot, value.to("cpu" if away else device), memory_format)
    return offloaded


def _run(
    plan: Planned, early: PrefetchedLoad | None, believed: Collection[str]
) -> tuple[dict[str, torch.Tensor], LoadReport]:
    """Runs what was not begun early, and brings in what was."""
    if early is not None and not believed:
        early.cancel()
    if early is None or not believed:
        running = plan.start()
        return running.result(), running.report
    tensors = early.result()
    report = early.report
    if not plan.is_empty:
        running = plan.start()
        tensors.update(running.result())
        report = report.plus(running.report)
    return tensors, report


def _apart(value: torch.Tensor, storages: set[int]) -> torch.Tensor:
    """Tensors that share memory in the file are separate parameters where the model has them so."""
    place = value.untyped_storage().data_ptr()
    if place in storages:
        return value.clone()
    storages.add(place)
    return value


def _planned_dtypes(
    dtype: torch.dtype | str | None, headers: Mapping[str, tuple[str, tuple[int, ...]]]
) -> torch.dtype | dict[str, torch.dtype] | None:
    """What a tensor will count in an automatic device map."""
    if dtype is None:
        return None
    name = dtypes.parse_dtype(dtype)
    if name is not None:
        return dtypes.to_torch(name)
    return {
        key: dtypes.to_torch(own) for key, (own, _) in headers.items() if own in dtypes.CASTABLE
    }


def _devices_of(
    tensors: Sequence[ParameterRef], devices: Mapping[str, torch.device | str] | None
) -> Callable[[Iterable[ParameterRef]], Iterator[torch.device | str | None]]:
    """The device of each tensor; ``None`` for where it is."""
    if devices is None or set(devices) == {""}:
        everywhere = None if devices is None else devices[""]
        return lambda slots: (everywhere for _ in slots)
    by_name: dict[str, torch.device | str] = {}
    for device, names in assign((t.name for t in tensors), devices).items():
        by_name.update(dict.fromkeys(names, device))
    return lambda slots: (by_name[slot.name] for slot in slots)


def _move_rest(
    tensors: Sequence[ParameterRef],
    where: Callable[[Iterable[ParameterRef]], Iterator[torch.device | str | None]],
) -> None:
    """What the checkpoint does not hold goes where its module goes."""
    for slot, device in zip(tensors, where(tensors), strict=True):
        tensor = slot.tensor
        if device is None or device == "disk" or tensor.is_meta:
            continue
        if tensor.device != device:
            if slot.is_parameter:
                tensor.data = tensor.data.to(device)
            else:
                set_one(slot, tensor.to(device), None)
