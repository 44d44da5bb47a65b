"""Fills a module from a checkpoint: match, place, load, attach, dispatch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core import gc_pause
from weightlift.core.errors import ArgumentError
from weightlift.core.report import LoadReport, set_last_report
from weightlift.load.load_plan import LoadPlan, Planned
from weightlift.load.options import LoadOptions
from weightlift.module.attach import (
    attach,
    attach_own,
    bump_versions,
    initialize,
    move_unmatched,
)
from weightlift.module.matching import Match, MatchPolicy, match
from weightlift.module.own_loading import modules_with_own_loading
from weightlift.module.parameters import (
    Gathered,
    ParameterRef,
    gather_resharded,
    local_tensor,
    streamed_refs,
)
from weightlift.module.placement import (
    Devices,
    DtypeRule,
    Placement,
    PlacementPolicy,
    place,
)

if TYPE_CHECKING:
    import torch

    from weightlift.load.prefetch import PrefetchedLoad
    from weightlift.module.offload import Dispatch
    from weightlift.module.recorded_loading import OwnLoading

__all__ = ["NewLoad", "fill"]

# What most loads do not need is imported where it is used: these imports took longer than a load of
# a hundred tensors.

# Makes the plan of a load, which the ranks of a group may share.
NewLoad: TypeAlias = Callable[[Checkpoint, LoadOptions], Planned]


class _Filling(NamedTuple):
    """The state of a load before anything is read, except by modules with their own loading."""

    gathered: Gathered
    model: torch.nn.Module
    checkpoint: Checkpoint
    headers: Mapping[str, tuple[str, tuple[int, ...]]]
    refs: Sequence[ParameterRef]
    own: OwnLoading | None
    found: Match
    rule: DtypeRule
    devices: Devices
    placed: Placement


@gc_pause.paused()
def fill(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    placement: PlacementPolicy = PlacementPolicy(),
    matching: MatchPolicy = MatchPolicy(),
    options: LoadOptions = LoadOptions(),
    *,
    prefetched: PrefetchedLoad | None = None,
    new_load: NewLoad = LoadPlan,
    gathered: Gathered | None = None,
) -> LoadReport:
    """``load_into`` with all options.

    Args:
        model: the model, on ``meta`` or real.
        checkpoint: the checkpoint.
        placement: where tensors go.
        matching: the treatment of missing and unexpected tensors.
        options: how to load.
        prefetched: a running load of ``checkpoint``.
        new_load: makes the plan of the load, for example ``distributed.collective.group_load``.
        gathered: the model's tensors and its modules, if known.
    """
    gathered = gathered or gather_resharded(model)
    refs = gathered.refs
    for ref in streamed_refs(refs):
        raise ArgumentError(
            f"tensor {ref.name!r} is streamed and has no memory: close the stream first"
        )
    headers = checkpoint.headers()
    own = None
    if owners := modules_with_own_loading(model, gathered, headers):
        from weightlift.module.recorded_loading import record_own_loading

        own = record_own_loading(model, owners, checkpoint, headers, options)
        refs = own.refs
    found = match(model, refs, checkpoint, headers, matching, own)
    if matching.compare_ties and gathered.have_ties:
        from weightlift.module.ties import warn_of_unequal_ties

        warn_of_unequal_ties(found.pairs, checkpoint, headers, options)

    rule = DtypeRule.of(model, placement)
    devices = Devices.resolve(model, refs, placement, headers, rule)
    reuse = not options.pin_memory and placement.memory_format is None
    placed = place(found.pairs, headers, devices, rule, prefetched, reuse=reuse)
    filling = _Filling(
        gathered, model, checkpoint, headers, refs, own, found, rule, devices, placed
    )
    if options.background:
        report = _in_background(filling, placement, matching, options, new_load)
    else:
        report = _now(filling, placement, matching, options, new_load, prefetched)
    _report_keys(report, found)
    set_last_report(report)
    return report


def _in_background(
    filling: _Filling,
    placement: PlacementPolicy,
    matching: MatchPolicy,
    options: LoadOptions,
    new_load: NewLoad,
) -> LoadReport:
    """Makes the modules wait for tensors on ``meta``; fills all others now."""
    from weightlift.module.background.holding_back import hold_back
    from weightlift.module.background.load import BackgroundLoad
    from weightlift.module.background.split import require_one_device, split_by_meta
    from weightlift.module.order_of_use import which_model

    if new_load is not LoadPlan:
        raise ArgumentError(
            "background=True cannot be combined with group=, because the ranks wait for each "
            "other: leave out one of them"
        )
    require_one_device(filling.devices.by_prefix)
    later, placed = split_by_meta(filling.placed)
    plan = LoadPlan(filling.checkpoint, options)
    _add_to_plan(plan, later, filling.checkpoint)
    started = BackgroundLoad.start(
        which_model(filling.model, len(filling.gathered.modules)),
        plan,
        later,
        [ref.name for _, ref in filling.found.pairs],
        filling.checkpoint,
        filling.headers,
        placement.memory_format,
    )
    try:
        now = filling._replace(placed=placed)
        report = _now(now, placement, matching, options, new_load, None)
        return hold_back(started, filling.model, options, report)
    except BaseException:
        started.cancel()
        raise


def _now(
    filling: _Filling,
    placement: PlacementPolicy,
    matching: MatchPolicy,
    options: LoadOptions,
    new_load: NewLoad,
    prefetched: PrefetchedLoad | None,
) -> LoadReport:
    """Runs the load and puts the tensors into the model."""
    _, _, checkpoint, _, refs, own, found, rule, devices, placed = filling
    memory_format = placement.memory_format
    plan = new_load(checkpoint, options)
    _add_to_plan(plan, placed, checkpoint)
    tensors, report = _load(plan, prefetched, placed)
    for name in found.scalars:
        if name in tensors:
            tensors[name] = tensors[name].reshape(())
    attach(placed, tensors, checkpoint, memory_format, exclusive=new_load is LoadPlan)
    offloaded: dict[str, torch.Tensor] = {}
    if own is not None:
        offloaded.update(attach_own(own, devices, rule, memory_format))
        report = report.plus(own.report)
    bump_versions(placed, own, checkpoint)
    empty = [ref for ref in found.unmatched if ref.persistent and ref.tensor.is_meta]
    if matching.initialize is not None and empty:
        offloaded |= initialize(empty, matching.initialize, devices, rule, memory_format)

    if devices.by_prefix is not None:
        move_unmatched(found.unmatched, devices)
        if placement.dispatch is not None or devices.are_spread:
            offloaded.update((n, r.tensor.detach()) for n, r in devices.on_disk_elsewhere(refs))
            _dispatch(filling, placement.dispatch, offloaded, options.caller)
    return report


def _dispatch(
    filling: _Filling,
    dispatch: Dispatch | None,
    initialized: Mapping[str, torch.Tensor],
    caller: str,
) -> None:
    """Adds the hooks that move tensors to their use, or read them from the disk."""
    from weightlift.module.offload import DiskWeights, dispatch_by_accelerate

    on_disk = filling.placed.on_disk
    names = {n: (name, cast) for name, ref, cast in on_disk for n in ref.names}
    weights = DiskWeights(filling.checkpoint, names, caller)
    devices = filling.devices.by_prefix or {}
    (dispatch or dispatch_by_accelerate)(filling.model, devices, weights, initialized)


def _add_to_plan(plan: Planned, placed: Placement, checkpoint: Checkpoint) -> None:
    """Adds all tensors that are neither prefetched nor stay in their file."""
    if len(placed.prefetched) == sum(map(len, placed.groups.values())):
        return
    whole: dict[tuple[torch.device, str | None], list[str]] = {}
    for group, members in placed.groups.items():
        names = [name for name, _ in members]
        if placed.prefetched:
            names = [name for name in names if name not in placed.prefetched]
        parts = [placed.parts[name] for name in names] if group.in_parts else None
        if group.in_place:
            _check_memory(members)
            targets = [local_tensor(ref.tensor) for _, ref in members]
            plan.add(group.device, None, names, targets, parts)
        elif group.in_parts:
            plan.add(group.device, group.cast_to, names, parts=parts)
        else:
            whole.setdefault((group.device, group.cast_to), []).extend(names)
    for (device, cast_to), names in whole.items():
        if len(names) == len(checkpoint):
            # All names at once: planning is faster in the order of the files.
            plan.add(device, cast_to)
        elif names:
            plan.add(device, cast_to, names)


def _check_memory(members: Sequence[tuple[str, ParameterRef]]) -> None:
    """
    Raises:
        ArgumentError: several elements of a tensor are one place in memory (``expand``).
    """
    for _, ref in members:
        tensor = ref.tensor
        if not tensor.is_contiguous() and any(
            count > 1 and not stride
            for count, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            raise ArgumentError(
                f"tensor {ref.name!r} of the model is expanded: some of its elements are one place "
                "in memory and cannot have values of their own; make it a tensor.clone() first"
            )


def _load(
    plan: Planned, prefetched: PrefetchedLoad | None, placed: Placement
) -> tuple[dict[str, torch.Tensor], LoadReport]:
    """Runs the plan and takes the prefetched tensors: name in the checkpoint -> tensor."""
    if prefetched is not None and not placed.prefetched:
        prefetched.cancel()
    if prefetched is None or not placed.prefetched:
        running = plan.start()
        return running.result(), running.report
    tensors = prefetched.result()
    report = prefetched.report
    if not plan.is_empty:
        running = plan.start()
        tensors.update(running.result())
        report = report.plus(running.report)
    return tensors, report


def _report_keys(report: LoadReport, found: Match) -> None:
    """Reports missing, unexpected and mismatched tensors."""
    report.missing_keys = found.missing
    report.unexpected_keys = found.unexpected
    report.mismatched_keys = found.mismatched
    report.error_msgs = [
        f"{ref.name}: a buffer on meta that no checkpoint has"
        for ref in found.unmatched
        if not ref.persistent and ref.tensor.is_meta
    ]
    # Matched tensors have their data, or are read at each use.
    report.meta_keys = [
        ref.name
        for ref in found.unmatched
        if ref.tensor.is_meta and getattr(ref.module, ref.key).is_meta
    ]
