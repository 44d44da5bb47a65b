"""The parts of vLLM 0.32's DefaultModelLoader that weightlift uses, for tests without vLLM."""

import dataclasses
from pathlib import Path

from safetensors import safe_open

from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight


class DefaultModelLoader:
    @dataclasses.dataclass
    class Source:
        model_or_path: str
        revision: str | None = None
        subfolder: str | None = None
        prefix: str = ""
        fall_back_to_pt: bool = True
        allow_patterns_overrides: list | None = None
        is_unused_weight: object = None

    counter_before_loading_weights = 0.0

    def __init__(self, load_config):
        self.load_config = load_config
        self.local_expert_ids = None
        unknown = load_config.model_loader_extra_config.keys() - {"enable_weights_track"}
        if unknown:
            raise ValueError(f"Unexpected extra config keys: {unknown}")

    def _prepare_weights(self, path, subfolder, revision, fall_back_to_pt, patterns):
        assert self.load_config.load_format == "auto"
        folder = Path(path, subfolder or "")
        for pattern in patterns or ["*.safetensors", "*.bin"]:
            files = [str(file) for file in folder.glob(pattern)]
            if files:
                return str(folder), files, pattern.endswith("safetensors"), "index.json"
        raise RuntimeError(f"Cannot find any model weights with `{path}`")

    def _get_weights_iterator(self, source):
        _, files, _, _ = self._prepare_weights(
            source.model_or_path, source.subfolder, None, True, source.allow_patterns_overrides
        )
        for file in sorted(files):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if not should_skip_weight(name, self.local_expert_ids):
                        yield source.prefix + name, opened.get_tensor(name)

    def get_all_weights(self, model_config, model):
        unused = getattr(model, "is_unused_checkpoint_weight", None)
        yield from self._get_weights_iterator(
            self.Source(model_config.model, is_unused_weight=unused)
        )
        for source in getattr(model, "secondary_weights", ()):
            yield from self._get_weights_iterator(source)

    def load_weights(self, model, model_config):
        loaded = model.load_weights(self.get_all_weights(model_config, model))
        self.track_weights_loading(model, loaded)

    def track_weights_loading(self, model, loaded_weights, quantized=False):
        exempt = getattr(model, "exempt", set())
        missing = {name for name, _ in model.named_parameters()} - loaded_weights - exempt
        if missing:
            raise ValueError(f"Following weights were not initialized from checkpoint: {missing}")
