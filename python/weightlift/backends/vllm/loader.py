"""The loader that vLLM runs in each of its workers."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.model_loader.weight_utils import filter_safetensors_files_by_weight_name

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.open_checkpoint import open_checkpoint
from weightlift.core.errors import CheckpointError
from weightlift.core.report import LoadReport, format_bytes
from weightlift.load.copies import Copy
from weightlift.load.options import LoadOptions
from weightlift.load.read_ahead import read_ahead
from weightlift.module.recording.reader import CheckpointReader, sources_of
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
        self._reader = _Reader()

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        begun = time.perf_counter()
        self._reader = _Reader()
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
            recorder.give_real_ones()
        report = self._reader.report
        _log.info(
            "weightlift read %s of %s for this rank in %.2f s%s",
            format_bytes(report.bytes),
            format_bytes(self._reader.offered),
            time.perf_counter() - begun,
            _whole(recorder.whole),
        )
        if self._check and self._slices:
            self._compare(model, model_config)

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if self.counter_before_loading_weights == 0.0:
            self.counter_before_loading_weights = time.perf_counter()
        for file in self._files(source):
            checkpoint = open_checkpoint(file)
            chosen = [
                name
                for name in _in_order(file, checkpoint)
                if not should_skip_weight(name, self.local_expert_ids)
            ]
            keys = self._reader.add(checkpoint, chosen)
            if self._recorder is None:
                for name, tensor in read_ahead(checkpoint, chosen, _OPTIONS):
                    self._reader.count(tensor)
                    yield source.prefix + name, tensor
                continue
            for name, shape in sources_of(checkpoint, chosen).items():
                if shape is None:
                    tensor = self._reader.tensors([keys[name]])[keys[name]]
                else:
                    tensor = self._recorder.placeholder(keys[name], shape)
                yield source.prefix + name, tensor

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
        self._reader = _Reader()
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


class _Reader:
    """Reads from all files that were added, as from one checkpoint.

    Attributes:
        report: of all reads.
        offered: bytes of all tensors in the files.
    """

    checkpoint = None

    def __init__(self) -> None:
        self.offered = 0
        self._counted = 0
        self._parts: list[tuple[Checkpoint, dict[str, str]]] = []
        self._keys: set[str] = set()
        self._reader: CheckpointReader | None = None
        self._before = LoadReport()

    @property
    def report(self) -> LoadReport:
        read = LoadReport(bytes=self._counted, read_bytes=self._counted)
        now = self._before if self._reader is None else self._before.plus(self._reader.report)
        return now.plus(read)

    def add(self, checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, str]:
        """Name -> key in all that there is, for the tensors of another file."""
        number = len(self._parts)
        keys = {name: name if name not in self._keys else f"{name} ({number})" for name in names}
        self._keys.update(keys.values())
        if self._reader is not None:
            self._before, self._reader = self._before.plus(self._reader.report), None
        self._parts.append((checkpoint, keys))
        self.offered += sum(sum(part.sizes()) for part in checkpoint.parts)
        return keys

    def count(self, tensor: torch.Tensor) -> None:
        """Of a tensor that was read elsewhere."""
        self._counted += tensor.numel() * tensor.element_size()

    def tensors(self, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        return self._all().tensors(names)

    def copy(self, copies: Sequence[Copy]) -> None:
        self._all().copy(copies)

    def _all(self) -> CheckpointReader:
        if self._reader is None:
            self._reader = CheckpointReader(Checkpoint.joined(self._parts), _OPTIONS)
        return self._reader


def _in_order(file: str, checkpoint: Checkpoint) -> list[str]:
    """As vLLM hands them out."""
    return sorted(checkpoint) if file.endswith(".safetensors") else list(checkpoint)


def _natural(path: str) -> list[Any]:
    """``model-2`` before ``model-10``."""
    parts = re.split(r"(\d+)", Path(path).name)
    return [int(part) if part.isdigit() else part for part in parts]


def _whole(whole: Mapping[str, str]) -> str:
    """For the log: how many tensors came whole, and why."""
    if not whole:
        return ""
    reasons = ", ".join(sorted(set(whole.values())))
    return f"; {len(whole)} tensors came whole ({reasons})"


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
