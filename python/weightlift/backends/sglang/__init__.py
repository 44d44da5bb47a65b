"""SGLang: its default loader reads through the engine where ``WEIGHTLIFT_SGLANG`` asks for it."""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from weightlift.backends.serving_files import FilesReader
    from weightlift.module.recording.recorder import Recorder

__all__ = ["register"]

_LOADER = "sglang.srt.model_loader.loader.DefaultModelLoader"
_WAYS = ("slices", "whole")
# What the hooked methods take, in the versions that are known.
_KNOWN_OPTIONS = {"resolved_source", "startup_prefetch_started", "startup_prefetch_active"}
_log = logging.getLogger("weightlift")

# Of a load that is recorded in this context.
_recording: ContextVar[tuple[FilesReader, Recorder] | None] = ContextVar(
    "weightlift_sglang_recording", default=None
)


def register() -> None:
    """The entry point of the group ``sglang.srt.plugins``. SGLang's list of load formats is closed,
    so the environment says whether the default loader is to read through the engine:
    ``WEIGHTLIFT_SGLANG=slices`` or ``whole``. Without it nothing is hooked."""
    way = os.environ.get("WEIGHTLIFT_SGLANG", "")
    if not way:
        return
    if way not in _WAYS:
        _log.warning("WEIGHTLIFT_SGLANG is %r; it can be 'slices' or 'whole': not used", way)
        return
    try:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(f"{_LOADER}._get_weights_iterator", _iterate, HookType.AROUND)
        if way == "slices":
            HookRegistry.register(f"{_LOADER}.load_weights_only", _load, HookType.AROUND)
    except (ImportError, AttributeError, TypeError) as error:
        _log.warning(
            "this version of SGLang has no hooks that are known (%s: %s): its own loader serves",
            type(error).__name__,
            error,
        )


def _load(original: Callable[..., Any], model: Any, weights: Any, target_device: Any) -> Any:
    """Around ``load_weights_only``: the model's own loading, recorded."""
    from weightlift.backends.serving_files import AHEAD_BYTES, FilesReader, summary
    from weightlift.load.options import LoadOptions
    from weightlift.module.recording.recorder import Recorder
    from weightlift.module.recording.replay import Taken

    begun = time.perf_counter()
    reader = FilesReader(LoadOptions(caller="sglang"))
    recorder = Recorder(reader, ahead=AHEAD_BYTES, threads=True)
    recorder.expect([*model.named_parameters(), *model.named_buffers()])
    token = _recording.set((reader, recorder))
    try:
        with recorder.watching():
            result = original(model, weights, target_device)
    finally:
        _recording.reset(token)
    recorder.finish()
    recorder.replace_kept()
    _log.info("%s", summary(reader, Taken.of(recorder), time.perf_counter() - begun))
    return result


def _iterate(
    original: Callable[..., Any], loader: Any, source: Any, **options: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """Around ``_get_weights_iterator``."""
    from weightlift.backends.serving_files import FilesReader, weights_of
    from weightlift.load.options import LoadOptions

    config = loader.load_config
    load_format = str(getattr(config.load_format, "value", config.load_format))
    plain = load_format in ("auto", "safetensors") and config.draft_model_idx is None
    if not plain or not options.keys() <= _KNOWN_OPTIONS:
        found: Iterator[tuple[str, torch.Tensor]] = original(loader, source, **options)
        return found
    files = _files(loader, source, options.get("resolved_source"))
    if files is None:
        files_of_sglang: Iterator[tuple[str, torch.Tensor]] = original(loader, source, **options)
        return files_of_sglang
    if loader.counter_before_loading_weights == 0.0:
        loader.counter_before_loading_weights = time.perf_counter()
    recording = _recording.get()
    reader, recorder = recording or (FilesReader(LoadOptions(caller="sglang")), None)
    return weights_of(files, reader, recorder, prefix=source.prefix)


def _files(loader: Any, source: Any, resolved: Any) -> list[str] | None:
    """The safetensors files of a source; ``None`` where it has others."""
    if resolved is not None:
        return list(resolved.weight_files) if resolved.use_safetensors else None
    folder, files, use_safetensors = loader._prepare_weights(
        source.model_or_path,
        source.revision,
        source.fall_back_to_pt,
        source.allow_patterns_overrides,
    )
    if not use_safetensors:
        return None
    if source.model_config is not None:
        module = inspect.getmodule(type(loader))
        files = module.maybe_add_mtp_safetensors(  # type: ignore[union-attr]
            files, folder, "model.safetensors.index.json", source.model_config.hf_config
        )
    return list(files)
