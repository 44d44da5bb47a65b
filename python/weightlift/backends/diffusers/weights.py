"""``_load_pretrained_model``: all weights of a model to where they belong, at once."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from weightlift.backends import stand_aside
from weightlift.backends.diffusers.calls import current_call, shards_bar
from weightlift.backends.diffusers.context import NAME
from weightlift.backends.diffusers.files import arrives_as, engine_device, load_all, mode_for
from weightlift.backends.diffusers.state_dicts import Pending
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core import dtypes
from weightlift.core.devices import parse_device
from weightlift.load.options import LoadOptions, Mode
from weightlift.module.fill import fill
from weightlift.module.matching import MatchPolicy
from weightlift.module.placement import PlacementPolicy

if TYPE_CHECKING:
    import torch

__all__ = ["dispatch_model", "load_pretrained_model"]


def load_pretrained_model(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def load(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments

        def stock(**changes: Any) -> Any:
            given.update(changes)
            return original(*bound.args, **bound.kwargs)

        pending = given["state_dict"]
        call = current_call.get()
        if pending is not None and not isinstance(pending, Pending):
            return stock()
        reason = _reason_for_stock(given)
        if reason is not None:
            stand_aside(NAME, reason, warn=False)
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
                pending = load_all(opened, parse_device("cpu"), given["disable_mmap"])
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
            PlacementPolicy(
                device_map and _known_prefixes(given["model"], device_map),
                dtype=given["dtype"],
                keep_in_fp32=given["keep_in_fp32_modules"] or (),
            ),
            MatchPolicy(strict=False, ignore_mismatched_sizes=True),
            LoadOptions(
                fit.mode,
                progress=shards_bar(len(opened.parts)) if early is None else False,
                caller=NAME,
            ),
            prefetched=early,
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
        tensors = given["model"].state_dict()
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


def _known_prefixes(model: torch.nn.Module, device_map: Mapping[str, Any]) -> dict[str, Any]:
    """The map without what the model does not have, which diffusers passes over in silence."""
    names = {"", *(name for name, _ in model.named_modules(remove_duplicate=False))}
    names.update(name for name, _ in model.named_parameters(remove_duplicate=False))
    names.update(name for name, _ in model.named_buffers(remove_duplicate=False))
    return {prefix: device for prefix, device in device_map.items() if prefix in names}


def _has_hooks(device_map: Mapping[str, Any]) -> bool:
    devices = set(device_map.values())
    return "disk" in devices or len({engine_device(device) for device in devices}) > 1


def dispatch_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Not again: tensors on the disk were given their hooks with their places in the file."""

    def dispatch_model(model: Any, device_map: Any, *args: Any, **kwargs: Any) -> Any:
        call = current_call.get()
        if call is None or call.dispatched is not model:
            return original(model, device_map, *args, **kwargs)
        call.dispatched = None
        model.hf_device_map = dict(device_map)
        return model

    return dispatch_model
