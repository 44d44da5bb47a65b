"""The ``from_pretrained`` of a model: reads begin when its files are known."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from weightlift.backends import early_return
from weightlift.backends.diffusers.arguments import corrected_arguments
from weightlift.backends.diffusers.context import NAME, temporary_value
from weightlift.backends.diffusers.files import castable, engine_device, open_files
from weightlift.backends.diffusers.single_file import current_single_file
from weightlift.backends.fallback import FallbackToLibrary, report_fallback
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core.errors import WeightliftError
from weightlift.load.options import LoadOptions
from weightlift.load.prefetch import PrefetchedLoad
from weightlift.load.slots_ahead import slots_ahead
from weightlift.module.device_map import single_entry
from weightlift.module.offload import DiskWeights

__all__ = [
    "Call",
    "current_call",
    "model_from_pretrained",
    "on_model_file",
    "on_shard_files",
    "shards_bar",
]


@dataclasses.dataclass
class Call:
    """A running ``from_pretrained`` of a model.

    Attributes:
        cls: the model's class.
        early: arguments of a load that can begin before the build, or ``None``.
        files: the files of the weights.
        sharded: whether they have an index.
        checkpoint: the checkpoint in ``files``, once known.
        begun: the running load.
        by_diffusers: whether diffusers reads the tensors itself.
        on_disk: the filled model, and its weights on the disk.
    """

    cls: Any
    early: dict[str, Any] | None
    files: Sequence[str] = ()
    sharded: bool = False
    checkpoint: Checkpoint | None = None
    begun: PrefetchedLoad | None = None
    by_diffusers: bool = False
    on_disk: tuple[Any, DiskWeights] | None = None

    def found(self, files: Sequence[str], *, sharded: bool) -> None:
        """Stores the files, and begins to read them."""
        # An error is raised again when diffusers requests the tensors; diffusers would treat an
        # error here as a missing file.
        with contextlib.suppress(FallbackToLibrary, WeightliftError):
            with slots_ahead([self.early["device"]] if self.early else (), casts=True):
                self.checkpoint = open_files(files)
            self.files, self.sharded = files, sharded
            if self.early is None or "torch" in self.checkpoint.formats:
                return
            keep = self.early["keep"]
            names = [n for n in self.checkpoint if keep.isdisjoint(n.split("."))] if keep else None
            self.begun = PrefetchedLoad.start(
                self.checkpoint,
                self.early["device"],
                self.early["dtype"],
                names,
                LoadOptions(self.early["mode"], progress=shards_bar(len(files)), caller=NAME),
            )

    def whole_file(self, file: str) -> Checkpoint | None:
        """The checkpoint, if this is the only file of ``_load_pretrained_model``, which then gets
        names instead of tensors."""
        if self.checkpoint is None or self.sharded or list(self.files) != [file]:
            return None
        from diffusers.models.modeling_utils import ModelMixin

        fix = "_fix_state_dict_keys_on_load"
        # A class's own function may read tensors.
        return self.checkpoint if getattr(self.cls, fix) is getattr(ModelMixin, fix) else None

    def cancel(self) -> None:
        if self.begun is not None:
            self.begun.cancel()
            self.begun = None

    def keep_on_disk(self, model: Any, devices: Any, on_disk: DiskWeights, given: Any) -> None:
        """Stores the weights that diffusers' ``dispatch_model`` gives to its hooks."""
        self.on_disk = model, on_disk

    def take_on_disk(self, model: Any) -> DiskWeights | None:
        held, self.on_disk = self.on_disk, None
        return None if held is None or held[0] is not model else held[1]

    def take(self) -> PrefetchedLoad | None:
        begun, self.begun = self.begun, None
        return begun


current_call: ContextVar[Call | None] = ContextVar("weightlift_diffusers_call", default=None)


def model_from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("device_map"), MappingProxyType):  # of a pipeline's component
            kwargs["device_map"] = dict(kwargs["device_map"])
        planned = None if early_return.is_enabled(NAME) else _planned_arguments(cls, kwargs)
        if kwargs.get("use_flashpack"):
            report_fallback(NAME, "FlashPack files are read by flashpack", warn=False)
            planned = None
        call = Call(cls, planned)
        with contextlib.ExitStack() as stack:
            stack.callback(call.cancel)
            stack.enter_context(early_return.returning_early(NAME))
            stack.enter_context(temporary_value(current_call, call))
            stack.enter_context(temporary_value(current_single_file, None))
            stack.enter_context(corrected_arguments(pretrained_model_name_or_path, kwargs))
            return original(cls, pretrained_model_name_or_path, **kwargs)

    return from_pretrained


def _planned_arguments(cls: Any, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of the load, if they are known before the model is built."""
    import torch

    slow = (kwargs.get("quantization_config"), kwargs.get("parallel_config"))
    if any(slow) or not kwargs.get("low_cpu_mem_usage", True):
        return None
    device_map = kwargs.get("device_map")
    alone = single_entry("cpu" if device_map is None else device_map)
    device = None if alone is None else engine_device(alone)
    dtype = kwargs.get("dtype")
    dtype = kwargs.get("torch_dtype") if dtype is None else dtype
    if dtype is None:
        dtype, keep = torch.get_default_dtype(), None
    else:
        if not isinstance(dtype, torch.dtype):
            dtype = torch.float32  # as diffusers does, with a warning
        keep = cls._keep_in_fp32_modules if dtype != torch.float32 else None
    file_dtype = castable(dtype)
    if device is None or file_dtype is None:
        return None
    return {
        "device": device,
        "dtype": file_dtype,
        "keep": frozenset([keep] if isinstance(keep, str) else keep or ()),
        "mode": "read" if kwargs.get("disable_mmap") else "auto",
    }


def on_model_file(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_model_file(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        call = current_call.get()
        if call is not None and not kwargs.get("dduf_entries"):
            call.found([found], sharded=False)
        return found

    return _get_model_file


def on_shard_files(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_checkpoint_shard_files(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        call = current_call.get()
        if call is not None and not kwargs.get("dduf_entries"):
            call.found(found[0], sharded=True)
        return found

    return _get_checkpoint_shard_files


def shards_bar(count: int) -> Any:
    """diffusers' progress bar for shards, updated by bytes."""
    if count < 2:
        return False
    bar: Any = None
    shown = 0

    def show(done: int, total: int) -> None:
        nonlocal bar, shown
        from diffusers.utils import logging
        from diffusers.utils.distributed_utils import is_torch_dist_rank_zero

        if bar is None:
            off = {} if is_torch_dist_rank_zero() else {"disable": True}
            bar = logging.tqdm(total=count, desc="Loading checkpoint shards", **off)
        finished = done * count // total if total else count
        bar.update(finished - shown)
        shown = finished
        if done == total:
            bar.close()

    return show
