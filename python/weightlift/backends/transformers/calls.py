"""The replaced calls of transformers, and the decision about each load."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from weightlift.backends import early_return
from weightlift.backends.fallback import fall_back, levels_to_caller
from weightlift.backends.transformers import compat, prefetch
from weightlift.backends.transformers.open_files import fallback_reason, open_checkpoint, weights_of
from weightlift.backends.transformers.walk import walk_tensors
from weightlift.backends.transformers.weights import CALLER, Batch, LoadFailed, Weights
from weightlift.core import dtypes, gc_pause
from weightlift.core.devices import parse_device
from weightlift.core.errors import ArgumentError, OutOfMemoryError, WeightliftError
from weightlift.core.report import set_last_report
from weightlift.load.slots_ahead import slots_ahead
from weightlift.module.device_map import known_devices

if TYPE_CHECKING:
    import torch

__all__ = [
    "files_found",
    "from_pretrained",
    "load_of_class",
    "load_of_keys",
    "load_of_model",
    "model_built",
    "not_walked",
    "replace_walk",
    "warm_up",
]

_log = logging.getLogger("weightlift")

# Whether this thread runs a load that reserves its own device memory.
_reserves: ContextVar[bool] = ContextVar("weightlift_transformers_reserves", default=False)


def _load(
    original: Callable[..., Any],
    model: Any,
    state_dict: Any,
    files: Sequence[str] | None,
    config: Any,
    *rest: Any,
) -> Any:
    """``PreTrainedModel._load_pretrained_model``."""
    if state_dict is not None or not files:
        return original(model, state_dict, files, config, *rest)
    sharded = _is_sharded(model)
    reason = fallback_reason(model, files, config, sharded)
    if sharded and reason is None:
        return _load_shards(original, model, files, config, *rest)
    own_way = functools.partial(original, model, None, files, config, *rest)
    ours = compat.is_walked(config)
    disable_mmap = getattr(config, "disable_mmap", None)
    weights = None if reason else prefetch.begun(files)
    try:
        if weights is None:
            with slots_ahead(known_devices(getattr(config, "device_map", None)), casts=True):
                checkpoint = None if reason else open_checkpoint(files)
            if checkpoint is None or "not_tensors" in checkpoint.metadata:
                reason = reason or "it holds more than tensors"
                _log.info(
                    "weightlift: %s: transformers falls back to its own loading: %s",
                    files[0],
                    reason,
                )
                return own_way()
            weights = weights_of(checkpoint, files, disable_mmap)
        if not ours:
            weights.start(_guess(weights, model, config))
    except OutOfMemoryError:
        raise
    except WeightliftError as error:
        if weights is not None:
            weights.close()
        return fall_back(CALLER, error, own_way)
    failed: WeightliftError | None = None
    token = _reserves.set(ours)
    try:
        with gc_pause.paused() if ours else contextlib.nullcontext():
            result = original(model, weights, files, config, *rest)
    except LoadFailed as failure:
        failed = failure.error
    finally:
        _reserves.reset(token)
        weights.close()
    if failed is not None:
        return fall_back(CALLER, failed, own_way)
    if weights.report is not None:
        set_last_report(weights.report)
    return result


def _is_sharded(model: Any) -> bool:
    return any(kind.__name__ == "DTensor" for kind in set(map(type, model.parameters())))


def _load_shards(
    original: Callable[..., Any], model: Any, files: Sequence[str], config: Any, *rest: Any
) -> Any:
    """The same if each rank uses parts of the tensors: an error on one rank is raised on all."""
    from weightlift.distributed.collective import collective_load

    with collective_load(model) as met:
        checkpoint, failed = None, None
        try:
            checkpoint = open_checkpoint(files)
        except WeightliftError as error:
            failed = error
        state = {name: str(tensor.dtype) for name, tensor in model.state_dict().items()}
        if met.begin(checkpoint, failed, state):
            if checkpoint is None:
                raise WeightliftError(
                    "this rank could not open the checkpoint that the other ranks load"
                )
            if "not_tensors" in checkpoint.metadata:
                return original(model, None, files, config, *rest)
            disable_mmap = getattr(config, "disable_mmap", None)
            weights = weights_of(checkpoint, files, disable_mmap)
            token = _reserves.set(True)
            try:
                result = original(model, weights, files, config, *rest)
            except LoadFailed as failure:
                raise failure.error from None
            finally:
                _reserves.reset(token)
                weights.close()
    if failed is not None:
        return fall_back(CALLER, failed, lambda: original(model, None, files, config, *rest))
    if weights.report is not None:
        set_last_report(weights.report)
    return result


def _guess(weights: Weights, model: Any, config: Any) -> Batch:
    """A prediction of the tensors' destinations; the library handles all others and wrong
    predictions itself. Tensors that it will not request are left out."""
    import torch

    expand_device_map = importlib.import_module(
        "transformers.integrations.accelerate"
    ).expand_device_map
    cpu = torch.device("cpu")
    batch = Batch(weights)
    state: dict[str, Any] = {}
    devices: dict[str, Any] = {}
    if config.hf_quantizer is None:
        state = model.state_dict()
        devices = expand_device_map(config.device_map or {"": "cpu"}, list(state))
    mapping = config.weight_mapping or []
    scoped = any(getattr(entry, "scope_prefix", None) is not None for entry in mapping)
    sources = [entry.compiled_sources for entry in mapping]
    prefix = f"{model.base_model_prefix}."
    for name in weights:
        renamed = scoped or any(source.search(name) for source in sources)
        place = next(
            (n for n in (name, prefix + name, name.removeprefix(prefix)) if n in state), ""
        )
        if config.hf_quantizer is not None or renamed:
            batch.add(name, cpu, None)
        elif place:
            dtype = state[place].dtype
            wider = dtype if _is_wider(dtype, weights.headers[name][0]) else None
            batch.add(name, parse_device(devices[place]), wider)
    return batch


def _is_wider(dtype: torch.dtype, own: str) -> bool:
    """Whether a cast loses nothing, so that it does no harm where it was not wanted."""
    return (
        own in dtypes.CASTABLE
        and dtypes.file_name(dtype) in ("F32", "F64")
        and dtype.itemsize > dtypes.to_torch(own).itemsize
    )


def load_of_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any
    ) -> Any:
        return _load(original, model, state_dict, checkpoint_files, load_config)

    return _load_pretrained_model


def load_of_class(original: Callable[..., Any]) -> Callable[..., Any]:
    def _load_pretrained_model(
        cls: Any, model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any
    ) -> Any:
        own = functools.partial(original, cls)
        return _load(own, model, state_dict, checkpoint_files, load_config)

    return _load_pretrained_model


def load_of_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    def _load_pretrained_model(
        model: Any,
        state_dict: Any,
        checkpoint_files: Any,
        load_config: Any,
        expected_keys: Any = None,
    ) -> Any:
        return _load(original, model, state_dict, checkpoint_files, load_config, expected_keys)

    return _load_pretrained_model


def replace_walk(original: Callable[..., Any]) -> Callable[..., Any]:
    """The library's walk over the tensors, where it is compat."""
    compat.offer(original)

    def convert_and_load_state_dict_in_model(
        model: Any, state_dict: Any, load_config: Any, disk_offload_index: Any = None
    ) -> Any:
        if isinstance(state_dict, Weights) and compat.is_walked(load_config):
            return walk_tensors(model, state_dict, load_config, disk_offload_index)
        return original(model, state_dict, load_config, disk_offload_index)

    return convert_and_load_state_dict_in_model


def not_walked(original: Callable[..., Any]) -> Callable[..., Any]:
    return original


def warm_up(original: Callable[..., Any]) -> Callable[..., Any]:
    """The walk reserves for itself, and what it needs; the library's walk uses what this does."""

    def caching_allocator_warmup(model: Any, expanded_device_map: Any, hf_quantizer: Any) -> None:
        if not _reserves.get():
            original(model, expanded_device_map, hf_quantizer)

    return caching_allocator_warmup


def from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = _with_quantization_config(kwargs)
        with early_return.returning_early(CALLER), prefetch.watching(kwargs):
            return original(cls, *args, **kwargs)

    return from_pretrained


def files_found(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_resolved_checkpoint_files(*args: Any, **kwargs: Any) -> Any:
        files, metadata = original(*args, **kwargs)
        prefetch.found(files)
        return files, metadata

    return _get_resolved_checkpoint_files


def model_built(original: Callable[..., Any]) -> Callable[..., Any]:
    """What the library does first with the model that it has built."""

    def get_model_conversion_mapping(
        model: Any, key_mapping: Any = None, hf_quantizer: Any = None, add_legacy: bool = True
    ) -> Any:
        prefetch.begin(model, key_mapping, hf_quantizer)
        return original(model, key_mapping, hf_quantizer, add_legacy)

    return get_model_conversion_mapping


_BITS: tuple[str, ...] = ("load_in_8bit", "load_in_4bit")


def _with_quantization_config(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``load_in_8bit`` and ``load_in_4bit``, which version 5 refuses, as what they became."""
    bits = {name: kwargs.pop(name) for name in _BITS if name in kwargs}
    if not any(bits.values()):
        return kwargs
    if kwargs.get("quantization_config") is not None:
        raise ArgumentError(
            f"{' and '.join(bits)} and quantization_config are given; leave out the former"
        )
    config = importlib.import_module("transformers").BitsAndBytesConfig
    known = inspect.signature(config).parameters
    bits.update({name: kwargs.pop(name) for name in list(kwargs) if name in known})
    text = ", ".join(f"{name}={value!r}" for name, value in bits.items())
    warnings.warn(
        f"weightlift: transformers 5 has no {next(iter(bits))}=; this load goes on with "
        f"quantization_config=BitsAndBytesConfig({text}), which is how to write it",
        FutureWarning,
        stacklevel=levels_to_caller(),
    )
    return {**kwargs, "quantization_config": config(**bits)}
