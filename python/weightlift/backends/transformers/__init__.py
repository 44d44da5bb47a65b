"""transformers: what ``PreTrainedModel`` and ``AutoModel*`` load from files, adapters included.

``PreTrainedModel._load_pretrained_model`` is given the tensors of a ``Checkpoint`` instead of
slices of opened files. Where the library's walk over them is one that is known, `walk`
takes its place, and one plan brings every tensor to its parameter's device and dtype; what needs
no renaming is on its way before (`ahead`). Elsewhere (quantizers; versions whose walk is not known)
the library walks: what it takes as it is finds its tensor already at its place, everything else is
handed out as mapped.

Of a model that the library has cut (tensor and expert parallel, FSDP) each rank reads its parts.

The stock way, by design: GGUF, pipeline parallel, accelerate's FSDP, DeepSpeed ZeRO-3, devices that
are neither CPU nor CUDA.
"""

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

from weightlift.backends.fallback import fall_back, levels_to_caller
from weightlift.backends.hooks import Hook
from weightlift.backends.safetensors import load_file_adapters
from weightlift.backends.transformers import ahead, known
from weightlift.backends.transformers.opening import open_checkpoint, weights_of, why_stock
from weightlift.backends.transformers.walk import walk_tensors
from weightlift.backends.transformers.weights import CALLER, Batch, Retreat, Weights
from weightlift.core import dtypes, gc_pause
from weightlift.core.devices import parse_device
from weightlift.core.errors import ArgumentError, OutOfMemoryError, WeightliftError
from weightlift.core.report import set_last_report

if TYPE_CHECKING:
    import torch

__all__ = ["HOOKS"]

_log = logging.getLogger("weightlift")


_MODEL = "transformers.modeling_utils"

# Whether this thread is in a load that reserves its device memory itself.
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
    reason = why_stock(model, files, config, sharded)
    if sharded and reason is None:
        return _load_shards(original, model, files, config, *rest)
    stock = functools.partial(original, model, None, files, config, *rest)
    ours = known.is_ours(config)
    disable_mmap = getattr(config, "disable_mmap", None)
    try:
        weights = None if reason else ahead.begun(files)
        if weights is None:
            checkpoint = None if reason else open_checkpoint(files)
            if checkpoint is None or "not_tensors" in checkpoint.metadata:
                reason = reason or "it holds more than tensors"
                _log.info(
                    "weightlift: %s: transformers falls back to its own loading: %s",
                    files[0],
                    reason,
                )
                return stock()
            weights = weights_of(checkpoint, files, disable_mmap)
        if not ours:
            weights.start(_guess(weights, model, config))
    except OutOfMemoryError:
        raise
    except WeightliftError as error:
        return fall_back(CALLER, error, stock)
    failed: WeightliftError | None = None
    token = _reserves.set(ours)
    try:
        with gc_pause.paused() if ours else contextlib.nullcontext():
            result = original(model, weights, files, config, *rest)
    except Retreat as retreat:
        failed = retreat.error
    finally:
        _reserves.reset(token)
        weights.close()
    if failed is not None:
        return fall_back(CALLER, failed, stock)
    if weights.report is not None:
        set_last_report(weights.report)
    return result


def _is_sharded(model: Any) -> bool:
    return any(kind.__name__ == "DTensor" for kind in set(map(type, model.parameters())))


def _load_shards(
    original: Callable[..., Any], model: Any, files: Sequence[str], config: Any, *rest: Any
) -> Any:
    """The same where each rank takes parts of the tensors: what fails on one fails on all."""
    from weightlift.distributed.collective import collective_load

    with collective_load(model) as met:
        checkpoint, failed = None, None
        try:
            checkpoint = open_checkpoint(files)
        except WeightliftError as error:
            failed = error
        state = {name: str(tensor.dtype) for name, tensor in model.state_dict().items()}
        if met.begin(checkpoint, failed, state):
            assert checkpoint is not None
            if "not_tensors" in checkpoint.metadata:
                return original(model, None, files, config, *rest)
            disable_mmap = getattr(config, "disable_mmap", None)
            weights = weights_of(checkpoint, files, disable_mmap)
            token = _reserves.set(True)
            try:
                result = original(model, weights, files, config, *rest)
            except Retreat as retreat:
                raise retreat.error from None
            finally:
                _reserves.reset(token)
                weights.close()
    if failed is not None:
        return fall_back(CALLER, failed, lambda: original(model, None, files, config, *rest))
    if weights.report is not None:
        set_last_report(weights.report)
    return result


def _guess(weights: Weights, model: Any, config: Any) -> Batch:
    """Where the library will take tensors to, as far as that is plain: it sees to the rest itself,
    as to what is guessed wrong. What it will not ask for is left out."""
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


def _load_of_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any
    ) -> Any:
        return _load(original, model, state_dict, checkpoint_files, load_config)

    return _load_pretrained_model


def _load_of_class(original: Callable[..., Any]) -> Callable[..., Any]:
    def _load_pretrained_model(
        cls: Any, model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any
    ) -> Any:
        own = functools.partial(original, cls)
        return _load(own, model, state_dict, checkpoint_files, load_config)

    return _load_pretrained_model


def _load_of_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    def _load_pretrained_model(
        model: Any,
        state_dict: Any,
        checkpoint_files: Any,
        load_config: Any,
        expected_keys: Any = None,
    ) -> Any:
        return _load(original, model, state_dict, checkpoint_files, load_config, expected_keys)

    return _load_pretrained_model


def _walk(original: Callable[..., Any]) -> Callable[..., Any]:
    """The library's walk over the tensors, where it is known."""
    known.offer(original)

    def convert_and_load_state_dict_in_model(
        model: Any, state_dict: Any, load_config: Any, disk_offload_index: Any = None
    ) -> Any:
        if isinstance(state_dict, Weights) and known.is_ours(load_config):
            return walk_tensors(model, state_dict, load_config, disk_offload_index)
        return original(model, state_dict, load_config, disk_offload_index)

    return convert_and_load_state_dict_in_model


def _not_walked(original: Callable[..., Any]) -> Callable[..., Any]:
    return original


def _warm_up(original: Callable[..., Any]) -> Callable[..., Any]:
    """The walk reserves for itself, and what it needs; the library's walk uses what this does."""

    def caching_allocator_warmup(model: Any, expanded_device_map: Any, hf_quantizer: Any) -> None:
        if not _reserves.get():
            original(model, expanded_device_map, hf_quantizer)

    return caching_allocator_warmup


def _from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = _with_quantization_config(kwargs)
        with ahead.watching(kwargs):
            return original(cls, *args, **kwargs)

    return from_pretrained


def _files_found(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_resolved_checkpoint_files(*args: Any, **kwargs: Any) -> Any:
        files, metadata = original(*args, **kwargs)
        ahead.found(files)
        return files, metadata

    return _get_resolved_checkpoint_files


def _model_built(original: Callable[..., Any]) -> Callable[..., Any]:
    """What the library does first with the model that it has built."""

    def get_model_conversion_mapping(
        model: Any, key_mapping: Any = None, hf_quantizer: Any = None, add_legacy: bool = True
    ) -> Any:
        ahead.begin(model, key_mapping, hf_quantizer)
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


_FROM_PRETRAINED = (
    "(cls, pretrained_model_name_or_path, *model_args, config=None, cache_dir=None, "
    "ignore_mismatched_sizes=False, force_download=False, local_files_only=False, token=None, "
    "revision='main', use_safetensors=None, weights_only=True, {}**kwargs)"
)
_RESOLVED = (
    "(pretrained_model_name_or_path, variant, gguf_file, use_safetensors, user_agent, "
    "is_remote_code, transformers_explicit_filename=None, download_kwargs=None{})"
)
HOOKS = (
    Hook(
        _MODEL,
        "PreTrainedModel._load_pretrained_model",
        {
            "(cls, model, state_dict, checkpoint_files, load_config)": _load_of_class,  # 5.0
            "(model, state_dict, checkpoint_files, load_config)": _load_of_model,  # 5.1
            "(model, state_dict, checkpoint_files, load_config, expected_keys=None)": (
                _load_of_keys  # 5.4
            ),
        },
    ),
    Hook(
        _MODEL,
        "convert_and_load_state_dict_in_model",
        {
            "(model, state_dict, load_config, tp_plan, dtype_plan=None, disk_offload_index=None)": (
                _not_walked  # 5.0
            ),
            "(model, state_dict, load_config, tp_plan, disk_offload_index=None)": (
                _not_walked  # 5.1
            ),
            "(model, state_dict, load_config, disk_offload_index=None)": _walk,  # 5.16
        },
    ),
    Hook(
        _MODEL,
        "caching_allocator_warmup",
        {"(model, expanded_device_map, hf_quantizer)": _warm_up},
    ),
    Hook(
        _MODEL,
        "PreTrainedModel.from_pretrained",
        {
            _FROM_PRETRAINED.format(""): _from_pretrained,
            _FROM_PRETRAINED.format("fusion_config=None, disable_mmap=None, "): (
                _from_pretrained  # 5.6
            ),
        },
    ),
    Hook(
        _MODEL,
        "_get_resolved_checkpoint_files",
        {
            _RESOLVED.format(""): _files_found,
            _RESOLVED.format(", tqdm_class=None"): _files_found,  # 5.4
        },
    ),
    Hook(
        _MODEL,
        "get_model_conversion_mapping",
        {"(model, key_mapping=None, hf_quantizer=None, add_legacy=True)": _model_built},
    ),
    Hook("peft.utils.save_and_load", "safe_load_file", load_file_adapters(CALLER)),
)
