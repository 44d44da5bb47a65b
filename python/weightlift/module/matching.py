"""Matches the tensors of a checkpoint to those of a model, and reports the differences."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from weightlift.checkpoint.checkpoint import Checkpoint, describe_location
from weightlift.core.errors import CheckpointError
from weightlift.module.own_loading import Headers
from weightlift.module.parameters import ParameterRef

if TYPE_CHECKING:
    import torch

    from weightlift.module.recorded_loading import OwnLoading

__all__ = ["Match", "MatchPolicy", "check_keys", "format_names", "match"]

# Name prefixes of torch.compile, (Distributed)DataParallel and FullyShardedDataParallel.
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.")
# How many names an error lists before it only counts.
_LISTED = 20


class MatchPolicy(NamedTuple):
    """The treatment of missing and unexpected tensors.

    Attributes:
        strict: missing or unexpected names are an error, raised before anything is read.
        ignore_mismatched_sizes: skip tensors whose shape differs from the model's.
        ignore_missing: whether a name may be missing.
        ignore_unexpected: whether a name may be unexpected.
        initialize: initializes tensors on ``meta`` that the checkpoint lacks, by name; called only
            if there are any.
        compare_ties: warn if the checkpoint has different values for the names of one tensor.
        has_arguments: whether the call has ``strict``, ``ignore_mismatched_sizes`` and ``key_map``,
            which errors advise.
    """

    strict: bool = True
    ignore_mismatched_sizes: bool = False
    ignore_missing: Callable[[str], bool] | None = None
    ignore_unexpected: Callable[[str], bool] | None = None
    initialize: Callable[[Sequence[str]], Mapping[str, torch.Tensor]] | None = None
    compare_ties: bool = False
    has_arguments: bool = True


class Match(NamedTuple):
    """The result of matching.

    Attributes:
        pairs: (name in the checkpoint, tensor of the model) for all tensors to load.
        unmatched: the model's other tensors.
        missing: names that the model has and the checkpoint lacks.
        unexpected: names that the checkpoint has and the model lacks.
        mismatched: (name, shape in the checkpoint, shape in the model) of skipped tensors.
        errors: errors of modules with their own loading.
        scalars: names of tensors of shape [1] for the model's scalars.
    """

    pairs: list[tuple[str, ParameterRef]]
    unmatched: list[ParameterRef]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    errors: list[str]
    scalars: list[str]

    def empty_buffers(self) -> list[str]:
        """Names of buffers on ``meta`` that no checkpoint has."""
        return [ref.name for ref in self.unmatched if not ref.persistent and ref.tensor.is_meta]


def match(
    model: torch.nn.Module,
    refs: Sequence[ParameterRef],
    checkpoint: Checkpoint,
    headers: Headers,
    policy: MatchPolicy,
    own: OwnLoading | None = None,
) -> Match:
    """Finds the model's tensors in a checkpoint, by name and shape.

    Args:
        model: the model, for messages.
        refs: its tensors.
        checkpoint: the checkpoint, for messages.
        headers: its headers.
        policy: the treatment of missing and unexpected tensors.
        own: the result of modules with their own loading.

    Raises:
        CheckpointError: model and checkpoint differ in a way that the policy forbids.
    """
    found = _match_names(refs, headers, own)
    missing, unexpected = found.missing, found.unexpected
    if policy.ignore_missing is not None:
        missing = [name for name in missing if not policy.ignore_missing(name)]
    if policy.ignore_unexpected is not None:
        unexpected = [name for name in unexpected if not policy.ignore_unexpected(name)]
    found = found._replace(missing=missing, unexpected=unexpected)
    check_keys(checkpoint, model, found, policy)
    return found


def _match_names(refs: Sequence[ParameterRef], headers: Headers, own: OwnLoading | None) -> Match:
    by_name, free = refs, headers
    if own is not None:
        by_name = own.others()
        free = {name: header for name, header in headers.items() if name not in own.claimed}
    found = Match([], [], [], [], [], [], [])
    pairs = found.pairs
    for ref in by_name:
        name = ref.name
        header = free.get(name)
        # The common case. Other names of a tied tensor may have other shapes.
        if (
            header is not None
            and header[1] == ref.tensor.shape
            and header[0] != "F4"
            and ref.persistent
            and not ref.ties
        ):
            pairs.append((name, ref))
        elif not ref.persistent:
            found.unmatched.append(ref)
        else:
            _match_one(ref, free, found)
    if len(found.pairs) < len(free):
        names = {ref.name for ref in refs if ref.persistent}
        names.update(name for ref in refs if ref.ties and ref.persistent for name in ref.names)
        found.unexpected.extend(name for name in free if name not in names)
    if own is None:
        return found
    mismatched, errors = own.mismatched(headers)
    return Match(
        [*own.matched, *found.pairs],
        [*found.unmatched, *own.rest()],
        [*own.missing, *found.missing],
        [*own.unexpected, *found.unexpected],
        [*mismatched, *found.mismatched],
        errors,
        found.scalars,
    )


def _match_one(ref: ParameterRef, headers: Headers, found: Match) -> None:
    """Matches a tensor that may have several names; the last one is loaded, as in
    ``load_state_dict``."""
    shape = tuple(ref.tensor.shape)
    match = None
    is_mismatched = False
    for name in ref.names:
        header = headers.get(name)
        if header is None:
            continue
        theirs = header[1]
        if header[0] == "F4":  # an element of torch's dtype holds two numbers
            theirs = (*theirs[:-1], theirs[-1] // 2)
        if theirs == shape or (shape == () and theirs == (1,)):  # torch loads [1] into a scalar
            match = name
        else:
            found.mismatched.append((name, theirs, shape))
            is_mismatched = True
    if match is not None:
        found.pairs.append((match, ref))
        if shape == () and headers[match][1]:
            found.scalars.append(match)
        return
    found.unmatched.append(ref)
    if not is_mismatched:
        found.missing.extend(ref.names)


def check_keys(
    checkpoint: Checkpoint, model: torch.nn.Module, found: Match, policy: MatchPolicy
) -> None:
    """Raises a ``CheckpointError`` that lists all forbidden differences."""
    problems = format_names("errors of the modules' own loading", found.errors)
    if found.mismatched and not policy.ignore_mismatched_sizes:
        problems += format_names(
            "of another shape than the model's"
            + " (ignore_mismatched_sizes=True skips them)" * policy.has_arguments,
            [
                f"{name}: {theirs} in the checkpoint, {ours} in the model"
                for name, theirs, ours in found.mismatched
            ],
        )
    hint = ""
    if policy.strict:
        problems += format_names("missing in the checkpoint", found.missing)
        problems += format_names("unexpected: the model does not have them", found.unexpected)
        problems += format_names(
            "buffers on meta that no checkpoint has (non-persistent); build the model with "
            "accelerate.init_empty_weights(include_buffers=False)",
            found.empty_buffers(),
        )
        if found.missing or found.unexpected:
            hint = _what_helps(found, policy.has_arguments)
    if problems:
        raise CheckpointError(
            f"{describe_location(checkpoint)} does not fit {type(model).__name__}{hint}:\n"
            + "\n".join(problems)
        )


def _what_helps(found: Match, has_arguments: bool) -> str:
    """The remedy: a common prefix of the names, similar names, or ``strict=False``."""
    missing, unexpected = set(found.missing), set(found.unexpected)
    for prefix in _WRAPPERS:
        if missing and {f"{prefix}{name}" for name in missing} <= unexpected:
            return f": its names begin with {prefix!r}; open_checkpoint(..., prefix={prefix!r})"
        if unexpected and {f"{prefix}{name}" for name in unexpected} <= missing:
            return (
                f": the model's names begin with {prefix!r}, the prefix of a wrapper; load into "
                "the wrapped model"
            )
    near = {}
    for name in list(unexpected)[:_LISTED]:
        close = difflib.get_close_matches(name, list(missing)[:5_000], n=1, cutoff=0.8)
        if close:
            near[name] = close[0]
    if near and len(near) == len(unexpected):
        told = ", ".join(
            f"{theirs!r} resembles {ours!r}" for theirs, ours in sorted(near.items())[:3]
        )
        if not has_arguments:
            return f"; {told}; open_checkpoint(...).renamed(...) renames"
        return f"; {told}; key_map= renames, strict=False loads what matches"
    return "; strict=False loads what matches" if has_arguments else ""


def format_names(title: str, names: Sequence[str]) -> list[str]:
    """Lines of an error text: the count and the first names."""
    if not names:
        return []
    shown = [f"    {name}" for name in names[:_LISTED]]
    if len(names) > _LISTED:
        shown.append(f"    and {len(names) - _LISTED} more")
    return [f"  {len(names)} {title}:", *shown]
