"""Maps the tensors of a checkpoint to those of a model."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weightlift.backends.transformers.shards import Cut, cutter
from weightlift.backends.transformers.weights import Weights

__all__ = ["Target", "find_targets"]


@dataclasses.dataclass(slots=True)
class Target:
    """A tensor of the model (the first one that a converter makes), and its sources.

    Attributes:
        converter: the library's converter; ``None`` if the tensor is unchanged.
        sources: (pattern of the converter, name in the checkpoint), in the order of the walk.
        cuts: for a DTensor, name -> this rank's part of each source; ``None``: not cut.
        device: its device by the device map.
        value: the finished tensor, or name -> tensor made by the converter.
    """

    name: str
    converter: Any
    sources: list[tuple[str, str]]
    cuts: dict[str, Cut | None] | None = None
    device: Any = None
    value: Any = None

    def cut(self, key: str) -> Cut | None:
        return None if self.cuts is None else self.cuts[key]

    @property
    def keys(self) -> list[str]:
        """The sources that this rank reads from."""
        cuts = self.cuts
        return [key for _, key in self.sources if cuts is None or cuts[key] is not None]


def find_targets(
    core: Any, model: Any, weights: Weights, state: Mapping[str, Any], config: Any, info: Any
) -> list[Target]:
    """Maps the checkpoint's tensors to the model's, and records those without a target."""
    mapping = config.weight_mapping or []
    renamings = [entry for entry in mapping if isinstance(entry, core.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, core.WeightConverter)]
    of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix
    targets: dict[str, Target] = {}
    cuts: dict[str, Callable[[Sequence[int], int], Cut | None]] = {}
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    for key in sorted(weights.headers, key=core.dot_natural_key):
        name, pattern = core.rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = core.rename_source_key(key, [], [], prefix, state)
        if name in state:
            target = targets.get(name)
            if target is None:
                converter = None if pattern is None else of_pattern[pattern]
                target = targets[name] = Target(name, converter, [])
                cut = cutter(core, state[name], converter)
                if cut is not None:
                    target.cuts = {}
                    cuts[name] = cut
            source = key if pattern is None else pattern
            if target.cuts is not None:
                number = seen[name, source]
                seen[name, source] += 1
                target.cuts[key] = cuts[name](weights.headers[key][1], number)
            target.sources.append((source, key))
        elif pattern is None:
            info.unexpected_keys.add(name)
        else:
            patterns = of_pattern[pattern].target_patterns
            info.unexpected_keys.update(name.replace(patterns[0], one) for one in patterns)
    return list(targets.values())
