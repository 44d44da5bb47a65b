"""Models over several devices and the disk: offloaded weights and accelerate's hooks."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from weightlift.checkpoint.by_path import CheckpointByPath, described_by_path
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core import dtypes
from weightlift.core.devices import parse_device
from weightlift.core.errors import ArgumentError
from weightlift.core.report import disk_reads_of
from weightlift.core.settings import Settings
from weightlift.load.load_tensors import load_tensors
from weightlift.load.options import LoadOptions
from weightlift.module.device_map import disjoint_map
from weightlift.module.parameters import is_streamed
from weightlift.module.prefetched_weights import PrefetchedWeights

if TYPE_CHECKING:
    import torch

__all__ = [
    "ChainedWeights",
    "DiskWeights",
    "Dispatch",
    "dispatch_by_accelerate",
    "offloaded_weights",
    "whole_state_dict",
]


_log = logging.getLogger("weightlift")


class DiskWeights(Mapping[str, "torch.Tensor"]):
    """Tensors that stay in their file and are read at each access. The files stay open, so that a
    save over them does not change the values.

    A copy reads the same open files. A pickle holds the paths of safetensors files, which must be
    unchanged when it is loaded; for other files, and for replaced ones, it holds the tensors.

    Args:
        checkpoint: the checkpoint.
        names: the model's name -> (the checkpoint's name, the file's name of the dtype to cast to).
        caller: the library; ``stats()`` sums these reads under ``disk_reads_of(caller)``, and
            ``last_report()`` does not include them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Mapping[str, tuple[str, str | None]],
        caller: str = "weightlift",
    ) -> None:
        self._checkpoint = checkpoint
        self._names = dict(names)
        self._caller = disk_reads_of(caller)
        self._ahead: PrefetchedWeights | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._ahead is not None and name in self._names:
            tensor: torch.Tensor = self._ahead.get(name)
            return tensor
        return _read(self._checkpoint, self._names, self._caller, name, False)

    @property
    def checkpoint(self) -> Checkpoint:
        return self._checkpoint

    def place(self, name: str) -> tuple[Checkpoint, str, str | None]:
        """(where it is, its name there, the file's name of a dtype that it is cast to).

        Raises:
            KeyError: there is none of that name.
        """
        return self._checkpoint, *self._names[name]

    def read_ahead(self) -> None:
        """From now on reads tensors ahead, in the learned order of accesses."""
        read = functools.partial(_read, self._checkpoint, self._names, self._caller)
        own = functools.partial(_own_bytes, self._checkpoint, self._names)
        self._ahead = PrefetchedWeights(self._names, read, own)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __deepcopy__(self, memo: object) -> DiskWeights:
        return self  # immutable

    def __reduce__(self) -> tuple[Any, ...]:
        checkpoint = self._checkpoint
        by_path = described_by_path(checkpoint, {stored for stored, _ in self._names.values()})
        if by_path is not None:
            return _reopened, (by_path, self._names, self._caller)
        read: dict[tuple[str, str | None], torch.Tensor] = {}
        for name, at in self._names.items():
            if at not in read:
                read[at] = self[name]
        return dict, ({name: read[at] for name, at in self._names.items()},)


def _read(
    checkpoint: Checkpoint,
    names: Mapping[str, tuple[str, str | None]],
    caller: str,
    name: str,
    ahead: bool,
) -> torch.Tensor:
    """Reads one tensor of ``DiskWeights``; ``ahead`` also populates the pages of its mapping."""
    stored, dtype = names[name]
    settings = dataclasses.replace(Settings.current(), populate=True) if ahead else None
    tensor: torch.Tensor = load_tensors(
        checkpoint,
        parse_device("cpu"),
        LoadOptions(caller=caller, settings=settings),
        dtype=dtype,
        names=[stored],
        shared=True,
    )[stored]
    return tensor


def _own_bytes(
    checkpoint: Checkpoint, names: Mapping[str, tuple[str, str | None]], name: str
) -> int:
    """Bytes of own memory that ``_read`` needs, beside the page cache."""
    stored, cast_to = names[name]
    if cast_to is None and set(checkpoint.formats) <= {"safetensors"}:
        return 0
    dtype, shape = checkpoint[stored]
    return math.prod(shape) * dtypes.bits(cast_to or dtype) // 8


def _reopened(
    by_path: CheckpointByPath, names: Mapping[str, tuple[str, str | None]], caller: str
) -> DiskWeights:
    weights = DiskWeights(by_path.open(), names)
    weights._caller = caller
    return weights


# (model, device map, weights on the disk, initialized tensors that are on no device)
Dispatch: TypeAlias = Callable[
    [
        "torch.nn.Module",
        Mapping[str, "torch.device | str"],
        DiskWeights,
        Mapping[str, "torch.Tensor"],
    ],
    None,
]


def dispatch_by_accelerate(
    model: torch.nn.Module,
    devices: Mapping[str, torch.device | str],
    on_disk: DiskWeights,
    initialized: Mapping[str, torch.Tensor],
) -> None:
    """Adds accelerate's hooks to a model over several devices, or with weights on the disk."""
    from accelerate import dispatch_model

    named: dict[str, int | str] = {
        name: str(device) if str(device) in ("cpu", "disk") else _ordinal(device)
        for name, device in disjoint_map(model, devices).items()
    }
    with warnings.catch_warnings():
        # The map names a tensor itself if the module's children are on another device.
        warnings.filterwarnings("ignore", "The following device_map keys do not match")
        dispatch_model(
            model,
            device_map=named,
            state_dict=offloaded_weights(model, named, on_disk, initialized),
            offload_index={} if "disk" in devices.values() else None,
            skip_keys=getattr(model, "_skip_keys", None),
        )
    _make_picklable(model)
    if len(on_disk):
        on_disk.read_ahead()


def _make_picklable(model: torch.nn.Module) -> None:
    """Replaces the local functions that accelerate sets on modules, which pickle cannot write."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if "_hf_hook" in vars(module) and isinstance(forward, functools.partial):
            vars(module)["forward"] = _HookedForward(forward.func, module)
            functools.update_wrapper(vars(module)["forward"], vars(module)["_old_forward"])
    for name in ("to", "cuda"):
        if name in vars(model):
            vars(model)[name] = functools.partial(_refuse_move, model, name)


class _HookedForward(functools.partial[Any]):
    """accelerate's ``forward`` of a module, in a form that pickles."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _hooked_forward, self.args


def _hooked_forward(module: torch.nn.Module) -> _HookedForward:
    import torch
    from accelerate.hooks import ModelHook, add_hook_to_module

    function = add_hook_to_module(torch.nn.Identity(), ModelHook()).forward.func
    made = _HookedForward(function, module)
    functools.update_wrapper(made, types.MethodType(type(module).forward, module))
    return made


def _refuse_move(model: torch.nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """accelerate's ``model.to`` and ``model.cuda`` of a dispatched model."""
    import torch

    if name != "to" or torch._C._nn._parse_to(*args, **kwargs)[0] is not None:
        _log.warning("You shouldn't move a model that is dispatched using accelerate hooks.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RuntimeError("You can't move a model that has some modules offloaded to cpu or disk.")
    return getattr(type(model), name)(model, *args, **kwargs)


def offloaded_weights(
    model: torch.nn.Module,
    device_map: Mapping[str, int | str],
    on_disk: DiskWeights,
    initialized: Mapping[str, torch.Tensor],
) -> Mapping[str, torch.Tensor] | None:
    """The source of accelerate's hooks: the tensors that are on no compute device."""
    from accelerate.utils import extract_submodules_state_dict

    on_cpu = [name for name, device in device_map.items() if str(device) == "cpu"]
    host: dict[str, torch.Tensor] = dict(initialized)
    if on_cpu and any(str(device) not in ("cpu", "disk") for device in device_map.values()):
        host.update(extract_submodules_state_dict(model.state_dict(), on_cpu))
    return ChainedWeights(host, on_disk) if host or on_disk else None


def whole_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The complete state dict of a model, including tensors that accelerate's hooks hold."""
    state: dict[str, torch.Tensor] = model.state_dict()
    read: dict[int, torch.Tensor] = {}
    for name, tensor in state.items():
        if is_streamed(tensor):
            stored: Any = tensor
            if id(stored.stored) not in read:
                read[id(stored.stored)] = stored.read()
            state[name] = read[id(stored.stored)]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.device.type != "meta" or name not in state:
            continue
        module, _, key = name.rpartition(".")
        hook = getattr(model.get_submodule(module), "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            elsewhere = getattr(part, "weights_map", None)
            if elsewhere is not None and id(parameter) not in read:
                read[id(parameter)] = elsewhere[key]
        if id(parameter) in read:
            state[name] = read[id(parameter)]
    return state


class ChainedWeights(Mapping[str, "torch.Tensor"]):
    """Two mappings in one; weights in memory win over those on the disk."""

    def __init__(self, host: Mapping[str, torch.Tensor], on_disk: DiskWeights) -> None:
        self.host, self.on_disk = host, on_disk

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.host[name] if name in self.host else self.on_disk[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.host
        yield from (name for name in self.on_disk if name not in self.host)

    def __len__(self) -> int:
        return len(set(self.host) | set(self.on_disk))

    def __contains__(self, name: object) -> bool:
        return name in self.host or name in self.on_disk


def _ordinal(device: torch.device | str) -> int | str:
    index = getattr(device, "index", None)
    if index is None:
        return str(device)
    if getattr(device, "type", "") != "cuda":
        raise ArgumentError(f"{device}: accelerate's hooks need a CUDA device with a number")
    return int(index)
