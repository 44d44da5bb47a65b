"""Which tensor goes to which device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from weightlift.errors import ArgumentError, CheckpointError, DeviceError

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceMap", "assign", "parse_device", "parse_device_map"]

# A device, the name of a way to spread a model, or module prefix -> device.
DeviceMap: TypeAlias = "str | int | torch.device | Mapping[str, str | int | torch.device]"
_Device = TypeVar("_Device")
_NEED_A_MODEL = ("auto", "balanced", "balanced_low_0", "sequential")


def parse_device(device: torch.device | str | int) -> torch.device:
    """``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``1`` or a ``torch.device``, with its index filled in.

    Raises:
        DeviceError: no such device, or none that tensors can be loaded to.
    """
    import torch

    try:
        if isinstance(device, int) and not isinstance(device, bool):
            if device < 0:
                raise ValueError("an index below zero")
            parsed = torch.device("cuda", device)
        else:
            parsed = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise DeviceError(f"device {device!r} is invalid: {error}") from None
    if parsed.type == "meta":
        raise DeviceError("device 'meta' is invalid: it holds no data, and a load brings some")
    if parsed.type == "cuda" and parsed.index is None:
        current = torch.cuda.current_device() if torch.cuda.is_available() else 0
        return torch.device("cuda", current)
    return parsed


def parse_device_map(device_map: DeviceMap) -> dict[str, torch.device]:
    """A device map that needs no model: module prefix -> device, ``""`` for all.

    Raises:
        ArgumentError: it needs a model, or leaves tensors on the disk.
        DeviceError: there is no such device.
    """
    devices = device_map if isinstance(device_map, Mapping) else {"": device_map}
    parsed = {}
    for prefix, device in devices.items():
        if device in _NEED_A_MODEL or device == "disk":
            raise ArgumentError(
                f"device_map: {device!r} needs a model to spread over the devices; use load_into"
            )
        parsed[prefix] = parse_device(device)
    return parsed


def assign(names: Iterable[str], devices: Mapping[str, _Device]) -> dict[_Device, list[str]]:
    """The tensors of each device, by the longest prefix that is whole components of their name.

    Raises:
        CheckpointError: a name that no prefix covers.
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
        more = f" and {len(uncovered) - 3} more" if len(uncovered) > 3 else ""
        raise CheckpointError(
            f"device_map has no device for {', '.join(uncovered[:3])}{more}: name their module, or "
            'add "" for all the rest'
        )
    return assigned
