"""Where the maps of accelerate's hooks have their weights, and what the executor reads them from:
host memory, safetensors files, files that accelerate wrote, and files that a load holds open.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core.errors import read_error
from weightlift.module.offload import ChainedWeights, DiskWeights

if TYPE_CHECKING:
    import torch

    from weightlift.module.streaming.on_demand import Needed

__all__ = [
    "InMemory",
    "Origin",
    "UnstreamedError",
    "Weight",
    "needed_weights",
    "origin_of",
    "root_of",
]

_CALLER = "accelerate"

_Identity = tuple[int, ...]


def _identity(path: str) -> _Identity:
    status = Path(path).stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Origin(Protocol):
    """Where a weight lies."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what accelerate would be given, before the model's own is made of it."""

    def is_same(self) -> bool:
        """Whether it is what it was when the hook was attached."""


def _version_of(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # which those have not


class InMemory(NamedTuple):
    """A tensor in memory, and the mapping that holds it."""

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


class UnstreamedError(Exception):
    """Why the executor cannot serve a hook."""


def root_of(mapping: Any) -> Any:
    """The map that all hooks of a model read from; ``None`` for a hook with weights of its own."""
    from accelerate.utils.offload import PrefixedDataset

    return mapping.dataset if type(mapping) is PrefixedDataset else None


def origin_of(mapping: Any, name: str) -> Origin:
    """Where a map of accelerate's has a weight.

    Raises:
        UnstreamedError: that cannot be told.
        KeyError: the map lacks it.
    """
    import torch
    from accelerate.utils.offload import OffloadedWeightsLoader, PrefixedDataset

    if type(mapping) is PrefixedDataset:
        return origin_of(mapping.dataset, mapping.prefix + name)
    if type(mapping) is OffloadedWeightsLoader:
        if name in mapping.state_dict:
            return origin_of(mapping.state_dict, name)
        return _of_entry(mapping, name)
    if type(mapping) is ChainedWeights:
        return origin_of(mapping.on_disk if name not in mapping.host else mapping.host, name)
    if type(mapping) is DiskWeights:
        checkpoint, key, cast_to = mapping.place(name)
        return _InOpenFiles(mapping, key, _after_cast(checkpoint, key, cast_to))
    tensor: Any = None
    if isinstance(mapping, dict):
        if name not in mapping:
            raise KeyError(name)
        tensor = mapping.get(name)
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return InMemory(tensor, mapping, name, _version_of(tensor))
    raise UnstreamedError(f"{name!r} comes from a {type(mapping).__name__}")


def _of_entry(loader: Any, name: str) -> Origin:
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
        raise UnstreamedError(f"{key!r} is {own}")
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
        return HostSource(read, _CALLER).begin([*read], rest)

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


class Weight(NamedTuple):
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
    origin: Origin

    def owner(self, module: torch.nn.Module) -> torch.nn.Module:
        for part in self.path:
            module = module._modules[part]  # type: ignore[assignment]
        return module


def needed_weights(weights: Sequence[Weight]) -> dict[str, Needed]:
    """The weights of a model, with the sources that they are read from: one for each kind."""
    from weightlift.module.streaming.on_demand import Needed
    from weightlift.module.streaming.sources import FileSource, HostSource, settings_for

    streamed_bytes = sum(w.shape.numel() * w.dtype.itemsize for w in weights)
    settings = settings_for(streamed_bytes)
    in_memory: dict[str, torch.Tensor] = {}
    raw: dict[str, _InRawFile] = {}
    by_file: dict[str, tuple[Checkpoint, dict[str, str]]] = {}
    places: list[tuple[Weight, Any, str]] = []
    open_files: dict[int, FileSource] = {}
    for weight in weights:
        origin = weight.origin
        if isinstance(origin, InMemory):
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
                open_files[id(origin.weights)] = FileSource(checkpoint, settings, _CALLER)
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
        id(in_memory): HostSource(in_memory, _CALLER),
        id(raw): _RawFiles(raw),
        id(by_file): FileSource(Checkpoint.joined(by_file.values()), settings, _CALLER),
    }
    return {
        weight.name: Needed(tuple(weight.shape), weight.dtype, sources.get(id(at), at), key)
        for weight, at, key in places
    }


def _check_one_cast(weight: Weight, own: torch.dtype) -> None:
    """What is cast twice may be rounded twice."""
    if weight.origin.dtype not in (own, weight.dtype):
        raise UnstreamedError(
            f"{weight.name!r} is {own} in its file, offloaded as {weight.origin.dtype} and used as "
            f"{weight.dtype}"
        )
