"""Pipelines: device maps by component, DDUF files, and reads ahead."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from weightlift.backends.diffusers.archive import current_archive, dduf_path, unpacked
from weightlift.backends.diffusers.arguments import corrected_arguments
from weightlift.backends.diffusers.context import temporary_value
from weightlift.backends.diffusers.files import load_all, open_files
from weightlift.backends.diffusers.prefetch import prefetch
from weightlift.checkpoint.resolve import resolve
from weightlift.core.devices import parse_device
from weightlift.core.errors import ArgumentError
from weightlift.core.settings import Settings
from weightlift.module.device_map import AUTOMATIC

if TYPE_CHECKING:
    import torch

__all__ = ["load_sub_model", "on_components", "pipeline_from_pretrained"]


@dataclasses.dataclass
class _Pipeline:
    """A running ``from_pretrained`` of a pipeline.

    Attributes:
        device_map: component, or module of it, -> device, if it is a dict.
        given: components that the caller has made.
        use_safetensors: the caller's argument.
        ended: set at the end.
    """

    device_map: Mapping[str, Any] | None
    given: frozenset[str]
    use_safetensors: bool | None
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)

    def of(self, component: str) -> Any:
        """The device map of a component: the entry of its name, else of ``""``."""
        if self.device_map is None:
            return None
        own = {}
        for name, device in self.device_map.items():
            head, _, module = name.partition(".")
            if head == component:
                own[module] = device
        if not own and "" in self.device_map:
            own = {"": self.device_map[""]}
        if set(own) != {""}:
            return own or None
        alone = own[""]
        return alone if alone is None or isinstance(alone, Mapping) or alone in AUTOMATIC else own

    def check(self, config: Mapping[str, Any]) -> None:
        names = {name.partition(".")[0] for name in self.device_map or ()} - {""}
        unknown = sorted(names - set(config))
        if unknown:
            there = ", ".join(name for name, value in config.items() if isinstance(value, list))
            raise ArgumentError(
                f"device_map: the pipeline has no component {unknown[0]!r}; it has {there}"
            )

    @property
    def has_hooks(self) -> bool:
        """Whether components compute on different devices, or have no device of their own."""
        return self.main_device != "cpu" or "disk" in self._devices()

    @property
    def main_device(self) -> torch.device | str:
        """The device for computation with weights on the disk: the map's first GPU, or the CPU."""
        for device in self._devices():
            if device is not None and device not in (*AUTOMATIC, "cpu", "disk"):
                return parse_device(device)
        return "cpu"

    def _devices(self) -> Iterator[Any]:
        for device in (self.device_map or {}).values():
            yield from device.values() if isinstance(device, Mapping) else (device,)


_pipeline: ContextVar[_Pipeline | None] = ContextVar("weightlift_diffusers_pipeline", default=None)


def pipeline_from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        path = pretrained_model_name_or_path
        device_map = kwargs.get("device_map")
        by_component = device_map if isinstance(device_map, Mapping) else None
        if by_component is not None:
            kwargs["device_map"] = None
        pipeline = _Pipeline(by_component, frozenset(kwargs), kwargs.get("use_safetensors"))
        dduf_file = kwargs.pop("dduf_file", None)
        with contextlib.ExitStack() as stack:
            folder = path
            if dduf_file is not None:
                folder = stack.enter_context(unpacked(dduf_path(path, dduf_file, kwargs)))
            stack.enter_context(corrected_arguments(folder, kwargs))
            stack.enter_context(temporary_value(_pipeline, pipeline))
            stack.callback(pipeline.ended.set)
            made = original(cls, folder, **kwargs)
            if dduf_file is not None:
                made.register_to_config(_name_or_path=path)
                for name, part in made.components.items():
                    if hasattr(part, "register_to_config"):  # it has the temporary folder's
                        part.register_to_config(_name_or_path=f"{dduf_file}/{name}")
        if pipeline.device_map is not None:
            made.hf_device_map = dict(pipeline.device_map)
        return made

    return from_pretrained


def on_components(original: Callable[..., Any]) -> Callable[..., Any]:
    """Called when the pipeline's folder exists and no component is loaded yet."""

    def _identify_model_variants(folder: Any, variant: Any, config: Mapping[str, Any]) -> Any:
        variants = original(folder, variant, config)
        pipeline = _pipeline.get()
        if pipeline is not None:
            pipeline.check(config)
            jobs = [
                (Path(folder, name), variants.get(name))
                for name, value in config.items()
                if isinstance(value, (list, tuple))
                and value[0] is not None
                and name not in pipeline.given
                and pipeline.of(name) != {"": "disk"}
            ]
            if current_archive.get() is None and Settings.current().populate is not False:
                threading.Thread(
                    target=prefetch,
                    args=(jobs, pipeline.use_safetensors, pipeline.ended),
                    name="weightlift prefetch",
                    daemon=True,
                ).start()
        return variants

    return _identify_model_variants


def load_sub_model(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def load_sub_model(*args: Any, **kwargs: Any) -> Any:
        pipeline = _pipeline.get()
        if pipeline is None:
            return original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        device_map = pipeline.of(given["name"])
        if isinstance(device_map, Mapping):
            # diffusers removes the hooks of a component with a device map, and has no disk.
            simple = set(device_map) == {""} and device_map[""] not in ("cpu", "disk")
            device_map = dict(device_map) if simple else MappingProxyType(device_map)
        if pipeline.device_map is not None:
            given["device_map"] = device_map
        made = _from_archive(given)
        if made is None:
            made = original(*bound.args, **bound.kwargs)
        if pipeline.has_hooks and (device_map is None or isinstance(device_map, MappingProxyType)):
            _compute_on(made, device_map or {"": "cpu"}, pipeline.main_device)
        return made

    return load_sub_model


def _compute_on(
    component: Any, device_map: Mapping[str, Any], main_device: torch.device | str
) -> None:
    """Adds hooks to a component without its own GPU: on the CPU they move its inputs there; on the
    disk it computes on the main device."""
    import torch

    devices = set(device_map.values())
    if not isinstance(component, torch.nn.Module) or len(devices) != 1:
        return
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_module

    options: dict[str, Any] = {
        "device_map": dict(device_map),
        "skip_keys": getattr(component, "_skip_keys", None),
    }
    if devices == {"cpu"}:
        dispatch_model(component, main_device="cpu", force_hooks=True, **options)
    elif devices == {"disk"}:
        weights = _weights_of_hooks(component)
        remove_hook_from_module(component, recurse=True)
        dispatch_model(
            component,
            main_device=main_device,
            state_dict=weights.state_dict,
            offload_index=weights.index,
            **options,
        )


def _weights_of_hooks(module: torch.nn.Module) -> Any:
    """The ``OffloadedWeightsLoader`` of accelerate's hooks.

    Raises:
        ArgumentError: there are no hooks.
    """
    for child in module.modules():
        hook = getattr(child, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            weights = getattr(one, "weights_map", None)
            if weights is not None:
                return getattr(weights, "dataset", weights)
    # transformers (before 5.16) dispatches only models on two or more devices.
    library = type(module).__module__.partition(".")[0]
    raise ArgumentError(
        f"{library} {getattr(sys.modules[library], '__version__', '')} leaves a "
        f"{type(module).__name__} that is all on the disk without its weights; give this "
        f"component to 'cpu' in device_map, or update {library}"
    )


def _from_archive(given: Mapping[str, Any]) -> Any:
    """A transformers model, which can only be loaded from a state dict."""
    archive = current_archive.get()
    if archive is None:
        return None
    from diffusers.pipelines.pipeline_loading_utils import get_class_obj_and_candidates

    cls, _ = get_class_obj_and_candidates(
        given["library_name"],
        given["class_name"],
        given["importable_classes"],
        given["pipelines"],
        given["is_pipeline_module"],
        component_name=given["name"],
        cache_dir=given["cached_folder"],
    )
    from transformers import PreTrainedModel

    if not issubclass(cls, PreTrainedModel):
        return None
    folder = archive.folder / given["name"]
    files = resolve(
        archive.dduf.path,
        subfolder=given["name"],
        variant=given["model_variants"].pop(given["name"], None),
        use_safetensors=given["use_safetensors"],
    )
    opened = open_files([folder / file.name for file in files.files])
    model = cls.from_pretrained(
        None,
        config=cls.config_class.from_pretrained(folder),
        state_dict=load_all(opened, parse_device("cpu"), given["disable_mmap"]),
        dtype=given["dtype"],
        device_map=given["device_map"],
        max_memory=given["max_memory"],
        offload_folder=given["offload_folder"],
    )
    if (folder / "generation_config.json").exists():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    return model
