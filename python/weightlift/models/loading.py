"""What ``ModelMixin.from_pretrained`` decides: what its arguments mean and which contradict each
other, which configuration and checkpoint belong together, whether reading may begin before the
module is built, who fills it (one process, a rank of several, a quantizer), and what is said of
weights that are missing or left over."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import itertools
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from weightlift.checkpoint.checkpoint import Checkpoint, describe_location
from weightlift.checkpoint.hub import HubArguments, download, list_files
from weightlift.checkpoint.integrity import identity_of
from weightlift.checkpoint.open_checkpoint import open_checkpoint
from weightlift.core import dtypes, gc_pause
from weightlift.core.devices import parse_device
from weightlift.core.errors import ArgumentError, CheckpointError
from weightlift.core.report import LoadReport
from weightlift.load.options import LoadOptions, Mode
from weightlift.load.prefetch import PrefetchedLoad
from weightlift.models.building import Builder
from weightlift.module.device_map import single_entry
from weightlift.module.fill import fill
from weightlift.module.matching import MatchPolicy, format_names
from weightlift.module.parameters import gather
from weightlift.module.placement import PlacementPolicy

if TYPE_CHECKING:
    from weightlift.distributed.collective import TensorParallel
    from weightlift.models.quantization import Quantizer

__all__ = ["load_pretrained"]

_log = logging.getLogger("weightlift")
_Model = TypeVar("_Model", bound=torch.nn.Module)

_FLAX_NAMES = ("diffusion_flax_model.msgpack", "flax_model.msgpack")
# Arguments of from_pretrained with their defaults, apart from those of the Hub.
_ARGUMENTS: dict[str, Any] = {
    "torch_dtype": None,
    "dtype": None,
    "device_map": None,
    "device_mesh": None,
    "tp_plan": None,
    "max_memory": None,
    "offload_folder": None,
    "offload_state_dict": None,
    "low_cpu_mem_usage": True,
    "ignore_mismatched_sizes": False,
    "output_loading_info": False,
    "variant": None,
    "use_safetensors": None,
    "from_flax": False,
    "quantization_config": None,
    "load_in_8bit": False,
    "load_in_4bit": False,
    "disable_mmap": False,
    "mode": "auto",
    "pin_memory": False,
    "memory_format": None,
    "verify": False,
    "progress": False,
}
# Of these, those that diffusers does not have: a class may have arguments of these names.
_OURS = (
    "device_mesh",
    "tp_plan",
    "mode",
    "pin_memory",
    "memory_format",
    "verify",
    "progress",
)


def load_pretrained(
    cls: type[_Model], path: str | os.PathLike[str], arguments: dict[str, Any]
) -> _Model:
    """``cls.from_pretrained(path, **arguments)``; the arguments are used up."""
    own = inspect.signature(cls.__init__).parameters
    given = {
        name: default if name in _OURS and name in own else arguments.pop(name, default)
        for name, default in _ARGUMENTS.items()
    }
    if given["device_mesh"] is None and given["tp_plan"] is None:
        return _load(cls, os.fspath(path), given, arguments, None)
    for other in ("device_map", "quantization_config", "load_in_8bit", "load_in_4bit"):
        if given[other]:
            raise ArgumentError(f"{other}= goes not together with device_mesh= and tp_plan=")
    if not given["low_cpu_mem_usage"]:
        raise ArgumentError("device_mesh= and tp_plan= need low_cpu_mem_usage=True")
    from weightlift.distributed.collective import tensor_parallel

    with tensor_parallel(given["device_mesh"], given["tp_plan"]) as parallel:
        return _load(cls, os.fspath(path), given, arguments, parallel)


def _load(
    cls: type[_Model],
    path: str,
    given: Mapping[str, Any],
    kwargs: dict[str, Any],
    parallel: TensorParallel | None,
) -> _Model:
    hub = HubArguments.pop_from(kwargs)
    _refuse_unknown(cls, kwargs)
    dtype = _parse_dtype(given["dtype"], given["torch_dtype"])
    device_map = given["device_map"]
    if device_map is not None and not given["low_cpu_mem_usage"]:
        raise ArgumentError(
            f"device_map={device_map!r} needs low_cpu_mem_usage=True: built for real, the "
            "model would be on the CPU first"
        )
    mode: Mode = "read" if given["disable_mmap"] and given["mode"] == "auto" else given["mode"]
    if not os.path.exists(path):  # noqa: PTH110
        hub = hub.pinned(path)

    config, overrides = _load_config(cls, path, hub, kwargs)
    quantizer = _quantizer(given, config)
    if given["from_flax"]:
        checkpoint = None
    else:
        checkpoint = open_checkpoint(
            path,
            variant=given["variant"],
            use_safetensors=given["use_safetensors"],
            **dataclasses.asdict(hub),
        )
    options = LoadOptions(mode, given["pin_memory"], given["verify"], given["progress"])
    placement = PlacementPolicy(
        device_map,
        given["max_memory"],
        offload=given["offload_folder"] is not None,
        dtype=dtype,
        memory_format=given["memory_format"],
    )
    builder: Builder[_Model] = Builder(
        functools.partial(cls.from_config, config, **overrides),  # type: ignore[attr-defined]
        _built_dtype(dtype, checkpoint),
    )
    early = None
    modules = None
    if (
        checkpoint is not None
        and quantizer is None
        and given["low_cpu_mem_usage"]
        and parallel is None
    ):
        early = _begin(cls, checkpoint, device_map, dtype, options)
    try:
        with gc_pause.paused():
            model = builder.build(empty=given["low_cpu_mem_usage"])
            if checkpoint is None:
                checkpoint = _open_flax(path, hub, model)
            rename = _former_attention_names(model, checkpoint)
            if rename is not None:
                checkpoint = checkpoint.renamed(rename)
            _refuse_another_model(model, checkpoint)
            matching = MatchPolicy(
                strict=False,
                ignore_mismatched_sizes=given["ignore_mismatched_sizes"],
                ignore_unexpected=_matcher(
                    getattr(cls, "_keys_to_ignore_on_load_unexpected", None)
                ),
                initialize=functools.partial(builder.initialized, model),
            )
            if quantizer is not None:
                report = quantizer.load(model, checkpoint, placement, matching, options)
            elif parallel is not None:
                parallel.cut(model)
                new_load = parallel.new_load
                report = fill(model, checkpoint, placement, matching, options, new_load=new_load)
            else:
                refs, modules = gather(model)
                report = fill(
                    model, checkpoint, placement, matching, options, prefetched=early, refs=refs
                )
    except BaseException:
        if early is not None:
            early.cancel()
        raise
    _warn_of_keys(cls, path, report)
    if device_map is not None and "hf_device_map" not in vars(model):
        # As accelerate's dispatch_model has it, which was not needed for one device.
        first = next(itertools.chain(model.parameters(), model.buffers()), None)
        vars(model)["hf_device_map"] = {} if first is None else {"": first.device}
    model.register_to_config(_name_or_path=path)  # type: ignore[operator]
    _evaluate(model, modules)
    if given["output_loading_info"]:
        return model, {  # type: ignore[return-value]
            "missing_keys": report.missing_keys,
            "unexpected_keys": report.unexpected_keys,
            "mismatched_keys": report.mismatched_keys,
            "error_msgs": report.error_msgs,
        }
    return model


def _parse_dtype(dtype: Any, torch_dtype: Any) -> torch.dtype | str | None:
    wanted = dtype if dtype is not None else torch_dtype
    if wanted is None or (isinstance(wanted, str) and wanted == "auto"):
        return wanted
    name = dtypes.parse_dtype(wanted)
    assert name is not None
    return dtypes.to_torch(name)


def _built_dtype(
    dtype: torch.dtype | str | None, checkpoint: Checkpoint | None
) -> torch.dtype | None:
    """In which the module is built: what the checkpoint does not hold takes this dtype."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto" and checkpoint is not None:
        for name, _ in checkpoint.headers().values():
            if name in dtypes.CASTABLE:
                return dtypes.to_torch(name)
    return None


def _load_config(
    cls: type[Any], path: str, hub: HubArguments, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration, and what of ``kwargs`` is not one of its overrides."""
    if path.endswith(".dduf"):
        from weightlift.checkpoint.dduf import open_dduf

        entry = f"{hub.subfolder}/{cls.config_name}" if hub.subfolder else cls.config_name
        return open_dduf(path).read_json(entry), kwargs
    folder = str(Path(path).parent) if Path(path).is_file() else path
    config, unused, _ = cls.load_config(
        folder,
        return_unused_kwargs=True,
        return_commit_hash=True,
        **dataclasses.asdict(hub),
        **kwargs,
    )
    return dict(config), unused


def _refuse_unknown(cls: type[torch.nn.Module], arguments: Mapping[str, Any]) -> None:
    """What is neither an argument of ``from_pretrained`` nor of the config."""
    taken = [
        name
        for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    ignored = getattr(cls, "ignore_for_config", ())
    known = {*taken, *getattr(cls, "_deprecated_kwargs", ())} - {*ignored}
    for name in arguments:
        if name in ignored:
            raise ArgumentError(
                f"{cls.__name__}.from_pretrained takes no {name!r}: the class leaves it out of its "
                "config (ignore_for_config)"
            )
        if name not in known:
            hub = HubArguments.__dataclass_fields__
            near = difflib.get_close_matches(name, [*known, *_ARGUMENTS, *hub], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(
                f"{cls.__name__}.from_pretrained has no argument {name!r}, nor has "
                f"{cls.__name__}.__init__{hint}"
            )


def _quantizer(given: Mapping[str, Any], config: Mapping[str, Any]) -> Quantizer | None:
    saved = config.get("quantization_config")
    names = ("quantization_config", "load_in_8bit", "load_in_4bit")
    if saved is None and not any(given[name] for name in names):
        return None
    if not given["low_cpu_mem_usage"]:
        raise ArgumentError("quantizing while loading needs low_cpu_mem_usage=True")
    from weightlift.models.quantization import choose_quantizer

    return choose_quantizer(
        given["quantization_config"],
        saved,
        load_in_8bit=given["load_in_8bit"],
        load_in_4bit=given["load_in_4bit"],
    )


def _begin(
    cls: type[torch.nn.Module],
    checkpoint: Checkpoint,
    device_map: Any,
    dtype: torch.dtype | str | None,
    options: LoadOptions,
) -> PrefetchedLoad | None:
    """Starts to read while the module is being built, where one device takes it all."""
    alone = single_entry("cpu" if device_map is None else device_map)
    if not isinstance(alone, (str, int, torch.device)):
        return None  # or to be refused
    device = parse_device(alone)
    believed = torch.get_default_dtype() if dtype is None else dtype
    if options.mode == "map":
        believed = "auto"  # nothing is cast
    kept = frozenset(getattr(cls, "_keep_in_fp32_modules", None) or ())
    ignored = _matcher(getattr(cls, "_keys_to_ignore_on_load_unexpected", None))
    names = None
    if kept or ignored:
        names = [
            name
            for name in checkpoint
            if kept.isdisjoint(name.split(".")) and not (ignored and ignored(name))
        ]
    return PrefetchedLoad.start(checkpoint, device, dtypes.parse_dtype(believed), names, options)


def _open_flax(path: str, hub: HubArguments, model: torch.nn.Module) -> Checkpoint:
    from weightlift.checkpoint.flax_msgpack import load_flax_state_dict

    folder = Path(path, hub.subfolder or "")
    if folder.is_dir():
        found = [folder / name for name in _FLAX_NAMES if (folder / name).is_file()]
    else:
        there = list_files(path, hub)
        found = [download(path, name, hub) for name in _FLAX_NAMES if name in there][:1]
    if not found:
        raise CheckpointError(f"{folder}: there is neither {' nor '.join(_FLAX_NAMES)} in it")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    file = (str(found[0]), identity_of(found[0].stat()))
    return Checkpoint([], in_memory=load_flax_state_dict(found[0], shapes), loaded=[file])


def _former_attention_names(
    model: torch.nn.Module, checkpoint: Checkpoint
) -> Callable[[str], str] | None:
    """The renaming for checkpoints of diffusers before 0.16, whose attention blocks had other
    names; blocks that may come from such a checkpoint carry a flag."""
    former = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    endings = tuple(f"{old}.{leaf}" for old in former for leaf in ("weight", "bias"))
    if not any(name.endswith(endings) for name in checkpoint):
        return None
    paths = [
        name for name, m in model.named_modules() if vars(m).get("_from_deprecated_attn_block")
    ]
    renames = {
        f"{path}.{old}.{leaf}": f"{path}.{new}.{leaf}"
        for path in paths
        for old, new in former.items()
        for leaf in ("weight", "bias")
        if f"{path}.{old}.{leaf}" in checkpoint
    }
    return (lambda name: renames.get(name, name)) if renames else None


def _refuse_another_model(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Nothing in common: diffusers returns a model that is random altogether."""
    if any(name in checkpoint for name, _ in model.named_parameters()):
        return
    wanted = model.state_dict().keys()
    if not (wanted and checkpoint and wanted.isdisjoint(checkpoint)):
        return
    problems = [
        *format_names("the model has and the checkpoint lacks", list(wanted)),
        *format_names("the checkpoint has and the model lacks", list(checkpoint)),
    ]
    raise CheckpointError(
        f"{describe_location(checkpoint)} holds the weights of another model than "
        f"{type(model).__name__}; no name is in both:\n" + "\n".join(problems)
    )


def _evaluate(model: torch.nn.Module, modules: Sequence[torch.nn.Module] | None) -> None:
    """``eval()``; where the modules are known and none has one of its own, without the way through
    ``__setattr__``, which looks at three dictionaries for each."""
    if modules is not None and all(
        getattr(kind, name) is getattr(torch.nn.Module, name)
        for kind in {*map(type, modules)}
        for name in ("eval", "train", "__setattr__")
    ):
        for module in modules:
            vars(module)["training"] = False
    else:
        model.eval()


def _matcher(patterns: list[str] | None) -> Callable[[str], bool] | None:
    if not patterns:
        return None
    compiled = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    return lambda name: compiled.search(name) is not None


def _warn_of_keys(cls: type[torch.nn.Module], path: str, report: LoadReport) -> None:
    if report.unexpected_keys:
        _log.warning(
            "%s: %s has no place for these weights, they were not used: %s",
            path,
            cls.__name__,
            ", ".join(report.unexpected_keys),
        )
    fresh = [*report.missing_keys]
    fresh += [
        f"{name} (shape {theirs} in the checkpoint, {ours} in the model)"
        for name, theirs, ours in report.mismatched_keys
    ]
    if fresh:
        _log.warning(
            "%s does not hold these weights of %s, which are newly initialized: %s. Train the "
            "model before you use its predictions",
            path,
            cls.__name__,
            ", ".join(fresh),
        )
