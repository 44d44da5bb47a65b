"""accelerate's hooks on modules whose weights are on the host or on the disk: the weights come from
the streaming executor.

The hooks stay accelerate's own objects, and outside of a forward their modules look as accelerate
leaves them. What a hook would read for its module's forward is there already, or on its way: it was
read ahead, in the order learned, into a few buffers that are used again and again. That goes for
``cpu_offload``, ``disk_offload``, ``dispatch_model``, and for whoever calls these: transformers'
and diffusers' device maps, diffusers' ``enable_sequential_cpu_offload``.

A hook goes accelerate's way when something is not as it was when the hook was attached: other
weights in its map, files that were written to, another dtype, a forward without inputs (as tools
call hooks that want the real tensors). One line of log says so. Nothing is said of a hook whose map
lacks a weight of its module, as after a load of a checkpoint that lacks it: accelerate raises a
KeyError in the module's forward.
"""

from __future__ import annotations

import copy
import functools
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from weightlift.backends.fallback import report_unstreamed
from weightlift.backends.hooks import outside_of_graphs
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core.errors import WeightliftError, read_error
from weightlift.module.offload import ChainedWeights, DiskWeights

if TYPE_CHECKING:
    import torch

    from weightlift.module.streaming.on_demand import Needed, WeightsOnDemand

__all__ = ["detach_hook", "init_hook", "post_forward", "pre_forward", "release"]

_NAME = "accelerate"

_Identity = tuple[int, ...]


def _identity(path: str) -> _Identity:
    status = Path(path).stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


# --- where a hook's map has its weights -----------------------------------------------------------


class _Origin(Protocol):
    """Where a weight lies."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what accelerate would be given, before the model's own is made of it."""

    def is_same(self) -> bool:
        """Whether it is what it was when the hook was attached."""


def _version_of(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # which those have not


class _InMemory(NamedTuple):
    tensor: torch.Tensor
    mapping: Mapping[str, torch.Tensor]
    name: str
    version: int

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def is_same(self) -> bool:
        found = self.mapping.get(self.name)
        return found is self.tensor and _version_of(found) == self.version


class _InSafetensors(NamedTuple):
    path: str
    key: str
    dtype: torch.dtype
    identity: _Identity

    def is_same(self) -> bool:
        return _identity(self.path) == self.identity


class _InRawFile(NamedTuple):
    path: str
    dtype: torch.dtype
    identity: _Identity

    def is_same(self) -> bool:
        return _identity(self.path) == self.identity


class _InOpenFiles(NamedTuple):
    weights: DiskWeights
    key: str
    dtype: torch.dtype

    def is_same(self) -> bool:
        return True  # its files are held open


class _NotKnownError(Exception):
    """Why the executor cannot serve a hook."""


def _root_of(mapping: Any) -> Any:
    from accelerate.utils.offload import PrefixedDataset

    return mapping.dataset if type(mapping) is PrefixedDataset else None


def _origin(mapping: Any, name: str) -> _Origin:
    """Where a map of accelerate's has a weight.

    Raises:
        _NotKnownError: that cannot be told.
        KeyError: the map lacks it.
    """
    import torch
    from accelerate.utils.offload import OffloadedWeightsLoader, PrefixedDataset

    if type(mapping) is PrefixedDataset:
        return _origin(mapping.dataset, mapping.prefix + name)
    if type(mapping) is OffloadedWeightsLoader:
        if name in mapping.state_dict:
            return _origin(mapping.state_dict, name)
        return _of_entry(mapping, name)
    if type(mapping) is ChainedWeights:
        return _origin(mapping.on_disk if name not in mapping.host else mapping.host, name)
    if type(mapping) is DiskWeights:
        checkpoint, key, cast_to = mapping.place(name)
        return _InOpenFiles(mapping, key, _after_cast(checkpoint, key, cast_to))
    tensor: Any = None
    if isinstance(mapping, dict):
        if name not in mapping:
            raise KeyError(name)
        tensor = mapping.get(name)
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return _InMemory(tensor, mapping, name, _version_of(tensor))
    raise _NotKnownError(f"{name!r} comes from a {type(mapping).__name__}")


def _of_entry(loader: Any, name: str) -> _Origin:
    import torch

    entry = loader.index[name]
    path = entry.get("safetensors_file")
    if path is None:
        path = os.fspath(Path(loader.save_folder) / f"{name}.dat")
        return _InRawFile(path, getattr(torch, entry["dtype"]), _identity(path))
    key = entry.get("weight_name", name)
    own = _after_cast(_opened(path, _identity(path)), key, None)
    wanted = getattr(torch, entry["dtype"]) if "dtype" in entry else own
    return _InSafetensors(path, key, wanted, _identity(path))


@functools.lru_cache(maxsize=64)
def _opened(path: str, _: _Identity) -> Checkpoint:
    return Checkpoint.from_file(path)


def _after_cast(checkpoint: Checkpoint, key: str, cast_to: str | None) -> torch.dtype:
    from weightlift.core import dtypes

    own = checkpoint[key][0]
    if own not in dtypes.TORCH_NAMES or own == "F4":
        raise _NotKnownError(f"{key!r} is {own}")
    return dtypes.to_torch(cast_to or own)


class _RawFiles:
    """A source for the executor: files that accelerate wrote, a tensor's bytes in each."""

    def __init__(self, origins: Mapping[str, _InRawFile]) -> None:
        self._origins = origins

    def fill(self, names: Sequence[str], targets: Sequence[torch.Tensor]) -> None:
        self.begin(names, targets)()

    def begin(self, names: Sequence[str], targets: Sequence[torch.Tensor]) -> Callable[[], None]:
        from weightlift.module.streaming.sources import HostSource

        read: dict[str, torch.Tensor] = {}
        rest: list[torch.Tensor] = []
        for name, target in zip(names, targets, strict=True):
            value = self._read(self._origins[name], target)
            if value is not target:
                read[name] = value
                rest.append(target)
        return HostSource(read, _NAME).begin([*read], rest)

    def _read(self, origin: _InRawFile, target: torch.Tensor) -> torch.Tensor:
        import torch

        is_direct = target.device.type == "cpu" and target.dtype == origin.dtype
        value = target if is_direct else torch.empty(target.shape, dtype=origin.dtype)
        data: Any = value.view(-1).view(torch.uint8).numpy()
        left = memoryview(data)
        with Path(origin.path).open("rb", buffering=0) as file:
            while len(left):
                count = file.readinto(left)
                if not count:
                    raise read_error("file_shrank", "the file ends before its tensor", origin.path)
                left = left[count:]
        return value


# --- the weights of one model ---------------------------------------------------------------------


class _Weight(NamedTuple):
    """A parameter that a hook brings in.

    Attributes:
        path: of its module, below that of the hook.
        key: there.
        name: in the map that all hooks of the model read from.
        shape, dtype: the model's.
    """

    path: tuple[str, ...]
    key: str
    name: str
    shape: torch.Size
    dtype: torch.dtype
    origin: _Origin

    def owner(self, module: torch.nn.Module) -> torch.nn.Module:
        for part in self.path:
            module = module._modules[part]  # type: ignore[assignment]
        return module


class _Model:
    """What hooks that read from one map, for one device, have in common.

    Args:
        root: the map. It is held, so that another one is not taken for it.
        device: where the model computes.
    """

    def __init__(self, root: Any, device: torch.device) -> None:
        self.root, self.device = root, device
        self._lock = threading.Lock()
        self._weights: dict[str, _Weight] = {}
        self._running: WeightsOnDemand | None = None
        self._refused = False

    def add(self, weight: _Weight) -> None:
        with self._lock:
            self._weights[weight.name] = weight

    def is_in_place(self, weight: _Weight) -> bool:
        """Whether it need not be read: it is where it is used."""
        origin = weight.origin
        return (
            isinstance(origin, _InMemory)
            and origin.tensor.device == self.device
            and origin.dtype == weight.dtype
        )

    @property
    def is_refused(self) -> bool:
        return self._refused

    def refuse(self, reason: str) -> None:
        """From now on accelerate serves its hooks; one line says so."""
        with self._lock:
            if self._refused:
                return
            self._refused = True
            running, self._running = self._running, None
        if running is not None:
            running.close()
        report_unstreamed(_NAME, reason)

    def parameters(
        self, weights: Sequence[_Weight], like: Sequence[torch.nn.Parameter]
    ) -> list[torch.nn.Parameter] | None:
        """What is to be used in the place of these; ``None`` where accelerate serves its hooks."""
        import torch

        made = []
        for weight, old in zip(weights, like, strict=True):
            if self.is_in_place(weight):
                origin: Any = weight.origin
                with torch.inference_mode(False):
                    made.append(torch.nn.Parameter(origin.tensor.detach(), old.requires_grad))
                continue
            running = self._on_demand(weight.name)
            if running is None:
                return None
            made.append(running.parameter(weight.name, old.requires_grad))
        return made

    def _on_demand(self, name: str) -> WeightsOnDemand | None:
        import torch

        running = self._running
        if running is not None and name in running:
            return running
        reason = None
        with self._lock:
            if self._running is None or name not in self._running:
                if self._running is not None:
                    self._running.close()
                    self._running = None
                try:
                    self._running = self._started()
                except (WeightliftError, OSError, _NotKnownError, torch.OutOfMemoryError) as error:
                    reason = str(error)
            running = self._running
        if reason is not None:
            self.refuse(reason)
        return running

    def _started(self) -> WeightsOnDemand:
        from weightlift.module.streaming.on_demand import WeightsOnDemand

        rest = [weight for weight in self._weights.values() if not self.is_in_place(weight)]
        return WeightsOnDemand(_needed(rest), self.device)

    def release(self) -> None:
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            running.close()


def _needed(weights: Sequence[_Weight]) -> dict[str, Needed]:
    """The weights of a model, with the sources that they are read from: one for each kind."""
    from weightlift.module.streaming.on_demand import Needed
    from weightlift.module.streaming.sources import FileSource, HostSource, settings_for

    streamed_bytes = sum(w.shape.numel() * w.dtype.itemsize for w in weights)
    settings = settings_for(streamed_bytes)
    in_memory: dict[str, torch.Tensor] = {}
    raw: dict[str, _InRawFile] = {}
    by_file: dict[str, tuple[Checkpoint, dict[str, str]]] = {}
    places: list[tuple[_Weight, Any, str]] = []
    open_files: dict[int, FileSource] = {}
    for weight in weights:
        origin = weight.origin
        if isinstance(origin, _InMemory):
            tensor = origin.tensor
            key = f"{tensor.data_ptr()} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}"
            in_memory[key] = tensor
            places.append((weight, in_memory, key))
        elif isinstance(origin, _InRawFile):
            raw[origin.path] = origin
            places.append((weight, raw, origin.path))
        elif isinstance(origin, _InOpenFiles):
            if id(origin.weights) not in open_files:
                checkpoint = origin.weights.checkpoint.renamed(lambda name: name)
                open_files[id(origin.weights)] = FileSource(checkpoint, settings, _NAME)
            own = _after_cast(origin.weights.checkpoint, origin.key, None)
            _check_one_cast(weight, own)
            places.append((weight, open_files[id(origin.weights)], origin.key))
        elif isinstance(origin, _InSafetensors):
            checkpoint = _opened(origin.path, origin.identity)
            _check_one_cast(weight, _after_cast(checkpoint, origin.key, None))
            key = f"{origin.path}/{origin.key}"
            by_file.setdefault(origin.path, (checkpoint, {}))[1][origin.key] = key
            places.append((weight, by_file, key))
    sources: dict[int, Any] = {
        id(in_memory): HostSource(in_memory, _NAME),
        id(raw): _RawFiles(raw),
        id(by_file): FileSource(Checkpoint.joined(by_file.values()), settings, _NAME),
    }
    return {
        weight.name: Needed(tuple(weight.shape), weight.dtype, sources.get(id(at), at), key)
        for weight, at, key in places
    }


def _check_one_cast(weight: _Weight, own: torch.dtype) -> None:
    """What is cast twice may be rounded twice."""
    if weight.origin.dtype not in (own, weight.dtype):
        raise _NotKnownError(
            f"{weight.name!r} is {own} in its file, offloaded as {weight.origin.dtype} and used as "
            f"{weight.dtype}"
        )


_models: weakref.WeakValueDictionary[tuple[int, Any], _Model] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _model_of(root: Any, device: torch.device) -> _Model:
    with _lock:
        found = _models.get((id(root), device))
        if found is None:
            found = _models[id(root), device] = _Model(root, device)
        return found


def _device(execution_device: Any) -> torch.device:
    import torch

    if isinstance(execution_device, int):
        device = torch.device("cuda", execution_device)
    else:
        device = torch.device(execution_device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cpu":
        device = torch.device("cpu")
    if device.type not in ("cpu", "cuda"):
        raise _NotKnownError(f"weights are streamed to 'cpu' and 'cuda', not to {device}")
    return device


# --- one hook -------------------------------------------------------------------------------------


class _Bound:
    """What one hook brings in. It knows the hook's module by what it is called with alone: it must
    not keep the hook, which is a key of ``_bound``, alive."""

    def __init__(self, hook: Any, module: torch.nn.Module) -> None:
        root = _root_of(hook.weights_map)
        if root is None:
            raise _NotKnownError("a hook has weights of its own")
        self._map = hook.weights_map
        self._execution_device = hook.execution_device
        self.model = _model_of(root, _device(hook.execution_device))
        self._weights: list[_Weight] = []
        try:
            self._weights += [
                self._weight(name, parameter)
                for name, parameter in module.named_parameters(recurse=hook.place_submodules)
            ]
        except (_NotKnownError, WeightliftError, OSError, AttributeError) as error:
            self.model.refuse(str(error))
        for weight in self._weights:
            self.model.add(weight)
        self._buffers = _offloaded_buffers(hook, module)
        self._lock = threading.Lock()
        self._inside: set[int] = set()
        # Of each weight, the parameter that is there outside of a forward, and that of now.
        self._outside: list[torch.nn.Parameter] = []
        self._given: list[torch.nn.Parameter] = []
        self._aligning: Any = None

    def _weight(self, name: str, parameter: torch.nn.Parameter) -> _Weight:
        import torch

        if type(parameter) is not torch.nn.Parameter:
            raise _NotKnownError(f"{name!r} is a {type(parameter).__name__}")
        *path, key = name.split(".")
        origin = _origin(self._map, name)
        full = f"{self._map.prefix}{name}"
        return _Weight(tuple(path), key, full, parameter.shape, parameter.dtype, origin)

    def aligning(self, hook: Any) -> Any:
        """accelerate's own hook for all that is not the weights: it moves inputs and outputs."""
        made = self._aligning
        if made is None or any(
            getattr(made, name) != getattr(hook, name) for name in ("io_same_device", "skip_keys")
        ):
            made = copy.copy(hook)
            made.offload = False
            made.weights_map = None
            self._aligning = made
        return made

    def bring_in(self, hook: Any, module: torch.nn.Module) -> bool:
        """Puts weights into the module; ``False`` where accelerate is to do it."""
        if self.model.is_refused or hook.weights_map is not self._map:
            return False
        if hook.execution_device != self._execution_device:
            return False
        try:
            if not all(weight.origin.is_same() for weight in self._weights):
                self.model.refuse("offloaded weights were changed after their hooks were attached")
                return False
        except OSError:
            return False  # accelerate says what it thinks of a file that is gone
        with self._lock:
            owners = [weight.owner(module) for weight in self._weights]
            here = [o._parameters.get(w.key) for o, w in zip(owners, self._weights, strict=True)]
            is_in = [*map(id, here)] == [*map(id, self._given)] and bool(self._outside)
            outside = self._outside if is_in else here
            if not all(map(_is_as_attached, outside, self._weights)):
                self.model.refuse("parameters are not as they were when their hooks were attached")
                return False
            given = self.model.parameters(self._weights, outside)  # type: ignore[arg-type]
            if given is None:
                return False
            for owner, weight, parameter in zip(owners, self._weights, given, strict=True):
                owner._parameters[weight.key] = parameter
            self._outside, self._given = outside, given  # type: ignore[assignment]
            self._inside.add(threading.get_ident())
        _set_buffers(hook, module, self._buffers, hook.execution_device)
        return True

    def take_out(self, hook: Any, module: torch.nn.Module) -> bool:
        """Puts back what was there; ``False`` where ``bring_in`` has not been."""
        with self._lock:
            if threading.get_ident() not in self._inside:
                return False
            self._inside.discard(threading.get_ident())
            if self._inside:  # another thread computes with them
                return True
            self._put_back(module)
        _set_buffers(hook, module, self._buffers, "meta")
        return True

    def forget(self, module: torch.nn.Module) -> None:
        """After a forward that has ended with an exception."""
        with self._lock:
            self._inside.clear()
            self._put_back(module)

    def _put_back(self, module: torch.nn.Module) -> None:
        given, self._given = self._given, []
        for weight, now, old in zip(self._weights, given, self._outside, strict=False):
            parameters = weight.owner(module)._parameters
            if parameters.get(weight.key) is now:
                parameters[weight.key] = old
        self._outside = []


def _is_as_attached(parameter: torch.nn.Parameter | None, weight: _Weight) -> bool:
    import torch

    return (
        type(parameter) is torch.nn.Parameter
        and parameter.is_meta
        and parameter.shape == weight.shape
        and parameter.dtype == weight.dtype
    )


def _offloaded_buffers(hook: Any, module: torch.nn.Module) -> list[str]:
    if not hook.offload_buffers:
        return []
    from accelerate.utils.modeling import get_non_persistent_buffers

    stay = get_non_persistent_buffers(module, recurse=hook.place_submodules)
    names = (name for name, _ in module.named_buffers(recurse=hook.place_submodules))
    return [name for name in names if name not in stay]


def _set_buffers(hook: Any, module: torch.nn.Module, names: Sequence[str], device: Any) -> None:
    """As accelerate does it: they are small, and a module may write to them."""
    if not names:
        return
    from accelerate.utils.modeling import set_module_tensor_to_device

    for name in names:
        value = None if device == "meta" else hook.weights_map[name]
        set_module_tensor_to_device(module, name, device, value=value)


# Hook of accelerate -> what it brings in; ``None``: accelerate does it.
_bound: weakref.WeakKeyDictionary[Any, _Bound | None] = weakref.WeakKeyDictionary()


def _bind(hook: Any, module: torch.nn.Module) -> _Bound | None:
    from accelerate.hooks import AlignDevicesHook

    if type(hook) is not AlignDevicesHook or not hook.offload or hook.weights_map is None:
        return None
    made = None
    try:
        if next(iter(module.named_parameters(recurse=hook.place_submodules)), None) is not None:
            made = _Bound(hook, module)
    except _NotKnownError as error:
        report_unstreamed(_NAME, str(error))
    except KeyError:
        pass  # the map lacks a weight: accelerate raises in the forward
    _bound[hook] = made
    return made


def release() -> None:
    """When the backend is switched off: accelerate's hooks serve themselves, and the buffers go."""
    with _lock:
        models = list(_models.values())
    for model in models:
        model.release()


# --- in the place of accelerate's methods ---------------------------------------------------------


def init_hook(reference: Callable[..., Any]) -> Callable[..., Any]:
    def init_hook(self: Any, module: Any) -> Any:
        result = reference(self, module)
        _bind(self, module)
        return result

    return init_hook


def pre_forward(reference: Callable[..., Any]) -> Callable[..., Any]:
    def pre_forward(self: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.offload:
            return reference(self, module, *args, **kwargs)
        bound = _bound.get(self, _UNKNOWN)
        if bound is _UNKNOWN:
            # Of a copy, or of a model that was dispatched before the backend was on: by the next
            # forward all its hooks are known.
            _bind(self, module)
        elif bound is not None and (args or kwargs) and bound.bring_in(self, module):
            return reference(bound.aligning(self), module, *args, **kwargs)
        elif bound is not None:
            bound.forget(module)
        return reference(self, module, *args, **kwargs)

    return outside_of_graphs(pre_forward)


def post_forward(reference: Callable[..., Any]) -> Callable[..., Any]:
    def post_forward(self: Any, module: Any, output: Any) -> Any:
        bound = _bound.get(self) if self.offload else None
        if bound is not None and bound.take_out(self, module):
            return reference(bound.aligning(self), module, output)
        return reference(self, module, output)

    return outside_of_graphs(post_forward)


def detach_hook(reference: Callable[..., Any]) -> Callable[..., Any]:
    def detach_hook(self: Any, module: Any) -> Any:
        bound = _bound.pop(self, None)
        if bound is not None:
            bound.forget(module)
        return reference(self, module)

    return detach_hook


_UNKNOWN: Any = object()
