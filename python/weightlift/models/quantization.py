"""Quantizing while loading, by bitsandbytes and torchao; the weights arrive through the engine."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from weightlift import placement
from weightlift.checkpoint import Checkpoint
from weightlift.dtypes import parse_dtype
from weightlift.errors import ArgumentError, CheckpointError
from weightlift.materialize import Loading
from weightlift.modules import fill
from weightlift.report import LoadReport

__all__ = ["Quantizer", "choose_quantizer"]

# Weights that are on their device before they are quantized there: more at a time would need the
# memory of the whole model that quantizing is to save.
_AT_ONCE = 1 << 30
# What bitsandbytes saves beside a quantized weight.
_STATISTICS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.")
_STATISTICS_8BIT = ("SCB", "weight_format")


class Quantizer(Protocol):
    """Fills a model on ``meta`` with quantized weights."""

    def load(
        self,
        model: torch.nn.Module,
        checkpoint: Checkpoint,
        dtype: torch.dtype | str | None,
        device_map: Any,
        max_memory: Mapping[Any, Any] | None,
        **options: Any,
    ) -> LoadReport: ...


def choose_quantizer(
    config: Any,
    *,
    pre_quantized: bool,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
) -> Quantizer:
    """The quantizer of a configuration of transformers or diffusers, of its JSON, or of the flags.

    Args:
        config: ``BitsAndBytesConfig`` or ``TorchAoConfig`` of either library, or the same as read
            from ``config.json``.
        pre_quantized: the checkpoint holds quantized weights.

    Raises:
        ArgumentError: flags that contradict another or the config, or a method that is not known.
    """
    if load_in_8bit and load_in_4bit:
        raise ArgumentError("load_in_8bit=True and load_in_4bit=True contradict each other")
    if load_in_8bit or load_in_4bit:
        if config is not None and not pre_quantized:
            raise ArgumentError(
                "quantization_config says all that load_in_8bit and load_in_4bit do: give one"
            )
        if config is None:
            from transformers import BitsAndBytesConfig

            flags = {"load_in_8bit": load_in_8bit, "load_in_4bit": load_in_4bit}
            config = BitsAndBytesConfig.from_dict(flags)  # type: ignore[no-untyped-call]
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    method = values.get("quant_method")
    method = str(getattr(method, "value", method))
    if method == "bitsandbytes":
        return _BitsAndBytes(config, pre_quantized)
    if method == "torchao" and not pre_quantized:
        return _TorchAo(config)
    raise ArgumentError(
        f"quantization_config: {method!r} is not known here"
        + (" for a checkpoint that is quantized already" if pre_quantized else "")
        + "; load_in_4bit, load_in_8bit, BitsAndBytesConfig and TorchAoConfig are"
    )


class _BitsAndBytes:
    def __init__(self, config: Any, pre_quantized: bool) -> None:
        from transformers import BitsAndBytesConfig

        if isinstance(config, Mapping):
            config = BitsAndBytesConfig.from_dict(dict(config))  # type: ignore[no-untyped-call]
        self._config = config
        self._pre_quantized = pre_quantized

    def load(
        self,
        model: torch.nn.Module,
        checkpoint: Checkpoint,
        dtype: torch.dtype | str | None,
        device_map: Any,
        max_memory: Mapping[Any, Any] | None,
        **options: Any,
    ) -> LoadReport:
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        layers = _bitsandbytes()

        if dtype is None:
            dtype = torch.float16  # what the 8-bit product takes, and diffusers' default
        skipped = [*(self._config.llm_int8_skip_modules or ()), *_kept(model)]
        replace_with_bnb_linear(model, skipped, self._config, self._pre_quantized)
        weights = {
            f"{name}.weight": module
            for name, module in model.named_modules()
            if isinstance(module, (layers.Linear4bit, layers.Linear8bitLt))
        }
        devices = _devices(model, device_map, max_memory, dtype)
        found = {name: module for name, module in weights.items() if name in checkpoint}
        beside = [name for name in checkpoint if _is_statistic(name, weights)]
        missing = [name for name in weights if name not in found]
        if missing:
            raise CheckpointError(
                f"{checkpoint}: it lacks {missing[0]} and {len(missing) - 1} more weights, which "
                "cannot be initialized as quantized ones"
            )
        report = None
        for part in self._parts(checkpoint, found, beside, devices, dtype):
            loading = Loading(checkpoint, **options)
            for device, name_dtype, names in part:
                loading.add(device, name_dtype, names)
            loading.start()
            tensors = loading.result()
            report = loading.report if report is None else report.plus(loading.report)
            for name in [name for name in tensors if name in found]:
                self._set(found[name], name, tensors)
        apart = {*found, *beside}
        rest = fill(
            model,
            checkpoint.renamed(lambda name: None if name in apart else name),
            device_map=devices,
            dtype=dtype,
            strict=False,
            ignore_missing=apart.__contains__,
            **options,
        )
        _mark(model, self._config, "bitsandbytes")
        model.is_loaded_in_4bit = bool(self._config.load_in_4bit)  # type: ignore[assignment]
        model.is_loaded_in_8bit = bool(self._config.load_in_8bit)  # type: ignore[assignment]
        if report is None:
            return rest
        total = report.plus(rest)
        total.missing_keys, total.unexpected_keys = rest.missing_keys, rest.unexpected_keys
        total.mismatched_keys, total.error_msgs = rest.mismatched_keys, rest.error_msgs
        return total

    def _parts(
        self,
        checkpoint: Checkpoint,
        found: Mapping[str, torch.nn.Module],
        beside: list[str],
        devices: Mapping[str, torch.device | str],
        dtype: torch.dtype | str,
    ) -> Iterator[list[tuple[torch.device, str | None, list[str]]]]:
        """Loads of bounded size: (device, dtype, names), the statistics of a weight with it."""
        cast = None if self._pre_quantized else parse_dtype(dtype)
        of_weight: dict[str, list[str]] = {name: [name] for name in found}
        for name in beside:
            of_weight[_weight_of(name)].append(name)
        device_of = {
            name: device
            for device, names in placement.assign(found, devices).items()
            for name in names
        }
        part: dict[torch.device, list[str]] = {}
        held = 0
        for weight, names in of_weight.items():
            device = device_of[weight]
            if not isinstance(device, torch.device):
                raise ArgumentError(
                    f"device_map: {weight} would stay on the disk, where nothing is quantized"
                )
            part.setdefault(device, []).extend(names)
            held += found[weight].weight.numel() * 4  # type: ignore[operator]
            if held >= _AT_ONCE:
                yield [(device, cast, chosen) for device, chosen in part.items()]
                part, held = {}, 0
        if part:
            yield [(device, cast, chosen) for device, chosen in part.items()]

    def _set(self, module: Any, name: str, tensors: dict[str, torch.Tensor]) -> None:
        layers = _bitsandbytes()
        value = tensors.pop(name)
        old = module.weight
        if isinstance(module, layers.Linear4bit):
            if self._pre_quantized:
                stats = {key: t for key, t in tensors.items() if key.startswith(f"{name}.")}
                module.weight = layers.Params4bit.from_prequantized(
                    data=value,
                    quantized_stats=stats,
                    requires_grad=False,
                    device=value.device,
                    module=module,
                )
            else:
                new = layers.Params4bit(value, requires_grad=False, **old.__dict__)
                module.weight = new.to(value.device)
            return
        options = {key: item for key, item in old.__dict__.items() if key != "SCB"}
        if self._pre_quantized:
            options["SCB"] = tensors[f"{name.removesuffix('weight')}SCB"]
        new = layers.Int8Params(value.to("cpu"), requires_grad=False, **options)
        module.weight = new.to(value.device)


def _bitsandbytes() -> Any:
    # By name: its types are not declared.
    return importlib.import_module("bitsandbytes.nn")


class _TorchAo:
    def __init__(self, config: Any) -> None:
        self._config = config

    def load(
        self,
        model: torch.nn.Module,
        checkpoint: Checkpoint,
        dtype: torch.dtype | str | None,
        device_map: Any,
        max_memory: Mapping[Any, Any] | None,
        **options: Any,
    ) -> LoadReport:
        from torchao.quantization import quantize_

        if dtype is None:
            dtype = torch.bfloat16  # diffusers' default for torchao
        skipped = [*(self._config.modules_to_not_convert or ()), *_kept(model)]
        devices = _devices(model, device_map, max_memory, dtype)
        report = fill(model, checkpoint, device_map=devices, dtype=dtype, strict=False, **options)
        if report.missing_keys:
            raise CheckpointError(
                f"{checkpoint}: it lacks {report.missing_keys[0]} and "
                f"{len(report.missing_keys) - 1} more, which cannot be initialized when quantizing"
            )

        def chosen(module: torch.nn.Module, name: str) -> bool:
            parts = name.split(".")
            return isinstance(module, torch.nn.Linear) and not any(
                skip in parts or name == skip or name.startswith(f"{skip}.") for skip in skipped
            )

        quantize_(model, self._config.get_apply_tensor_subclass(), chosen)
        _mark(model, self._config, "torchao")
        return report


def _kept(model: torch.nn.Module) -> list[str]:
    return list(getattr(model, "_keep_in_fp32_modules", None) or ())


def _devices(
    model: torch.nn.Module,
    device_map: Any,
    max_memory: Mapping[Any, Any] | None,
    dtype: torch.dtype | str,
) -> dict[str, torch.device | str]:
    if device_map is None:
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    return placement.resolve_device_map(
        model,
        device_map,
        max_memory=max_memory,
        dtype=dtype if isinstance(dtype, torch.dtype) else None,
        keep_in_fp32=_kept(model),
    )


def _weight_of(name: str) -> str:
    """The weight that a tensor tells about."""
    for ending in _STATISTICS_8BIT:
        if name.endswith(f".{ending}"):
            return f"{name[: -len(ending)]}weight"
    return name[: name.index(".weight.") + len(".weight")]


def _is_statistic(name: str, weights: Mapping[str, Any]) -> bool:
    if name.rpartition(".")[2] in _STATISTICS_8BIT:
        return _weight_of(name) in weights
    return ".weight." in name and any(part in name for part in _STATISTICS)


def _mark(model: Any, config: Any, method: str) -> None:
    model.is_quantized = True
    model.quantization_method = getattr(config, "quant_method", method)
    register: Callable[..., None] | None = getattr(model, "register_to_config", None)
    if register is not None:
        register(quantization_config=config)
