"""Makes the sizes of a configuration small.

The meaning of a number follows from its name in the libraries. A model is only built here and never
computes, so most relations between sizes do not matter. The rules below keep the relations that
constructors check (heads divide widths, lists have one entry for each layer). If one way fails, the
next is tried.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

__all__ = ["WAYS", "Way", "shrunk"]


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to make widths small.

    Attributes:
        width: the new value of every width; ``None`` divides each one, which keeps ratios.
        divisor: for widths, if they are divided.
        heads: the most attention heads.
        lists: whether widths in lists are made small too.
    """

    width: int | None
    divisor: int = 1
    heads: int = 4
    lists: bool = True


WAYS = (
    Way(width=32),
    Way(width=None, divisor=16),
    Way(width=64, heads=2),
    Way(width=None, divisor=8),
    Way(width=32, lists=False),
    Way(width=None, divisor=4, heads=1 << 20),
    Way(width=None, divisor=1, heads=1 << 20, lists=False),
)

_LAYERS = re.compile(
    r"(^|_)(n|num|nb|number)?_?\w*(layers?|blocks?|stages?|depth|repeats?|modules)$|^L$|^layers$"
)
_NOT_LAYERS = re.compile(r"(block|patch|window)_size|every|interval|period|drop|idx|index|_freq")
_DEPTHS = re.compile(r"depths|layers_per_block|num_(\w+_)?blocks|layer_counts|num_layers")
_HEADS = re.compile(r"heads?$|n_head")
_KEY_VALUE_HEADS = re.compile(r"(key_value|kv)_heads|n_head_kv|num_kv|query_groups")
_TOKEN = re.compile(r"(token|_?id|_idx|index|_indices|_ids)s?$")
_KEPT = re.compile(
    r"patch|kernel|stride|channels$|channel$|bins|dilation|padding|_rank$|groups?$|window|ratio|"
    r"rate|factor|rotary|rope|theta|scale|shift|expansion|version|num_labels|kernel|range|level"
)
# Channels inside a model, not of its inputs and outputs; norms use groups of 32.
_INNER_CHANNELS = re.compile(r"block_\w*channels$|^(base|hidden|model)_channels$|^c_hidden$")
# Attributes that the constructor derives from the number of layers.
_DERIVED = {"stage_names", "out_features", "_out_features", "out_indices", "_out_indices"}
_EXPERTS = re.compile(r"expert")
_CHOSEN = re.compile(r"top_?k|per_tok|topk")
_GROUPS = re.compile(r"^(n_group|topk_group)$")
_POSITIONS = re.compile(
    r"position|max_\w*(len|length)|seq\w*_len|context_length|ctx|relative_attention|max_seq|"
    r"num_buckets|(source|target)_positions|sample_size|image_size|input_size|img_size|"
    r"max_2d|num_queries|num_frames|num_latents|num_feature_levels|resolution"
)
_HEAD_WIDTH = re.compile(r"head_dim|d_kv|attention_head_size|qk_\w*dim|v_head_dim|kv_channels")
_WIDER = re.compile(r"intermediate|ffn|inner|d_ff|feed_?forward|mlp_dim")
_VOCABULARY = re.compile(r"vocab|num_embeddings|n_words|n_positions|codebook_size|buckets")


def shrunk(config: dict[str, Any], way: Way) -> dict[str, Any]:
    """The same configuration with small numbers; nested ones too."""
    layers = {
        value
        for key, value in config.items()
        if isinstance(value, int) and not isinstance(value, bool) and _is_layers(key)
    }
    return {
        key: _shrunk(key, value, way, layers)
        for key, value in config.items()
        if key not in _DERIVED
    }


def _is_layers(key: str) -> bool:
    return bool(_LAYERS.search(key)) and not _NOT_LAYERS.search(key)


def _shrunk(key: str, value: Any, way: Way, layers: set[int]) -> Any:
    if isinstance(value, dict):
        if "rope" in key or key in ("id2label", "label2id"):
            return value
        if key == "per_layer_config":  # of the two layers that are left
            return {n: shrunk(one, way) for n, one in value.items() if int(n) < 2}
        return shrunk(value, way)
    if isinstance(value, (list, tuple)):
        return _list(key, value, way, layers)
    if isinstance(value, int) and not isinstance(value, bool):
        return _number(key, value, way)
    return value


def _list(key: str, values: Any, way: Way, layers: set[int]) -> Any:
    if not values:
        return values
    made = list(values)
    if all(isinstance(one, dict) for one in made):
        return type(values)(_shrunk("", one, way, set()) for one in made)
    if len(made) in layers and len(made) > 2:
        # One for each layer that is left: one of every kind, up to the number of layers.
        kinds = list(dict.fromkeys(map(str, made)))
        first = [next(one for one in made if str(one) == kind) for kind in kinds]
        made = (first + made)[:2]
    numbers = all(isinstance(one, int) and not isinstance(one, bool) for one in made)
    if numbers and _DEPTHS.search(key):
        return type(values)(min(one, 1) for one in made)
    if numbers and (way.lists or _HEADS.search(key)):
        made = [_number(key, one, way) for one in made]
    return type(values)(made)


def _number(key: str, value: int, way: Way) -> int:
    if value <= 1:
        return value
    if _VOCABULARY.search(key):
        return min(value, 128)
    if _GROUPS.search(key):
        return 1
    if _CHOSEN.search(key):
        return min(value, 2)
    if _HEAD_WIDTH.search(key):
        return min(value, 8) if way.width else max(value // way.divisor, 2)
    if _KEY_VALUE_HEADS.search(key):
        return min(value, 2, way.heads)
    if _HEADS.search(key):
        return min(value, way.heads)
    if _EXPERTS.search(key) and not _WIDER.search(key) and "size" not in key and "dim" not in key:
        return min(value, 4)
    if _is_layers(key):
        return min(value, 2)
    if _TOKEN.search(key):
        return value if value < 64 else value % 64
    if _POSITIONS.search(key):
        return min(value, 64)
    if _INNER_CHANNELS.search(key):
        return min(value, way.width or max(value // way.divisor // 32, 1) * 32)
    if _KEPT.search(key) or value <= 8:
        return value
    return _width(key, value, way)


def _width(key: str, value: int, way: Way) -> int:
    if way.width is None:
        return max(value // way.divisor, 8) if value % way.divisor == 0 else value
    if value <= way.width:
        return value
    return 2 * way.width if _WIDER.search(key) else way.width
