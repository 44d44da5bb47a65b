"""The parts of SGLang 0.5.23's DefaultModelLoader that weightlift uses, for tests without
SGLang."""

import dataclasses
import enum
from pathlib import Path

import torch
from safetensors import safe_open


class LoadFormat(str, enum.Enum):
    AUTO = "auto"
    NPCACHE = "npcache"


def maybe_add_mtp_safetensors(files, folder, index, config):
    extra = Path(folder, "mtp.safetensors")
    return [*files, str(extra)] if extra.exists() and str(extra) not in files else files


class DefaultModelLoader:
    @dataclasses.dataclass
    class Source:
        model_or_path: str
        revision: str | None = None
        prefix: str = ""
        fall_back_to_pt: bool = True
        allow_patterns_overrides: list | None = None
        model_config: object = None

    counter_before_loading_weights = 0.0

    def __init__(self, load_config):
        self.load_config = load_config

    def _prepare_weights(self, path, revision, fall_back_to_pt, patterns):
        for pattern in patterns or ["model*.safetensors", "*.bin"]:
            files = sorted(str(file) for file in Path(path).glob(pattern))
            if files:
                return path, files, pattern.endswith("safetensors")
        raise RuntimeError(f"Cannot find any model weights with `{path}`")

    def _get_weights_iterator(self, source, *, resolved_source=None):
        folder, files, use_safetensors = self._prepare_weights(
            source.model_or_path, None, True, source.allow_patterns_overrides
        )
        if not use_safetensors:
            tensors = torch.load(files[0], weights_only=True)
            return ((source.prefix + name, tensor) for name, tensor in tensors.items())
        files = maybe_add_mtp_safetensors(files, folder, "", None)
        return self._stock(files, source.prefix)

    @staticmethod
    def _stock(files, prefix):
        for file in files:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    yield prefix + name, opened.get_tensor(name)

    @staticmethod
    def load_weights_only(model, weights, target_device):
        model.load_weights(weights)

    def load_model(self, model, sources):
        def weights():
            for source in sources:
                yield from self._get_weights_iterator(source)

        DefaultModelLoader.load_weights_only(model, weights(), torch.device("cpu"))
        model.scale_after = model.scale.item()
