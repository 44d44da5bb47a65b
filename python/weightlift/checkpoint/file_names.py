"""What the names of weight files say, and which of them a library would take."""

from __future__ import annotations

import functools
import re
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

# The names that diffusers and transformers give to weights, in the order in which they are looked
# for: any safetensors before .bin, diffusers' name before transformers'.
MODELS: tuple[tuple[Format, str], ...] = (
    ("safetensors", "diffusion_pytorch_model"),
    ("safetensors", "model"),
    ("torch", "diffusion_pytorch_model"),
    ("torch", "pytorch_model"),
)
# peft's, and diffusers' for LoRA; where there is no model beside them.
ADAPTERS: tuple[tuple[Format, str], ...] = (
    ("safetensors", "adapter_model"),
    ("safetensors", "pytorch_lora_weights"),
    ("torch", "adapter_model"),
    ("torch", "pytorch_lora_weights"),
)
EXTENSIONS: dict[Format, str] = {"safetensors": ".safetensors", "torch": ".bin"}
# Of files that are named by their own path.
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
    """Which weights of a folder a caller asks for."""

    variant: str | None
    use_safetensors: bool | None
    strict_index: bool = False

    def takes(self, format: Format) -> bool:
        return self.use_safetensors in (None, format == "safetensors")


class WeightsName(NamedTuple):
    """What the name of a file says."""

    name: str
    format: Format
    stem: str
    variant: str | None
    kind: Literal["index", "single", "shard"]
    spelling: int
    shards: int


# How the files of a checkpoint are called: @ is the stem, % the extension.
_SPELLINGS: tuple[tuple[Literal["index", "single", "shard"], str], ...] = (
    # diffusers and transformers
    ("index", r"@%\.index(?:\.(?P<variant>.+))?\.json"),
    # huggingface_hub's save_torch_state_dict
    ("index", r"@\.(?P<variant>.+)%\.index\.json"),
    # diffusers of 2024, which still reads them
    ("index", r"@%\.(?P<variant>.+)\.index\.json"),
    ("shard", r"@(?:\.(?P<variant>.+))?-\d{5,}-of-(?P<shards>\d{5,})%"),
    ("shard", r"@-\d{5,}-of-(?P<shards>\d{5,})\.(?P<variant>.+)%"),
    ("single", r"@(?:\.(?P<variant>.+))?%"),
)


# Each when it is first needed: to compile all of them takes longer than to open a checkpoint.
@functools.cache
def _pattern(format: Format, spelling: int) -> re.Pattern[str]:
    stems = "|".join(stem for own, stem in (*MODELS, *ADAPTERS) if own == format)
    pattern = _SPELLINGS[spelling][1].replace("@", f"(?P<stem>{stems})")
    return re.compile(pattern.replace("%", re.escape(EXTENSIONS[format])), re.DOTALL)


def parse_name(name: str) -> WeightsName | None:
    """``None`` for a name that no library gives to weights."""
    is_index = name.endswith(".json")
    for format, extension in EXTENSIONS.items():
        if extension not in name:
            continue
        for spelling, (kind, _) in enumerate(_SPELLINGS):
            if (kind == "index") != is_index:
                continue
            if found := _pattern(format, spelling).fullmatch(name):
                parts = found.groupdict()
                shards = int(parts.get("shards") or 0)
                return WeightsName(
                    name, format, parts["stem"], parts["variant"], kind, spelling, shards
                )
    return None


def choose(weights: Sequence[WeightsName], selection: Selection) -> WeightsName | None:
    """The file, or the index, that a library would load."""
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
    """For messages: names up to twenty, and the number of the rest."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
