"""Which tensor of a checkpoint is which of a model, and what is said where they differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from weightlift.checkpoint.checkpoint import Checkpoint, describe_location
from weightlift.core.errors import CheckpointError
from weightlift.module.parameters import ParameterRef

if TYPE_CHECKING:
    import torch

__all__ = ["MatchPolicy", "check_keys", "format_names", "match"]

# How many names an error lists before it only counts.
_LISTED = 20


@dataclasses.dataclass(frozen=True)
class MatchPolicy:
    """What becomes of tensors that are in the model or in the checkpoint alone.

    Attributes:
        strict: missing or unexpected names are an error, before anything is read.
        ignore_mismatched_sizes: leave out tensors of another shape than the model's.
        ignore_missing: of a name, whether it may be missing.
        ignore_unexpected: of a name, whether it may be there.
        initialize: gives values to tensors on ``meta`` that the checkpoint does not hold, by name;
            called only if there are any.
    """

    strict: bool = True
    ignore_mismatched_sizes: bool = False
    ignore_missing: Callable[[str], bool] | None = None
    ignore_unexpected: Callable[[str], bool] | None = None
    initialize: Callable[[Sequence[str]], Mapping[str, torch.Tensor]] | None = None


def match(
    tensors: Sequence[ParameterRef], headers: Mapping[str, tuple[str, tuple[int, ...]]]
) -> tuple[
    list[tuple[str, ParameterRef]],
    list[ParameterRef],
    list[str],
    list[tuple[str, tuple[int, ...], tuple[int, ...]]],
]:
    """(name in the checkpoint, tensor of the model) for all that match; the model's other tensors;
    missing names; mismatched ones."""
    matched = []
    rest = []
    missing = []
    mismatched = []
    for slot in tensors:
        header = headers.get(slot.name)
        # Most of them. Of tied ones, other names may be of other shapes.
        if (
            header is not None
            and header[1] == slot.tensor.shape
            and header[0] != "F4"
            and slot.persistent
            and not slot.ties
        ):
            matched.append((slot.name, slot))
            continue
        if not slot.persistent:
            rest.append(slot)
            continue
        shape = tuple(slot.tensor.shape)
        found = None
        wrong = False
        for name in slot.names:
            header = headers.get(name)
            if header is None:
                continue
            theirs = header[1]
            if header[0] == "F4":  # two numbers are one element of torch's dtype
                theirs = (*theirs[:-1], theirs[-1] // 2)
            if theirs != shape and not (shape == () and theirs == (1,)):
                mismatched.append((name, theirs, shape))
                wrong = True
            elif found is None:
                found = name
        if found is not None:
            matched.append((found, slot))
            continue
        rest.append(slot)
        if not wrong:
            missing += slot.names
    return matched, rest, missing, mismatched


def check_keys(
    checkpoint: Checkpoint,
    model: torch.nn.Module,
    missing: Sequence[str],
    unexpected: Sequence[str],
    mismatched: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]],
    empty: Sequence[str],
    policy: MatchPolicy,
    errors: Sequence[str] = (),
) -> None:
    """Raises where a checkpoint does not fit a model.

    Args:
        checkpoint: for the message.
        model: for the message.
        missing: names of the model's tensors.
        unexpected: names in the checkpoint.
        mismatched: (name, shape in the checkpoint, shape in the model).
        empty: names of buffers on ``meta`` that no checkpoint holds.
        policy: what is allowed.
        errors: what the model's modules say.

    Raises:
        CheckpointError: with all that is wrong.
    """
    problems = format_names("errors of the modules' own loading", errors)
    if mismatched and not policy.ignore_mismatched_sizes:
        problems += format_names(
            "of another shape than the model's (ignore_mismatched_sizes=True leaves them out)",
            [f"{name}: {theirs} in the checkpoint, {ours} in the model"
             for name, theirs, ours in mismatched],
        )  # fmt: skip
    if policy.strict:
        problems += format_names("missing in the checkpoint", missing)
        problems += format_names("unexpected: the model has no place for them", unexpected)
        problems += format_names(
            "buffers on meta that no checkpoint holds (non-persistent); build the model with "
            "accelerate.init_empty_weights(include_buffers=False)",
            empty,
        )
    if problems:
        hint = (
            "; strict=False loads what matches" if policy.strict and (missing or unexpected) else ""
        )
        raise CheckpointError(
            f"{describe_location(checkpoint)} does not fit {type(model).__name__}{hint}:\n"
            + "\n".join(problems)
        )


def format_names(title: str, names: Sequence[str]) -> list[str]:
    """Lines of an error: how many, and the first of them."""
    if not names:
        return []
    shown = [f"    {name}" for name in names[:_LISTED]]
    if len(names) > _LISTED:
        shown.append(f"    and {len(names) - _LISTED} more")
    return [f"  {len(names)} {title}:", *shown]
