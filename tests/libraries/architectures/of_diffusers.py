"""Every model class of the installed diffusers, tiny, and the ways to load it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from files import FORMS, changed, filled, write
from observe import digest
from shrink import WAYS, shrunk

__all__ = ["LIBRARY", "OPTIONS", "NotMade", "amend", "cases", "make", "names"]

LIBRARY = "diffusers"
MOST_ELEMENTS = 12_000_000

OPTIONS: dict[str, tuple[Any, ...]] = {
    "files": FORMS,
    "stored": ("float32", "bfloat16", "float16"),
    "dtype": (None, "float32", "bfloat16", "float16"),
    "device_map": (None, "cpu", "with disk", "in full memory"),
    "call": ("plain", "uneven", "mismatched", "refused", "read"),
}
_SETTINGS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("settings.json").read_text()
)


class NotMade(Exception):
    """An architecture cannot be made tiny here."""


def names() -> list[str]:
    return [
        name
        for name in diffusers._import_structure["models"]
        if name not in ("AutoModel", "ModelMixin", "AttentionBackendName", "attention_backend")
    ]


@dataclasses.dataclass
class Made:
    """A tiny model on disk.

    Attributes:
        cls: the model's class.
        tensors: of its checkpoint, as the library saves them.
        buffers: names of buffers.
        folder: the folder for files; it has the config.json.
    """

    cls: Any
    tensors: dict[str, torch.Tensor]
    buffers: frozenset[str]
    folder: Path

    @property
    def title(self) -> str:
        return str(self.cls.__name__)

    @functools.cached_property
    def elements(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())


def _defaults(cls: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for parameter in inspect.signature(cls.__init__).parameters.values():
        if parameter.name in given:
            found[parameter.name] = given[parameter.name]
        elif parameter.default is not inspect.Parameter.empty:
            found[parameter.name] = parameter.default
    return found


def make(name: str, folder: Path) -> Made:
    """Builds and saves the tiny model.

    Raises:
        NotMade: the model cannot be made.
    """
    settings = _SETTINGS.get(name, {})
    if "reason" in settings:
        raise NotMade(settings["reason"])
    try:
        cls = getattr(diffusers, name)
        if not (inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin)):
            raise NotMade("no ModelMixin")
        defaults = _defaults(cls, settings.get("given", {}))
    except NotMade:
        raise
    except Exception as error:
        raise NotMade(_short(error)) from error
    reasons = []
    for way in WAYS:
        arguments = {**shrunk(defaults, way), **settings.get("set", {})}
        try:
            with torch.device("meta"):
                try:
                    count = sum(p.numel() for p in cls(**arguments).parameters())
                except NotImplementedError:  # its constructor computes
                    count = 0
            if count > MOST_ELEMENTS:
                reasons.append(f"{count / 1e6:.0f} M parameters")
                continue
            return _saved(cls(**arguments), folder)
        except Exception as error:
            reasons.append(_short(error))
    raise NotMade("; ".join(dict.fromkeys(reasons)))


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}"


def _saved(model: Any, folder: Path) -> Made:
    filled(model)
    model.save_config(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if not tensors:
        raise NotMade("it has no tensor")
    return Made(type(model), tensors, frozenset(dict(model.named_buffers())), folder)


def _content(made: Made, case: Mapping[str, Any]) -> tuple[str, dict[str, torch.Tensor]]:
    """The tensors in the files of a case, and a name for them."""
    content = case["call"] if case["call"] in ("uneven", "mismatched", "refused") else "whole"
    dtype = getattr(torch, case["stored"])
    tensors = {
        # Copies, because tied tensors share memory, which safetensors refuses.
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).clone()
        for name, tensor in made.tensors.items()
    }
    return content, tensors if content == "whole" else changed(tensors, content)


def _written(made: Made, case: Mapping[str, Any]) -> Path:
    content, tensors = _content(made, case)
    key = "-".join((case["files"], case["stored"], content)).replace(" ", "-")
    folder = made.folder / key
    if folder.exists():
        return folder
    folder.mkdir()
    (folder / "config.json").write_bytes((made.folder / "config.json").read_bytes())
    stem = "diffusion_pytorch_model"
    write(folder, case["files"], tensors, (stem, stem))
    return folder


def amend(made: Made, case: Mapping[str, Any], alone: dict[str, Any]) -> None:
    """diffusers alone leaves buffers of modules on the disk as the constructor made them; the
    backend must load them from the files."""
    places = alone.get("attributes", {}).get("hf_device_map")
    if case["device_map"] != "with disk" or not isinstance(places, dict):
        return
    on_disk = [module for module, place in places.items() if place == "disk"]
    _, tensors = _content(made, case)
    for name, entry in alone["tensors"].items():
        *kind, dtype, shape, stride, device, grad, _ = entry
        held = tensors.get(name)
        buffer = name in made.buffers and any(f"{name}.".startswith(f"{m}.") for m in on_disk)
        if not buffer or held is None or tuple(held.shape) != shape or device == "meta":
            continue
        bits = digest(held.to(getattr(torch, dtype.removeprefix("torch."))))
        alone["tensors"][name] = (*kind, dtype, shape, stride, device, grad, bits)


def _with_disk(made: Made, dtype: torch.dtype) -> dict[str, Any]:
    """A map with about half of the model on the disk: diffusers' own, if the class allows one."""
    if made.cls._no_split_modules is not None:
        return {"device_map": "auto", "max_memory": {"cpu": made.elements * dtype.itemsize // 2}}
    children = list(dict.fromkeys(name.partition(".")[0] for name in made.tensors))
    return {"device_map": {c: ("cpu", "disk")[i % 2] for i, c in enumerate(children)}}


def cases(made: Made, row: Mapping[str, Any]) -> Callable[[], Any]:
    """The call of a row of options; it is made twice."""
    folder = _written(made, row)
    options: dict[str, Any] = {}
    if row["dtype"] is not None:
        options["torch_dtype"] = getattr(torch, row["dtype"])
    if row["device_map"] == "cpu":
        options["device_map"] = "cpu"
    elif row["device_map"] == "in full memory":
        options["low_cpu_mem_usage"] = False
    elif row["device_map"] is not None:
        options |= _with_disk(made, getattr(torch, row["dtype"] or "float32"))
    if row["files"] == "bin shards":  # else diffusers looks for no index of .bin files
        options["use_safetensors"] = False
    if row["call"] == "read":
        options["disable_mmap"] = True
    if row["call"] == "mismatched":
        options["ignore_mismatched_sizes"] = True

    def load() -> Any:
        if row["device_map"] == "with disk":
            options["offload_folder"] = tempfile.mkdtemp(prefix="offload-", dir=made.folder)
        return made.cls.from_pretrained(folder, output_loading_info=True, **options)

    return load
