"""The loader for vLLM's workers."""

from __future__ import annotations

import copy
import inspect
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.model_loader.weight_utils import filter_safetensors_files_by_weight_name

from weightlift.backends.serving_files import (
    AHEAD_BYTES,
    OWN_KEYS,
    FilesReader,
    expect_tensors,
    refuse_unfilled,
    summary,
    tell_unfilled,
    weights_again,
    weights_of,
)
from weightlift.core.errors import CheckpointError
from weightlift.distributed.rank_group import RankGroup
from weightlift.distributed.shared_copies import is_of_whole_tensor, share_copies
from weightlift.load.copies import Copy
from weightlift.load.options import LoadOptions
from weightlift.module.recording.recorder import Recorder
from weightlift.module.recording.replay import Taken

__all__ = ["WeightliftModelLoader"]

# A logger of vLLM, which shows only its own loggers.
_log = init_logger("vllm.weightlift")

_OPTIONS = LoadOptions(caller="vllm")
for _method, _count in (("_prepare_weights", 6), ("track_weights_loading", 4)):
    if len(inspect.signature(getattr(DefaultModelLoader, _method)).parameters) != _count:
        raise ImportError(f"DefaultModelLoader.{_method} takes other arguments")
# Model -> the parts of tensors that its own loading used, for reloads.
_taken_by: WeakKeyDictionary[torch.nn.Module, Taken] = WeakKeyDictionary()


class WeightliftModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """Reads the slices of each tensor that the rank's parameters need, straight to their place.

    Options in ``--model-loader-extra-config``: ``{"slices": false}`` gives the model whole tensors
    that are read ahead; ``{"share": true}`` lets one rank of a node read each tensor that all its
    ranks need whole; ``{"check": true}`` loads both ways and compares.
    """

    counter_before_loading_weights: float

    def __init__(self, load_config: Any) -> None:
        config = copy.copy(load_config)
        config.load_format = "auto"
        extra = config.model_loader_extra_config
        own: dict[str, Any] = {}
        if isinstance(extra, dict):
            own = {key: extra[key] for key in OWN_KEYS if key in extra}
            config.model_loader_extra_config = {k: v for k, v in extra.items() if k not in own}
        for key, value in own.items():
            if not isinstance(value, bool):
                raise ValueError(f"{key} must be true or false, got {value!r}")
        super().__init__(config)
        self._slices: bool = own.get("slices", True)
        self._check: bool = own.get("check", False)
        self._share: bool = own.get("share", False)
        self._untracked: list[str] = []  # of whole tensors: what vLLM knows no weights of
        self._recorder: Recorder | None = None
        self._taken: Taken | None = None
        self._is_loading = False
        self._reader = FilesReader(_OPTIONS)

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        begun = time.perf_counter()
        self._reader = reader = FilesReader(_OPTIONS)
        self._is_loading = True
        self._untracked = []
        try:
            if not self._slices or model_config.quantization == "torchao":
                super().load_weights(model, model_config)
                tell_unfilled(_log, reader, self._untracked)
                _log.info("%s", summary(reader, None, time.perf_counter() - begun))
                return
            taken = self._load_slices(model, model_config)
            _taken_by[model] = taken
            _log.info("%s", summary(reader, taken, time.perf_counter() - begun))
            if self._check:
                self._compare(model, model_config)
        except Exception:
            if reader.last is not None:
                _log.error("weightlift: after tensor %r of %s", *reversed(reader.last))
            raise
        finally:
            self._is_loading = False

    def _load_slices(self, model: torch.nn.Module, model_config: Any) -> Taken:
        reader = self._reader
        group = self._ranks()

        def is_held(copy: Copy) -> bool:
            return group is not None and is_of_whole_tensor(copy, recorder.sources[copy.name].shape)

        recorder = Recorder(reader, ahead=AHEAD_BYTES, held=is_held, threads=True)
        made_late = expect_tensors(recorder, model)
        self._recorder = recorder
        try:
            with recorder.watching():
                super().load_weights(model, model_config)
        except Exception as error:
            if group is not None:
                group.gather(group.groups, error)  # so that the other ranks do not wait
            raise
        finally:
            self._recorder = None
        if group is not None:
            rest, report = share_copies(recorder.take_held(), reader.joined, _OPTIONS, group)
            recorder.put_back(rest)
            reader.ended(report)
            group.close()
        recorder.finish()
        parameters = list(model.named_parameters())
        unfilled = recorder.unfilled(parameters, in_part=bool(reader.absent))
        refuse_unfilled(reader, unfilled, made_late=made_late)
        quantized = model_config.quantization is not None
        tell_unfilled(_log, reader, [] if quantized else recorder.unfilled(parameters))
        recorder.replace_kept()
        return Taken.of(recorder)

    def track_weights_loading(
        self, model: torch.nn.Module, loaded_weights: set[str] | None, quantized: bool = False
    ) -> None:
        """vLLM's own check leaves out what it processes after loading: linear layers, ..."""
        super().track_weights_loading(model, loaded_weights, quantized)
        if loaded_weights is not None and not quantized:
            names = (name for name, _ in model.named_parameters())
            self._untracked = [name for name in names if name not in loaded_weights]

    def _ranks(self) -> RankGroup | None:
        """The tensor parallel ranks, if they share reads."""
        tensor_parallel = get_tp_group() if self._share else None
        if tensor_parallel is None or tensor_parallel.world_size == 1:
            return None
        return RankGroup([tensor_parallel.device_group], "node")

    def get_all_weights(
        self, model_config: Any, model: torch.nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """vLLM also calls this outside ``load_weights``, to reload a model in place. Then the parts
        that the first load used are read ahead."""
        if self._is_loading:
            yield from super().get_all_weights(model_config, model)
            return
        begun = time.perf_counter()
        self._reader = reader = FilesReader(_OPTIONS)
        self._taken = _taken_by.get(model) if self._slices else None
        try:
            yield from super().get_all_weights(model_config, model)
            _log.info("%s", summary(reader, self._taken, time.perf_counter() - begun))
        finally:
            self._taken = None

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if self.counter_before_loading_weights == 0.0:
            self.counter_before_loading_weights = time.perf_counter()
        local = self.local_expert_ids
        files = self._files(source)

        def skip(name: str) -> bool:
            return bool(should_skip_weight(name, local))

        if self._taken is not None:
            again = weights_again(files, self._reader, self._taken, prefix=source.prefix, skip=skip)
            yield from again
            return
        yield from weights_of(files, self._reader, self._recorder, prefix=source.prefix, skip=skip)

    def _files(self, source: Any) -> list[str]:
        """The files of a source, in vLLM's order."""
        folder, files, use_safetensors, index = self._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        prefixes = getattr(self, "_encoder_only_lm_prefixes", None)
        if prefixes is not None and use_safetensors and files:
            from vllm.model_executor.model_loader import weight_utils

            files = weight_utils.filter_mm_encoder_only_safetensors_files(
                files, folder, index, prefixes, weights_mapper=self._encoder_only_weights_mapper
            )
            if not files:
                raise CheckpointError(
                    f"{source.model_or_path}: --mm-encoder-only leaves none of its weight files"
                )
        if source.is_unused_weight is not None and use_safetensors:
            files = filter_safetensors_files_by_weight_name(files, source.is_unused_weight)
        return sorted(files, key=_natural)

    def _compare(self, model: torch.nn.Module, model_config: Any) -> None:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        recorded = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._reader = FilesReader(_OPTIONS)
        super().load_weights(model, model_config)
        wrong = [
            name
            for name, before in recorded.items()
            if not torch.equal(_bytes_of(tensors[name]), _bytes_of(before))
        ]
        if wrong:
            raise CheckpointError(
                f"{', '.join(wrong[:3])} ({len(wrong)} in all): whole tensors give other bytes "
                "than slices: this is a bug in weightlift, please report it"
            )
        _log.info("weightlift: whole tensors give the same %d parameters", len(recorded))


def _natural(path: str) -> list[Any]:
    """``model-2`` before ``model-10``."""
    parts = re.split(r"(\d+)", Path(path).name)
    return [int(part) if part.isdigit() else part for part in parts]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
