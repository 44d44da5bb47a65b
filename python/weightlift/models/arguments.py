"""Parses the arguments of ``ModelMixin.from_pretrained``."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from weightlift.checkpoint.hub import HubArguments
from weightlift.core import dtypes
from weightlift.core.errors import ArgumentError
from weightlift.core.given import check_flag
from weightlift.load.options import LoadOptions
from weightlift.module.device_map import unused_max_memory
from weightlift.module.placement import PlacementPolicy, check_memory_format

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

    from weightlift.models.loadable import LoadableModel

__all__ = ["PretrainedArguments", "QuantizationArguments"]

_log = logging.getLogger("weightlift")

# Arguments with their defaults, without those of the Hub.
_DEFAULTS: dict[str, Any] = {
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
    "background": False,
}
# On, off or ``None``; ``progress`` may also be a function.
_FLAGS = (
    "use_safetensors",
    *(n for n, d in _DEFAULTS.items() if isinstance(d, bool) and n != "progress"),
)
# Arguments that diffusers lacks: a class may have constructor arguments of these names.
_NOT_OF_DIFFUSERS = frozenset(
    (
        "device_mesh",
        "tp_plan",
        "mode",
        "pin_memory",
        "memory_format",
        "verify",
        "progress",
        "background",
    )
)


@dataclasses.dataclass(frozen=True)
class QuantizationArguments:
    """The quantization that the caller requests; the flags are deprecated forms."""

    config: Any = None
    load_in_8bit: bool = False
    load_in_4bit: bool = False

    @property
    def names(self) -> list[str]:
        """The names of the given arguments."""
        asked = {
            "quantization_config": self.config,
            "load_in_8bit": self.load_in_8bit,
            "load_in_4bit": self.load_in_4bit,
        }
        return [name for name, value in asked.items() if value]


@dataclasses.dataclass(frozen=True)
class PretrainedArguments:
    """The arguments of one call.

    Attributes:
        path: a folder, a file or the id of a repository.
        hub: the arguments for access to the repository.
        config_overrides: arguments of the class's constructor.
        placement: the devices and dtypes of the tensors.
        options: how to load.
        quantization: the requested quantization.
        low_cpu_mem_usage: build the module on ``meta``.
        tensor_parallel: whether ``device_mesh`` or ``tp_plan`` was given.
    """

    path: str
    hub: HubArguments
    config_overrides: Mapping[str, Any]
    placement: PlacementPolicy
    options: LoadOptions
    quantization: QuantizationArguments
    variant: str | None
    use_safetensors: bool | None
    from_flax: bool
    low_cpu_mem_usage: bool
    ignore_mismatched_sizes: bool
    output_loading_info: bool
    device_mesh: DeviceMesh | None
    tp_plan: Mapping[str, ParallelStyle] | None

    @classmethod
    def parse(
        cls, model_class: type[LoadableModel], path: str, keywords: Mapping[str, Any]
    ) -> PretrainedArguments:
        """Parses the keyword arguments of ``model_class.from_pretrained(path, ...)``.

        Raises:
            ArgumentError: an argument is unknown, or contradicts another.
        """
        rest = dict(keywords)
        own = inspect.signature(model_class.__init__).parameters
        values = {
            name: default if name in _NOT_OF_DIFFUSERS and name in own else rest.pop(name, default)
            for name, default in _DEFAULTS.items()
        }
        hub = HubArguments.pop_from(rest)
        _refuse_unknown(model_class, rest)
        for name in _FLAGS:
            if values[name] is not None:
                check_flag(name, values[name])
        _refuse_contradictions(values)
        check_memory_format(values["memory_format"])
        mode = values["mode"]
        return cls(
            path=path,
            hub=hub,
            config_overrides=rest,
            placement=PlacementPolicy(
                values["device_map"],
                values["max_memory"],
                offload=values["offload_folder"] is not None,
                dtype=_parse_dtype(values["dtype"], values["torch_dtype"]),
                memory_format=values["memory_format"],
            ),
            options=LoadOptions(
                "read" if values["disable_mmap"] and mode == "auto" else mode,
                values["pin_memory"] or False,
                values["verify"] or False,
                values["progress"] or False,
                background=values["background"] or False,
            ),
            quantization=QuantizationArguments(
                values["quantization_config"], values["load_in_8bit"], values["load_in_4bit"]
            ),
            variant=values["variant"],
            use_safetensors=values["use_safetensors"],
            from_flax=values["from_flax"],
            low_cpu_mem_usage=values["low_cpu_mem_usage"],
            ignore_mismatched_sizes=values["ignore_mismatched_sizes"],
            output_loading_info=values["output_loading_info"],
            device_mesh=values["device_mesh"],
            tp_plan=values["tp_plan"],
        )

    def pinned(self) -> PretrainedArguments:
        """The same arguments with the current commit of a Hub repository."""
        if os.path.exists(self.path):  # noqa: PTH110 - pathlib raises for what no file can be named
            return self
        return dataclasses.replace(self, hub=self.hub.pinned(self.path))

    @property
    def tensor_parallel(self) -> bool:
        return self.device_mesh is not None or self.tp_plan is not None


def _refuse_unknown(model_class: type[LoadableModel], rest: Mapping[str, Any]) -> None:
    """Refuses arguments of neither ``from_pretrained`` nor the config."""
    parameters = list(inspect.signature(model_class.__init__).parameters.values())[1:]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    own = [parameter.name for parameter in parameters if parameter.kind not in variable]
    ignored = set(model_class.ignore_for_config)
    known = {*own, *model_class._deprecated_kwargs} - ignored
    for name in rest:
        if name in ignored:
            raise ArgumentError(
                f"{model_class.__name__}.from_pretrained takes no {name!r}, because the class "
                "excludes it from its config (ignore_for_config): set it after the load"
            )
        if name not in known:
            hub = HubArguments.__dataclass_fields__
            near = difflib.get_close_matches(name, [*known, *_DEFAULTS, *hub], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(
                f"{model_class.__name__}.from_pretrained has no argument {name!r}, nor has "
                f"{model_class.__name__}.__init__{hint}"
            )


def _refuse_contradictions(values: Mapping[str, Any]) -> None:
    unused = unused_max_memory(values["device_map"], values["max_memory"])
    if unused is not None:
        _log.warning("%s", unused)
    device_map, low_memory = values["device_map"], values["low_cpu_mem_usage"]
    if values["disable_mmap"] and values["mode"] == "map":
        raise ArgumentError("disable_mmap=True and mode='map' contradict each other: give one")
    if values["device_mesh"] is not None or values["tp_plan"] is not None:
        for other in ("device_map", "quantization_config", "load_in_8bit", "load_in_4bit"):
            if values[other]:
                raise ArgumentError(
                    f"{other}= cannot be combined with device_mesh= and tp_plan=: leave it out"
                )
        if not low_memory:
            raise ArgumentError("device_mesh= and tp_plan= need low_cpu_mem_usage=True")
    if values["background"]:
        for other in ("device_mesh", "tp_plan", "quantization_config", "load_in_8bit"):
            if values[other]:
                raise ArgumentError(
                    f"background=True cannot be combined with {other}=: leave out one of them"
                )
        if values["load_in_4bit"]:
            raise ArgumentError(
                "background=True cannot be combined with load_in_4bit=: leave out one of them"
            )
        if not low_memory:
            raise ArgumentError(
                "background=True needs low_cpu_mem_usage=True, because a real model could be used "
                "with random weights"
            )
    if device_map is not None and not low_memory:
        raise ArgumentError(
            f"device_map={device_map!r} needs low_cpu_mem_usage=True, because a real model would "
            "be built on the CPU first"
        )


def _parse_dtype(dtype: Any, torch_dtype: Any) -> torch.dtype | str | None:
    wanted = dtype if dtype is not None else torch_dtype
    if isinstance(wanted, str) and wanted == "auto":
        return wanted
    name = dtypes.parse_dtype(wanted)
    return None if name is None else dtypes.to_torch(name)
