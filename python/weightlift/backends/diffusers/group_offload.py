"""diffusers' group offload: the weights of a group come from the streaming executor.

The hooks and the groups stay diffusers' own. Where a group would be copied to the device whole, its
modules get weights that are read ahead of their use, from the host's memory or from the files that
diffusers wrote, into a few buffers that are used again and again; nothing is pinned. Groups that
are in the memory that they are used in are left there.

A model goes diffusers' way, which one line of log says, where gradients of its weights are
recorded, its weights are other than plain parameters, or it is offloaded to something else than the
CPU; and from when something has changed its weights.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weightlift.backends.diffusers.context import NAME
from weightlift.backends.fallback import report_unstreamed
from weightlift.backends.hooks import outside_of_graphs
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core.errors import WeightliftError

if TYPE_CHECKING:
    import torch

    from weightlift.module.streaming.on_demand import Needed, WeightsOnDemand

__all__ = ["apply_group_offloading", "init_cpu_param_dict", "offload", "onload", "release"]


class _Place(NamedTuple):
    """A parameter of a group.

    Attributes:
        module, key: where it hangs.
        name: of the model.
        parameter: that hangs there while the group is not in use.
        state: of its memory, when it was offloaded.
        stored: its name in the group's file.
    """

    module: weakref.ref[torch.nn.Module]
    key: str
    name: str
    parameter: torch.nn.Parameter
    state: tuple[int, int]
    stored: str | None


def _state_of(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _identity(path: str) -> tuple[int, ...]:
    status = Path(path).stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _Model:
    """The groups of one model."""

    def __init__(self, onload_device: torch.device) -> None:
        import torch

        device = onload_device
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        # Weakly: they know the model, and what it holds should go with the last of them.
        self.groups: list[weakref.ref[_Group]] = []
        self.refused = False
        self._lock = threading.Lock()
        self._running: WeightsOnDemand | None = None

    def refuse(self, reason: str) -> None:
        with self._lock:
            if self.refused:
                return
            self.refused = True
        self.release()
        report_unstreamed(NAME, reason)

    def weights(self) -> WeightsOnDemand | None:
        import torch

        reason = None
        with self._lock:
            if self._running is None and not self.refused:
                from weightlift.module.streaming.on_demand import WeightsOnDemand

                try:
                    self._running = WeightsOnDemand(self._needed(), self.device)
                except (WeightliftError, OSError, torch.OutOfMemoryError) as error:
                    reason = str(error)
            running = self._running
        if reason is not None:
            self.refuse(reason)
        return running

    def _needed(self) -> dict[str, Needed]:
        from weightlift.module.streaming.on_demand import Needed
        from weightlift.module.streaming.sources import FileSource, HostSource, settings_for

        in_memory = {}
        files: dict[str, tuple[Checkpoint, dict[str, str]]] = {}
        keys = {}
        for group in filter(None, (known() for known in self.groups)):
            for place in group.places:
                if group.path is None:
                    key = f"{place.state[0]} {tuple(place.parameter.shape)}"
                    in_memory[key] = place.parameter.data
                else:
                    opened = files.setdefault(group.path, (Checkpoint.from_file(group.path), {}))
                    key = opened[1][str(place.stored)] = f"{group.path}/{place.stored}"
                keys[place.name] = place, key
        size = sum(place.parameter.nbytes for place, _ in keys.values())
        file_source = FileSource(Checkpoint.joined(files.values()), settings_for(size), NAME)
        host_source = HostSource(in_memory, NAME)
        return {
            name: Needed(
                tuple(place.parameter.shape),
                place.parameter.dtype,
                host_source if place.stored is None else file_source,
                key,
            )
            for name, (place, key) in keys.items()
        }

    def release(self) -> None:
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            running.close()


class _Group:
    """What is put into the modules of one of diffusers' groups, and taken out again."""

    def __init__(self, model: _Model, group: Any, names: dict[int, list[_Hanging]]) -> None:
        self.model = model
        self.path: str | None = None
        self._identity: tuple[int, ...] = ()
        if group.offload_to_disk_path is not None:
            self.path = group.safetensors_file_path
            self._identity = _identity(group.safetensors_file_path)
        self.places: list[_Place] = []
        for parameter in _parameters_of(group):
            stored = None if self.path is None else group.tensor_to_key[parameter]
            for module, key, name in names[id(parameter)]:
                self.places.append(
                    _Place(weakref.ref(module), key, name, parameter, _state_of(parameter), stored)
                )
        self.buffers = list(_buffers_of(group))
        self.offload_device = group.offload_device
        self.is_in = False
        self._lock = threading.Lock()

    @property
    def is_in_place(self) -> bool:
        return self.path is None and self.model.device == self.offload_device

    def bring_in(self) -> bool:
        """Puts weights into the modules; ``False`` where diffusers is to do it."""
        import torch

        if self.model.refused:
            return False
        places = [place for place in self.places if place.module() is not None]
        if torch.is_grad_enabled() and any(p.parameter.requires_grad for p in places):
            self.model.refuse("gradients of its weights are recorded (torch.no_grad() is off)")
            return False
        if self.path is not None and _identity(self.path) != self._identity:
            self.model.refuse(f"{self.path} was written to after its weights were offloaded")
            return False
        if not self.is_in_place and any(_state_of(p.parameter) != p.state for p in places):
            self.model.refuse("weights were changed after they were offloaded")
            return False
        with self._lock:
            if not self.is_in_place:
                weights = self.model.weights()
                if weights is None:
                    return False
                for place in places:
                    made = weights.parameter(place.name, place.parameter.requires_grad)
                    _hang(place, made)
                for buffer in self.buffers:
                    buffer.data = buffer.data.to(self.model.device)
            self.is_in = True
        return True

    def take_out(self) -> bool:
        """Puts back what was there; ``False`` where ``bring_in`` has not been."""
        with self._lock:
            if not self.is_in:
                return False
            self.is_in = False
            if not self.is_in_place:
                for place in self.places:
                    _hang(place, place.parameter)
                for buffer in self.buffers:
                    buffer.data = buffer.data.to(self.offload_device)
        return True


def _hang(place: _Place, parameter: torch.nn.Parameter) -> None:
    module = place.module()
    if module is not None:
        module._parameters[place.key] = parameter


_Hanging = tuple[Any, str, str]


def _parameters_of(group: Any) -> Iterator[torch.nn.Parameter]:
    found = {id(p): p for module in group.modules for p in module.parameters()}
    found.update({id(p): p for p in group.parameters})
    yield from found.values()


def _buffers_of(group: Any) -> Iterator[torch.Tensor]:
    for module in group.modules:
        yield from module.buffers()
    yield from group.buffers


class _Call:
    """One call of ``_apply_group_offloading``: its groups."""

    def __init__(self) -> None:
        self.groups: dict[int, Any] = {}

    def bind(self, module: torch.nn.Module) -> None:
        import torch

        groups = list(self.groups.values())
        if not groups:
            return
        devices = {torch.device(group.onload_device) for group in groups}
        kinds = {type(p) for group in groups for p in _parameters_of(group)}
        reason = None
        if any(torch.device(group.offload_device).type != "cpu" for group in groups):
            reason = "weights are offloaded to something else than the CPU"
        elif len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
            reason = "weights are streamed to 'cpu' and 'cuda'"
        elif kinds - {torch.nn.Parameter}:
            other = sorted(kind.__name__ for kind in kinds - {torch.nn.Parameter})
            reason = f"weights are {', '.join(other)}"
        if reason is not None:
            report_unstreamed(NAME, reason)
            return
        names: dict[int, list[_Hanging]] = {}
        for prefix, holder in module.named_modules():
            for key, parameter in holder._parameters.items():
                if parameter is not None:
                    name = f"{prefix}.{key}" if prefix else key
                    names.setdefault(id(parameter), []).append((holder, key, name))
        model = _Model(devices.pop())
        for group in groups:
            bound = _Group(model, group, names)
            _read_buffers(group, bound)
            model.groups.append(weakref.ref(bound))
            _bound[group] = bound
        _models.add(model)


def _read_buffers(group: Any, bound: _Group) -> None:
    """Of a group in a file: they stay in memory from now on."""
    if bound.path is None or not bound.buffers:
        return
    from weightlift.core.devices import parse_device
    from weightlift.load.load_tensors import load_tensors
    from weightlift.load.options import LoadOptions

    names = [group.tensor_to_key[buffer] for buffer in bound.buffers]
    options = LoadOptions(mode="read", caller=NAME)
    checkpoint = Checkpoint.from_file(bound.path)
    read = load_tensors(checkpoint, parse_device("cpu"), options, names=names)
    for name, buffer in zip(names, bound.buffers, strict=True):
        buffer.data = read[name]


_current: ContextVar[_Call | None] = ContextVar("weightlift_group_offload", default=None)
_bound: weakref.WeakKeyDictionary[Any, _Group] = weakref.WeakKeyDictionary()
_models: weakref.WeakSet[_Model] = weakref.WeakSet()


def release() -> None:
    """When the backend is switched off: diffusers moves its groups itself, and the buffers go."""
    for bound in list(_bound.values()):
        bound.take_out()
    for model in list(_models):
        model.release()


def apply_group_offloading(original: Callable[..., Any]) -> Callable[..., Any]:
    def _apply_group_offloading(module: Any, config: Any) -> Any:
        call = _Call()
        token = _current.set(call)
        try:
            original(module, config)
        finally:
            _current.reset(token)
        call.bind(module)

    return _apply_group_offloading


def init_cpu_param_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    def _init_cpu_param_dict(self: Any) -> Any:
        if _current.get() is None:
            return original(self)
        # Not pinned; whoever needs that pins on the fly.
        before, self.low_cpu_mem_usage = self.low_cpu_mem_usage, True
        try:
            return original(self)
        finally:
            self.low_cpu_mem_usage = before

    return _init_cpu_param_dict


def onload(original: Callable[..., Any]) -> Callable[..., Any]:
    def onload_(self: Any) -> Any:
        bound = _bound.get(self)
        if bound is not None:
            if bound.bring_in():
                return None
            bound.take_out()
        return original(self)

    return outside_of_graphs(onload_)


def offload(original: Callable[..., Any]) -> Callable[..., Any]:
    def offload_(self: Any) -> Any:
        call = _current.get()
        if call is not None:
            call.groups[id(self)] = self
        else:
            bound = _bound.get(self)
            if bound is not None and bound.take_out():
                return None
        return original(self)

    return outside_of_graphs(offload_)
