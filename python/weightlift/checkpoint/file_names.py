"""Parses the names of weight files, and chooses the file that a library would load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from weightlift.checkpoint.files import Format

__all__ = [
    "ADAPTERS",
    "EXTENSIONS",
    "FILE_FORMATS",
    "FLAX_NAMES",
    "MODELS",
    "Selection",
    "WeightsName",
    "choose",
    "listed",
    "parse_name",
]

# The weight file names of diffusers and transformers, in search order: any safetensors before .bin,
# diffusers' name before transformers'.
MODELS: tuple[tuple[Format, str], ...] = (
    ("safetensors", "diffusion_pytorch_model"),
    ("safetensors", "model"),
    ("torch", "diffusion_pytorch_model"),
    ("torch", "pytorch_model"),
)
# The names of peft, and of diffusers for LoRA; used only if there is no model.
ADAPTERS: tuple[tuple[Format, str], ...] = (
    ("safetensors", "adapter_model"),
    ("safetensors", "pytorch_lora_weights"),
    ("torch", "adapter_model"),
    ("torch", "pytorch_lora_weights"),
)
EXTENSIONS: dict[Format, str] = {"safetensors": ".safetensors", "torch": ".bin"}
# The formats of files given by their own path.
FILE_FORMATS: dict[str, Format] = {
    ".safetensors": "safetensors",
    ".bin": "torch",
    ".pt": "torch",
    ".pth": "torch",
    ".ckpt": "torch",
}
# How many names an error lists before it only counts.
_LISTED = 20
FLAX_NAMES = ("diffusion_flax_model.msgpack", "flax_model.msgpack")


class Selection(NamedTuple):
    """The weights of a folder that a caller requests."""

    variant: str | None
    use_safetensors: bool | None
    strict_index: bool = False

    def takes(self, format: Format) -> bool:
        return self.use_safetensors in (None, format == "safetensors")


class WeightsName(NamedTuple):
    """The parsed name of a weight file."""

    name: str
    format: Format
    stem: str
    variant: str | None
    kind: Literal["index", "single", "shard"]
    spelling: int
    shards: int


def parse_name(name: str) -> WeightsName | None:
    """Parses a name; ``None`` if no library names weights so."""
    for format, stem in (*MODELS, *ADAPTERS):
        extension = EXTENSIONS[format]
        if not name.startswith(stem) or extension not in name:
            continue
        rest = name[len(stem) :]
        if rest.endswith(".json"):
            found = _parse_index_name(rest, extension)
        elif rest.endswith(extension):
            found = _parse_file_name(rest[: -len(extension)])
        else:
            continue
        if found is not None:
            kind, spelling, variant, shards = found
            return WeightsName(name, format, stem, variant, kind, spelling, shards)
    return None


# (kind, spelling, variant, shards). Parsed without regular expressions, which take longer to
# compile than a checkpoint takes to open.
_Parsed = tuple[Literal["index", "single", "shard"], int, "str | None", int]


def _parse_index_name(rest: str, extension: str) -> _Parsed | None:
    """Parses the part of an index's name after the stem."""
    # diffusers and transformers: .safetensors.index.json, .safetensors.index.fp16.json
    inner = rest.removesuffix(".json")
    if inner == f"{extension}.index":
        return "index", 0, None, 0
    if variant := _variant(inner.removeprefix(f"{extension}.index"), inner):
        return "index", 0, variant, 0
    if not rest.endswith(".index.json"):
        return None
    inner = rest.removesuffix(".index.json")
    # huggingface_hub's save_torch_state_dict: .fp16.safetensors.index.json
    if inner.endswith(extension) and (variant := _variant(inner.removesuffix(extension))):
        return "index", 1, variant, 0
    # diffusers in 2024 (still read today): .safetensors.fp16.index.json
    if variant := _variant(inner.removeprefix(extension), inner):
        return "index", 2, variant, 0
    return None


def _parse_file_name(rest: str) -> _Parsed | None:
    """Parses the part of a file's name between the stem and the extension."""
    before, _, total = rest.rpartition("-of-")
    before, dash, number = before.rpartition("-")
    if dash and _is_count(number) and _is_count(total) and (not before or _variant(before)):
        return "shard", 3, _variant(before), int(total)
    number, _, behind = rest.removeprefix("-").partition("-of-")
    total, dot, variant = behind.partition(".")
    if rest.startswith("-") and dot and variant and _is_count(number) and _is_count(total):
        return "shard", 4, variant, int(total)
    if not rest or _variant(rest):
        return "single", 5, _variant(rest), 0
    return None


def _variant(text: str, unless: str | None = None) -> str | None:
    """``"fp16"`` for ``".fp16"``; ``None`` if ``text`` equals ``unless`` (no prefix was
    removed)."""
    return text[1:] if text[:1] == "." and len(text) > 1 and text != unless else None


def _is_count(text: str) -> bool:
    return len(text) >= 5 and text.isdecimal()


def choose(weights: Sequence[WeightsName], selection: Selection) -> WeightsName | None:
    """The file or index that a library would load."""
    order = (*MODELS, *ADAPTERS)
    fit = [
        (order.index((found.format, found.stem)), _later(found), found.spelling, found)
        for found in weights
        if found.kind != "shard"
        and found.variant == selection.variant
        and selection.takes(found.format)
    ]
    return min(fit, key=lambda item: item[:3])[3] if fit else None


def _later(weights: WeightsName) -> bool:
    """diffusers looks for an index first, transformers and accelerate for a single file."""
    first = "index" if weights.stem == "diffusion_pytorch_model" else "single"
    return weights.kind != first


def listed(names: Iterable[str]) -> str:
    """For messages: up to twenty names, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
