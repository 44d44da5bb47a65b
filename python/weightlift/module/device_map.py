"""Device maps: the device of each tensor."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from weightlift.core.devices import loadable_device
from weightlift.core.errors import ArgumentError, CheckpointError, DeviceError
from weightlift.core.report import format_count

if TYPE_CHECKING:
    import torch

__all__ = [
    "AUTOMATIC",
    "DeviceMap",
    "assign",
    "disjoint_map",
    "parse_device_map",
    "parse_max_memory",
    "resolve_device_map",
    "single_device",
    "single_entry",
    "unused_max_memory",
]

# A device, the name of a strategy, or module prefix -> device.
DeviceMap: TypeAlias = "str | int | torch.device | Mapping[str, str | int | torch.device]"
_Device = TypeVar("_Device")
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
_UNITS = {
    "": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SHOWN = 3


def single_device(device_map: DeviceMap) -> torch.device | None:
    """The only device of a map; ``None`` if there are several, or the disk."""
    alone = single_entry(device_map)
    return None if alone is None else loadable_device(alone)


def single_entry(device_map: Any) -> Any:
    """The only entry of a map, unparsed; ``None`` if there are several, or the disk."""
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            return None
        device_map = device_map[""]
    if isinstance(device_map, str) and device_map in (*AUTOMATIC, "disk"):
        return None
    return device_map


def parse_device_map(device_map: DeviceMap) -> dict[str, torch.device]:
    """A device map that needs no model: module prefix -> device, ``""`` for all.

    Raises:
        ArgumentError: the map needs a model, or leaves tensors on the disk.
        DeviceError: a device does not exist.
    """
    devices = device_map if isinstance(device_map, Mapping) else {"": device_map}
    parsed = {}
    for prefix, device in devices.items():
        if device in AUTOMATIC or device == "disk":
            raise ArgumentError(f"device_map: {device!r} needs a model: use load_into")
        parsed[prefix] = loadable_device(device)
    return parsed


def known_devices(
    device_map: DeviceMap | None, tensors: Iterable[torch.Tensor] = ()
) -> set[torch.device]:
    """The devices of a load, as far as they are known before its checkpoint is opened: those of a
    map, or of the model's ``tensors`` without one, if all are on CUDA devices. Empty for a map that
    needs the checkpoint, or that is invalid, which is an error later."""
    if device_map is None:
        return _cuda_devices(tensors)
    given = device_map.values() if isinstance(device_map, Mapping) else (device_map,)
    try:
        return {loadable_device(device) for device in given}
    except DeviceError:
        return set()


def _cuda_devices(tensors: Iterable[torch.Tensor]) -> set[torch.device]:
    """Empty if a tensor is elsewhere. Makes no object for each tensor."""
    indices = set()
    for tensor in tensors:
        if not tensor.is_cuda:
            return set()
        indices.add(tensor.get_device())
    import torch

    return {torch.device("cuda", index) for index in indices}


def assign(names: Iterable[str], devices: Mapping[str, _Device]) -> dict[_Device, list[str]]:
    """The tensors of each device, by the longest matching prefix (whole components of the name).

    Raises:
        CheckpointError: no prefix matches a name.
    """
    assigned: dict[_Device, list[str]] = {}
    of_module: dict[str, _Device] = {}
    uncovered: list[str] = []
    for name in names:
        module = name.rpartition(".")[0]
        device = devices.get(name)
        if device is None:
            device = of_module.get(module)
        if device is None:
            prefix = module
            while prefix and prefix not in devices:
                prefix = prefix.rpartition(".")[0]
            device = devices.get(prefix)
            if device is None:
                uncovered.append(name)
                continue
            of_module[module] = device
        assigned.setdefault(device, []).append(name)
    if uncovered:
        more = f" and {len(uncovered) - _SHOWN} more" if len(uncovered) > _SHOWN else ""
        raise CheckpointError(
            f"device_map has no device for {', '.join(uncovered[:_SHOWN])}{more}: add their "
            'module, or "" for all others'
        )
    return assigned


def disjoint_map(
    model: torch.nn.Module, devices: Mapping[str, torch.device | str]
) -> dict[str, torch.device | str]:
    """The map without nested prefixes: accelerate's hook on a module covers everything below it."""
    of_name: dict[str, torch.device | str] = {}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    for device, assigned in assign(names, devices).items():
        of_name.update(dict.fromkeys(assigned, device))
    found: dict[str, torch.device | str] = {}

    def walk(prefix: str, below: Sequence[str]) -> None:
        held = {of_name[name] for name in below}
        if len(held) == 1:
            found[prefix] = held.pop()
            return
        children: dict[str, list[str]] = {}
        depth = len(prefix) + 1 if prefix else 0
        for name in below:
            end = name.find(".", depth)
            children.setdefault(name if end < 0 else name[:end], []).append(name)
        for child, inside in children.items():
            walk(child, inside)

    walk("", names)
    return found


def resolve_device_map(
    model: torch.nn.Module,
    device_map: DeviceMap,
    *,
    max_memory: Mapping[int | str, int | str] | None = None,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    keep_in_fp32: Collection[str] = (),
    no_split_module_classes: Collection[str] | None = None,
    offload: bool = False,
) -> dict[str, torch.device | str]:
    """A complete device map for a model: module prefix -> device or ``"disk"``.

    Args:
        model: the model, which may be on ``meta``; tied tensors are already tied.
        device_map: a device; module prefix -> device or ``"disk"``; or ``"sequential"``, which
            fills one device after another; ``"auto"`` and ``"balanced"``, which give each GPU about
            the same number of bytes; ``"balanced_low_0"``, which leaves GPU 0 for other uses.
        max_memory: for automatic maps, device -> bytes. Devices that it does not name are not
            used. By default the memory that is free now.
        dtype: the dtype of floating-point tensors after the load, or tensor -> dtype; ``None``:
            their own.
        keep_in_fp32: path components whose tensors are float32.
        no_split_module_classes: classes of modules that stay on one device; by default those in
            ``_no_split_modules`` of the model and its modules.
        offload: an automatic map may put tensors that do not fit on the disk, as with ``"disk"`` in
            ``max_memory``.

    Raises:
        CheckpointError: the model does not fit, or the map does not cover a tensor.
        DeviceError: a device does not exist.
        ArgumentError: ``max_memory`` is invalid, or accelerate is not installed.
    """
    import torch

    if not isinstance(device_map, (str, int, torch.device, Mapping)):
        raise ArgumentError(
            f"device_map is {device_map!r}; it can be a device, one of "
            f"{', '.join(map(repr, AUTOMATIC))}, or a dict of module prefixes"
        )
    if isinstance(device_map, str) and device_map in AUTOMATIC:
        return _automatic(
            _outline(model, dtype, keep_in_fp32),
            device_map,
            None if max_memory is None else parse_max_memory(max_memory),
            _no_split(model) if no_split_module_classes is None else no_split_module_classes,
            offload,
        )
    given = device_map if isinstance(device_map, Mapping) else {"": device_map}
    devices = {prefix: _device_or_disk(device) for prefix, device in given.items()}
    tensors = _tensors(model)
    assign((name for name, persistent in tensors.items() if persistent), devices)
    known = {*tensors, *(name for name, _ in model.named_modules(remove_duplicate=False))}
    unknown = [prefix for prefix in devices if prefix not in known]
    if unknown:
        warnings.warn(
            f"device_map: {type(model).__name__} has nothing named {', '.join(unknown[:_SHOWN])}",
            UserWarning,
            stacklevel=2,
        )
    _cover(devices, tensors)
    return devices


def unused_max_memory(device_map: object, max_memory: object) -> str | None:
    """What to say where ``max_memory`` has no effect; ``None`` where it has, or is not given."""
    if max_memory is None or (isinstance(device_map, str) and device_map in AUTOMATIC):
        return None
    return (
        f"max_memory is for automatic device maps ({', '.join(map(repr, AUTOMATIC))}), and "
        f"device_map is {device_map!r}: give one of them, or leave out max_memory"
    )


def parse_max_memory(max_memory: Mapping[int | str, int | str]) -> dict[int | str, int]:
    """Parses ``max_memory``, such as ``{"0": "8GB", "cpu": "30GiB"}``: device -> bytes, GPUs first.

    GPUs are integers, ``"0"`` or ``"cuda:0"``; sizes are bytes or text such as ``"500MiB"`` or
    ``"8GB"``, in any case.

    Raises:
        DeviceError: a device does not exist.
        ArgumentError: a size is invalid.
    """
    import torch

    count = torch.cuda.device_count()
    parsed: dict[int | str, int] = {}
    if not isinstance(max_memory, Mapping):
        raise ArgumentError(
            f"max_memory is {max_memory!r}; it must be a dict of devices and bytes, such as "
            "{0: '8GB', 'cpu': '30GiB'}"
        )
    for key, size in max_memory.items():
        found = re.fullmatch(r"(?:cuda:)?(\d+)", str(key))
        device = int(found[1]) if found else str(key)
        if device not in (*range(count), "cpu", "disk"):
            there = ", ".join(map(repr, (*range(count), "cpu", "disk")))
            raise DeviceError(f"max_memory: there is no device {key!r}; there is: {there}")
        if device in parsed:
            raise ArgumentError(f"max_memory: device {device!r} is in it twice")
        parsed[device] = _parse_size(key, size)
    order = {"cpu": count, "disk": count + 1}
    return {key: parsed[key] for key in sorted(parsed, key=lambda key: order.get(str(key), key))}


def _parse_size(device: int | str, size: int | float | str) -> int:
    if isinstance(size, (int, float)) and not isinstance(size, bool) and 0 <= size < 2**63:
        return int(size)
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", str(size))
    if not isinstance(size, str) or found is None or found[2].lower() not in _UNITS:
        raise ArgumentError(
            f"max_memory: {size!r} for device {device!r} is not a size: write bytes or '8GB'"
        )
    return int(float(found[1]) * _UNITS[found[2].lower()])


def _device_or_disk(device: torch.device | str | int) -> torch.device | str:
    if isinstance(device, str) and device == "disk":
        return "disk"
    return loadable_device(int(device) if isinstance(device, str) and device.isdigit() else device)


def _tensors(model: torch.nn.Module) -> dict[str, bool]:
    """Name of each parameter or buffer -> whether the state dict has it."""
    return {
        f"{prefix}.{key}" if prefix else key: key not in module._non_persistent_buffers_set
        for prefix, module in model.named_modules(remove_duplicate=False)
        for held in (module._parameters, module._buffers)
        for key, tensor in held.items()
        if tensor is not None
    }


def _no_split(model: torch.nn.Module) -> set[str]:
    return {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }


def _outline(
    model: torch.nn.Module,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None,
    keep_in_fp32: Collection[str],
) -> torch.nn.Module:
    """A copy of the modules with tensors on ``meta`` in their future dtypes.

    accelerate accepts other dtypes, but counts a wider dtype as the tensor's own, or takes time
    quadratic in the number of tensors.
    """
    import torch

    keep = frozenset(keep_in_fp32)

    def planned(name: str, tensor: torch.Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        wanted = (dtype.get(name) if isinstance(dtype, Mapping) else dtype) or tensor.dtype
        narrow = wanted in (torch.float16, torch.bfloat16)
        return torch.float32 if narrow and not keep.isdisjoint(name.split(".")) else wanted

    modules = list(model.named_modules())
    names = {type(module).__name__ for _, module in modules}
    kinds = {name: type(name, (torch.nn.Module,), {}) for name in names}
    made: dict[int, torch.nn.Module] = {
        id(module): kinds[type(module).__name__]() for _, module in modules
    }
    tensors: dict[int, torch.Tensor] = {}  # id of the original -> copy, to keep ties
    for prefix, module in modules:
        outline = made[id(module)]
        for key, child in module._modules.items():
            if child is not None:
                outline._modules[key] = made[id(child)]
        for held, copies in (
            (module._parameters, outline._parameters),
            (module._buffers, outline._buffers),
        ):
            for key, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in tensors:
                    wanted = planned(f"{prefix}.{key}" if prefix else key, tensor)
                    empty = torch.empty(tensor.shape, dtype=wanted, device="meta")
                    tensors[id(tensor)] = (
                        torch.nn.Parameter(empty, requires_grad=False)
                        if held is module._parameters
                        else empty
                    )
                copies[key] = tensors[id(tensor)]  # type: ignore[assignment]
    return made[id(model)]


def _automatic(
    model: torch.nn.Module,
    strategy: str,
    max_memory: Mapping[int | str, int] | None,
    no_split: Collection[str],
    offload: bool,
) -> dict[str, torch.device | str]:
    try:
        from accelerate.utils import modeling
    except ImportError as error:
        raise ArgumentError(
            f"device_map={strategy!r} needs accelerate: pip install 'weightlift[accelerate]'"
        ) from error

    options: dict[str, Any] = {"no_split_module_classes": list(no_split)}

    def infer(
        places: Sequence[int | str], limits: Mapping[int | str, int]
    ) -> dict[str, torch.device | str]:
        """accelerate's map, in which ``places`` are GPUs 0, 1, ..."""
        found = modeling.infer_auto_device_map(model, dict(limits), **options)
        devices = {
            name: _device_or_disk(places[place] if isinstance(place, int) else place)
            for name, place in found.items()
        }
        _cover(devices, _tensors(model))
        return devices

    memory = _free_memory(modeling, strategy) if max_memory is None else max_memory
    room = {device: size for device, size in memory.items() if size > 0 and device != "disk"}
    gpus = [device for device in room if device != "cpu"]
    whole = {gpus.index(device) if device in gpus else device: room[device] for device in room}
    limits = whole
    if strategy != "sequential":
        low_zero = strategy == "balanced_low_0" and 0 in gpus
        limits = modeling.get_balanced_memory(model, dict(whole), low_zero=low_zero, **options)
    devices = infer(gpus, limits)
    if offload or "disk" in memory or "disk" not in devices.values():
        return devices

    # A second try: accelerate reserves room for the largest layer on the first GPU, which is needed
    # only if layers are offloaded.
    if gpus:
        with _quiet(modeling.logger):
            devices = infer([gpus[0], *gpus], dict(enumerate([0, *(room[gpu] for gpu in gpus)])))
    if "disk" in devices.values():
        devices = infer(gpus, whole)  # without balancing
    if "disk" in devices.values():
        sizes = modeling.compute_module_sizes(model)
        limits_of = {_device_or_disk(device): size for device, size in room.items()}
        raise CheckpointError(_shortage(model, devices, limits_of, sizes))
    return devices


def _free_memory(modeling: Any, strategy: str) -> dict[int | str, int]:
    import torch

    free: dict[int | str, int] = modeling.get_max_memory()
    gpus = [device for device in free if isinstance(device, int)]
    for gpu in gpus:  # torch's cached memory is available for tensors
        free[gpu] += torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    if len(gpus) == 1 and strategy != "sequential":  # as in accelerate's get_balanced_memory
        free[gpus[0]] = int(free[gpus[0]] * 0.9)
    return free


def _shortage(
    model: torch.nn.Module,
    devices: Mapping[str, torch.device | str],
    room: Mapping[torch.device | str, int],
    sizes: Mapping[str, int],
) -> str:
    lacks = ["max_memory has no device with room"]
    if room:
        once = [*model.named_parameters(), *model.named_buffers()]  # what is tied, too
        held = assign((name for name, _ in once), devices)
        used = {device: sum(sizes[name] for name in names) for device, names in held.items()}
        *others, last = room
        missing = used["disk"] - (room[last] - used.get(last, 0))
        lacks = [f"{d} would hold {_size(used.get(d, 0))} of its {_size(room[d])}" for d in others]
        lacks.append(f"{last} has {_size(room[last])} and lacks {_size(missing)}")
    return (
        f"{type(model).__name__} has {_size(sizes[''])}, which does not fit: {'; '.join(lacks)}. "
        "Give more max_memory, or let weights stay on the disk with a 'disk' in it or an "
        "offload_folder"
    )


def _cover(devices: dict[str, torch.device | str], names: Iterable[str]) -> None:
    """Adds tensors that a map omits: accelerate omits buffers of split modules, users omit buffers
    that no checkpoint has. They get the device of the first other entry of the same module."""
    import torch

    for name in names:
        prefixes = [*(name[: dot.start()] for dot in re.finditer(r"\.", name)), name]
        if "" in devices or any(prefix in devices for prefix in prefixes):
            continue
        inside: list[torch.device | str] = []
        while prefixes and not inside:
            prefixes.pop()
            start = f"{prefixes[-1]}." if prefixes else ""
            inside = [d for key, d in devices.items() if key.startswith(start) and d != "disk"]
        devices[name] = inside[0] if inside else torch.device("cpu")


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Suppresses accelerate's warning about the GPU numbers that stand for places."""

    def others(record: logging.LogRecord) -> bool:
        return "is not available" not in record.getMessage()

    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


def _size(count: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return format_count(count, "byte")
