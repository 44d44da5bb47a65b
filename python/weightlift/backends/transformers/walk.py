"""Fills the parameters of a transformers model from a checkpoint by one plan.

``transformers.core_model_loading.convert_and_load_state_dict_in_model`` works tensor by tensor,
with a regex, a future and a conversion object for each. Here the library's own functions give the
name and the converter of each tensor, then one ``LoadPlan`` loads all tensors to their devices and
dtypes. Tensors that the library only stacks or concatenates (the experts of a mixture) are written
straight to their place in the result; the library does all other conversions, on a few tensors at a
time.
"""

from __future__ import annotations

import copy
import functools
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightlift.backends import early_return
from weightlift.backends.transformers.compat import core_module
from weightlift.backends.transformers.layout import Layout, layout_of
from weightlift.backends.transformers.targets import Target, find_targets
from weightlift.backends.transformers.weights import CALLER, Batch, LoadFailed, Weights
from weightlift.checkpoint.checkpoint import describe_location
from weightlift.core import dtypes
from weightlift.core.devices import parse_device
from weightlift.core.errors import OutOfMemoryError, WeightliftError
from weightlift.load.allocation import empty_on_host, naming_tensor
from weightlift.load.options import LoadOptions
from weightlift.module.background.holding_back import hold_back
from weightlift.module.background.load import BackgroundLoad
from weightlift.module.order_of_use import which_model
from weightlift.module.parameters import ParameterRef
from weightlift.module.placement import Group, Placement

if TYPE_CHECKING:
    import torch

__all__ = ["walk_tensors"]

# Bytes of one wave of tensors for the library's conversions; two waves are in memory at a time.
_WAVE_BYTES = 256 << 20
# The module of weightlift's own registration hook.
_BUILD_CONTEXT = "weightlift.models.build_context"


def walk_tensors(
    model: Any, weights: Weights, config: Any, disk_offload_index: dict[str, Any] | None
) -> tuple[Any, dict[str, Any] | None]:
    """``convert_and_load_state_dict_in_model``, without a quantizer and on whole tensors.

    Raises:
        LoadFailed: the load failed before the model was changed.
    """
    import torch

    core = core_module()
    state = model.state_dict()
    info = core.LoadStateDictInfo(
        missing_keys=set(state),
        unexpected_keys=set(),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    targets = find_targets(core, model, weights, state, config, info)
    tqdm = importlib.import_module("transformers.utils.logging").tqdm
    with tqdm(total=len(targets), desc="Loading weights") as bar:
        show = _Bar(bar, len(targets))
        fill = _Fill(core, model, weights, state, config, info, disk_offload_index, show)
        # The library makes tensors in its own threads, which do not have the caller's mode.
        with torch.inference_mode(False):
            fill.run(targets)
        show(1, 1)
    mapping = config.weight_mapping or []
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]
    return info, fill.disk_offload_index


class _Bar:
    """Shows bytes done and total in the library's progress bar, which counts tensors."""

    def __init__(self, bar: Any, count: int) -> None:
        self._bar, self._count = bar, count
        self._shown = 0

    def __call__(self, done: int, total: int) -> None:
        reached = self._count * done // total if total else 0
        if reached > self._shown:
            self._bar.update(reached - self._shown)
            self._shown = reached


class _Fill:
    """One load into a model."""

    def __init__(
        self,
        core: Any,
        model: Any,
        weights: Weights,
        state: Mapping[str, Any],
        config: Any,
        info: Any,
        disk_offload_index: dict[str, Any] | None,
        bar: _Bar,
    ) -> None:
        self._core, self._model, self._weights = core, model, weights
        self._state, self._config, self._info, self._bar = state, config, info, bar
        self.disk_offload_index = disk_offload_index
        self._device_map = config.device_map or {"": "cpu"}
        self._on_disk = "disk" in self._device_map.values()
        self._buffers: set[str] = set()
        if self._on_disk and not config.offload_buffers:
            self._buffers = {name for name, _ in model.named_buffers()}
        self._dtypes = _dtypes(core, state, config)
        self._is_watched = _is_watched()
        self._modules: dict[str, torch.nn.Module] = {}
        self._find_modules(model, "")
        # Tensors that arrive after the call has returned, by name.
        self._later: dict[str, ParameterRef] = {}

    def run(self, targets: Sequence[Target]) -> None:
        from transformers.integrations.accelerate import expand_device_map

        devices = expand_device_map(self._device_map, [target.name for target in targets])
        for target in targets:
            target.device = devices[target.name]
        mismatched = {target.name: m for target in targets if (m := self._mismatch(target))}
        try:
            self._load([target for target in targets if target.name not in mismatched])
        except OutOfMemoryError:
            raise
        except WeightliftError as error:
            raise LoadFailed(error) from error
        for target in targets:
            if target.name in mismatched:
                # In the order of the library's walk, which its report shows.
                self._info.missing_keys.discard(target.name)
                self._info.mismatched_keys.add(mismatched[target.name])
                continue
            if target.converter is None:
                if target.name in self._later:
                    self._mark(target)
                else:
                    self._place(target)
                continue
            made = target.value
            if made is None:
                wave = self._wave([target])
                wave.start()
                made = self._convert(target, wave.result())
            for name, value in made.items():
                self._place_value(target, name, value[0] if isinstance(value, list) else value)
            target.value = None

    def _mismatch(self, target: Target) -> tuple[str, Any, Any] | None:
        """(name, shape, the model's shape) of an unchanged tensor, if the shapes differ."""
        if target.converter is not None or self._goes_to_disk(target.name, target.device):
            return None
        key = target.sources[0][1]
        own, shape = self._weights.headers[key]
        expected = self._state[target.name].shape
        if (cut := target.cut(key)) is not None:
            shape, expected = cut.shape, self._state[target.name]._local_tensor.shape
        if own == "F4":  # an element of torch's dtype holds two numbers
            shape = (*shape[:-1], shape[-1] // 2)
        return None if shape == expected else (target.name, type(expected)(shape), expected)

    def _goes_to_disk(self, name: str, device: Any) -> bool:
        return bool(device == "disk" and name not in self._buffers)

    def _load(self, targets: Sequence[Target]) -> None:
        """Loads all tensors that do not stay on the disk, and converts them."""
        batch = Batch(self._weights, self._bar)
        merged: list[tuple[Target, Layout]] = []
        left: list[Target] = []
        plain: list[Target] = []
        later: list[tuple[Target, ParameterRef]] = []
        for target in targets:
            if target.converter is not None:
                layout = None
                if target.device != "disk":
                    layout = layout_of(self._core, target, self._weights.headers)
                if layout is not None:
                    merged.append((target, layout))
                elif not self._on_disk:
                    left.append(target)
            elif (ref := self._may_come_later(target)) is not None:
                later.append((target, ref))
            elif not self._goes_to_disk(target.name, target.device):
                plain.append(target)
                key = target.sources[0][1]
                batch.add(key, self._to(target), self._dtypes(target.name), target.cut(key))
        self._merge(merged, batch)
        self._start_in_background(later)
        started = [batch]

        def start_batch(wave: Sequence[Target]) -> Batch:
            started.append(self._wave(wave))
            started[-1].start()
            return started[-1]

        try:
            batch.start()
            # Each wave is read while the one before it is converted.
            waves = list(self._waves(left))
            following = [start_batch(wave) for wave in waves[:1]]
            for number, wave in enumerate(waves):
                current = following.pop()
                following += [start_batch(after) for after in waves[number + 1 : number + 2]]
                tensors = current.result()
                for target in wave:
                    target.value = self._convert(target, tensors)
            tensors = batch.result()
            self._weights.drop_prefetched()
        except BaseException:
            for one in started:
                one.cancel()
            raise
        for target in plain:
            target.value = tensors[target.sources[0][1]]

    def _to(self, target: Target) -> torch.device:
        """The device of its sources."""
        forced = target.cuts is None and getattr(target.converter, "force_cpu", False)
        on_host = target.device == "disk" or forced
        return parse_device("cpu" if on_host else target.device)

    # --- What goes on when the call has returned

    def _may_come_later(self, target: Target) -> ParameterRef | None:
        """The reference to a tensor that only the engine fills and that is still the library's
        tensor on ``meta``; ``None`` for others."""
        if not early_return.is_wanted(CALLER) or target.cuts is not None or self._is_watched:
            return None
        if len(set(self._device_map.values())) > 1 or self._on_disk:
            return None
        key = target.sources[0][1]
        own, wanted = self._weights.headers[key][0], self._dtypes(target.name)
        name = dtypes.file_name(wanted)
        if name != own and not {own, name} <= dtypes.CASTABLE:
            return None
        path, _, leaf = target.name.rpartition(".")
        module = self._modules[path]
        for held, is_parameter in ((module._parameters, True), (module._buffers, False)):
            tensor = held.get(leaf)
            if tensor is not None and tensor.is_meta and tensor.dtype == wanted:
                return ParameterRef(tensor, is_parameter, True, target.name, module, leaf)
        return None

    def _start_in_background(self, later: Sequence[tuple[Target, ParameterRef]]) -> None:
        if not later:
            return
        placed = Placement({}, {}, frozenset(), [], {})
        casts = False
        for target, ref in later:
            key = target.sources[0][1]
            name = dtypes.file_name(ref.tensor.dtype)
            cast_to = None if name == self._weights.headers[key][0] else name
            casts = casts or cast_to is not None
            group = Group(self._to(target), cast_to, False, False)
            placed.groups.setdefault(group, []).append((key, ref))
            self._later[target.name] = ref
        plan = self._weights.plan({group.device for group in placed.groups}, casts, None)
        for group, members in placed.groups.items():
            plan.add(group.device, group.cast_to, [key for key, _ in members])
        place = {path: number for number, path in enumerate(self._modules)}
        names = sorted(self._later, key=lambda name: place[name.rpartition(".")[0]])
        which, weights = which_model(self._model), self._weights
        started = BackgroundLoad.start(
            which, plan, placed, names, weights.checkpoint, weights.headers, None
        )
        hold_back(started, self._model, LoadOptions(caller=CALLER))

    def _mark(self, target: Target) -> None:
        """Marks a future tensor as loaded for the library."""
        self._later[target.name].tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        self._info.missing_keys.discard(target.name)

    # --- What the library stacks and concatenates

    def _merge(self, merged: Sequence[tuple[Target, Layout]], batch: Batch) -> None:
        sizes: dict[int, list[int]] = {}
        for target, layout in merged:
            device = self._to(target)
            if device.type == "cuda":
                count = math.prod(layout.shape) * self._dtypes(target.name).itemsize
                sizes.setdefault(device.index, []).append(count)
        for index, counts in sizes.items():
            self._weights.allocator.reserve(index, counts)
        for target, layout in merged:
            device = self._to(target)
            with naming_tensor(describe_location(self._weights.checkpoint), target.name):
                value = self._empty(device, layout.shape, self._dtypes(target.name))
            for key, part in zip(layout.names, layout.parts(value), strict=True):
                cut = target.cut(key)
                pieces = None if cut is None else cut.pieces
                batch.add_into(key, device, part, None if pieces is None else pieces[0])
            target.value = {target.name: value}

    def _empty(
        self, device: torch.device, shape: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        import torch

        name = dtypes.file_name(dtype)
        if device.type == "cuda" and name is not None and name != "F4":
            value: torch.Tensor = self._weights.allocator.empty(device.index, shape, name)[1]
            return value
        if device.type == "cpu":
            return empty_on_host(shape, dtype)
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    # --- What the library converts

    def _wave(self, targets: Sequence[Target]) -> Batch:
        batch = Batch(self._weights)
        for target in targets:
            for key in target.keys:
                batch.add(key, self._to(target), self._dtypes(target.name), target.cut(key))
        return batch

    def _waves(self, targets: Sequence[Target]) -> Iterator[list[Target]]:
        wave: list[Target] = []
        waiting = 0
        for target in targets:
            for key in target.keys:
                cut = target.cut(key)
                shape = self._weights.headers[key][1] if cut is None else cut.shape
                waiting += math.prod(shape) * self._dtypes(target.name).itemsize
            wave.append(target)
            if waiting >= _WAVE_BYTES:
                yield wave
                wave, waiting = [], 0
        if wave:
            yield wave

    def _convert(self, target: Target, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        converter = copy.deepcopy(target.converter)
        for pattern, key in target.sources:
            # A function, as the library passes it, which removes a None result.
            tensor = tensors[key] if target.cuts is None else functools.partial(tensors.get, key)
            converter.add_tensor(target.name, key, pattern, tensor)
        try:
            made: dict[str, Any] = converter.convert(
                target.name,
                model=self._model,
                config=self._model.config,
                hf_quantizer=None,
                loading_info=self._info,
            )
        except self._core.SkipParameters:
            return {}
        return made

    # --- Into the model

    def _find_modules(self, module: torch.nn.Module, path: str) -> None:
        self._modules[path] = module
        for name, child in module._modules.items():
            if child is not None:
                self._find_modules(child, f"{path}.{name}" if path else name)

    def _place_value(self, target: Target, name: str, value: torch.Tensor) -> None:
        from transformers.integrations.accelerate import get_device

        device = get_device(self._device_map, name)
        if getattr(target.converter, "force_cpu", False) and device != "disk":
            value = value.to(device)
        if self._goes_to_disk(name, device):
            self._offload(name, value, target.converter)
        else:
            self._core.set_param_for_module(self._model, name, value, self._info, None)

    def _offload(self, name: str, value: torch.Tensor | None, converter: Any) -> None:
        self.disk_offload_index = self._core.offload_and_maybe_resave_param(
            name,
            value,
            self._info,
            self._config.disk_offload_folder,
            self.disk_offload_index,
            converter,
        )

    def _place(self, target: Target) -> None:
        """Sets an unchanged tensor, as ``set_param_for_module`` does."""
        import torch

        name, value = target.name, target.value
        target.value = None
        if self._goes_to_disk(name, target.device):
            if name not in (self.disk_offload_index or {}):
                wave = self._wave([target])
                wave.start()
                value = wave.result()[target.sources[0][1]]
            self._offload(name, value, None)
            return
        path, _, key = name.rpartition(".")
        module = self._modules[path]
        if target.cuts is not None or self._is_watched or not _sets_plainly(module):
            self._core.set_param_for_module(self._model, name, value, self._info, None)
        elif key in module._parameters:
            if type(value) is torch.Tensor or not isinstance(value, torch.nn.Parameter):
                value = torch.nn.Parameter(value, requires_grad=value.is_floating_point())
            value._is_hf_initialized = True  # type: ignore[attr-defined]
            module._parameters[key] = value
            self._info.missing_keys.discard(name)
        elif key in module._buffers:
            value._is_hf_initialized = True
            module._buffers[key] = value
            self._info.missing_keys.discard(name)
        else:
            self._core.set_param_for_module(self._model, name, value, self._info, None)


def _sets_plainly(module: torch.nn.Module) -> bool:
    """Whether setting an existing parameter only replaces it."""
    from torch.nn import Module

    return type(module).__setattr__ is Module.__setattr__


def _is_watched() -> bool:
    """Whether somebody sees to what is registered with modules: a model whose constructor loads
    this one while it is built on ``meta``, or a hook of torch."""
    from torch.nn.modules import module

    own = getattr(module.Module.__setattr__, "__code__", None)
    put = getattr(module.Module.register_parameter, "__code__", None)
    if own is None or put is None or own.co_filename != put.co_filename:
        return True
    hooks = [
        *module._global_parameter_registration_hooks.values(),
        *module._global_buffer_registration_hooks.values(),
    ]
    # Ours is there for good, and does nothing outside a build.
    ours = sys.modules.get(_BUILD_CONTEXT)
    if ours is not None and ours.in_build():
        return True
    return any(
        getattr(hook, "__module__", "") != "weightlift.models.build_context" for hook in hooks
    )


def _dtypes(core: Any, state: Mapping[str, Any], config: Any) -> Callable[[str], torch.dtype]:
    """The dtype of each tensor of the model: from the plan if listed there, else its own."""
    plan = config.dtype_plan or {}
    if not plan:
        return lambda name: state[name].dtype
    pattern, by_group, _ = core.build_glob_alternation(list(plan))

    def dtype(name: str) -> torch.dtype:
        found = pattern.search(name)
        own: torch.dtype = state[name].dtype if found is None else plan[by_group[found.lastgroup]]
        return own

    return dtype
