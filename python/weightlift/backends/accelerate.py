"""accelerate: ``load_checkpoint_in_model``, ``load_checkpoint_and_dispatch``, weights on the disk.

accelerate's own loop over the files stays; its calls get faster. During a call of the two
functions, ``load_state_dict`` returns each tensor on its final device and in its final dtype, by
one plan per file. The device's cache is not emptied after every tensor. Weights for the disk are
not read: the index refers to the original file. Weights that ``offload_state_dict`` would write to
the disk and read back stay in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import inspect
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from weightlift.backends import accelerate_hooks
from weightlift.backends.fallback import FallbackToLibrary, fall_back
from weightlift.backends.hooks import WITHOUT_SIGNATURE, Hook
from weightlift.backends.safetensors import load_file_adapters, open_adapters, usable_device
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.open_checkpoint import open_checkpoint
from weightlift.core import dtypes
from weightlift.core.errors import CheckpointError, OutOfMemoryError, WeightliftError
from weightlift.core.settings import Settings
from weightlift.load.load_plan import LoadPlan
from weightlift.load.load_tensors import load_tensors
from weightlift.load.options import LoadOptions
from weightlift.load.slots_ahead import slots_ahead
from weightlift.module.device_map import known_devices
from weightlift.module.prefetched_weights import PrefetchedWeights

if TYPE_CHECKING:
    import torch

__all__ = ["HOOKS", "release"]

_NAME = "accelerate"


class _Call:
    """One call of ``load_checkpoint_in_model`` with a device map that the engine supports."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        import torch

        model = given["model"]
        dtype = given["dtype"]
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype.removeprefix("torch."))
        self.model = model
        self.buffers = dict(model.named_buffers(remove_duplicate=False))
        self.tensors = {**dict(model.named_parameters(remove_duplicate=False)), **self.buffers}
        self.device_map = given["device_map"]
        self.devices: dict[Any, torch.device] = {
            device: usable_device(device) for device in self.device_map.values() if device != "disk"
        }
        self.dtype: torch.dtype | None = dtype
        # accelerate applies keep_in_fp32_modules only to float16.
        self.in_fp32 = (given["keep_in_fp32_modules"] or ()) if dtype == torch.float16 else ()
        self.offload_state_dict = bool(given["offload_state_dict"])
        self.offload_buffers = bool(given["offload_buffers"])
        self.on_disk: dict[str, dict[str, str]] = {}  # entries for accelerate's index
        self.kept: dict[str, torch.Tensor] = {}  # tensors under offload_state_dict

    @staticmethod
    def of(given: Mapping[str, Any]) -> _Call | None:
        """``None`` if accelerate does more than place tensors, or uses other devices."""
        import torch

        if given["device_map"] is None or given["offload_8bit_bnb"]:
            return None
        if any(type(p) is not torch.nn.Parameter for p in given["model"].parameters()):
            return None
        try:
            return _Call(given)
        except (FallbackToLibrary, WeightliftError, AttributeError, TypeError):
            return None  # an invalid device or dtype, for accelerate's own error

    def place(self, name: str) -> Any:
        """The map's entry with the longest matching prefix; ``None`` if there is none."""
        while name and name not in self.device_map:
            name = name.rpartition(".")[0]
        return self.device_map.get(name)

    def final_dtype(self, name: str, own: torch.dtype) -> torch.dtype:
        """The final dtype of the parameter."""
        import torch

        if self.dtype is None:
            place = self.place(name)
            stays = place == "disk" or (place == "cpu" and self.offload_state_dict)
            return own if stays else self.tensors[name].dtype
        if not (own.is_floating_point or own.is_complex):
            return own
        if any(key == name or f"{key}." in name for key in self.in_fp32):
            return torch.float32
        return self.dtype

    def load(self, checkpoint: Checkpoint, path: str) -> dict[str, torch.Tensor]:
        import torch

        in_its_file = set(checkpoint.formats) == {"safetensors"}
        cpu = torch.device("cpu")
        loaded: dict[str, torch.Tensor] = {}
        groups: dict[tuple[torch.device, str | None], list[str]] = {}
        buffers = []
        for name, (own, shape) in checkpoint.headers().items():
            place = self.place(name)
            if place is None or name not in self.tensors:
                # accelerate skips it, or raises its own error.
                loaded[name] = torch.empty(shape, device="meta")
                continue
            kind = dtypes.to_torch(own)
            final = self.final_dtype(name, kind)
            if place != "disk":
                group = self.devices[place], _cast(own, final)
            elif name in self.buffers and not self.offload_buffers:
                # accelerate 1.15 offloads only parameters.
                group = cpu, _cast(own, final)
                buffers.append(name)
            elif in_its_file:
                loaded[name] = torch.empty(shape, dtype=kind, device="meta")
                self.on_disk[name] = {
                    "safetensors_file": os.path.abspath(path),  # noqa: PTH100 - a link stays one
                    "weight_name": name,
                    "dtype": str(final).removeprefix("torch."),
                }
                continue
            else:
                group = cpu, None
            groups.setdefault(group, []).append(name)
        loaded.update(_load(checkpoint, groups))
        for name in buffers:
            value = loaded.pop(name)
            _set(self.model, name, "cpu", value, self.final_dtype(name, value.dtype))
        return loaded


_current: ContextVar[_Call | None] = ContextVar("weightlift_accelerate", default=None)


def _load(
    checkpoint: Checkpoint, groups: Mapping[tuple[torch.device, str | None], list[str]]
) -> dict[str, torch.Tensor]:
    def load() -> dict[str, torch.Tensor]:
        plan = LoadPlan(checkpoint, LoadOptions(caller=_NAME))
        for (device, dtype), names in groups.items():
            plan.add(device, dtype, names)
        return plan.start().result()

    # Not within `except`: the error keeps the loaded tensors alive.
    with contextlib.suppress(OutOfMemoryError):
        return load()
    # Replaces accelerate's garbage collection after every file.
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    return load()


def _cast(own: str, final: torch.dtype) -> str | None:
    """The dtype for a cast by the engine; ``None``: no cast, or a cast by torch."""
    target = dtypes.file_name(final)
    return target if target != own and {own, target} <= dtypes.CASTABLE else None


def _set(model: torch.nn.Module, name: str, *arguments: Any) -> None:
    from accelerate.utils import set_module_tensor_to_device

    set_module_tensor_to_device(model, name, *arguments)


def _load_checkpoint_in_model(reference: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(reference)

    def load_checkpoint_in_model(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        token = _current.set(_Call.of(given.arguments))
        try:
            return reference(*args, **kwargs)
        finally:
            _current.reset(token)

    return load_checkpoint_in_model


def _load_checkpoint_and_dispatch(reference: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(reference)

    def load_checkpoint_and_dispatch(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        device_map = given.get("device_map")
        if given.get("offload_folder") is not None or not (
            isinstance(device_map, dict) and "disk" in device_map.values()
        ):
            return reference(*args, **kwargs)
        # Only for the index, if the weights are safetensors.
        folder = tempfile.mkdtemp(prefix="weightlift-")
        try:
            model = reference(**{**given, "offload_folder": folder})
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
        return model

    return load_checkpoint_and_dispatch


def _load_state_dict(reference: Callable[..., Any]) -> Callable[..., Any]:
    def load_state_dict(checkpoint_file: Any, device_map: Any = None) -> Any:
        original_call = functools.partial(reference, checkpoint_file, device_map)
        call = _current.get()
        is_safetensors = checkpoint_file.endswith(".safetensors")
        try:
            with slots_ahead(known_devices(call.device_map if call else None), casts=True):
                if is_safetensors:
                    checkpoint = Checkpoint.from_file(checkpoint_file)
                else:
                    checkpoint = open_checkpoint(checkpoint_file)
        except CheckpointError:  # something else than a state dict
            return original_call()
        except WeightliftError as error:
            # The reference's safe_open and load_file are hooked and count fallbacks themselves.
            return original_call() if is_safetensors else fall_back(_NAME, error, original_call)
        if is_safetensors and checkpoint.file_metadata()[0].get("format") != "pt":
            return original_call()  # for accelerate's own error
        if "not_tensors" in checkpoint.metadata:
            return original_call()
        if call is not None:
            return call.load(checkpoint, checkpoint_file)
        if device_map is not None:
            return original_call()
        return load_tensors(checkpoint, usable_device("cpu"), LoadOptions(caller=_NAME))

    return load_state_dict


def _offload_weight(reference: Callable[..., Any]) -> Callable[..., Any]:
    def offload_weight(
        weight: Any, weight_name: str, offload_folder: Any, index: Any = None
    ) -> Any:
        call = _current.get()
        if call is None or index is None:
            return reference(weight, weight_name, offload_folder, index)
        if weight_name in call.on_disk:
            index[weight_name] = call.on_disk.pop(weight_name)
        elif call.offload_state_dict and call.place(weight_name) != "disk":
            call.kept[weight_name] = weight
            index[weight_name] = {}
        else:
            return reference(weight, weight_name, offload_folder, index)
        return index

    return offload_weight


def _load_offloaded_weights(reference: Callable[..., Any]) -> Callable[..., Any]:
    def load_offloaded_weights(model: Any, index: Any, offload_folder: Any) -> Any:
        call = _current.get()
        if call is None:
            return reference(model, index, offload_folder)
        for name in list(call.kept):
            _set(model, name, "cpu", call.kept.pop(name))
        return None

    return load_offloaded_weights


def _clear_device_cache(reference: Callable[..., Any]) -> Callable[..., Any]:
    def clear_device_cache(garbage_collection: bool = False) -> None:
        if _current.get() is None:
            reference(garbage_collection)

    return clear_device_cache


@functools.lru_cache(maxsize=64)
def _offloaded(path: str, _identity: tuple[int, ...]) -> Checkpoint:
    return Checkpoint.from_file(path)


# The id of a loader of accelerate, which as a mapping has no hash -> what is read ahead of the
# hooks that read from it.
_ahead: dict[int, PrefetchedWeights] = {}


def _identity(path: str) -> tuple[int, ...]:
    status = Path(path).stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_offloaded(
    index: Mapping[str, Any], device: torch.device, key: str, ahead: bool
) -> tuple[tuple[int, ...], torch.Tensor]:
    """A tensor of a safetensors file, and which file that was."""
    import torch

    entry = index[key]
    identity = _identity(entry["safetensors_file"])
    checkpoint = _offloaded(entry["safetensors_file"], identity)
    name = entry.get("weight_name", key)
    own = checkpoint[name][0]
    wanted = getattr(torch, entry["dtype"]) if "dtype" in entry else dtypes.to_torch(own)
    settings = dataclasses.replace(Settings.current(), populate=True) if ahead else None
    loaded = load_tensors(
        checkpoint,
        device,
        LoadOptions(caller=_NAME, settings=settings),
        dtype=_cast(own, wanted),
        names=[name],
        shared=True,
    )
    return identity, loaded[name].to(wanted)


def _cast_bytes(index: Mapping[str, Any], key: str) -> int:
    """What a tensor takes of memory that is not the page cache's."""
    import torch

    entry = index[key]
    path = entry["safetensors_file"]
    own, shape = _offloaded(path, _identity(path))[entry.get("weight_name", key)]
    wanted = getattr(torch, entry["dtype"]) if "dtype" in entry else dtypes.to_torch(own)
    return 0 if dtypes.to_torch(own) == wanted else math.prod(shape) * int(wanted.itemsize)


def _advise(folder: str, index: Mapping[str, Any], key: str, ahead: bool) -> None:
    """Has the kernel read a file of accelerate's own into the page cache, before it is mapped."""
    if ahead and "safetensors_file" not in index[key]:
        descriptor = os.open(Path(folder) / f"{key}.dat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def _prefetch_files(loader: Any, key: str) -> None:
    """Reads ahead the files that accelerate's hooks will map next, in the learned order; accelerate
    maps them itself."""
    if loader.save_folder is None or not hasattr(os, "posix_fadvise"):
        return
    found = _ahead.get(-id(loader))
    if found is None:
        advise = functools.partial(_advise, os.fspath(loader.save_folder), dict(loader.index))
        found = _ahead[-id(loader)] = PrefetchedWeights(loader.index, advise, lambda _: 0)
        weakref.finalize(loader, _ahead.pop, -id(loader), None)
    found.get(key)


def _prefetched_weights_of(loader: Any, device: torch.device) -> PrefetchedWeights | None:
    """Reads ahead of the hooks of this loader: on the CPU, where it needs only the page cache."""
    if device.type != "cpu":
        return None
    found = _ahead.get(id(loader))
    if found is None:
        index = {key: dict(e) for key, e in loader.index.items() if "safetensors_file" in e}
        read = functools.partial(_read_offloaded, index, device)
        found = PrefetchedWeights(index, read, functools.partial(_cast_bytes, index))
        _ahead[id(loader)] = found
        weakref.finalize(loader, _ahead.pop, id(loader), None)
    return found


def _getitem(reference: Callable[..., Any]) -> Callable[..., Any]:
    def __getitem__(self: Any, key: str) -> Any:
        entry = {} if key in self.state_dict else self.index[key]
        path = entry.get("safetensors_file")
        if path is None:
            if key not in self.state_dict:
                _prefetch_files(self, key)
            return reference(self, key)
        try:
            device = usable_device(self.device)
            identity = _identity(path)
            _offloaded(path, identity)
        except (FallbackToLibrary, WeightliftError, OSError) as error:
            return fall_back(_NAME, error, lambda: reference(self, key))
        ahead = _prefetched_weights_of(self, device)
        if ahead is not None:
            then, tensor = ahead.get(key)
            if then == identity:
                return tensor
        return _read_offloaded(self.index, device, key, False)[1]

    return __getitem__


class _Collector(ModuleType):
    """``gc``, without the collection after every file: it takes a second where much is imported."""

    def __init__(self, reference: Any) -> None:
        super().__init__("gc")
        self._reference = reference

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reference, name)

    def collect(self, *generation: int) -> int:
        return 0 if _current.get() is not None else gc.collect(*generation)


_MODELING = "accelerate.utils.modeling"
_IN_MODEL = {
    "(model, checkpoint, device_map=None, offload_folder=None, dtype=None, "
    "offload_state_dict=False, offload_buffers=False, keep_in_fp32_modules=None, "
    "offload_8bit_bnb=False, strict=False, full_state_dict=True, broadcast_from_rank0=False)": (
        _load_checkpoint_in_model
    )
}
_AND_DISPATCH = {
    "(model, checkpoint, device_map=None, max_memory=None, no_split_module_classes=None, "
    "offload_folder=None, offload_buffers=False, dtype=None, offload_state_dict=None, "
    "skip_keys=None, preload_module_classes=None, force_hooks=False, strict=False, "
    "full_state_dict=True, broadcast_from_rank0=False)": _load_checkpoint_and_dispatch
}
HOOKS = (
    *(
        Hook(module, "load_checkpoint_in_model", _IN_MODEL)
        for module in (
            _MODELING,
            "accelerate.utils",
            "accelerate.utils.bnb",
            "accelerate.big_modeling",
            "accelerate",
        )
    ),
    *(
        Hook(module, "load_checkpoint_and_dispatch", _AND_DISPATCH)
        for module in ("accelerate.big_modeling", "accelerate")
    ),
    Hook(_MODELING, "load_state_dict", {"(checkpoint_file, device_map=None)": _load_state_dict}),
    Hook(_MODELING, "safe_open", open_adapters(_NAME)),
    Hook(_MODELING, "safe_load_file", load_file_adapters(_NAME)),
    Hook(
        _MODELING,
        "offload_weight",
        {"(weight, weight_name, offload_folder, index=None)": _offload_weight},
    ),
    Hook(
        _MODELING,
        "load_offloaded_weights",
        {"(model, index, offload_folder)": _load_offloaded_weights},
    ),
    Hook(_MODELING, "clear_device_cache", {"(garbage_collection=False)": _clear_device_cache}),
    Hook(_MODELING, "gc", {WITHOUT_SIGNATURE: _Collector}),
    Hook(
        "accelerate.utils.offload", "OffloadedWeightsLoader.__getitem__", {"(self, key)": _getitem}
    ),
    Hook(
        "accelerate.hooks",
        "CpuOffload.init_hook",
        {"(self, module)": accelerate_hooks.init_whole_model_hook},
    ),
    *(
        Hook("accelerate.hooks", f"AlignDevicesHook.{name}", {signature: adapter})
        for name, signature, adapter in (
            ("init_hook", "(self, module)", accelerate_hooks.init_hook),
            ("pre_forward", "(self, module, *args, **kwargs)", accelerate_hooks.pre_forward),
            ("post_forward", "(self, module, output)", accelerate_hooks.post_forward),
            ("detach_hook", "(self, module)", accelerate_hooks.detach_hook),
        )
    ),
)
# When the backend is switched off.
release = accelerate_hooks.release
