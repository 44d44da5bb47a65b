"""Quantization during the load, by bitsandbytes and torchao, of weights from the engine."""

from __future__ import annotations

import importlib
import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

import torch

from weightlift.checkpoint.checkpoint import Checkpoint, describe_location
from weightlift.core import dtypes
from weightlift.core.errors import ArgumentError, CheckpointError
from weightlift.core.report import LoadReport, set_last_report
from weightlift.load.load_plan import LoadPlan
from weightlift.load.options import LoadOptions
from weightlift.module.device_map import assign, resolve_device_map
from weightlift.module.fill import fill
from weightlift.module.matching import MatchPolicy, format_names
from weightlift.module.parameters import assign_parameter
from weightlift.module.placement import PlacementPolicy

__all__ = ["Quantizer", "choose_quantizer", "flattened"]

_log = logging.getLogger("weightlift")

# Bytes of unquantized weights on the device at a time, which limits the memory that quantization is
# to save.
_AT_ONCE = 1 << 30
# Suffixes of the tensors that bitsandbytes saves beside a quantized weight.
_STATISTICS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.")
_STATISTICS_8BIT = ("SCB", "weight_format")


class Quantizer(Protocol):
    """Fills a model on ``meta`` with quantized weights."""

    def load(
        self,
        model: torch.nn.Module,
        checkpoint: Checkpoint,
        placement: PlacementPolicy,
        matching: MatchPolicy,
        options: LoadOptions,
    ) -> LoadReport:
        """As ``fill``."""


def choose_quantizer(
    config: Any,
    saved: Mapping[str, Any] | None,
    *,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
) -> Quantizer:
    """The quantizer of a configuration of transformers or diffusers, of its JSON, or of the flags.

    Args:
        config: ``BitsAndBytesConfig`` or ``TorchAoConfig`` of either library, or its values.
        saved: the configuration in ``config.json`` of a checkpoint with quantized weights.

    Raises:
        ArgumentError: flags contradict each other or the config, or the method is unknown.
    """
    if load_in_8bit and load_in_4bit:
        raise ArgumentError(
            "load_in_8bit=True and load_in_4bit=True contradict each other: give one"
        )
    if load_in_8bit or load_in_4bit:
        if config is not None:
            raise ArgumentError(
                "quantization_config includes load_in_8bit and load_in_4bit: give one"
            )
        config = {
            "quant_method": "bitsandbytes",
            "load_in_8bit": load_in_8bit,
            "load_in_4bit": load_in_4bit,
        }
    if saved is not None and config is not None:
        _log.warning(
            "the weights are already quantized, by the configuration in config.json: leave out "
            "quantization_config"
        )
    chosen = config if saved is None else saved
    if not isinstance(chosen, Mapping) and not hasattr(chosen, "to_dict"):
        raise ArgumentError(
            f"quantization_config is {chosen!r}; it must be a BitsAndBytesConfig, a TorchAoConfig, "
            "or a dict of its values"
        )
    values = dict(chosen) if isinstance(chosen, Mapping) else chosen.to_dict()
    method = values.get("quant_method")
    method = str(getattr(method, "value", method))
    kinds: dict[str, tuple[str, Callable[[Any, bool], Quantizer]]] = {
        "bitsandbytes": ("BitsAndBytesConfig", _BitsAndBytes),
        "torchao": ("TorchAoConfig", _TorchAo),
    }
    if method not in kinds:
        raise ArgumentError(
            f"quantization_config: the method {method!r} is not known; use load_in_4bit, "
            "load_in_8bit, BitsAndBytesConfig or TorchAoConfig"
        )
    name, kind = kinds[method]
    if isinstance(chosen, Mapping):
        chosen = getattr(importlib.import_module("transformers"), name).from_dict(values)
    return kind(chosen, saved is not None)


def flattened(
    state_dict: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """torchao's tensors as plain ones, and the metadata to rebuild them."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tensors, metadata = flatten_tensor_state_dict(dict(state_dict))
    return tensors, metadata


class _BitsAndBytes:
    def __init__(self, config: Any, quantized: bool) -> None:
        self._config = config
        self._quantized = quantized
        # By name: its types are not declared.
        self._layers = importlib.import_module("bitsandbytes.nn")

    def load(
        self,
        model: torch.nn.Module,
        checkpoint: Checkpoint,
        placement: PlacementPolicy,
        matching: MatchPolicy,
        options: LoadOptions,
    ) -> LoadReport:
        # The 8-bit product needs float16, which is also diffusers' default.
        dtype = torch.float16 if placement.dtype is None else placement.dtype
        linear = [name for name, layer in _linear(model).items() if type(layer) is torch.nn.Linear]
        devices = _devices(model, placement, dtype, linear)
        names = self._chosen(linear, checkpoint, devices, _kept(model))
        mismatched = self._mismatched(model, checkpoint, names)
        if mismatched and not matching.ignore_mismatched_sizes:
            raise CheckpointError(_refusal(model, checkpoint, mismatched))
        present = [name for name in names if name in checkpoint and name not in mismatched]
        parts = _parts_of(present, checkpoint)
        absent = [name for name in names if name not in parts]
        initial = matching.initialize(absent) if absent and matching.initialize else {}
        layers = {name: self._replace(model, name) for name in names}
        device_of = {
            name: _real(device, name)
            for device, assigned in assign(names, devices).items()
            for name in assigned
        }
        cast = None if self._quantized else dtypes.parse_dtype(dtype)
        report = self._load_weights(checkpoint, parts, layers, device_of, cast, options)
        for weight, value in initial.items():
            kind = value.dtype if cast is None else dtypes.to_torch(cast)
            self._set(layers[weight], weight, {weight: value.to(device_of[weight], kind)})

        apart = {*names, *(name for inside in parts.values() for name in inside)}
        rest = fill(
            model,
            checkpoint.renamed(lambda name: None if name in apart else name),
            placement._replace(device_map=devices, max_memory=None, dtype=dtype),
            matching._replace(ignore_missing=apart.__contains__),
            options,
        )
        report = _with_keys_of(report.plus(rest), rest)
        report.missing_keys[:0] = [name for name in absent if name not in mismatched]
        report.mismatched_keys[:0] = [(n, *mismatched[n]) for n in mismatched if n in names]
        set_last_report(report)
        _mark(model, self._config)
        vars(model)["is_loaded_in_4bit"] = bool(self._config.load_in_4bit)
        vars(model)["is_loaded_in_8bit"] = bool(self._config.load_in_8bit)
        return report

    def _load_weights(
        self,
        checkpoint: Checkpoint,
        parts: Mapping[str, list[str]],
        layers: Mapping[str, Any],
        device_of: Mapping[str, torch.device],
        cast: str | None,
        options: LoadOptions,
    ) -> LoadReport:
        """Loads weights and their statistics in batches, and quantizes them."""
        report = LoadReport()
        for weights in _batches(parts, layers):
            plan = LoadPlan(checkpoint, LoadOptions(options.mode))
            for device in {device_of[weight] for weight in weights}:
                here = [weight for weight in weights if device_of[weight] == device]
                plan.add(device, cast, [name for weight in here for name in parts[weight]])
            running = plan.start()
            tensors = running.result()
            report = report.plus(running.report)
            for weight in weights:
                own = {name: tensors.pop(name) for name in parts[weight]}
                self._set(layers[weight], weight, own)
        return report

    def _chosen(
        self,
        linear: list[str],
        checkpoint: Checkpoint,
        devices: Mapping[str, torch.device | str],
        kept: list[str],
    ) -> list[str]:
        """The weights to quantize, or those that are quantized in the checkpoint."""
        if self._quantized:
            known = {_weight_of(name) for name in checkpoint if _is_statistic(name)}
            return [name for name in linear if name in known]
        skipped = [*(self._config.llm_int8_skip_modules or ()), *kept]
        modules = [name.removesuffix(".weight") for name in linear]
        if any(getattr(device, "type", None) == "cuda" for device in devices.values()):
            left_out = {  # by diffusers' rule
                module
                for module in modules
                for key in skipped
                if key in (module, module.rpartition(".")[2]) or f"{key}." in module
            }
        else:  # by transformers' rule: diffusers requires a GPU
            from transformers.quantizers.quantizers_utils import should_convert_module

            left_out = {name for name in modules if not should_convert_module(name, skipped)}
        return [f"{module}.weight" for module in modules if module not in left_out]

    def _mismatched(
        self, model: torch.nn.Module, checkpoint: Checkpoint, names: list[str]
    ) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """All mismatches, also those that ``fill`` would find, because ``fill`` runs late."""
        found = {}
        for name, tensor in model.state_dict().items():
            if name not in checkpoint:
                continue
            kind, theirs = checkpoint[name]
            ours = tuple(tensor.shape)
            if self._quantized and self._config.load_in_4bit and name in names:
                packed = (math.prod(ours) + 1) // 2
                same = math.prod(theirs) * dtypes.bits(kind) // 8 == packed
            else:
                same = theirs == ours
            if not same:
                found[name] = (theirs, ours)
        return found

    def _replace(self, model: torch.nn.Module, weight: str) -> Any:
        name, config = weight.removesuffix(".weight"), self._config
        old: Any = model.get_submodule(name)
        size = (old.in_features, old.out_features, old.bias is not None)
        with torch.device("meta"):
            if config.load_in_8bit:
                new = self._layers.Linear8bitLt(
                    *size,
                    has_fp16_weights=config.llm_int8_has_fp16_weight,
                    threshold=config.llm_int8_threshold,
                )
            else:
                new = self._layers.Linear4bit(
                    *size,
                    config.bnb_4bit_compute_dtype,
                    compress_statistics=config.bnb_4bit_use_double_quant,
                    quant_type=config.bnb_4bit_quant_type,
                    quant_storage=config.bnb_4bit_quant_storage,
                )
        new.bias = old.bias  # the same, in case that the constructor has to initialize it
        new.requires_grad_(False)
        model.set_submodule(name, new)
        return new

    def _set(self, module: Any, name: str, tensors: dict[str, torch.Tensor]) -> None:
        value = tensors.pop(name)
        options = dict(module.weight.__dict__)
        if self._config.load_in_8bit:
            options.pop("SCB", None)
            if self._quantized:
                options["SCB"] = tensors.pop(f"{name.removesuffix('weight')}SCB")
            # Int8Params quantizes tensors that come from the CPU.
            new = self._layers.Int8Params(value.to("cpu"), requires_grad=False, **options)
        elif self._quantized:
            new = self._layers.Params4bit.from_prequantized(
                data=value,
                quantized_stats=tensors,
                requires_grad=False,
                device=value.device,
                module=module,
            )
            assign_parameter(module, "weight", new)
            return
        else:
            new = self._layers.Params4bit(value, requires_grad=False, **options)
        assign_parameter(module, "weight", new.to(value.device))


class _TorchAo:
    def __init__(self, config: Any, quantized: bool) -> None:
        self._config = config
        self._quantized = quantized
        self._library = importlib.import_module("torchao.quantization")

    def load(
        self,
        model: torch.nn.Module,
        checkpoint: Checkpoint,
        placement: PlacementPolicy,
        matching: MatchPolicy,
        options: LoadOptions,
    ) -> LoadReport:
        # bfloat16 is diffusers' default for torchao.
        dtype = torch.bfloat16 if placement.dtype is None else placement.dtype
        devices = _devices(model, placement, dtype, ())
        placement = placement._replace(device_map=devices, max_memory=None, dtype=dtype)
        if self._quantized:
            report = self._load_quantized(model, checkpoint, devices, placement, matching, options)
        else:
            chosen = self._chosen(model)
            for device, names in assign(chosen, devices).items():
                _real(device, names[0])
            report = fill(model, checkpoint, placement, matching, options)
            self._quantize(model, chosen)
        _mark(model, self._config)
        return report

    def _chosen(self, model: torch.nn.Module) -> set[str]:
        """By diffusers' rule."""
        skipped = [*(self._config.modules_to_not_convert or ()), *_kept(model)]
        return {name for name in _linear(model) if not any(f"{key}." in name for key in skipped)}

    def _quantize(self, model: torch.nn.Module, chosen: Collection[str]) -> None:
        config = self._config.get_apply_tensor_subclass()
        if isinstance(config, self._library.FqnToConfig):  # accepts no filter
            others = {
                name: None
                for name, module in model.named_modules()
                if isinstance(module, torch.nn.Linear) and f"{name}.weight" not in chosen
            }
            config = self._library.FqnToConfig({**config.fqn_to_config, **others})
            self._library.quantize_(model, config, None)
        else:
            self._library.quantize_(model, config, lambda _, name: f"{name}.weight" in chosen)

    def _load_quantized(
        self,
        model: torch.nn.Module,
        checkpoint: Checkpoint,
        devices: Mapping[str, torch.device | str],
        placement: PlacementPolicy,
        matching: MatchPolicy,
        options: LoadOptions,
    ) -> LoadReport:
        """Loads tensors that ``flattened`` or diffusers made."""
        from torchao.prototype.safetensors.safetensors_utils import is_metadata_torchao

        if not is_metadata_torchao(checkpoint.metadata):
            raise CheckpointError(
                f"{describe_location(checkpoint)}: has no metadata to rebuild torchao's tensors; "
                "save the model with save_pretrained, as safetensors"
            )
        parts = self._parts_of(model, checkpoint)
        inside = {part for names in parts.values() for part in names}
        plan = LoadPlan(checkpoint, LoadOptions(options.mode))
        for device, names in assign(parts, devices).items():
            plan.add(_real(device, names[0]), None, [p for name in names for p in parts[name]])
        running = plan.start()
        self._set(model, checkpoint, parts, running.result())
        rest = fill(
            model,
            checkpoint.renamed(lambda name: None if name in inside else name),
            placement,
            matching._replace(ignore_missing=parts.__contains__),
            options,
        )
        report = _with_keys_of(running.report.plus(rest), rest)
        set_last_report(report)
        return report

    def _parts_of(self, model: torch.nn.Module, checkpoint: Checkpoint) -> dict[str, list[str]]:
        """Quantized tensor of the model -> the tensors to rebuild it from."""
        metadata = checkpoint.metadata
        state = model.state_dict()
        parts = {}
        for name in json.loads(metadata["tensor_names"]):
            described = json.loads(metadata[name])
            if "_tensor_data_names" in described and name in state:
                module, _, key = name.rpartition(".")
                data = described["_tensor_data_names"]
                parts[name] = [f"{module}._{key}_{part}" for part in data]
        inside = {part for names in parts.values() for part in names}
        if absent := sorted(inside.difference(checkpoint)):
            raise CheckpointError(
                f"{describe_location(checkpoint)}: parts of quantized tensors are missing; save "
                "the model again:\n" + "\n".join(format_names("missing", absent))
            )
        return parts

    def _set(
        self,
        model: torch.nn.Module,
        checkpoint: Checkpoint,
        parts: Mapping[str, list[str]],
        tensors: dict[str, torch.Tensor],
    ) -> None:
        """Rebuilds quantized tensors and puts them into the model; empties ``tensors``."""
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        metadata, state = checkpoint.metadata, model.state_dict()
        mismatched = {}
        for name, inside in parts.items():  # one at a time: torchao searches all tensors each time
            made, _ = unflatten_tensor_state_dict(
                {part: tensors.pop(part) for part in inside},
                {name: metadata[name], "tensor_names": json.dumps([name])},
            )
            shapes = (tuple(made[name].shape), tuple(state[name].shape))
            if shapes[0] != shapes[1]:
                mismatched[name] = shapes
                continue
            module, _, key = name.rpartition(".")
            parameter = torch.nn.Parameter(made[name], requires_grad=False)
            assign_parameter(model.get_submodule(module), key, parameter)
        if mismatched:
            raise CheckpointError(_refusal(model, checkpoint, mismatched))


def _kept(model: torch.nn.Module) -> list[str]:
    return list(getattr(model, "_keep_in_fp32_modules", None) or ())


def _linear(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Weight -> its layer, for linear layers whose weight is not tied: quantization would untie
    it."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and places.get(id(module.weight)) == [f"{name}.weight"]
    }


def _devices(
    model: torch.nn.Module,
    placement: PlacementPolicy,
    dtype: torch.dtype | str,
    in_bytes: Collection[str],
) -> dict[str, torch.device | str]:
    """The device map; ``in_bytes`` are weights with at most one byte per element."""
    device_map = placement.device_map
    if device_map is None:
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    planned = dict.fromkeys(in_bytes, torch.int8)
    if isinstance(dtype, torch.dtype):
        planned = {**dict.fromkeys(model.state_dict(), dtype), **planned}
    return resolve_device_map(
        model,
        device_map,
        max_memory=placement.max_memory,
        dtype=planned,
        keep_in_fp32=_kept(model),
    )


def _real(device: torch.device | str, name: str) -> torch.device:
    if not isinstance(device, torch.device):
        raise ArgumentError(
            f"device_map: {name} would stay on the disk, where quantization is impossible: give it "
            "a device"
        )
    return device


def _parts_of(weights: Collection[str], checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Weight -> itself and the statistics that bitsandbytes saved beside it."""
    parts = {weight: [weight] for weight in weights}
    for name in checkpoint:
        if _is_statistic(name) and (weight := _weight_of(name)) in parts:
            parts[weight].append(name)
    return parts


def _batches(parts: Mapping[str, list[str]], layers: Mapping[str, Any]) -> Iterator[list[str]]:
    """Batches of weights of bounded size."""
    batch: list[str] = []
    size = 0
    for weight in parts:
        batch.append(weight)
        size += layers[weight].in_features * layers[weight].out_features * 4
        if size >= _AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _with_keys_of(report: LoadReport, rest: LoadReport) -> LoadReport:
    """The sum of two reports, with the key lists of the second."""
    report.missing_keys, report.unexpected_keys = rest.missing_keys, rest.unexpected_keys
    report.mismatched_keys, report.error_msgs = rest.mismatched_keys, rest.error_msgs
    return report


def _weight_of(name: str) -> str:
    """The weight that a tensor belongs to."""
    for ending in _STATISTICS_8BIT:
        if name.endswith(f".{ending}"):
            return f"{name[: -len(ending)]}weight"
    return name[: name.index(".weight.") + len(".weight")]


def _is_statistic(name: str) -> bool:
    if name.rpartition(".")[2] in _STATISTICS_8BIT:
        return True
    return ".weight." in name and any(part in name for part in _STATISTICS)


def _refusal(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> str:
    lines = [
        f"{name}: {theirs} in the checkpoint, {ours} in the model"
        for name, (theirs, ours) in mismatched.items()
    ]
    return "\n".join(
        [
            f"{describe_location(checkpoint)} does not fit {type(model).__name__}:",
            *format_names("of another shape than the model's", lines),
        ]
    )


def _mark(model: torch.nn.Module, config: Any) -> None:
    vars(model).update(is_quantized=True, quantization_method=config.quant_method)
    register: Callable[..., None] | None = getattr(model, "register_to_config", None)
    if register is not None:
        register(quantization_config=config)
