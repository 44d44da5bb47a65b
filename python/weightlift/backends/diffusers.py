"""diffusers: the weights of models, pipelines, single files and adapters.

``ModelMixin.from_pretrained`` keeps all that it does around the bytes. ``load_state_dict`` hands it
the names in a file in the place of tensors; ``_load_pretrained_model`` has the engine read all of
them to where they belong at once, and asks diffusers for its keys, warnings and loading info with
nothing left to place. Reading begins when the files are known, before the module is built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from weightlift import _native, checkpoint, dtypes
from weightlift.backends import (
    Hook,
    StandAside,
    is_enabled,
    or_stock,
    signature_text,
    stand_aside,
)
from weightlift.backends.safetensors import load_file_adapters, open_adapters, usable_device
from weightlift.checkpoint import Checkpoint
from weightlift.dduf import Dduf, open_dduf
from weightlift.errors import ArgumentError, DeviceError, WeightliftError
from weightlift.hub import HubArguments, download
from weightlift.materialize import cancel_plan, load_tensors, new_plan, start_plan
from weightlift.modules import Early, fill
from weightlift.placement import parse_device
from weightlift.resolve import CheckpointFiles, ShardFile, resolve
from weightlift.settings import Settings

if TYPE_CHECKING:
    import torch

__all__ = ["HOOKS"]

_NAME = "diffusers"
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
# How often the prefetch of a pipeline looks whether it is still wanted.
_POLL_SECONDS = 0.05


# --- A call of from_pretrained -------------------------------------------------------------------


@dataclasses.dataclass
class _Call:
    """A ``from_pretrained`` of a model that is under way.

    Attributes:
        cls: the model's class.
        early: arguments of a load that can begin before the model is built, if one can.
        files: of the weights.
        sharded: whether they have an index.
        checkpoint: in ``files``, once they are known.
        begun: the load that has begun.
        by_diffusers: whether diffusers reads the tensors itself.
        dispatched: the model, if it has accelerate's hooks already.
    """

    cls: Any
    early: dict[str, Any] | None
    files: Sequence[str] = ()
    sharded: bool = False
    checkpoint: Checkpoint | None = None
    begun: Early | None = None
    by_diffusers: bool = False
    dispatched: Any = None

    def found(self, files: Sequence[str], *, sharded: bool) -> None:
        """Takes note of the files, and begins to read them."""
        # What goes wrong is met again when diffusers asks for the tensors; here it would take it
        # for a file that is not there.
        with contextlib.suppress(StandAside, WeightliftError):
            self.checkpoint = _open(files)
            self.files, self.sharded = files, sharded
            if self.early is None or "torch" in self.checkpoint.formats:
                return
            keep = self.early["keep"]
            names = [n for n in self.checkpoint if keep.isdisjoint(n.split("."))] if keep else None
            self.begun = Early(
                self.checkpoint,
                self.early["device"],
                self.early["dtype"],
                names,
                mode=self.early["mode"],
                progress=_shards_bar(len(files)),
                caller=_NAME,
            )

    def gives_names(self, file: str) -> bool:
        """Whether this is the file whose tensors ``_load_pretrained_model`` will get."""
        if self.checkpoint is None or self.sharded or list(self.files) != [file]:
            return False
        from diffusers.models.modeling_utils import ModelMixin

        fix = "_fix_state_dict_keys_on_load"
        # Where it is the class's own, it may look at tensors.
        return getattr(self.cls, fix) is getattr(ModelMixin, fix)

    def cancel(self) -> None:
        if self.begun is not None:
            self.begun.loading.cancel()
            self.begun = None

    def take(self) -> Early | None:
        begun, self.begun = self.begun, None
        return begun


_call: ContextVar[_Call | None] = ContextVar("weightlift_diffusers_call", default=None)


@contextlib.contextmanager
def _during(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _model_from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("device_map"), MappingProxyType):  # of a pipeline's component
            kwargs["device_map"] = dict(kwargs["device_map"])
        early = _early(cls, kwargs)
        if kwargs.get("use_flashpack"):
            stand_aside(_NAME, "FlashPack files are read by flashpack", warn=False)
            early = None
        call = _Call(cls, early)
        with contextlib.ExitStack() as stack:
            stack.callback(call.cancel)
            stack.enter_context(_during(_call, call))
            stack.enter_context(_during(_single, None))
            stack.enter_context(_meant(pretrained_model_name_or_path, kwargs))
            return original(cls, pretrained_model_name_or_path, **kwargs)

    return from_pretrained


def _early(cls: Any, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the weights will be loaded, where that can be told before the model is built."""
    import torch

    slow = (kwargs.get("quantization_config"), kwargs.get("parallel_config"))
    if any(slow) or not kwargs.get("low_cpu_mem_usage", True):
        return None
    device_map = kwargs.get("device_map")
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            return None
        device_map = device_map[""]
    if isinstance(device_map, str) and device_map in (*_SPREAD, "disk"):
        return None
    device = _engine_device("cpu" if device_map is None else device_map)
    dtype = kwargs.get("dtype")
    dtype = kwargs.get("torch_dtype") if dtype is None else dtype
    if dtype is None:
        dtype, keep = torch.get_default_dtype(), None
    else:
        if not isinstance(dtype, torch.dtype):
            dtype = torch.float32  # as diffusers does, with a warning
        keep = cls._keep_in_fp32_modules if dtype != torch.float32 else None
    file_dtype = _castable(dtype)
    if device is None or file_dtype is None:
        return None
    return {
        "device": device,
        "dtype": file_dtype,
        "keep": frozenset([keep] if isinstance(keep, str) else keep or ()),
        "mode": "read" if kwargs.get("disable_mmap") else "auto",
    }


def _engine_device(device: Any) -> torch.device | None:
    """The device, if the engine loads to it."""
    try:
        return usable_device(device)
    except (DeviceError, StandAside):
        return None


def _castable(dtype: torch.dtype) -> str | None:
    name = dtypes.file_name(dtype)
    return name if name in dtypes.CASTABLE else None


def _file_known(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_model_file(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        call = _call.get()
        if call is not None and not kwargs.get("dduf_entries"):
            call.found([found], sharded=False)
        return found

    return _get_model_file


def _shards_known(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_checkpoint_shard_files(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        call = _call.get()
        if call is not None and not kwargs.get("dduf_entries"):
            call.found(found[0], sharded=True)
        return found

    return _get_checkpoint_shard_files


def _shards_bar(count: int) -> Any:
    """The progress bar that diffusers shows for shards, fed with bytes."""
    if count < 2:
        return False
    bar: Any = None
    shown = 0

    def show(done: int, total: int) -> None:
        nonlocal bar, shown
        from diffusers.utils import logging
        from diffusers.utils.distributed_utils import is_torch_dist_rank_zero

        if bar is None:
            off = {} if is_torch_dist_rank_zero() else {"disable": True}
            bar = logging.tqdm(total=count, desc="Loading checkpoint shards", **off)
        finished = done * count // total if total else count
        bar.update(finished - shown)
        shown = finished
        if done == total:
            bar.close()

    return show


# --- Files and their tensors ---------------------------------------------------------------------


class _Name(str):
    """Stands for a tensor in a state dict: its name in the file."""


class _Pending(dict[str, _Name]):
    """A state dict whose tensors are still in their file; diffusers renames some of its keys."""

    def __init__(self, opened: Checkpoint, stock: Callable[[], Mapping[str, Any]]) -> None:
        super().__init__((name, _Name(name)) for name in opened)
        self._opened = opened
        self._stock = stock

    @property
    def renamed(self) -> dict[str, str] | None:
        """The name in the file -> the key, where diffusers has renamed any."""
        if all(key == name for key, name in self.items()):
            return None
        return {name: key for key, name in self.items()}

    def checkpoint(self, renamed: Mapping[str, str] | None) -> Checkpoint:
        return self._opened if renamed is None else self._opened.renamed(renamed.get)

    def by_diffusers(self) -> dict[str, Any]:
        tensors = self._stock()
        return {key: tensors[name] for key, name in self.items()}


def _open(files: Sequence[Any], key: str | None = None) -> Checkpoint:
    """The checkpoint in these files; in a torch file at its top, or at ``key``, whatever else is
    in it.

    Raises:
        StandAside: diffusers reads these itself.
        WeightliftError: a file is broken.
    """
    formats = {Path(file).suffix for file in files}
    if formats == {".gguf"}:
        raise StandAside("GGUF files are read by diffusers", warn=False)
    if formats == {".safetensors"}:
        parts = [_index(file) for file in files]
        opened = Checkpoint(parts)
        if sum(map(len, parts)) > len(opened.headers()):
            raise StandAside(f"{Path(files[0]).parent}: several shards hold the same tensor")
    else:
        shards = [ShardFile(Path(file).name, str(file), "torch") for file in files]
        opened = checkpoint._open_files(
            # "" is the top of the file, where diffusers looks, and nowhere else.
            CheckpointFiles(tuple(shards), "torch", str(Path(files[0]).parent)),
            key or "",
        )
        if key is None and "not_tensors" in opened.metadata:
            raise StandAside(f"{files[0]}: it holds more than tensors", warn=False)
    for name, (dtype, _) in opened.headers().items():
        if dtype not in dtypes.TORCH_NAMES:
            raise StandAside(f"{opened.paths[0]}: torch has no dtype for {name!r}: {dtype}")
    return opened


def _index(file: Any) -> _native.IndexedFile:
    archive = _archive.get()
    entry = None if archive is None else archive.entry(file)
    if archive is None or entry is None:
        return _native.IndexedFile.open(str(file))
    return archive.dduf.index(entry)


def _load_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """The tensors of a file, read by the engine; names in their place for ``from_pretrained``."""
    signature = inspect.signature(original)

    def load_state_dict(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        file = given["checkpoint_file"]
        device = _engine_device(given["map_location"])
        if isinstance(file, dict) or given.get("dduf_entries") or device is None:
            return original(*args, **kwargs)
        call = _call.get()
        if call is not None and call.by_diffusers:
            return original(*args, **kwargs)
        stock = functools.partial(original, *args, **kwargs)
        single = _single.get()
        if single is not None and not given["disable_mmap"]:
            return single.open(file, stock)
        if call is not None and call.gives_names(file):
            assert call.checkpoint is not None
            return _Pending(call.checkpoint, stock)
        try:
            opened = _open([file])
        except (StandAside, WeightliftError) as error:
            return or_stock(_NAME, error, stock)
        return _tensors(opened, device, given["disable_mmap"])

    return load_state_dict


def _tensors(opened: Checkpoint, device: torch.device, disable_mmap: bool) -> dict[str, Any]:
    mode = "read" if disable_mmap else _mode(opened, device, False)
    return load_tensors(opened, device, mode=mode, caller=_NAME)


def _mode(opened: Checkpoint, device: torch.device | None, casts: bool) -> str:
    """How bytes get to a device: torch files are mapped, as by diffusers, where ``"auto"`` reads
    them."""
    on_cpu = device is not None and device.type == "cpu"
    return "map" if on_cpu and not casts and "torch" in opened.formats else "auto"


# --- Weights into a model ------------------------------------------------------------------------


def _load_pretrained_model(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def load(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments

        def stock(**changes: Any) -> Any:
            given.update(changes)
            return original(*bound.args, **bound.kwargs)

        pending = given["state_dict"]
        call = _call.get()
        if pending is not None and not isinstance(pending, _Pending):
            return stock()
        reason = _reason_for_stock(given)
        if reason is not None:
            stand_aside(_NAME, reason, warn=False)
            if call is not None:
                call.by_diffusers = True
            return stock(state_dict=None if pending is None else pending.by_diffusers())
        renamed = None
        if pending is not None:
            renamed = pending.renamed
            opened = pending.checkpoint(renamed)
        elif call is not None and call.checkpoint is not None:
            opened = call.checkpoint
        else:
            return stock()  # a broken shard: diffusers meets it, or takes it
        fit = _Fit.of(given, opened)
        if not fit.by_engine:
            # Tensors from the engine, placed by diffusers; of shards, `_load_shard_file` asks.
            if pending is not None:
                pending = _tensors(opened, _cpu(), given["disable_mmap"])
            return stock(state_dict=pending)

        # diffusers compares names and shapes: with what does not fit, and on no device.
        only_talk = {
            "state_dict": fit.mismatched,
            "device_map": None,
            "offload_state_dict": None,
            "is_parallel_loading_enabled": False,
        }
        device_map = given["device_map"]
        if fit.mismatched and not given["ignore_mismatched_sizes"]:
            stock(**only_talk)  # raises
        early = None if call is None else call.take()
        if early is not None and renamed is not None:
            early.rename(renamed)
        fill(
            given["model"],
            opened,
            device_map=device_map and _known_prefixes(given["model"], device_map),
            dtype=given["dtype"],
            keep_in_fp32=given["keep_in_fp32_modules"] or (),
            strict=False,
            ignore_mismatched_sizes=True,
            mode=fit.mode,
            progress=_shards_bar(len(opened.parts)) if early is None else False,
            early=early,
            caller=_NAME,
        )
        if call is not None and device_map and _has_hooks(device_map):
            call.dispatched = given["model"]
        return stock(**only_talk)

    return load


def _reason_for_stock(given: Mapping[str, Any]) -> str | None:
    if given["hf_quantizer"] is not None:
        return "quantized weights are made by diffusers' quantizers"
    if given.get("tp_shard_specs") is not None:
        return "tensor parallel shards are read by diffusers"
    if given.get("dduf_entries"):
        return "DDUF entries are read by diffusers"
    return None


def _arrives_as(
    stored: str, name: str, tensor: torch.Tensor, wanted: str | None, keep: frozenset[str]
) -> str | None:
    """The file's name of the dtype in which diffusers places a tensor; ``None`` where it does
    something that the engine does not, such as to make numbers of booleans."""
    own = dtypes.file_name(tensor.dtype)
    if stored not in dtypes.FLOATING:
        return own if stored == own else None
    if stored == "F4" or not tensor.is_floating_point():
        return None
    if wanted is not None and not keep.isdisjoint(name.split(".")):
        return "F32"
    return wanted or own


@dataclasses.dataclass
class _Fit:
    """How a checkpoint goes with a model.

    Attributes:
        by_engine: whether the engine can place all of it as diffusers would.
        mismatched: tensors of another shape than the model's, without data.
        mode: of the load.
    """

    by_engine: bool
    mismatched: dict[str, torch.Tensor]
    mode: str

    @classmethod
    def of(cls, given: Mapping[str, Any], opened: Checkpoint) -> _Fit:
        import torch

        wanted = dtypes.parse_dtype(given["dtype"])
        keep = frozenset(given["keep_in_fp32_modules"] or ())
        device_map = given["device_map"]
        devices = set(device_map.values()) - {"disk"} if device_map else {"cpu"}
        by_engine = bool(given["low_cpu_mem_usage"]) and all(
            _engine_device(device) is not None for device in devices
        )
        casts = False
        mismatched = {}
        tensors = given["model"].state_dict()
        for name, (stored, shape) in opened.headers().items():
            tensor = tensors.get(name)
            if tensor is None:
                continue
            target = _arrives_as(stored, name, tensor, wanted, keep)
            by_engine &= target is not None
            casts |= target != stored
            if tuple(shape) != tuple(tensor.shape):
                mismatched[name] = torch.empty(shape, dtype=dtypes.to_torch(stored), device="meta")
        device = _engine_device(devices.pop()) if len(devices) == 1 else None
        mode = "read" if given["disable_mmap"] else _mode(opened, device, casts)
        return cls(by_engine, mismatched, mode)


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


def _known_prefixes(model: torch.nn.Module, device_map: Mapping[str, Any]) -> dict[str, Any]:
    """The map without what the model does not have, which diffusers passes over in silence."""
    names = {"", *(name for name, _ in model.named_modules(remove_duplicate=False))}
    names.update(name for name, _ in model.named_parameters(remove_duplicate=False))
    names.update(name for name, _ in model.named_buffers(remove_duplicate=False))
    return {prefix: device for prefix, device in device_map.items() if prefix in names}


def _has_hooks(device_map: Mapping[str, Any]) -> bool:
    devices = set(device_map.values())
    return "disk" in devices or len({_engine_device(device) for device in devices}) > 1


def _dispatch_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Not again: tensors on the disk were given their hooks with their places in the file."""

    def dispatch_model(model: Any, device_map: Any, *args: Any, **kwargs: Any) -> Any:
        call = _call.get()
        if call is None or call.dispatched is not model:
            return original(model, device_map, *args, **kwargs)
        call.dispatched = None
        model.hf_device_map = dict(device_map)
        return model

    return dispatch_model


# --- A single file -------------------------------------------------------------------------------


class _SingleFile:
    """A ``from_single_file`` that is under way. Its tensors are mappings of which nothing is read.
    diffusers renames most of them, and makes new ones out of a few; of the former it is known
    where in the file they are."""

    def __init__(self) -> None:
        self.origins: dict[int, tuple[torch.Tensor, int, Checkpoint, str]] = {}

    def open(self, file: Any, stock: Callable[[], Any]) -> Any:
        """What diffusers would have of the file."""
        if Path(file).suffix == ".safetensors":
            try:
                opened = _open([file])
            except (StandAside, WeightliftError) as error:
                return or_stock(_NAME, error, stock)
            loaded = _mapped(opened.parts[0])
            self._note(loaded, opened)
            return loaded
        loaded = inner = stock()
        key = []
        while isinstance(inner, Mapping) and "state_dict" in inner:  # as diffusers descends
            key.append("state_dict")
            inner = inner["state_dict"]
        try:
            self._note(inner, _open([file], ".".join(key)))
        except (StandAside, WeightliftError) as error:
            stand_aside(_NAME, str(error), warn=getattr(error, "warn", True))
        return loaded

    def _note(self, tensors: Mapping[str, Any], opened: Checkpoint) -> None:
        for name, tensor in tensors.items():
            if name in opened and not opened.is_view(name):
                self.origins[id(tensor)] = tensor, tensor._version, opened, name

    def origin(self, tensor: torch.Tensor) -> tuple[Checkpoint, str] | None:
        """Where a tensor is that is as it was."""
        known = self.origins.get(id(tensor))
        if known is None or tensor._version != known[1]:
            return None
        return known[2:]


def _mapped(part: _native.IndexedFile) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, none of which is read."""
    import torch

    whole = torch.from_file(part.path, shared=False, size=part.size, dtype=torch.uint8)
    tensors = {}
    for position, name in enumerate(part.names()):
        begin, end = part.range(position)
        dtype = dtypes.to_torch(part.dtype(position))
        data = whole[begin:end]
        if begin % dtype.itemsize:
            data = data.clone()
        shape = part.shape(position)
        if part.dtype(position) == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        # .data, for a version counter of its own: a change of one is none of the others.
        tensors[name] = data.view(dtype).reshape(shape).data
    return tensors


_single: ContextVar[_SingleFile | None] = ContextVar("weightlift_diffusers_single", default=None)


def _from_single_file(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_single_file(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if _single.get() is not None or not kwargs.get("low_cpu_mem_usage", True):
            return original(cls, *args, **kwargs)  # a component, or filled by torch
        with _during(_single, _SingleFile()):
            return original(cls, *args, **kwargs)

    return from_single_file


def _load_model_dict_into_meta(original: Callable[..., Any]) -> Callable[..., Any]:
    """Tensors of a single file into a model: those that are in it as they are, from there."""
    signature = inspect.signature(original)

    def load(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        device_map = given["device_map"] or {"": "cpu"}
        device = _engine_device(device_map.get("")) if len(device_map) == 1 else None
        wanted = None if given["dtype"] is None else _castable(given["dtype"])
        rare = given["dtype"] is not None and wanted is None
        single = _single.get()
        if single is None or not single.origins or device is None or rare:
            return original(*args, **kwargs)
        if given["hf_quantizer"] is not None:
            raise StandAside("quantized weights are made by diffusers' quantizers", warn=False)
        keep = frozenset(given["keep_in_fp32_modules"] or ())
        own = given["model"].state_dict()
        rest = {}
        from_files: dict[Checkpoint, dict[str, str]] = {}
        casts = False
        for name, tensor in given["state_dict"].items():
            slot = own.get(name)
            place = single.origin(tensor)
            if place is not None and slot is not None and slot.shape == tensor.shape:
                opened, stored_name = place
                stored = opened[stored_name][0]
                target = _arrives_as(stored, name, slot, wanted, keep)
                names = from_files.setdefault(opened, {})
                if target is not None and stored_name not in names:
                    names[stored_name] = name
                    casts |= target != stored
                    continue
            rest[name] = tensor
        given["state_dict"] = rest
        result = original(*bound.args, **bound.kwargs)
        for opened, names in from_files.items():
            fill(
                given["model"],
                opened.renamed(names.get),
                device_map=device,
                dtype=given["dtype"],
                keep_in_fp32=sorted(keep),
                strict=False,
                mode=_mode(opened, device, casts),
                caller=_NAME,
            )
        return result

    return load


# --- Pipelines -----------------------------------------------------------------------------------


@dataclasses.dataclass
class _Pipeline:
    """A ``from_pretrained`` of a pipeline that is under way.

    Attributes:
        device_map: component, or module of it, -> device, where it is a dict.
        given: components that the caller has made.
        use_safetensors: as the caller has it.
        ended: set when it is over.
    """

    device_map: Mapping[str, Any] | None
    given: frozenset[str]
    use_safetensors: bool | None
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)

    def of(self, component: str) -> Any:
        """The device map of a component: what stands under its name, else under ``""``."""
        if self.device_map is None:
            return None
        own = {}
        for name, device in self.device_map.items():
            head, _, module = name.partition(".")
            if head == component:
                own[module] = device
        if not own and "" in self.device_map:
            own = {"": self.device_map[""]}
        if set(own) != {""}:
            return own or None
        alone = own[""]
        return alone if alone is None or isinstance(alone, Mapping) or alone in _SPREAD else own

    def check(self, config: Mapping[str, Any]) -> None:
        names = {name.partition(".")[0] for name in self.device_map or ()} - {""}
        unknown = sorted(names - set(config))
        if unknown:
            there = ", ".join(name for name, value in config.items() if isinstance(value, list))
            raise ArgumentError(
                f"device_map: the pipeline has no component {unknown[0]!r}; it has {there}"
            )

    @property
    def has_hooks(self) -> bool:
        """Whether components compute on different devices, or have no device of their own."""
        return self.main_device != "cpu" or "disk" in self._devices()

    @property
    def main_device(self) -> torch.device | str:
        """Where what is on the disk computes: the first GPU of the map, or the CPU."""
        for device in self._devices():
            if device is not None and device not in (*_SPREAD, "cpu", "disk"):
                return parse_device(device)
        return "cpu"

    def _devices(self) -> Iterator[Any]:
        for device in (self.device_map or {}).values():
            yield from device.values() if isinstance(device, Mapping) else (device,)


_pipeline: ContextVar[_Pipeline | None] = ContextVar("weightlift_diffusers_pipeline", default=None)


def _pipeline_from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        path = pretrained_model_name_or_path
        device_map = kwargs.get("device_map")
        by_component = device_map if isinstance(device_map, Mapping) else None
        if by_component is not None:
            kwargs["device_map"] = None
        pipeline = _Pipeline(by_component, frozenset(kwargs), kwargs.get("use_safetensors"))
        dduf_file = kwargs.pop("dduf_file", None)
        with contextlib.ExitStack() as stack:
            folder = path
            if dduf_file is not None:
                folder = stack.enter_context(_unpacked(_dduf_path(path, dduf_file, kwargs)))
            stack.enter_context(_meant(folder, kwargs))
            stack.enter_context(_during(_pipeline, pipeline))
            stack.callback(pipeline.ended.set)
            made = original(cls, folder, **kwargs)
            if dduf_file is not None:
                made.register_to_config(_name_or_path=path)
                for name, part in made.components.items():
                    if hasattr(part, "register_to_config"):  # it has the temporary folder's
                        part.register_to_config(_name_or_path=f"{dduf_file}/{name}")
        if pipeline.device_map is not None:
            made.hf_device_map = dict(pipeline.device_map)
        return made

    return from_pretrained


def _components_known(original: Callable[..., Any]) -> Callable[..., Any]:
    """The folder of the pipeline is there, and no component is loaded yet."""

    def _identify_model_variants(folder: Any, variant: Any, config: Mapping[str, Any]) -> Any:
        variants = original(folder, variant, config)
        pipeline = _pipeline.get()
        if pipeline is not None:
            pipeline.check(config)
            jobs = [
                (Path(folder, name), variants.get(name))
                for name, value in config.items()
                if isinstance(value, (list, tuple))
                and value[0] is not None
                and name not in pipeline.given
                and pipeline.of(name) != {"": "disk"}
            ]
            if _archive.get() is None and Settings.current().populate is not False:
                threading.Thread(
                    target=_prefetch,
                    args=(jobs, pipeline.use_safetensors, pipeline.ended),
                    name="weightlift prefetch",
                    daemon=True,
                ).start()
        return variants

    return _identify_model_variants


def _prefetch(
    jobs: Sequence[tuple[Path, str | None]], use_safetensors: bool | None, ended: threading.Event
) -> None:
    """Reads the weights of all components into the page cache, in the order in which they are
    loaded: while modules are built, and between components, the disk would be idle."""
    components: list[list[_native.IndexedFile]] = []
    for folder, variant in jobs:
        with contextlib.suppress(WeightliftError):  # it has no weights, or broken ones
            found = resolve(folder, variant=variant, use_safetensors=use_safetensors)
            if found.format == "safetensors":
                components.append([_native.IndexedFile.open(file.path) for file in found.files])
    total = sum(part.size for parts in components for part in parts)
    if total > _native.machine()["memory_headroom"] // 2:
        return
    for parts in components:
        if ended.is_set() or not _populate(parts, ended):
            return


def _populate(parts: Sequence[_native.IndexedFile], ended: threading.Event) -> bool:
    """Has the engine read what it would map, and map it for nobody. Not posix_fadvise(2): pages
    that are on their way count as resident, and are then waited for one by one."""
    plan = new_plan(Settings.current())
    try:
        for part in parts:
            plan.map(part, None, False)
        start_plan(plan, None)
        while not plan.wait(_POLL_SECONDS):
            if ended.is_set():
                cancel_plan(plan)
    except WeightliftError:
        return False  # whoever loads the file meets it
    return True


def _load_sub_model(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def load_sub_model(*args: Any, **kwargs: Any) -> Any:
        pipeline = _pipeline.get()
        if pipeline is None:
            return original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        device_map = pipeline.of(given["name"])
        if isinstance(device_map, Mapping):
            # Of what has a dict, diffusers takes the hooks away, and it knows no disk.
            simple = set(device_map) == {""} and device_map[""] not in ("cpu", "disk")
            device_map = dict(device_map) if simple else MappingProxyType(device_map)
        if pipeline.device_map is not None:
            given["device_map"] = device_map
        made = _from_archive(given)
        if made is None:
            made = original(*bound.args, **bound.kwargs)
        if pipeline.has_hooks and (device_map is None or isinstance(device_map, MappingProxyType)):
            _compute_on(made, device_map or {"": "cpu"}, pipeline.main_device)
        return made

    return load_sub_model


def _compute_on(
    component: Any, device_map: Mapping[str, Any], main_device: torch.device | str
) -> None:
    """Hooks for a component without a GPU of its own, among others: on the CPU, what it is called
    with comes there; on the disk, it computes on the main device."""
    import torch

    devices = set(device_map.values())
    if not isinstance(component, torch.nn.Module) or len(devices) != 1:
        return
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_module

    options: dict[str, Any] = {
        "device_map": dict(device_map),
        "skip_keys": getattr(component, "_skip_keys", None),
    }
    if devices == {"cpu"}:
        dispatch_model(component, main_device="cpu", force_hooks=True, **options)
    elif devices == {"disk"}:
        weights = _weights_of_hooks(component)
        remove_hook_from_module(component, recurse=True)
        dispatch_model(
            component,
            main_device=main_device,
            state_dict=weights.state_dict,
            offload_index=weights.index,
            **options,
        )


def _weights_of_hooks(module: torch.nn.Module) -> Any:
    """accelerate's ``OffloadedWeightsLoader`` that its hooks read from."""
    for child in module.modules():
        hook = getattr(child, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            weights = getattr(one, "weights_map", None)
            if weights is not None:
                return getattr(weights, "dataset", weights)
    raise AssertionError(f"{type(module).__name__} on the disk has no hooks")


# --- DDUF ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Archive:
    """A pipeline in a DDUF file. A folder has all of it but the weights, which stay where they
    are: their files in the folder are empty."""

    dduf: Dduf
    folder: Path

    def entry(self, file: Any) -> str | None:
        path = Path(file)
        name = path.relative_to(self.folder).as_posix() if self.folder in path.parents else ""
        return name if name in self.dduf.entries else None


_archive: ContextVar[_Archive | None] = ContextVar("weightlift_diffusers_archive", default=None)


def _dduf_path(path: Any, dduf_file: Any, kwargs: Mapping[str, Any]) -> Path:
    if kwargs.get("quantization_config") is not None:
        raise ArgumentError("dduf_file and quantization_config do not go together")
    if Path(path).exists():
        return Path(path, dduf_file)
    names = {field.name for field in dataclasses.fields(HubArguments)}
    hub = HubArguments.pop_from({k: v for k, v in kwargs.items() if k in names})
    return download(str(path), str(dduf_file), hub)


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    dduf = open_dduf(path)
    with tempfile.TemporaryDirectory(prefix="weightlift-dduf-") as temporary:
        folder = Path(temporary)
        for name in dduf.entries:
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"" if name.endswith(".safetensors") else dduf.read(name))
        with _during(_archive, _Archive(dduf, folder)):
            yield folder


def _from_archive(given: Mapping[str, Any]) -> Any:
    """A model of transformers, which has no way to its weights but a state dict."""
    archive = _archive.get()
    if archive is None:
        return None
    from diffusers.pipelines.pipeline_loading_utils import get_class_obj_and_candidates

    cls, _ = get_class_obj_and_candidates(
        given["library_name"],
        given["class_name"],
        given["importable_classes"],
        given["pipelines"],
        given["is_pipeline_module"],
        component_name=given["name"],
        cache_dir=given["cached_folder"],
    )
    from transformers import PreTrainedModel

    if not issubclass(cls, PreTrainedModel):
        return None
    folder = archive.folder / given["name"]
    files = resolve(
        archive.dduf.path,
        subfolder=given["name"],
        variant=given["model_variants"].pop(given["name"], None),
        use_safetensors=given["use_safetensors"],
    )
    opened = _open([folder / file.name for file in files.files])
    model = cls.from_pretrained(
        None,
        config=cls.config_class.from_pretrained(folder),
        state_dict=_tensors(opened, _cpu(), given["disable_mmap"]),
        dtype=given["dtype"],
        device_map=given["device_map"],
        max_memory=given["max_memory"],
        offload_folder=given["offload_folder"],
    )
    if (folder / "generation_config.json").exists():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    return model


# --- Adapters ------------------------------------------------------------------------------------


class _Instead(type):
    """A class that stands for a module, apart from what it has itself."""

    module: Any

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.module, name)


def _safetensors(module: Any) -> type:
    """The name ``safetensors`` in a module that calls ``safetensors.torch.load_file``: for LoRA
    and textual inversion."""
    from safetensors import torch as of_torch

    def load_file(*args: Any, **kwargs: Any) -> Any:
        stock = of_torch.load_file
        adapter = load_file_adapters(_NAME).get(signature_text(stock))
        fast = stock if adapter is None or not is_enabled(_NAME) else adapter(stock)
        return fast(*args, **kwargs)

    torch = _Instead("torch", (), {"module": of_torch, "load_file": staticmethod(load_file)})
    return _Instead("safetensors", (), {"module": module, "torch": torch})


# --- What was meant ------------------------------------------------------------------------------

_mirror: ContextVar[str | None] = ContextVar("weightlift_diffusers_mirror", default=None)


@contextlib.contextmanager
def _meant(path: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """Arguments that are documented and have no effect, or fail: GPUs in ``max_memory`` named by
    text, and ``mirror``."""
    if isinstance(kwargs.get("max_memory"), Mapping):
        kwargs["max_memory"] = {_gpu(k): size for k, size in kwargs["max_memory"].items()}
    mirror = kwargs.pop("mirror", None)
    if mirror is None or Path(path).exists():
        yield
        return
    hub = HubArguments(
        cache_dir=kwargs.get("cache_dir"),
        local_files_only=bool(kwargs.get("local_files_only")),
        token=kwargs.get("token"),
        revision=kwargs.get("revision"),
        mirror=mirror,
    )
    # A commit: what resolves revisions in diffusers makes no request for one.
    kwargs["revision"] = hub.pinned(str(path)).revision
    with _during(_mirror, mirror.rstrip("/")):
        yield


def _gpu(key: Any) -> Any:
    number = re.fullmatch(r"(?:cuda:)?(\d+)", key) if isinstance(key, str) else None
    return key if number is None else int(number[1])


def _from_mirror(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function of huggingface_hub that asks the mirror, where one is named. It is not the Hub:
    the stored token is not for it."""
    of_api = "endpoint" not in inspect.signature(original).parameters

    def ask(*args: Any, **kwargs: Any) -> Any:
        endpoint = _mirror.get()
        if endpoint is None:
            return original(*args, **kwargs)
        if kwargs.get("token") is None:
            kwargs["token"] = False
        if not of_api:
            return original(*args, **kwargs, endpoint=endpoint)
        from huggingface_hub import HfApi

        return getattr(HfApi(endpoint=endpoint), original.__name__)(*args, **kwargs)

    return ask


class _AnySignature(dict[str, Any]):
    """Adapters for functions whose arguments are passed on as they are."""

    def __init__(self, adapter: Callable[[Any], Any]) -> None:
        super().__init__({"(...)": adapter})

    def get(self, key: str, default: Any = None) -> Any:
        return self["(...)"]


# --- Hooks ---------------------------------------------------------------------------------------

_MODELS = "diffusers.models.modeling_utils"
_PIPELINES = "diffusers.pipelines.pipeline_utils"
_SUB_MODEL = (
    "(library_name, class_name, importable_classes, pipelines, is_pipeline_module, pipeline_class, "
    "dtype, provider, sess_options, device_map, max_memory, offload_folder, offload_state_dict, "
    "model_variants, name, variant, low_cpu_mem_usage, cached_folder, use_safetensors, {}"
    "provider_options, disable_mmap, quantization_config=None, use_flashpack=False, "
    "trust_remote_code=False)"
)
_LOAD_STATE_DICT = (
    "(checkpoint_file, disable_mmap=False, map_location='cpu')",
    "(checkpoint_file, dduf_entries=None, disable_mmap=False, map_location='cpu')",  # 0.40
)
HOOKS = (
    Hook(
        _MODELS,
        "ModelMixin.from_pretrained",
        {"(cls, pretrained_model_name_or_path, **kwargs)": _model_from_pretrained},
    ),
    Hook(
        _MODELS,
        "ModelMixin._load_pretrained_model",
        {
            "(cls, model, state_dict, resolved_model_file, pretrained_model_name_or_path, "
            "loaded_keys, ignore_mismatched_sizes=False, assign_to_params_buffers=False, "
            "hf_quantizer=None, low_cpu_mem_usage=True, dtype=None, keep_in_fp32_modules=None, "
            "device_map=None, offload_state_dict=None, offload_folder=None, "
            "is_parallel_loading_enabled=False, disable_mmap=False, tp_shard_specs=None, "
            "tp_config=None)": _load_pretrained_model,
            # 0.40
            "(cls, model, state_dict, resolved_model_file, pretrained_model_name_or_path, "
            "loaded_keys, ignore_mismatched_sizes=False, assign_to_params_buffers=False, "
            "hf_quantizer=None, low_cpu_mem_usage=True, dtype=None, keep_in_fp32_modules=None, "
            "device_map=None, offload_state_dict=None, offload_folder=None, dduf_entries=None, "
            "is_parallel_loading_enabled=False, disable_mmap=False)": _load_pretrained_model,
        },
    ),
    *(
        Hook(module, "load_state_dict", dict.fromkeys(_LOAD_STATE_DICT, _load_state_dict))
        for module in (
            "diffusers.models.model_loading_utils",
            _MODELS,
            "diffusers.loaders.ip_adapter",
            "diffusers.loaders.lora_base",
            "diffusers.loaders.single_file_utils",
            "diffusers.loaders.textual_inversion",
            "diffusers.loaders.unet",
        )
    ),
    Hook(
        _MODELS,
        "_get_model_file",
        {
            "(pretrained_model_name_or_path, *, weights_name, subfolder=None, cache_dir=None, "
            "force_download=False, proxies=None, local_files_only=False, token=None, "
            "user_agent=None, revision=None, commit_hash=None)": _file_known,
            # 0.40
            "(pretrained_model_name_or_path, *, weights_name, subfolder=None, cache_dir=None, "
            "force_download=False, proxies=None, local_files_only=False, token=None, "
            "user_agent=None, revision=None, commit_hash=None, dduf_entries=None)": _file_known,
        },
    ),
    Hook(
        _MODELS,
        "_get_checkpoint_shard_files",
        {
            "(pretrained_model_name_or_path, index_filename, cache_dir=None, proxies=None, "
            "local_files_only=False, token=None, user_agent=None, revision=None, "
            "subfolder='')": _shards_known,
            # 0.40
            "(pretrained_model_name_or_path, index_filename, cache_dir=None, proxies=None, "
            "local_files_only=False, token=None, user_agent=None, revision=None, subfolder='', "
            "dduf_entries=None)": _shards_known,
        },
    ),
    Hook(_MODELS, "dispatch_model", _AnySignature(_dispatch_model)),
    Hook(
        "diffusers.loaders.single_file_model",
        "FromOriginalModelMixin.from_single_file",
        {"(cls, pretrained_model_link_or_path_or_dict=None, **kwargs)": _from_single_file},
    ),
    Hook(
        "diffusers.loaders.single_file",
        "FromSingleFileMixin.from_single_file",
        {"(cls, pretrained_model_link_or_path, **kwargs)": _from_single_file},
    ),
    *(
        Hook(f"diffusers.loaders.{module}", "safetensors", {"without a signature": _safetensors})
        for module in ("lora_base", "textual_inversion", "unet")
    ),
    Hook("diffusers.loaders.ip_adapter", "safe_open", open_adapters(_NAME)),
    Hook(
        _PIPELINES,
        "DiffusionPipeline.from_pretrained",
        {"(cls, pretrained_model_name_or_path, **kwargs)": _pipeline_from_pretrained},
    ),
    Hook(
        _PIPELINES,
        "_identify_model_variants",
        {"(folder, variant, config)": _components_known},
    ),
    Hook(
        _PIPELINES,
        "load_sub_model",
        dict.fromkeys(
            (
                _SUB_MODEL.format(""),
                _SUB_MODEL.format("dduf_entries, "),  # 0.40
            ),
            _load_sub_model,
        ),
    ),
    *(
        Hook(
            module,
            "load_model_dict_into_meta",
            {
                "(model, state_dict, dtype=None, model_name_or_path=None, hf_quantizer=None, "
                "keep_in_fp32_modules=None, device_map=None, unexpected_keys=None, "
                "offload_folder=None, offload_index=None, state_dict_index=None, "
                "state_dict_folder=None)": _load_model_dict_into_meta
            },
        )
        for module in (
            "diffusers.loaders.single_file_model",
            "diffusers.loaders.single_file_utils",
        )
    ),
    *(
        Hook(module, name, _AnySignature(_from_mirror))
        for module, names in (
            ("diffusers.configuration_utils", ("hf_hub_download",)),
            ("diffusers.utils.hub_utils", ("hf_hub_download", "model_info", "snapshot_download")),
            (
                _PIPELINES,
                ("hf_hub_download", "model_info", "snapshot_download"),
            ),
        )
        for name in names
    ),
)
