"""``_load_pretrained_model``: loads all weights of a model by one plan."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from weightlift.backends import early_return
from weightlift.backends.diffusers.calls import Call, current_call, shards_bar
from weightlift.backends.diffusers.context import NAME
from weightlift.backends.diffusers.files import arrives_as, engine_device, load_all, mode_for
from weightlift.backends.diffusers.state_dicts import Pending
from weightlift.backends.fallback import report_fallback
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core import dtypes
from weightlift.core.devices import parse_device
from weightlift.load.options import LoadOptions, Mode
from weightlift.module.device_map import disjoint_map
from weightlift.module.fill import fill
from weightlift.module.matching import MatchPolicy
from weightlift.module.offload import offloaded_weights
from weightlift.module.placement import PlacementPolicy

if TYPE_CHECKING:
    import torch

__all__ = ["dispatch_model", "load_pretrained_model"]


def load_pretrained_model(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def _load_pretrained_model(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return _Load(original, bound, current_call.get()).run()

    return _load_pretrained_model


class _Load:
    """One call of ``_load_pretrained_model``."""

    def __init__(
        self, original: Callable[..., Any], bound: inspect.BoundArguments, call: Call | None
    ) -> None:
        self._original, self._bound, self._call = original, bound, call
        self._given = bound.arguments

    def run(self) -> Any:
        """Places all weights, or lets diffusers do it; returns diffusers' result."""
        pending = self._given["state_dict"]
        if pending is not None and not isinstance(pending, Pending):
            return self._by_diffusers()
        reason = self._reason_for_fallback()
        if reason is not None:
            report_fallback(NAME, reason, warn=False)
            if self._call is not None:
                self._call.by_diffusers = True
            return self._by_diffusers(None if pending is None else pending.by_diffusers())
        renamed = None if pending is None else pending.renamed
        if pending is not None:
            opened = pending.checkpoint(renamed)
        elif self._call is not None and self._call.checkpoint is not None:
            opened = self._call.checkpoint
        else:
            return self._by_diffusers()  # a damaged shard: diffusers raises, or loads it
        fit = _Fit.of(self._given, opened)
        if not fit.by_engine:
            # diffusers places tensors from the engine; `_load_shard_file` requests those of shards.
            if pending is None:
                return self._by_diffusers()
            return self._by_diffusers(
                load_all(opened, parse_device("cpu"), self._given["disable_mmap"])
            )
        if fit.mismatched and not self._given["ignore_mismatched_sizes"]:
            self._report(fit)  # raises
        self._fill(opened, fit, renamed)
        return self._report(fit)

    def _reason_for_fallback(self) -> str | None:
        if self._given["hf_quantizer"] is not None:
            return "diffusers' quantizers make the quantized weights"
        if self._given.get("tp_shard_specs") is not None:
            return "diffusers reads tensor parallel shards"
        if self._given.get("dduf_entries"):
            return "diffusers reads DDUF entries"
        if self._call is None and "disk" in (self._given["device_map"] or {}).values():
            return "offload to the disk outside of from_pretrained"
        if self._given["device_map"] and not _covers(
            self._given["device_map"], self._given["model"]
        ):
            return "the device_map has no device for some tensors"
        return None

    def _by_diffusers(self, state_dict: Mapping[str, Any] | None = None) -> Any:
        if state_dict is not None or isinstance(self._given["state_dict"], Pending):
            self._given["state_dict"] = state_dict
        return self._original(*self._bound.args, **self._bound.kwargs)

    def _report(self, fit: _Fit) -> Any:
        """Lets diffusers report keys, warnings and errors, with the mismatches and nothing to
        place."""
        self._given.update(
            state_dict=fit.mismatched,
            device_map=None,
            offload_state_dict=None,
            is_parallel_loading_enabled=False,
        )
        return self._original(*self._bound.args, **self._bound.kwargs)

    def _models_dtype_on(self) -> frozenset[str]:
        """Devices on which diffusers' tensors get the dtype of the built model: the disk, and the
        CPU if the tensors go to the disk and back."""
        if "disk" not in (self._given["device_map"] or {}).values():
            return frozenset()
        back = self._given["offload_state_dict"] is not False
        return frozenset({"disk", "cpu"} if back else {"disk"})

    def _fill(self, opened: Checkpoint, fit: _Fit, renamed: Mapping[str, str] | None) -> None:
        given, call = self._given, self._call
        prefetched = None if call is None else call.take()
        if prefetched is not None and renamed is not None:
            prefetched = prefetched.renamed(renamed)
        device_map = given["device_map"]
        placement = PlacementPolicy(
            device_map and _existing_prefixes(given["model"], device_map),
            dtype=given["dtype"],
            keep_in_fp32=given["keep_in_fp32_modules"] or (),
            models_dtype_on=self._models_dtype_on(),
        )
        if call is not None:  # diffusers dispatches the model itself, at the end
            placement = placement._replace(dispatch=call.keep_on_disk)
        fill(
            given["model"],
            opened,
            placement,
            MatchPolicy(strict=False, ignore_mismatched_sizes=True),
            LoadOptions(
                fit.mode,
                progress=shards_bar(len(opened.file_sizes)) if prefetched is None else False,
                caller=NAME,
                background=prefetched is None and _may_go_on(given),
            ),
            prefetched=prefetched,
        )


@dataclasses.dataclass
class _Fit:
    """The comparison of a checkpoint with a model.

    Attributes:
        by_engine: whether the engine can place all tensors as diffusers would.
        mismatched: tensors of another shape than the model's, without data.
        mode: the mode of the load.
    """

    by_engine: bool
    mismatched: dict[str, torch.Tensor]
    mode: Mode

    @classmethod
    def of(cls, given: Mapping[str, Any], opened: Checkpoint) -> _Fit:
        import torch

        wanted = dtypes.parse_dtype(given["dtype"])
        keep = frozenset(given["keep_in_fp32_modules"] or ())
        device_map = given["device_map"]
        devices = set(device_map.values()) - {"disk"} if device_map else {"cpu"}
        by_engine = bool(given["low_cpu_mem_usage"]) and all(
            engine_device(device) is not None for device in devices
        )
        casts = False
        mismatched = {}
        tensors = given["model"].state_dict(keep_vars=True)
        for name, (stored, shape) in opened.headers().items():
            tensor = tensors.get(name)
            if tensor is None:
                continue
            target = arrives_as(stored, name, tensor, wanted, keep)
            by_engine &= target is not None
            casts |= target != stored
            if tuple(shape) != tuple(tensor.shape):
                mismatched[name] = torch.empty(shape, dtype=dtypes.to_torch(stored), device="meta")
        device = engine_device(devices.pop()) if len(devices) == 1 else None
        mode: Mode = "read" if given["disable_mmap"] else mode_for(opened, device, casts)
        return cls(by_engine, mismatched, mode)


def _may_go_on(given: Mapping[str, Any]) -> bool:
    """Whether the load may continue after ``from_pretrained`` returns."""
    if not early_return.is_wanted(NAME) or given["device_map"]:
        return False
    return all(parameter.is_meta for parameter in given["model"].parameters())


def _covers(device_map: Mapping[str, Any], model: torch.nn.Module) -> bool:
    """Whether every tensor has a device. Otherwise diffusers raises its own error or skips it."""
    if "" in device_map:
        return True
    names = itertools.chain(model.named_parameters(), model.named_buffers())
    parts = (name.split(".") for name, _ in names)
    return all(
        any(".".join(path[:count]) in device_map for count in range(len(path), 0, -1))
        for path in parts
    )


def _existing_prefixes(model: torch.nn.Module, device_map: Mapping[str, Any]) -> dict[str, Any]:
    """The map without unknown modules, which diffusers ignores silently."""
    names = {"", *(name for name, _ in model.named_modules(remove_duplicate=False))}
    names.update(name for name, _ in model.named_parameters(remove_duplicate=False))
    names.update(name for name, _ in model.named_buffers(remove_duplicate=False))
    return {prefix: device for prefix, device in device_map.items() if prefix in names}


def dispatch_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Uses the checkpoint's files for weights on the disk: the offload folder is empty."""

    def dispatch_model(model: Any, device_map: Any, *args: Any, **kwargs: Any) -> Any:
        call, given = current_call.get(), device_map
        on_disk = None if call is None else call.take_on_disk(model)
        if on_disk is None:
            return original(model, device_map, *args, **kwargs)
        if len(set(device_map.values())) > 1 and _overlaps(device_map):
            # accelerate's hook on a module takes all below it.
            device_map = disjoint_map(model, device_map)
        weights = offloaded_weights(model, device_map, on_disk, {})
        on_disk.read_ahead()
        if weights is not None:
            kwargs["state_dict"] = weights
        if "disk" in device_map.values():
            kwargs["offload_index"] = {}
        result = original(model, device_map, *args, **kwargs)
        if hasattr(model, "hf_device_map"):
            model.hf_device_map = dict(given)
        return result

    return dispatch_model


def _overlaps(device_map: Mapping[str, Any]) -> bool:
    return any(
        other != name and (not name or other.startswith(f"{name}."))
        for name in device_map
        for other in device_map
    )
