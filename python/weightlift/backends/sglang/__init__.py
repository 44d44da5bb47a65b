"""SGLang: its default loader reads through the engine if ``WEIGHTLIFT_SGLANG`` is set.

SGLang calls ``register`` (an entry point), which hooks two methods of ``DefaultModelLoader``
through SGLang's own ``HookRegistry``:

- ``load_weights_only``, only by ``slices``: records the model's own loading, and reads only the
  slices that it copies.
- ``_get_weights_iterator``: hands out tensors that the engine reads.

Decided in ``_iterate``, source by source: whether the engine reads it.

Falls back to SGLang's own iterator: load formats other than ``auto`` and ``safetensors``, draft
models by index, sources with other files than safetensors, and, with a warning, options that are
not known. With other hooks in SGLang nothing is hooked.
"""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from weightlift.backends.serving_files import FilesReader
    from weightlift.module.recording.recorder import Recorder

__all__ = ["register"]

_LOADER = "sglang.srt.model_loader.loader.DefaultModelLoader"
_WAYS = ("slices", "whole")
_log = logging.getLogger("weightlift")


class _ResolvedSource(Protocol):
    """SGLang's ``DefaultModelLoader.ResolvedSource``."""

    weight_files: Sequence[str]
    use_safetensors: bool


class _IteratorOptions(TypedDict, total=False):
    """What ``_get_weights_iterator`` takes by name, in the versions that are known."""

    resolved_source: _ResolvedSource | None
    startup_prefetch_started: bool
    startup_prefetch_active: bool


# The reader and the recorder of a recorded load in this context.
_recording: ContextVar[tuple[FilesReader, Recorder] | None] = ContextVar(
    "weightlift_sglang_recording", default=None
)


def register() -> None:
    """The entry point of the group ``sglang.srt.plugins``. SGLang has a fixed list of load formats,
    so an environment variable selects the engine: ``WEIGHTLIFT_SGLANG=slices`` or ``whole``.
    Without it nothing is hooked."""
    way = os.environ.get("WEIGHTLIFT_SGLANG", "")
    if not way:
        return
    if way not in _WAYS:
        _log.warning("WEIGHTLIFT_SGLANG is %r and ignored; it can be 'slices' or 'whole'", way)
        return
    try:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(f"{_LOADER}._get_weights_iterator", _iterate, HookType.AROUND)
        if way == "slices":
            HookRegistry.register(f"{_LOADER}.load_weights_only", _load, HookType.AROUND)
    except (ImportError, AttributeError, TypeError) as error:
        _log.warning(
            "this version of SGLang has unknown hooks (%s: %s), so its own loader is used",
            type(error).__name__,
            error,
        )


def _load(original: Callable[..., Any], model: Any, weights: Any, target_device: Any) -> Any:
    """Replaces ``load_weights_only``: records the model's own loading."""
    from weightlift.backends.serving_files import (
        AHEAD_BYTES,
        FilesReader,
        expect_tensors,
        refuse_unfilled,
        summary,
        tell_unfilled,
    )
    from weightlift.load.options import LoadOptions
    from weightlift.module.recording.recorder import Recorder
    from weightlift.module.recording.replay import Taken

    begun = time.perf_counter()
    reader = FilesReader(LoadOptions(caller="sglang"))
    recorder = Recorder(reader, ahead=AHEAD_BYTES, threads=True)
    made_late = expect_tensors(recorder, model)
    token = _recording.set((reader, recorder))
    try:
        with recorder.watching():
            result = original(model, weights, target_device)
    finally:
        _recording.reset(token)
    recorder.finish()
    parameters = list(model.named_parameters())
    unfilled = recorder.unfilled(parameters, in_part=bool(reader.absent))
    refuse_unfilled(reader, unfilled, made_late=made_late)
    quantized = getattr(model, "quant_config", None) is not None
    tell_unfilled(_log, reader, [] if quantized else recorder.unfilled(parameters))
    recorder.replace_kept()
    _log.info("%s", summary(reader, Taken.of(recorder), time.perf_counter() - begun))
    return result


def _iterate(
    original: Callable[..., Iterator[tuple[str, torch.Tensor]]],
    loader: Any,
    source: Any,
    **options: Unpack[_IteratorOptions],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Replaces ``_get_weights_iterator``."""
    from weightlift.backends.serving_files import FilesReader, weights_of
    from weightlift.load.options import LoadOptions

    unknown = sorted(options.keys() - _IteratorOptions.__annotations__.keys())
    if unknown:
        _log.warning(
            "weightlift does not support %s of this SGLang's loader: SGLang's own loader is used",
            ", ".join(unknown),
        )
        return original(loader, source, **options)
    config = loader.load_config
    load_format = str(getattr(config.load_format, "value", config.load_format))
    if load_format not in ("auto", "safetensors") or config.draft_model_idx is not None:
        return original(loader, source, **options)
    files = _files(loader, source, options.get("resolved_source"))
    if files is None:
        return original(loader, source, **options)
    if loader.counter_before_loading_weights == 0.0:
        loader.counter_before_loading_weights = time.perf_counter()
    recording = _recording.get()
    reader, recorder = recording or (FilesReader(LoadOptions(caller="sglang")), None)
    return weights_of(files, reader, recorder, prefix=source.prefix)


def _files(loader: Any, source: Any, resolved: _ResolvedSource | None) -> list[str] | None:
    """The safetensors files of a source; ``None`` if it has other files."""
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
