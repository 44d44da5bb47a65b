"""Single files: loads unchanged tensors straight from the file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlift.backends.diffusers.context import NAME, temporary_value
from weightlift.backends.diffusers.files import (
    arrives_as,
    castable,
    engine_device,
    mode_for,
    open_files,
)
from weightlift.backends.fallback import FallbackToLibrary, fall_back, report_fallback
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core import dtypes
from weightlift.core.errors import WeightliftError
from weightlift.load.options import LoadOptions
from weightlift.module.fill import fill
from weightlift.module.matching import MatchPolicy
from weightlift.module.placement import PlacementPolicy

if TYPE_CHECKING:
    import torch

__all__ = ["SingleFile", "current_single_file", "from_single_file", "load_model_dict_into_meta"]


class SingleFile:
    """A running ``from_single_file``. Its tensors are mappings that are not read. diffusers renames
    most of them and computes a few new ones; the places of the renamed ones in the file are
    known."""

    def __init__(self) -> None:
        self.origins: dict[int, tuple[torch.Tensor, int, Checkpoint, str]] = {}

    def open(self, file: Any, original_call: Callable[[], Any]) -> Any:
        """The state dict that diffusers expects."""
        if Path(file).suffix == ".safetensors":
            try:
                opened = open_files([file])
            except (FallbackToLibrary, WeightliftError) as error:
                return fall_back(NAME, error, original_call)
            loaded = _mapped(opened)
            self._note(loaded, opened)
            return loaded
        loaded = inner = original_call()
        key = []
        while isinstance(inner, Mapping) and "state_dict" in inner:  # as diffusers descends
            key.append("state_dict")
            inner = inner["state_dict"]
        try:
            self._note(inner, open_files([file], ".".join(key)))
        except (FallbackToLibrary, WeightliftError) as error:
            report_fallback(NAME, str(error), warn=getattr(error, "warn", True))
        return loaded

    def _note(self, tensors: Mapping[str, Any], opened: Checkpoint) -> None:
        for name, tensor in tensors.items():
            if name in opened and not opened.is_view(name):
                self.origins[id(tensor)] = tensor, tensor._version, opened, name

    def origin(self, tensor: torch.Tensor) -> tuple[Checkpoint, str] | None:
        """The place in the file of an unchanged tensor."""
        known = self.origins.get(id(tensor))
        if known is None or tensor._version != known[1]:
            return None
        return known[2:]


def _mapped(opened: Checkpoint) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, mapped but not read."""
    import torch

    (path,), (size,) = opened.paths, opened.file_sizes
    whole = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
    tensors = {}
    for name, (stored, shape) in opened.items():
        found = opened.byte_range(name)
        if found is None:
            continue
        _, begin, end = found
        dtype = dtypes.to_torch(stored)
        data = whole[begin:end]
        if begin % dtype.itemsize:
            data = data.clone()
        if stored == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        # .data gives each tensor its own version counter.
        tensors[name] = data.view(dtype).reshape(shape).data
    return tensors


current_single_file: ContextVar[SingleFile | None] = ContextVar(
    "weightlift_diffusers_single", default=None
)


def from_single_file(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_single_file(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if current_single_file.get() is not None or not kwargs.get("low_cpu_mem_usage", True):
            return original(cls, *args, **kwargs)  # a component, or filled by torch
        with temporary_value(current_single_file, SingleFile()):
            return original(cls, *args, **kwargs)

    return from_single_file


def load_model_dict_into_meta(original: Callable[..., Any]) -> Callable[..., Any]:
    """Fills a model from a single file; unchanged tensors are loaded straight from the file."""
    signature = inspect.signature(original)

    def load(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        device_map = given["device_map"] or {"": "cpu"}
        device = engine_device(device_map.get("")) if len(device_map) == 1 else None
        wanted = None if given["dtype"] is None else castable(given["dtype"])
        rare = given["dtype"] is not None and wanted is None
        single = current_single_file.get()
        if single is None or not single.origins or device is None or rare:
            return original(*args, **kwargs)
        if given["hf_quantizer"] is not None:
            raise FallbackToLibrary("diffusers' quantizers make the quantized weights", warn=False)
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
                target = arrives_as(stored, name, slot, wanted, keep)
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
                PlacementPolicy(device, dtype=given["dtype"], keep_in_fp32=sorted(keep)),
                MatchPolicy(strict=False),
                LoadOptions(mode_for(opened, device, casts), caller=NAME),
            )
        return result

    return load
