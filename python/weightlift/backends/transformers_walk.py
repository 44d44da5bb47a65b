"""From the tensors of a checkpoint to the parameters of a transformers model, in one plan.

What ``transformers.core_model_loading.convert_and_load_state_dict_in_model`` does tensor by tensor,
with a regex, a future and a conversion object for each, is done here for all of them at once: the
library's own functions say what each tensor is called in the model and who converts it, then one
``Loading`` brings every tensor to its device and dtype. Tensors that the library only stacks or
concatenates (the experts of a mixture) are written straight to their place in the result; other
conversions are the library's, on tensors that arrive a few at a time.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib
import inspect
import io
import logging
import math
import textwrap
import threading
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightlift import dtypes
from weightlift.allocation import Allocator, TorchAllocator, empty_on_host
from weightlift.backends.transformers_shards import Cut, cutter
from weightlift.errors import OutOfMemoryError, WeightliftError
from weightlift.materialize import Loading, Ranges
from weightlift.placement import parse_device
from weightlift.plans import Progress

if TYPE_CHECKING:
    import torch

    from weightlift.checkpoint import Checkpoint
    from weightlift.report import LoadReport

__all__ = ["Batch", "Retreat", "Slice", "Weights", "is_ours", "offer", "walk"]

_log = logging.getLogger("weightlift")

CALLER = "transformers"

# What this module stands in for, and what it relies on beyond names and signatures: digests of
# their code, by the first version that has it. Versions before 5.16 shard tensors in this walk.
_RELIED_ON = (
    "",  # the walk itself
    "set_param_for_module",
    "spawn_materialize",
    "_materialize_copy",
    "WeightTransform.add_tensor",
    "WeightTransform.materialize_tensors",
    "WeightRenaming.convert",
    "WeightConverter.convert",
    "MergeModulelist.convert",
    "MergeModulelist.get_target_pattern",
    "Concatenate.convert",
    "Concatenate.get_target_pattern",
)
_KNOWN = {
    "9432b03fb4a63b1b",  # 5.16
    "71af7c95f3de1491",  # 5.17
    "8932346be2c78a79",  # 5.21
    "3b2fb4744bea2b40",  # 5.23
}

# Bytes of what the library converts that are in memory besides the model: two of these.
_WAVE_BYTES = 256 << 20


class Retreat(Exception):
    """The engine failed before any tensor was placed."""

    def __init__(self, error: WeightliftError) -> None:
        super().__init__(str(error))
        self.error = error


class Weights(Mapping[str, "Slice"]):
    """The tensors of a checkpoint, as the library takes them: name -> what can be sliced.

    Attributes:
        checkpoint: where they are.
        headers: name -> (the file's dtype, shape).
        report: of all loads so far.
    """

    def __init__(self, checkpoint: Checkpoint, mode: str) -> None:
        self.checkpoint = checkpoint
        self.headers = checkpoint.headers()
        self.report: LoadReport | None = None
        self._mode = mode
        self._batch: Batch | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Slice:
        return Slice(self, name, self.headers[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    @functools.cached_property
    def allocator(self) -> Allocator:
        return TorchAllocator()

    def loading(
        self, devices: set[torch.device], casts: bool, progress: Progress | None
    ) -> Loading:
        """A load of these tensors."""
        on_host = {device.type for device in devices} <= {"cpu"}
        return Loading(
            self.checkpoint,
            mode="auto" if self._mode == "map" and (casts or not on_host) else self._mode,
            progress=progress or False,
            allocator=self.allocator if any(d.type == "cuda" for d in devices) else None,
            caller=CALLER,
        )

    def start(self, batch: Batch) -> None:
        """Begins the load that the slices are from."""
        batch.start()
        self._batch = batch

    def tensor(self, name: str) -> torch.Tensor:
        # The library's threads ask, all at once.
        with self._lock:
            if self._batch is not None:
                batch, self._batch = self._batch, None
                self._tensors = batch.result()
            tensor = self._tensors.get(name)
            if tensor is None:  # not expected to be asked for
                batch = Batch(self)
                batch.add(name, parse_device("cpu"), None)
                batch.start()
                tensor = batch.result()[name]
        return tensor

    def close(self) -> None:
        """Ends what was begun and nobody asked for."""
        with self._lock:
            if self._batch is not None:
                self._batch.cancel()
                self._batch = None


class Slice:
    """A tensor of ``Weights``, with the interface of safetensors' slices."""

    __slots__ = ("_header", "_name", "_weights")

    def __init__(self, weights: Weights, name: str, header: tuple[str, tuple[int, ...]]) -> None:
        self._weights, self._name, self._header = weights, name, header

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._weights.tensor(self._name)
        return tensor if index is Ellipsis else tensor[index]

    def get_shape(self) -> list[int]:
        return list(self._header[1])

    def get_dtype(self) -> str:
        return self._header[0]


class Batch:
    """Tensors that one plan loads, each to its device and dtype."""

    def __init__(self, weights: Weights, progress: Progress | None = None) -> None:
        self._weights = weights
        self._progress = progress
        self._groups: dict[tuple[torch.device, str | None], list[str]] = {}
        self._parts: dict[tuple[torch.device, str | None], dict[str, Ranges]] = {}
        self._into: dict[tuple[torch.device, bool], list[_Into]] = {}
        self._joined: list[tuple[str, int, list[torch.Tensor]]] = []
        self._by_torch: dict[str, torch.dtype] = {}
        self._loading: Loading | None = None

    def add(
        self, name: str, device: torch.device, dtype: torch.dtype | None, cut: Cut | None = None
    ) -> None:
        """Adds a tensor, or a part of it; ``dtype=None`` leaves it the file's."""
        own = self._weights.headers[name][0]
        cast = None if dtype is None else dtypes.file_name(dtype)
        if dtype is not None and cast != own:
            # The library casts each tensor by itself, also those that share their bytes.
            if (
                own not in dtypes.CASTABLE
                or cast not in dtypes.CASTABLE
                or self._weights.checkpoint.is_view(name)
            ):
                self._by_torch[name] = dtype
                cast = None
        else:
            cast = None
        if cut is None or cut.pieces is None:
            self._groups.setdefault((device, cast), []).append(name)
        elif len(cut.pieces) == 1:
            self._parts.setdefault((device, cast), {})[name] = cut.pieces[0]
        else:
            self._add_pieces(name, device, dtypes.to_torch(cast or own), cut)

    def _add_pieces(self, name: str, device: torch.device, dtype: torch.dtype, cut: Cut) -> None:
        import torch

        pieces = []
        for ranges in cut.pieces or ():
            shape = [count for _, _, count in ranges]
            pieces.append(torch.empty(shape, dtype=dtype, device=device))
            self.add_into(name, device, pieces[-1], ranges)
        self._joined.append((name, cut.dimension, pieces))

    def add_into(
        self, name: str, device: torch.device, target: torch.Tensor, ranges: Ranges | None
    ) -> None:
        """Adds a tensor, or a part of it, that is written to another."""
        into = _Into(name, target, ranges)
        self._into.setdefault((device, ranges is not None), []).append(into)

    def start(self) -> None:
        if not self._groups and not self._parts and not self._into:
            return
        every = [*self._groups, *self._parts]
        loading = self._weights.loading(
            {device for device, _ in (*every, *self._into)},
            any(cast is not None for _, cast in every),
            self._progress,
        )
        for (device, cast), names in self._groups.items():
            loading.add(device, cast, names)
        for (device, cast), parts in self._parts.items():
            loading.add(device, cast, list(parts), parts=list(parts.values()))
        for (device, _), into in self._into.items():
            ranges = [one.ranges for one in into if one.ranges is not None]
            targets = [one.target for one in into]
            loading.add(device, None, [one.name for one in into], targets, ranges or None)
        loading.start()
        self._loading = loading

    def result(self) -> dict[str, torch.Tensor]:
        """Waits: name -> tensor."""
        loading, self._loading = self._loading, None
        if loading is None:
            return {}
        import torch

        tensors = loading.result()
        while self._joined:
            name, dimension, pieces = self._joined.pop()
            tensors[name] = torch.cat(pieces, dimension)
        for name, dtype in self._by_torch.items():
            tensors[name] = tensors[name].to(dtype)
        report, before = loading.report, self._weights.report
        self._weights.report = report if before is None else before.plus(report)
        return tensors

    def cancel(self) -> None:
        if self._loading is not None:
            self._loading.cancel()
            self._loading = None


@dataclasses.dataclass(slots=True)
class _Into:
    name: str
    target: torch.Tensor
    ranges: Ranges | None


# --- Which walks are known -----------------------------------------------------------------------

# The library's own, once it is hooked.
_original: Callable[..., Any] | None = None


def offer(original: Callable[..., Any]) -> None:
    """Says what ``walk`` is to stand in for."""
    global _original
    _original = original


def is_ours(config: Any) -> bool:
    """Whether a load with this ``LoadStateDictConfig`` can go through ``walk``."""
    return config.hf_quantizer is None and _original is not None and _is_known(_original)


def _core() -> Any:
    return importlib.import_module("transformers.core_model_loading")


@functools.cache
def _is_known(original: Callable[..., Any]) -> bool:
    import transformers

    with contextlib.suppress(AttributeError, OSError, TypeError):
        digest = hashlib.sha256()
        for name in _RELIED_ON:
            found = functools.reduce(getattr, name.split("."), _core()) if name else original
            digest.update(_code(textwrap.dedent(inspect.getsource(found))).encode())
        if digest.hexdigest()[:16] in _KNOWN:
            return True
    _log.info(
        "weightlift: how transformers %s goes over the weights is not known; it does that itself, "
        "on tensors that the engine loads",
        transformers.__version__,
    )
    return False


def _code(source: str) -> str:
    """What a function's source says to Python, the same from every version of it: no comments,
    docstrings or layout. Not by `ast`, which fails where another thread is in it (gh-106905)."""
    found = []
    begins = True  # a statement
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE):
            found.append("\n")
            begins = True
        elif token.type not in (tokenize.COMMENT, tokenize.NL):
            if token.type != tokenize.STRING or not begins:
                # From 3.12 on, the parts of f-strings are tokens.
                found.append("".join(token.string.split()).replace("{{", "{").replace("}}", "}"))
            begins = False
    return "".join(found)


# --- The walk ------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class _Target:
    """A tensor of the model, the first of those that a converter makes, and what becomes it.

    Attributes:
        converter: the library's; ``None`` where the tensor is taken as it is.
        sources: (pattern of the converter, name in the checkpoint), in the order of the walk.
        cuts: of a DTensor, the part of each source that this rank takes, by name; ``None``: none.
        device: as the device map has it.
        value: where it is there already: the tensor, or by name what the converter made of them.
    """

    name: str
    converter: Any
    sources: list[tuple[str, str]]
    cuts: dict[str, Cut | None] | None = None
    device: Any = None
    value: Any = None

    def cut(self, key: str) -> Cut | None:
        return None if self.cuts is None else self.cuts[key]

    @property
    def keys(self) -> list[str]:
        """The sources that this rank takes something of."""
        cuts = self.cuts
        return [key for _, key in self.sources if cuts is None or cuts[key] is not None]


def walk(
    model: Any, weights: Weights, config: Any, disk_offload_index: dict[str, Any] | None
) -> tuple[Any, dict[str, Any] | None]:
    """``convert_and_load_state_dict_in_model``, without a quantizer and on whole tensors.

    Raises:
        Retreat: before anything was changed in the model.
    """
    core = _core()
    state = model.state_dict()
    info = core.LoadStateDictInfo(
        missing_keys=set(state),
        unexpected_keys=set(),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    targets = _targets(core, model, weights, state, config, info)
    tqdm = importlib.import_module("transformers.utils.logging").tqdm
    with tqdm(total=len(targets), desc="Loading weights") as bar:
        show = _Bar(bar, len(targets))
        fill = _Fill(core, model, weights, state, config, info, disk_offload_index, show)
        fill.run(targets)
        show(1, 1)
    mapping = config.weight_mapping or []
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]
    return info, fill.disk_offload_index


class _Bar:
    """Of bytes done and in all, shown by the library's progress bar, which counts tensors."""

    def __init__(self, bar: Any, count: int) -> None:
        self._bar, self._count = bar, count
        self._shown = 0

    def __call__(self, done: int, total: int) -> None:
        reached = self._count * done // total if total else 0
        if reached > self._shown:
            self._bar.update(reached - self._shown)
            self._shown = reached


def _targets(
    core: Any, model: Any, weights: Weights, state: Mapping[str, Any], config: Any, info: Any
) -> list[_Target]:
    """Which tensors of the checkpoint become which of the model; what becomes none is noted."""
    mapping = config.weight_mapping or []
    renamings = [entry for entry in mapping if isinstance(entry, core.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, core.WeightConverter)]
    of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix
    targets: dict[str, _Target] = {}
    cuts: dict[str, Callable[[Sequence[int], int], Cut | None]] = {}
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    for key in sorted(weights.headers, key=core.dot_natural_key):
        name, pattern = core.rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = core.rename_source_key(key, [], [], prefix, state)
        if name in state:
            target = targets.get(name)
            if target is None:
                converter = None if pattern is None else of_pattern[pattern]
                target = targets[name] = _Target(name, converter, [])
                cut = cutter(state[name], converter)
                if cut is not None:
                    target.cuts = {}
                    cuts[name] = cut
            source = key if pattern is None else pattern
            if target.cuts is not None:
                number = seen[name, source]
                seen[name, source] += 1
                target.cuts[key] = cuts[name](weights.headers[key][1], number)
            target.sources.append((source, key))
        elif pattern is None:
            info.unexpected_keys.add(name)
        else:
            patterns = of_pattern[pattern].target_patterns
            info.unexpected_keys.update(name.replace(patterns[0], one) for one in patterns)
    return list(targets.values())


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
        self._modules: dict[str, torch.nn.Module] = {}
        self._find_modules(model, "")

    def run(self, targets: Sequence[_Target]) -> None:
        from transformers.integrations.accelerate import expand_device_map

        devices = expand_device_map(self._device_map, [target.name for target in targets])
        for target in targets:
            target.device = devices[target.name]
        targets = [target for target in targets if not self._is_mismatched(target)]
        try:
            self._load(targets)
        except OutOfMemoryError:
            raise
        except WeightliftError as error:
            raise Retreat(error) from error
        for target in targets:
            if target.converter is None:
                self._place(target)
                continue
            made = target.value
            if made is None:
                wave = self._wave([target])
                wave.start()
                made = self._convert(target, wave.result())
            for name, value in made.items():
                self._place_made(target, name, value[0] if isinstance(value, list) else value)
            target.value = None

    def _is_mismatched(self, target: _Target) -> bool:
        """Notes a tensor that is taken as it is, and has another shape than the model's."""
        if target.converter is not None or self._goes_to_disk(target.name, target.device):
            return False
        key = target.sources[0][1]
        own, shape = self._weights.headers[key]
        expected = self._state[target.name].shape
        if (cut := target.cut(key)) is not None:
            shape, expected = cut.shape, self._state[target.name]._local_tensor.shape
        if own == "F4":  # two numbers are one element of torch's dtype
            shape = (*shape[:-1], shape[-1] // 2)
        if shape == expected:
            return False
        self._info.missing_keys.discard(target.name)
        self._info.mismatched_keys.add((target.name, type(expected)(shape), expected))
        return True

    def _goes_to_disk(self, name: str, device: Any) -> bool:
        return bool(device == "disk" and name not in self._buffers)

    def _load(self, targets: Sequence[_Target]) -> None:
        """Brings in all that does not stay on the disk, and has it converted."""
        batch = Batch(self._weights, self._bar)
        merged: list[tuple[_Target, _Layout]] = []
        left: list[_Target] = []
        plain: list[_Target] = []
        for target in targets:
            if target.converter is not None:
                layout = None
                if target.device != "disk":
                    layout = _layout(self._core, target, self._weights.headers)
                if layout is not None:
                    merged.append((target, layout))
                elif not self._on_disk:
                    left.append(target)
            elif not self._goes_to_disk(target.name, target.device):
                plain.append(target)
                key = target.sources[0][1]
                batch.add(key, self._to(target), self._dtypes(target.name), target.cut(key))
        self._merge(merged, batch)
        started = [batch]

        def begun(wave: Sequence[_Target]) -> Batch:
            started.append(self._wave(wave))
            started[-1].start()
            return started[-1]

        try:
            batch.start()
            # While that runs; and each wave is read while the one before it is converted.
            waves = list(self._waves(left))
            following = [begun(wave) for wave in waves[:1]]
            for number, wave in enumerate(waves):
                current = following.pop()
                following += [begun(after) for after in waves[number + 1 : number + 2]]
                tensors = current.result()
                for target in wave:
                    target.value = self._convert(target, tensors)
            tensors = batch.result()
        except BaseException:
            for one in started:
                one.cancel()
            raise
        for target in plain:
            target.value = tensors[target.sources[0][1]]

    def _to(self, target: _Target) -> torch.device:
        """Where its sources go."""
        forced = target.cuts is None and getattr(target.converter, "force_cpu", False)
        on_host = target.device == "disk" or forced
        return parse_device("cpu" if on_host else target.device)

    # --- What the library stacks and concatenates

    def _merge(self, merged: Sequence[tuple[_Target, _Layout]], batch: Batch) -> None:
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

    def _wave(self, targets: Sequence[_Target]) -> Batch:
        batch = Batch(self._weights)
        for target in targets:
            for key in target.keys:
                batch.add(key, self._to(target), self._dtypes(target.name), target.cut(key))
        return batch

    def _waves(self, targets: Sequence[_Target]) -> Iterator[list[_Target]]:
        wave: list[_Target] = []
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

    def _convert(self, target: _Target, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        converter = copy.deepcopy(target.converter)
        for pattern, key in target.sources:
            # A function, as the library's own: of what it is not given, it takes out the None.
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

    def _place_made(self, target: _Target, name: str, value: torch.Tensor) -> None:
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

    def _place(self, target: _Target) -> None:
        """Sets a tensor that is taken as it is, as ``set_param_for_module`` does."""
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
        if target.cuts is not None or not _sets_plainly(module):
            self._core.set_param_for_module(self._model, name, value, self._info, None)
        elif key in module._parameters:
            if not isinstance(value, torch.nn.Parameter):
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
    """Whether setting a parameter that is there does no more than to replace it."""
    from torch.nn import Module

    return type(module).__setattr__ is Module.__setattr__


def _dtypes(core: Any, state: Mapping[str, Any], config: Any) -> Callable[[str], torch.dtype]:
    """The dtype of each tensor of the model: of the plan where it names it, else its own."""
    plan = config.dtype_plan or {}
    if not plan:
        return lambda name: state[name].dtype
    pattern, by_group, _ = core.build_glob_alternation(list(plan))

    def dtype(name: str) -> torch.dtype:
        found = pattern.search(name)
        own: torch.dtype = state[name].dtype if found is None else plan[by_group[found.lastgroup]]
        return own

    return dtype


@dataclasses.dataclass(slots=True)
class _Layout:
    """Where tensors lie in what they are stacked and concatenated to.

    Attributes:
        names: in the checkpoint.
        shape: of the result.
        parts: the result -> a contiguous part of it for each name.
    """

    names: list[str]
    shape: tuple[int, ...]
    parts: Callable[[torch.Tensor], list[torch.Tensor]]


def _layout(
    core: Any, target: _Target, headers: Mapping[str, tuple[str, tuple[int, ...]]]
) -> _Layout | None:
    """The layout that a converter's operations come to; ``None`` where they do more, or would
    fail, which is the library's to say."""
    import torch

    converter = target.converter
    patterns = converter.target_patterns
    if (
        (converter.force_cpu and target.cuts is None)
        or len(patterns) != 1
        or patterns[0] not in target.name
    ):
        return None
    lists: dict[str, list[str]] = {pattern: [] for pattern in converter.source_patterns}
    shape_of: dict[str, tuple[int, ...]] = {}
    taken = set(target.keys)
    for pattern, key in target.sources:
        if pattern not in lists or headers[key][0] not in dtypes.TORCH_NAMES:
            return None
        if key in taken:
            cut = target.cut(key)
            if cut is not None and len(cut.pieces or ()) > 1:
                return None
            shape_of[key] = headers[key][1] if cut is None else cut.shape
            lists[pattern].append(key)
    names = [name for held in lists.values() for name in held]
    shapes = [shape_of[name] for name in names]
    if "*" in target.name or not all(lists.values()) or any(headers[n][0] == "F4" for n in names):
        return None
    steps = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
    merge, join = (core.MergeModulelist, 0), core.Concatenate
    if steps == [merge] and len(lists) == 1 and len(set(shapes)) == 1:
        return _Layout(names, (len(names), *shapes[0]), lambda value: list(value.unbind(0)))
    if min(map(len, shapes)) == 0 or len({shape[1:] for shape in shapes}) != 1:
        return None
    if steps == [(join, 0)]:
        rows = [shape[0] for shape in shapes]
        return _Layout(
            names, (sum(rows), *shapes[0][1:]), lambda value: list(torch.split(value, rows))
        )
    if steps == [merge, (join, 1)] and len({len(held) for held in lists.values()}) == 1:
        of_list = [{shape_of[name][0] for name in held} for held in lists.values()]
        if len(lists) < 2 or any(len(found) != 1 for found in of_list):
            return None
        widths = [found.pop() for found in of_list]
        shape = (len(next(iter(lists.values()))), sum(widths), *shapes[0][1:])
        return _Layout(
            names,
            shape,
            lambda value: [one for part in torch.split(value, widths, 1) for one in part.unbind(0)],
        )
    return None
