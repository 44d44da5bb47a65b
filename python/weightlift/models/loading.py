"""``ModelMixin.from_pretrained``: the configuration, the module, and its weights.

Finds the configuration and the checkpoint, starts reading before the module is built if possible,
fills it (one process, several ranks, or a quantizer), and warns of missing and unused weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from weightlift.checkpoint.checkpoint import Checkpoint, describe_location
from weightlift.checkpoint.hub import HubArguments, download, list_files
from weightlift.checkpoint.integrity import identity_of
from weightlift.checkpoint.open_checkpoint import open_checkpoint
from weightlift.core import dtypes, gc_pause
from weightlift.core.devices import loadable_device
from weightlift.core.errors import ArgumentError, CheckpointError
from weightlift.core.report import LoadReport
from weightlift.load.prefetch import PrefetchedLoad
from weightlift.load.slots_ahead import slots_ahead
from weightlift.models.arguments import PretrainedArguments
from weightlift.models.building import Builder
from weightlift.models.loadable import LoadableModel
from weightlift.module.background.waiting import tensors_to_come
from weightlift.module.device_map import known_devices, single_entry
from weightlift.module.fill import fill
from weightlift.module.matching import MatchPolicy, format_names
from weightlift.module.parameters import Gathered, gather

if TYPE_CHECKING:
    from weightlift.distributed.collective import TensorParallel
    from weightlift.models.quantization import Quantizer

__all__ = ["load_pretrained"]

_log = logging.getLogger("weightlift")
_Model = TypeVar("_Model", bound=LoadableModel)

_FLAX_NAMES = ("diffusion_flax_model.msgpack", "flax_model.msgpack")


def load_pretrained(
    cls: type[_Model], path: str, keywords: Mapping[str, Any]
) -> tuple[_Model, LoadReport, PretrainedArguments]:
    """The model of ``cls.from_pretrained(path, **keywords)``, and the report."""
    arguments = PretrainedArguments.parse(cls, path, keywords)
    ahead = slots_ahead(known_devices(arguments.placement.device_map), casts=True)
    with _tensor_parallel(arguments) as parallel, ahead:
        arguments = arguments.pinned()
        source = _open(cls, arguments)
        builder = Builder(
            cls,
            source.config,
            source.overrides,
            _built_dtype(arguments.placement.dtype, source.checkpoint),
        )
        prefetched = _prefetch(cls, source, arguments)
        try:
            with gc_pause.paused():
                model = builder.build(empty=arguments.low_cpu_mem_usage)
                report = _fill(model, builder, source, arguments, parallel, prefetched)
        except BaseException:
            if prefetched is not None:
                prefetched.cancel()
            raise
    _warn_of_keys(cls, path, report)
    if arguments.placement.device_map is not None and "hf_device_map" not in vars(model):
        # As accelerate's dispatch_model sets it, which is not called for one device.
        held = itertools.chain(tensors_to_come(model), tensors_to_come(model, "_buffers"))
        vars(model)["hf_device_map"] = next(({"": device} for _, device, _ in held), {})
    model.register_to_config(_name_or_path=path)
    return model, report, arguments


@dataclasses.dataclass(frozen=True)
class _Source:
    """The sources of a model.

    Attributes:
        config: the configuration.
        overrides: the caller's values that replace those of the configuration.
        checkpoint: the weights; ``None`` for Flax weights, which need the model's shapes.
        quantizer: fills the model, or ``None``.
    """

    config: Mapping[str, Any]
    overrides: Mapping[str, Any]
    checkpoint: Checkpoint | None
    quantizer: Quantizer | None


@contextlib.contextmanager
def _tensor_parallel(arguments: PretrainedArguments) -> Iterator[TensorParallel | None]:
    if not arguments.tensor_parallel:
        yield None
        return
    from weightlift.distributed.collective import tensor_parallel

    with tensor_parallel(arguments.device_mesh, arguments.tp_plan) as parallel:
        yield parallel


def _open(cls: type[LoadableModel], arguments: PretrainedArguments) -> _Source:
    config, overrides = _load_config(cls, arguments)
    quantizer = _quantizer(arguments, config)
    checkpoint = None
    if not arguments.from_flax:
        checkpoint = open_checkpoint(
            arguments.path,
            variant=arguments.variant,
            use_safetensors=arguments.use_safetensors,
            **dataclasses.asdict(arguments.hub),
        )
    return _Source(config, overrides, checkpoint, quantizer)


def _load_config(
    cls: type[LoadableModel], arguments: PretrainedArguments
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The configuration, and the caller's values that replace its own."""
    path, hub = arguments.path, arguments.hub
    if path.endswith(".dduf"):
        from weightlift.checkpoint.dduf import open_dduf

        entry = f"{hub.subfolder}/{cls.config_name}" if hub.subfolder else str(cls.config_name)
        return open_dduf(path).read_json(entry), arguments.config_overrides
    folder = str(Path(path).parent) if Path(path).is_file() else path
    config, unused, _ = cls.load_config(
        folder,
        return_unused_kwargs=True,
        return_commit_hash=True,
        **dataclasses.asdict(hub),
        **arguments.config_overrides,
    )
    return dict(config), unused


def _quantizer(arguments: PretrainedArguments, config: Mapping[str, Any]) -> Quantizer | None:
    saved = config.get("quantization_config")
    wanted = arguments.quantization
    if saved is None and not wanted.names:
        return None
    if not arguments.low_cpu_mem_usage:
        raise ArgumentError("quantization during the load needs low_cpu_mem_usage=True")
    from weightlift.models.quantization import choose_quantizer

    return choose_quantizer(
        wanted.config,
        saved,
        load_in_8bit=wanted.load_in_8bit,
        load_in_4bit=wanted.load_in_4bit,
    )


def _built_dtype(
    dtype: torch.dtype | str | None, checkpoint: Checkpoint | None
) -> torch.dtype | None:
    """The dtype of the build, which tensors missing in the checkpoint keep."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto" and checkpoint is not None:
        for name, _ in checkpoint.headers().values():
            if name in dtypes.CASTABLE:
                return dtypes.to_torch(name)
    return None


def _prefetch(
    cls: type[LoadableModel], source: _Source, arguments: PretrainedArguments
) -> PrefetchedLoad | None:
    """Starts reading while the module is built, if one device gets all tensors."""
    checkpoint, placement = source.checkpoint, arguments.placement
    if checkpoint is None or source.quantizer is not None:
        return None
    if arguments.tensor_parallel or not arguments.low_cpu_mem_usage:
        return None
    if arguments.options.background:
        return None  # the order of the modules is still unknown
    alone = single_entry("cpu" if placement.device_map is None else placement.device_map)
    if not isinstance(alone, (str, int, torch.device)):
        return None  # or an error later
    device = loadable_device(alone)
    expected = torch.get_default_dtype() if placement.dtype is None else placement.dtype
    if arguments.options.mode == "map":
        expected = "auto"  # no cast
    kept = frozenset(cls._keep_in_fp32_modules or ())
    ignored = _matcher(cls._keys_to_ignore_on_load_unexpected)
    names = None
    if kept or ignored:
        names = [
            name
            for name in checkpoint
            if kept.isdisjoint(name.split(".")) and not (ignored and ignored(name))
        ]
    return PrefetchedLoad.start(
        checkpoint, device, dtypes.parse_dtype(expected), names, arguments.options
    )


def _fill(
    model: _Model,
    builder: Builder[_Model],
    source: _Source,
    arguments: PretrainedArguments,
    parallel: TensorParallel | None,
    prefetched: PrefetchedLoad | None,
) -> LoadReport:
    """Fills the model and sets evaluation mode."""
    checkpoint = source.checkpoint
    if checkpoint is None:
        checkpoint = _open_flax(arguments.path, arguments.hub, model)
    rename = _former_attention_names(model, checkpoint)
    if rename is not None:
        checkpoint = checkpoint.renamed(rename)
    _refuse_another_model(model, checkpoint)
    placement, options = arguments.placement, arguments.options
    matching = MatchPolicy(
        strict=False,
        ignore_mismatched_sizes=arguments.ignore_mismatched_sizes,
        ignore_unexpected=_matcher(model._keys_to_ignore_on_load_unexpected),
        initialize=builder.initialized,
        compare_ties=True,
    )
    if source.quantizer is not None:
        if options.background:
            raise ArgumentError(
                "background=True cannot be combined with a quantized checkpoint, whose layers are "
                "made from the weights: leave it out"
            )
        report = source.quantizer.load(model, checkpoint, placement, matching, options)
        model.eval()
    elif parallel is not None:
        parallel.cut(model)
        report = fill(model, checkpoint, placement, matching, options, new_load=parallel.new_load)
        model.eval()
    else:
        gathered = gather(model)
        report = fill(
            model,
            checkpoint,
            placement,
            matching,
            options,
            prefetched=prefetched,
            gathered=gathered,
        )
        _evaluate(model, gathered)
    return report


def _open_flax(path: str, hub: HubArguments, model: torch.nn.Module) -> Checkpoint:
    from weightlift.checkpoint.flax_msgpack import load_flax_state_dict

    folder = Path(path, hub.subfolder or "")
    if folder.is_dir():
        found = [folder / name for name in _FLAX_NAMES if (folder / name).is_file()]
    else:
        there = list_files(path, hub)
        found = [download(path, name, hub) for name in _FLAX_NAMES if name in there][:1]
    if not found:
        raise CheckpointError(f"{folder}: has neither {' nor '.join(_FLAX_NAMES)}")
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
    if not any(map(str.endswith, checkpoint, itertools.repeat(endings))):
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
    """Refuses a checkpoint without a common name, for which diffusers returns a random model."""
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
        f"{describe_location(checkpoint)} has the weights of another model than "
        f"{type(model).__name__}; they share no name:\n" + "\n".join(problems)
    )


def _evaluate(model: torch.nn.Module, gathered: Gathered) -> None:
    """``eval()``; bypasses ``__setattr__``, which searches three dictionaries, if no module
    overrides ``train``."""
    if all(
        getattr(kind, name) is getattr(torch.nn.Module, name)
        for kind in gathered.classes
        for name in ("eval", "train", "__setattr__")
    ):
        for module in gathered.modules:
            module.__dict__["training"] = False
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
            "%s: %s does not have these weights, so they were not used: %s",
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
            "%s lacks these weights of %s, which were newly initialized: %s. Train the model "
            "before you use its predictions",
            path,
            cls.__name__,
            ", ".join(fresh),
        )
