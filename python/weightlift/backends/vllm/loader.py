"""The loader that vLLM runs in each of its workers."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.model_loader.weight_utils import filter_safetensors_files_by_weight_name

from weightlift.backends.serving_files import FilesReader, summary, weights_of
from weightlift.core.errors import CheckpointError
from weightlift.load.options import LoadOptions
from weightlift.module.recording.recorder import Recorder

__all__ = ["WeightliftModelLoader"]

# As a logger of vLLM's, which shows no others.
_log = init_logger("vllm.weightlift")

_OPTIONS = LoadOptions(caller="vllm")
_OWN_KEYS = ("slices", "check")


class WeightliftModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """Reads what each rank's parameters take of each tensor, straight to their place.

    ``--model-loader-extra-config`` may say ``{"slices": false}``, which hands the model whole
    tensors that are read ahead, and ``{"check": true}``, which loads both ways and compares.
    """

    counter_before_loading_weights: float

    def __init__(self, load_config: Any) -> None:
        config = copy.copy(load_config)
        config.load_format = "auto"
        extra = config.model_loader_extra_config
        own: dict[str, Any] = {}
        if isinstance(extra, dict):
            own = {key: extra[key] for key in _OWN_KEYS if key in extra}
            config.model_loader_extra_config = {k: v for k, v in extra.items() if k not in own}
        for key, value in own.items():
            if not isinstance(value, bool):
                raise ValueError(f"{key} must be true or false, got {value!r}")
        super().__init__(config)
        self._slices: bool = own.get("slices", True)
        self._check: bool = own.get("check", False)
        self._recorder: Recorder | None = None
        self._reader = FilesReader(_OPTIONS)

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        begun = time.perf_counter()
        self._reader = FilesReader(_OPTIONS)
        recorder = Recorder(self._reader)
        if not self._slices or model_config.quantization == "torchao":
            super().load_weights(model, model_config)
        else:
            recorder.expect([*model.named_parameters(), *model.named_buffers()])
            self._recorder = recorder
            try:
                with recorder.watching():
                    super().load_weights(model, model_config)
            finally:
                self._recorder = None
            recorder.finish()
            recorder.replace_kept()
        _log.info("%s", summary(self._reader, recorder.whole, time.perf_counter() - begun))
        if self._check and self._slices:
            self._compare(model, model_config)

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if self.counter_before_loading_weights == 0.0:
            self.counter_before_loading_weights = time.perf_counter()
        local = self.local_expert_ids
        yield from weights_of(
            self._files(source),
            self._reader,
            self._recorder,
            prefix=source.prefix,
            skip=lambda name: should_skip_weight(name, local),
        )

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
                "than slices did: this is a fault of weightlift's, please report it"
            )
        _log.info("weightlift: whole tensors give the same %d parameters", len(recorded))


def _natural(path: str) -> list[Any]:
    """``model-2`` before ``model-10``."""
    parts = re.split(r"(\d+)", Path(path).name)
    return [int(part) if part.isdigit() else part for part in parts]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
