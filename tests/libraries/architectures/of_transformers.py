"""Every configuration of the installed transformers, tiny, and the ways to load it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from files import FORMS, changed, filled, write
from shrink import WAYS, shrunk
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
)

__all__ = ["LIBRARY", "OPTIONS", "NotMade", "amend", "cases", "make", "names"]

LIBRARY = "transformers"
MOST_ELEMENTS = 12_000_000

OPTIONS: dict[str, tuple[Any, ...]] = {
    "model": ("as saved", "base", "head"),
    "files": FORMS,
    "stored": ("float32", "bfloat16", "float16"),
    "dtype": (None, "auto", "float32", "bfloat16", "float16"),
    "device_map": (None, "cpu", "auto with disk"),
    "call": ("plain", "uneven", "mismatched", "refused", "nested", "read"),
}
# In the order of preference for saving: with a head first, so that the others have weights to leave
# out.
_SAVED = (
    "ForConditionalGeneration",
    "ForCausalLM",
    "ForPreTraining",
    "ForMaskedLM",
    "LMHeadModel",
    "ForObjectDetection",
    "ForImageClassification",
    "ForCTC",
    "For",
    "",
)
_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForImageClassification",
    "ForAudioClassification",
    "ForSemanticSegmentation",
    "ForMultipleChoice",
    "For",
)
_BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}


class NotMade(Exception):
    """An architecture cannot be made tiny here."""


def names() -> list[str]:
    return list(CONFIG_MAPPING_NAMES)


@functools.cache
def _classes_by_type() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for mapping in dir(modeling_auto):
        if mapping.startswith("MODEL") and mapping.endswith("MAPPING_NAMES"):
            for name, classes in getattr(modeling_auto, mapping).items():
                for one in classes if isinstance(classes, (tuple, list)) else (classes,):
                    if one and one not in found.setdefault(name, []):
                        found[name].append(one)
    return found


def _classes(name: str, config_class: Any) -> list[Any]:
    """The model classes of a configuration: by the library's tables, else by its modules."""
    listed = [getattr(transformers, one, None) for one in _classes_by_type().get(name, [])]
    classes = [one for one in listed if inspect.isclass(one)]
    if classes:
        return classes
    package = config_class.__module__.rpartition(".")[0]
    for file in sorted(Path(inspect.getfile(config_class)).parent.glob("modeling_*.py")):
        classes += [
            one
            for one in vars(importlib.import_module(f"{package}.{file.stem}")).values()
            if inspect.isclass(one)
            and issubclass(one, transformers.PreTrainedModel)
            and getattr(one, "config_class", None) is config_class
            and not one.__name__.endswith("PreTrainedModel")
        ]
    return list(dict.fromkeys(classes))


def _first(classes: list[Any], order: tuple[str, ...]) -> list[Any]:
    """Sorts by the first of these that is in a class's name."""

    def key(cls: Any) -> int:
        return next((i for i, part in enumerate(order) if part in cls.__name__), len(order))

    return sorted((one for one in classes if key(one) < len(order)), key=key)


# Settings that have no default and no rule.
_SETTINGS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("settings.json").read_text()
)


def _configurations(name: str, config_class: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Ways to a small configuration."""
    settings = _SETTINGS.get(name, {})

    def make(way: Any) -> Any:
        default = config_class(**settings.get("given", {})).to_dict()
        small = shrunk(default, way)
        if small.get("use_timm_backbone") or "timm" in str(small.get("backbone_config")):
            small |= {"use_timm_backbone": False, "backbone": None, "backbone_config": _BACKBONE}
            small.pop("backbone_kwargs", None)
        _update(small, settings.get("set", {}))
        return config_class.from_dict(small)

    for way in WAYS:
        yield repr(way), functools.partial(make, way)


def _update(config: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _update(config[key], value)
        else:
            config[key] = value


@dataclasses.dataclass
class Made:
    """A tiny model on disk.

    Attributes:
        classes: the loaded classes, by the value of ``"model"``.
        tensors: of its checkpoint, as the library saves them.
        config: its folder's config.json.
        folder: where files are written.
    """

    classes: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    folder: Path

    @property
    def title(self) -> str:
        return " ".join(dict.fromkeys(one.__name__ for one in self.classes.values()))

    @functools.cached_property
    def elements(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())


def _small_enough(cls: Any, config: Any) -> str | None:
    with torch.device("meta"):
        try:
            count = sum(p.numel() for p in cls(config).parameters())
        except NotImplementedError:  # its constructor computes
            return None
    return f"{count / 1e6:.0f} M parameters" if count > MOST_ELEMENTS else None


def _is_built(cls: Any, config: Any) -> bool:
    try:
        return _small_enough(cls, copy.deepcopy(config)) is None
    except Exception:  # the configuration lacks what this class needs
        return False


def make(name: str, folder: Path) -> Made:
    """Builds and saves the tiny model.

    Raises:
        NotMade: the model cannot be made.
    """
    if "reason" in _SETTINGS.get(name, {}):
        raise NotMade(_SETTINGS[name]["reason"])
    try:
        config_class = CONFIG_MAPPING[name]
        classes = _classes(name, config_class)
    except Exception as error:
        raise NotMade(_short(error)) from error
    if not classes:
        raise NotMade("no class of a model has this configuration")
    reasons = []
    for cls in _first(classes, _SAVED)[:2]:
        for _, configuration in _configurations(name, config_class):
            try:
                config = configuration()
                reason = _small_enough(cls, config)
                if reason is None:
                    return _saved(cls, classes, config, folder)
            except Exception as error:
                reason = _short(error)
            reasons.append(reason)
    raise NotMade("; ".join(dict.fromkeys(reasons)))


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}"


def _saved(cls: Any, classes: list[Any], config: Any, folder: Path) -> Made:
    model = cls(config)
    filled(model)
    model.save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.torch.load(file.read_bytes())
        file.unlink()
    if not tensors:
        raise NotMade("it saves no tensor")
    loaded = {"as saved": cls}
    base = [one for one in classes if "For" not in one.__name__]
    loaded["base"] = next((one for one in base if _is_built(one, config)), cls)
    heads = [one for one in _first(classes, _HEADS) if one not in loaded.values()]
    loaded["head"] = next((one for one in heads if _is_built(one, config)), cls)
    return Made(loaded, tensors, json.loads((folder / "config.json").read_text()), folder)


def _written(made: Made, case: Mapping[str, Any]) -> Path:
    """The folder with the files that a case loads."""
    content = case["call"] if case["call"] in ("uneven", "mismatched", "refused") else "whole"
    key = "-".join((case["files"], case["stored"], content)).replace(" ", "-")
    folder = made.folder / key
    if folder.exists():
        return folder
    folder.mkdir()
    dtype = getattr(torch, case["stored"])
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in made.tensors.items()
    }
    if content != "whole":
        tensors = changed(tensors, content)
    for file in made.folder.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = {**made.config, "dtype": case["stored"]}
    (folder / "config.json").write_text(json.dumps(config))
    write(folder, case["files"], tensors, ("model", "pytorch_model"))
    return folder


def cases(made: Made, row: Mapping[str, Any]) -> Callable[[], Any]:
    """The call of a row of options; it is made twice."""
    cls = made.classes[row["model"]]
    folder = _written(made, row)
    options: dict[str, Any] = {}
    if row["dtype"] is not None:
        options["dtype"] = row["dtype"] if row["dtype"] == "auto" else getattr(torch, row["dtype"])
    if row["device_map"] == "cpu":
        options["device_map"] = "cpu"
    elif row["device_map"] is not None:
        size = getattr(torch, row["stored"]).itemsize
        options["device_map"] = "auto"
        options["max_memory"] = {"cpu": made.elements * size // 2}
    if row["call"] == "read":
        options["disable_mmap"] = True
    if row["call"] == "mismatched":
        options["ignore_mismatched_sizes"] = True

    def given() -> dict[str, Any]:
        if row["device_map"] != "auto with disk":
            return options
        return {
            **options,
            "offload_folder": tempfile.mkdtemp(prefix="offload-", dir=made.folder),
        }

    if row["call"] == "nested":
        return _nested(cls, folder, made.folder, given)
    return lambda: cls.from_pretrained(folder, output_loading_info=True, **given())


def amend(made: Made, case: Mapping[str, Any], alone: dict[str, Any]) -> None:
    """No load is known that the library alone gets wrong."""


def _nested(
    cls: Any, folder: Path, place: Path, options: Callable[[], dict[str, Any]]
) -> Callable[[], Any]:
    """A load in the constructor of a model that is itself being loaded.

    Args:
        cls: the inner model's class.
        folder: its weights.
        place: the folder for the outer model's files.
        options: the options of the inner load.
    """
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config

    class Outer(ModelMixin, ConfigMixin):  # type: ignore[misc]
        @register_to_config
        def __init__(self, size: int = 4) -> None:
            super().__init__()
            self.inner = cls.from_pretrained(folder, **options())
            self.outer = torch.nn.Linear(size, size)

    outer = Path(tempfile.mkdtemp(prefix="offload-", dir=place))

    built = Outer()
    built.save_config(outer)
    held = {id(tensor): (name, tensor) for name, tensor in built.state_dict().items()}
    tensors = {
        name: tensor + 1 if tensor.is_floating_point() else tensor.clone()
        for name, tensor in held.values()
        if tensor.device.type != "meta"
    }
    safetensors.torch.save_file(tensors, outer / "diffusion_pytorch_model.safetensors")
    return lambda: Outer.from_pretrained(outer, output_loading_info=True)
