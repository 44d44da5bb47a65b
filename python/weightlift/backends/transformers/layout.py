"""What the library stacks and concatenates, as places in the result: nothing is copied twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from weightlift.backends.transformers.targets import Target
from weightlift.core import dtypes

if TYPE_CHECKING:
    import torch

__all__ = ["Layout", "layout_of"]

_Headers: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]
# Pattern of the converter -> (name in the checkpoint, shape of this rank's part) in their order.
_Sources: TypeAlias = dict[str, list[tuple[str, tuple[int, ...]]]]


@dataclasses.dataclass(slots=True)
class Layout:
    """Where tensors lie in what they are stacked and concatenated to.

    Attributes:
        names: in the checkpoint.
        shape: of the result.
        parts: the result -> a contiguous part of it for each name.
    """

    names: list[str]
    shape: tuple[int, ...]
    parts: Callable[[torch.Tensor], list[torch.Tensor]]


def layout_of(core: Any, target: Target, headers: _Headers) -> Layout | None:
    """The layout that a converter's operations come to; ``None`` where they do more, or would
    fail, which is the library's to say.

    Args:
        core: ``transformers.core_model_loading``.
        target: a tensor that a converter makes.
        headers: name in the checkpoint -> (the file's dtype, shape).
    """
    sources = _sources(target, headers) if _is_alone(target) else None
    if sources is None:
        return None
    steps = [(type(op), getattr(op, "dim", None)) for op in target.converter.operations]
    stack = (core.MergeModulelist, 0)
    if steps == [stack]:
        return _stacked(sources)
    if steps == [(core.Concatenate, 0)]:
        return _concatenated(sources)
    if steps == [stack, (core.Concatenate, 1)]:
        return _stacked_and_concatenated(sources)
    return None


def _is_alone(target: Target) -> bool:
    """Whether the converter makes this one tensor, and makes it where it is wanted."""
    converter = target.converter
    patterns = converter.target_patterns
    on_cpu_first = converter.force_cpu and target.cuts is None
    return (
        not on_cpu_first
        and len(patterns) == 1
        and patterns[0] in target.name
        and "*" not in target.name
    )


def _sources(target: Target, headers: _Headers) -> _Sources | None:
    """What this rank takes; ``None`` where a pattern has none, or one has no place of its own."""
    sources: _Sources = {pattern: [] for pattern in target.converter.source_patterns}
    taken = set(target.keys)
    for pattern, key in target.sources:
        dtype, shape = headers[key]
        # Of F4, two numbers are one element of torch's dtype.
        if pattern not in sources or dtype not in dtypes.TORCH_NAMES or dtype == "F4":
            return None
        if key not in taken:
            continue
        cut = target.cut(key)
        if cut is not None and len(cut.pieces or ()) > 1:
            return None
        sources[pattern].append((key, shape if cut is None else cut.shape))
    return sources if all(sources.values()) else None


def _names_and_shapes(sources: _Sources) -> tuple[list[str], list[tuple[int, ...]]]:
    every = [source for held in sources.values() for source in held]
    return [name for name, _ in every], [shape for _, shape in every]


def _can_join(shapes: list[tuple[int, ...]]) -> bool:
    """Whether they differ in their first dimension alone, which all have."""
    return min(map(len, shapes)) > 0 and len({shape[1:] for shape in shapes}) == 1


def _stacked(sources: _Sources) -> Layout | None:
    names, shapes = _names_and_shapes(sources)
    if len(sources) != 1 or len(set(shapes)) != 1:
        return None
    return Layout(names, (len(names), *shapes[0]), lambda value: list(value.unbind(0)))


def _concatenated(sources: _Sources) -> Layout | None:
    import torch

    names, shapes = _names_and_shapes(sources)
    if not _can_join(shapes):
        return None
    rows = [shape[0] for shape in shapes]
    return Layout(names, (sum(rows), *shapes[0][1:]), lambda value: list(torch.split(value, rows)))


def _stacked_and_concatenated(sources: _Sources) -> Layout | None:
    """Each pattern's tensors stacked, and the stacks one behind the other in dimension 1."""
    import torch

    names, shapes = _names_and_shapes(sources)
    counts = {len(held) for held in sources.values()}
    widths_of = [{shape[0] for _, shape in held if shape} for held in sources.values()]
    if (
        len(sources) < 2
        or len(counts) != 1
        or not _can_join(shapes)
        or any(len(widths) != 1 for widths in widths_of)
    ):
        return None
    widths = [found.pop() for found in widths_of]
    return Layout(
        names,
        (counts.pop(), sum(widths), *shapes[0][1:]),
        lambda value: [one for part in torch.split(value, widths, 1) for one in part.unbind(0)],
    )
