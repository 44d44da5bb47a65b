"""Tensors into a module: ``load_into``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from weightlift import dtypes, garbage, placement
from weightlift.checkpoint import Checkpoint, open_checkpoint
from weightlift.errors import ArgumentError
from weightlift.matching import check_keys, match
from weightlift.materialize import Loading, Ranges, copy_to_device
from weightlift.offload import DiskWeights, dispatch
from weightlift.plans import Progress
from weightlift.report import LoadReport, set_last_report
from weightlift.slots import (
    Slot,
    dtensor_types,
    is_sharded,
    local_tensor,
    set_all,
    set_one,
    slots_of,
)

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


__all__ = ["Early", "fill", "load_into", "move"]


def load_into(
    model: torch.nn.Module,
    checkpoint: Checkpoint | str | os.PathLike[str],
    *,
    device_map: placement.DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    key_map: Callable[[str], str | None] | Mapping[str, str | None] | None = None,
    mode: str = "auto",
    pin_memory: bool = False,
    memory_format: torch.memory_format | None = None,
    verify: bool = False,
    progress: bool | Progress = False,
    group: ProcessGroup | DeviceMesh | None = None,
    scope: str = "node",
) -> LoadReport:
    """Fills a model with the tensors of a checkpoint, each read straight to its device.

    Parameters and buffers on ``meta`` are replaced. Real ones are filled in place (same
    ``data_ptr``, same ``requires_grad``) unless ``device_map``, ``dtype`` or ``pin_memory`` asks
    for other memory; then their ``.data`` is replaced. Tied parameters stay tied, and one name of
    them in the checkpoint is enough.

    Of a DTensor (``fully_shard``, ``parallelize_module``) the rank's own part alone is read, into
    the local tensor. All ranks of its mesh, or of ``group``, call this at the same time, and one
    that fails ends it on all.

    Args:
        model: on ``meta`` (``accelerate.init_empty_weights``, ``torch.device("meta")``) or real.
        checkpoint: a ``Checkpoint``, or what ``open_checkpoint`` takes.
        device_map: ``None`` leaves each tensor where it is (``meta``: the CPU); a device,
            ``"auto"``, ``"balanced"``, ``"balanced_low_0"``, ``"sequential"``, or module prefix ->
            device, where ``"disk"`` leaves tensors in their file, to be read at each use. With more
            than one device the model gets accelerate's hooks.
        max_memory: device -> bytes (``8_000_000_000``, ``"8GB"``, ``"500MiB"``) for automatic maps.
        offload_folder: allows automatic maps to use ``"disk"``; nothing is written to it.
        dtype: of the floating-point tensors; ``None``: each parameter's own; ``"auto"``: the
            checkpoint's. ``_keep_in_fp32_modules`` of the model stay in float32.
        strict: missing or unexpected keys are an error, before anything is read.
        ignore_mismatched_sizes: leave out tensors of another shape than the parameter's.
        key_map: the checkpoint's name of a tensor -> the model's, ``None`` to leave it out.
        mode: as in ``load_file``.
        pin_memory: page-locked host memory.
        memory_format: of 4-D weights, such as ``torch.channels_last``.
        verify: as in ``load_file``.
        progress: as in ``load_file``.
        group: the ranks that hold the same model: together they read each tensor that is not
            sharded once, and exchange the parts. ``None`` loads alone, and that is what
            ``dist.group.WORLD`` is before ``init_process_group``.
        scope: ``"node"`` reads once a node, and lets the ranks of a node share the mapping of
            what needs no copy; ``"group"`` reads once altogether, for slow shared storage.

    Returns:
        What was loaded, with ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys``.

    Raises:
        CheckpointError: keys or shapes do not match, the model does not fit the devices, or a
            rank failed or is gone.
    """
    tensors = slots_of(model)
    with _together(model, tensors, group, scope) as new_loading:
        return _load_into(
            model,
            checkpoint,
            key_map,
            tensors=tensors,
            device_map=device_map,
            max_memory=max_memory,
            offload=offload_folder is not None,
            dtype=dtype,
            strict=strict,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            mode=mode,
            pin_memory=pin_memory,
            memory_format=memory_format,
            verify=verify,
            progress=progress,
            new_loading=new_loading,
        )


def _load_into(
    model: torch.nn.Module,
    checkpoint: Checkpoint | str | os.PathLike[str],
    key_map: Callable[[str], str | None] | Mapping[str, str | None] | None,
    **options: Any,
) -> LoadReport:
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    if key_map is not None:
        rename = key_map if callable(key_map) else _lookup(key_map)
        checkpoint = checkpoint.renamed(rename)
    return fill(model, checkpoint, **options)


def _together(
    model: torch.nn.Module,
    tensors: Sequence[Slot],
    group: ProcessGroup | DeviceMesh | None,
    scope: str,
) -> AbstractContextManager[Callable[..., Loading]]:
    kinds = dtensor_types()
    if group is None and not any(isinstance(slot.tensor, kinds) for slot in tensors):
        return contextlib.nullcontext(Loading)
    from weightlift.distributed import together

    return together(model, group, scope)


def _lookup(names: Mapping[str, str | None]) -> Callable[[str], str | None]:
    return lambda name: names.get(name, name)


def move(
    model: torch.nn.Module,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    caller: str = "weightlift",
) -> None:
    """Brings a model's CPU tensors to a CUDA device through the staging ring, as they are now.

    What the engine does not copy (strided tensors, gradients, dtypes that no file has) stays, for
    ``torch.nn.Module.to`` to move. Tied tensors stay tied.

    Args:
        model: parameters keep their identity.
        device: its index is filled in.
        dtype: of the floating-point tensors.
    """
    import torch

    name = dtypes.parse_dtype(dtype)
    slots = {
        slot.name: slot
        for slot in slots_of(model)
        if slot.tensor.device.type == "cpu"
        and slot.tensor.is_contiguous()
        and dtypes.file_name(slot.tensor.dtype) is not None
        and type(slot.tensor) in (torch.Tensor, torch.nn.Parameter)
    }
    if not slots:
        return
    tensors = {key: slot.tensor.detach() for key, slot in slots.items()}
    copies = copy_to_device(tensors, device, name, caller=caller)
    set_all((slots[key], value) for key, value in copies.items())


class Early:
    """A load that began before its model was there, in the belief that everything goes to one
    device in one dtype; ``fill`` takes from it what turns out to be as believed."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: str | None,
        names: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.names = frozenset(checkpoint if names is None else names)
        self.loading = Loading(checkpoint, **options)
        self.loading.add(device, dtype, names)
        self.loading.start()
        self._renamed: Mapping[str, str] = {}

    def rename(self, names: Mapping[str, str]) -> None:
        """From now on under the names that ``checkpoint.renamed`` gives."""
        self.names = frozenset(names.get(name, name) for name in self.names)
        self._renamed = names

    def suits(self, device: torch.device, file_dtype: str, target: str | None) -> bool:
        """Whether what it loads comes as it is wanted: there, and cast to ``target``, if to any."""
        if device != self.device:
            return False
        if file_dtype not in dtypes.FLOATING:
            return True
        return (target or file_dtype) == (self.dtype or file_dtype)

    def result(self) -> dict[str, torch.Tensor]:
        tensors = self.loading.result()
        if self._renamed:
            return {self._renamed.get(name, name): t for name, t in tensors.items()}
        return tensors


@garbage.paused()
def fill(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    *,
    device_map: placement.DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload: bool = False,
    dtype: torch.dtype | str | None = None,
    keep_in_fp32: Sequence[str] | None = None,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    ignore_missing: Callable[[str], bool] | None = None,
    ignore_unexpected: Callable[[str], bool] | None = None,
    mode: str = "auto",
    pin_memory: bool = False,
    memory_format: torch.memory_format | None = None,
    verify: bool = False,
    progress: bool | Progress = False,
    initialize: Callable[[Sequence[str]], Mapping[str, torch.Tensor]] | None = None,
    early: Early | None = None,
    caller: str = "weightlift",
    new_loading: Callable[..., Loading] = Loading,
    tensors: Sequence[Slot] | None = None,
) -> LoadReport:
    """``load_into`` for callers that have more to say.

    Args:
        keep_in_fp32: path components whose tensors stay in float32; the model's
            ``_keep_in_fp32_modules`` by default.
        ignore_missing: names that may be missing.
        ignore_unexpected: names that may be there.
        initialize: gives values to tensors on ``meta`` that the checkpoint does not hold, by name;
            called only if there are any.
        early: a load of ``checkpoint`` that has begun.
        caller: whom ``stats()`` books it on.
        new_loading: makes the ``Loading``; of ``distributed.together``.
        tensors: of the model, if they are known.
    """
    if keep_in_fp32 is None:
        keep_in_fp32 = getattr(model, "_keep_in_fp32_modules", None) or ()
    rule = _DtypeRule(dtypes.parse_dtype(dtype), dtype is None, frozenset(keep_in_fp32))
    if tensors is None:
        tensors = slots_of(model)
    headers = checkpoint.headers()
    matched, rest, missing, mismatched = match(tensors, headers)
    empty = [t.name for t in rest if not t.persistent and t.tensor.is_meta]
    unexpected = []
    if len(matched) < len(headers):
        known = {t.name for t in tensors if t.persistent}
        known.update(name for t in tensors if t.ties and t.persistent for name in t.names)
        unexpected = [name for name in headers if name not in known]
    if ignore_missing is not None:
        missing = [name for name in missing if not ignore_missing(name)]
    if ignore_unexpected is not None:
        unexpected = [name for name in unexpected if not ignore_unexpected(name)]
    check_keys(
        checkpoint, model, missing, unexpected, mismatched, empty, strict, ignore_mismatched_sizes
    )
    devices: Mapping[str, torch.device | str] | None = None
    if device_map is not None and (alone := placement.single_device(device_map)) is not None:
        devices = {"": alone}
    elif device_map is not None:
        devices = placement.resolve_device_map(
            model,
            device_map,
            max_memory=max_memory,
            dtype=_planned_dtypes(dtype, headers),
            keep_in_fp32=keep_in_fp32,
            offload=offload,
        )
    where = _devices_of(tensors, devices)
    reuse = not pin_memory and memory_format is None
    places = _sort(matched, where, headers, rule, early, reuse)
    loading = new_loading(
        checkpoint,
        mode=mode,
        pin_memory=pin_memory,
        verify=verify,
        progress=progress,
        caller=caller,
    )
    places.add_to(loading, checkpoint)
    arrived, report = _run(loading, early, places.believed)
    views: set[int] = set()

    def taken(name: str) -> torch.Tensor:
        value = arrived.pop(name)
        return _apart(value, views) if checkpoint.is_view(name) else value

    take = arrived.pop if checkpoint.is_plain else taken
    own = checkpoint.is_plain and new_loading is Loading  # nobody else has what it makes
    for (_, _, in_place, _), group in places.groups.items():
        if not in_place:
            set_all(((slot, take(name)) for name, slot in group), memory_format, adopt=own)
    offloaded: dict[str, torch.Tensor] = {}
    if initialize is not None:
        bare = [t for t in rest if t.persistent and t.tensor.is_meta]
        if bare:
            offloaded = _initialize(bare, where, initialize, rule, memory_format)
    if devices is not None:
        _move_rest(rest, where)
        dispatch(model, devices, DiskWeights(checkpoint, places.on_disk, caller), offloaded)
    report.error_msgs = [f"{name}: a buffer on meta that no checkpoint holds" for name in empty]
    report.missing_keys = missing
    report.unexpected_keys = unexpected
    report.mismatched_keys = mismatched
    set_last_report(report)
    return report


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
    """

    groups: dict[_Destination, list[tuple[str, Slot]]]
    parts: dict[str, Ranges]
    believed: set[str]
    on_disk: dict[str, tuple[str, str | None]]

    def add_to(self, loading: Loading, checkpoint: Checkpoint) -> None:
        for (device, target, in_place, in_parts), group in self.groups.items():
            names = [name for name, _ in group if name not in self.believed]
            ranges = [self.parts[name] for name in names] if in_parts else None
            if in_place:
                targets = [local_tensor(slot.tensor) for _, slot in group]
                loading.add(device, None, names, targets, ranges)
            elif len(names) == len(checkpoint) and not in_parts:
                loading.add(device, target)  # in the order of the files, which is planned sooner
            elif names:
                loading.add(device, target, names, parts=ranges)


def _sort(
    matched: Sequence[tuple[str, Slot]],
    where: Callable[[Iterable[Slot]], Iterator[torch.device | str | None]],
    headers: Mapping[str, tuple[str, tuple[int, ...]]],
    rule: _DtypeRule,
    early: Early | None,
    reuse: bool,
) -> _Places:
    places = _Places({}, {}, set(), {})
    groups, parts, believed = places.groups, places.parts, places.believed
    cpu = placement.parse_device("cpu")
    begun = frozenset() if early is None else early.names
    # Most tensors are of the same kind as the one before, and go where that one went.
    usual = None
    group: list[tuple[str, Slot]] = []
    suited = False
    for (name, slot), device in zip(matched, where(slot for _, slot in matched), strict=True):
        file_dtype = headers[name][0]
        tensor = slot.tensor
        on_meta = tensor.is_meta
        kind = (on_meta, type(tensor), tensor.dtype, file_dtype, device)
        if kind == usual:
            group.append((name, slot))
            if suited and name in begun:
                believed.add(name)
            continue
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
            from weightlift.dtensors import device_of, local_part

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
        suited = early is not None and not in_part and early.suits(device, file_dtype, target)
        if suited and name in begun:
            believed.add(name)
        elif reuse and not on_meta and device == tensor.device:
            in_place = rule.own or tensor.dtype == dtypes.to_torch(target or file_dtype)
        group = groups.setdefault((device, target, in_place, in_part), [])
        group.append((name, slot))
        # What is in place depends on its device, what stays on the disk on whether it is a
        # parameter, and the dtype of some on their names.
        alike = on_meta and kind[-1] != "disk" and not rule.keep and not is_sharded(tensor)
        usual = kind if alike else None
    return places


def _initialize(
    bare: Sequence[Slot],
    where: Callable[[Iterable[Slot]], Iterator[torch.device | str | None]],
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
            from weightlift.dtensors import device_of, initialized

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
    loading: Loading, early: Early | None, believed: Collection[str]
) -> tuple[dict[str, torch.Tensor], LoadReport]:
    """Runs what was not begun early, and brings in what was."""
    if early is not None and not believed:
        early.loading.cancel()
    if early is None or not believed:
        loading.start()
        tensors = loading.result()
        return tensors, loading.report
    tensors = early.result()
    report = early.loading.report
    if loading.has_work:
        loading.start()
        tensors.update(loading.result())
        report = report.plus(loading.report)
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
    tensors: Sequence[Slot], devices: Mapping[str, torch.device | str] | None
) -> Callable[[Iterable[Slot]], Iterator[torch.device | str | None]]:
    """The device of each tensor; ``None`` for where it is."""
    if devices is None or set(devices) == {""}:
        everywhere = None if devices is None else devices[""]
        return lambda slots: (everywhere for _ in slots)
    by_name: dict[str, torch.device | str] = {}
    for device, names in placement.assign((t.name for t in tensors), devices).items():
        by_name.update(dict.fromkeys(names, device))
    return lambda slots: (by_name[slot.name] for slot in slots)


def _move_rest(
    tensors: Sequence[Slot],
    where: Callable[[Iterable[Slot]], Iterator[torch.device | str | None]],
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
