"""``load_into``: tensors of a checkpoint into a module, by one process or by several."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.open_checkpoint import open_checkpoint
from weightlift.core.errors import ArgumentError
from weightlift.core.report import LoadReport
from weightlift.load.load_plan import LoadPlan
from weightlift.load.options import LoadOptions, Mode, Progress
from weightlift.module.parameters import ParameterRef, dtensor_types, parameter_refs

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from weightlift.distributed.rank_group import Scope
    from weightlift.module.device_map import DeviceMap
    from weightlift.module.fill import NewLoad


__all__ = ["load_into"]


def load_into(
    model: torch.nn.Module,
    checkpoint: Checkpoint | str | os.PathLike[str],
    *,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    key_map: Callable[[str], str | None] | Mapping[str, str | None] | None = None,
    mode: Mode = "auto",
    pin_memory: bool = False,
    memory_format: torch.memory_format | None = None,
    verify: bool = False,
    progress: bool | Progress = False,
    group: ProcessGroup | DeviceMesh | None = None,
    scope: Scope = "node",
    background: bool = False,
) -> LoadReport:
    """Fills a model with the tensors of a checkpoint, each read straight to its device.

    Parameters and buffers on ``meta`` are replaced. Real ones are filled in place (same
    ``data_ptr``, same ``requires_grad``) unless ``device_map``, ``dtype`` or ``pin_memory`` asks
    for other memory; then their ``.data`` is replaced. Tied parameters stay tied, and one name of
    them in the checkpoint is enough.

    Of a DTensor (``fully_shard``, ``parallelize_module``) the rank's own part alone is read, into
    the local tensor. All ranks of its mesh, or of ``group``, call this at the same time, and one
    that fails ends it on all.

    Args:
        model: on ``meta`` (``accelerate.init_empty_weights``, ``torch.device("meta")``) or real.
        checkpoint: a ``Checkpoint``, or what ``open_checkpoint`` takes.
        device_map: ``None`` leaves each tensor where it is (``meta``: the CPU); a device,
            ``"auto"``, ``"balanced"``, ``"balanced_low_0"``, ``"sequential"``, or module prefix ->
            device, where ``"disk"`` leaves tensors in their file, to be read at each use. With more
            than one device the model gets accelerate's hooks.
        max_memory: device -> bytes (``8_000_000_000``, ``"8GB"``, ``"500MiB"``) for automatic maps.
        offload_folder: allows automatic maps to use ``"disk"``; nothing is written to it.
        dtype: of the floating-point tensors; ``None``: each parameter's own; ``"auto"``: the
            checkpoint's. ``_keep_in_fp32_modules`` of the model stay in float32.
        strict: missing or unexpected keys are an error, before anything is read.
        ignore_mismatched_sizes: leave out tensors of another shape than the parameter's.
        key_map: the checkpoint's name of a tensor -> the model's, ``None`` to leave it out.
        mode: as in ``load_file``.
        pin_memory: page-locked host memory.
        memory_format: of 4-D weights, such as ``torch.channels_last``.
        verify: as in ``load_file``.
        progress: as in ``load_file``.
        group: the ranks that hold the same model: together they read each tensor that is not
            sharded once, and exchange the parts. ``None`` loads alone, and that is what
            ``dist.group.WORLD`` is before ``init_process_group``.
        scope: ``"node"`` reads once a node, and lets the ranks of a node share the mapping of
            what needs no copy; ``"group"`` reads once altogether, for slow shared storage.
        background: return when the load runs. Each module waits, before its ``forward``, for its
            own tensors alone, which are read in the order of the modules, or in the one in which an
            earlier model of the class used them; whoever reads a tensor otherwise waits for it. For
            parameters on ``meta`` and one device. The report's ``wait()`` waits for all of it,
            ``progress`` tells how far it is, ``cancel()`` ends it, and so does dropping the model.
            What goes wrong is raised by the first module that needs what is missing.

    Returns:
        What was loaded, with ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys``.

    Raises:
        CheckpointError: keys or shapes do not match, the model does not fit the devices, or a
            rank failed or is gone.
        ArgumentError: arguments contradict each other, or are no model and no checkpoint;
            ``background=True`` with real parameters, DTensors, a ``group``, several devices or
            ``verify=True``.
    """
    # With the first load, for they take longer than all that `import weightlift` needs.
    from weightlift.module.fill import fill
    from weightlift.module.matching import MatchPolicy
    from weightlift.module.placement import PlacementPolicy

    _check_arguments(model, checkpoint)
    refs = parameter_refs(model)
    options = LoadOptions(mode, pin_memory, verify, progress, background=background)
    matching = MatchPolicy(strict, ignore_mismatched_sizes, compare_ties=True)
    placement = PlacementPolicy(
        device_map,
        max_memory,
        offload=offload_folder is not None,
        dtype=dtype,
        memory_format=memory_format,
    )
    if background and group is not None:
        raise ArgumentError(
            "background=True cannot be combined with group=: ranks that load together wait for "
            "each other"
        )
    with _for_group(model, refs, group, scope) as new_load:
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = open_checkpoint(checkpoint)
        if key_map is not None:
            rename = key_map if callable(key_map) else _lookup(key_map)
            checkpoint = checkpoint.renamed(rename)
        return fill(
            model,
            checkpoint,
            placement,
            matching,
            options,
            new_load=new_load,
            refs=refs,
        )


def _for_group(
    model: torch.nn.Module,
    refs: Sequence[ParameterRef],
    group: ProcessGroup | DeviceMesh | None,
    scope: Scope,
) -> AbstractContextManager[NewLoad]:
    kinds = dtensor_types()
    if group is None and not (kinds and any(isinstance(ref.tensor, kinds) for ref in refs)):
        return contextlib.nullcontext(LoadPlan)
    from weightlift.distributed.collective import group_load

    return group_load(model, group, scope)


def _check_arguments(model: object, checkpoint: object) -> None:
    """
    Raises:
        ArgumentError: what is easily given instead of a model and a checkpoint.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        if isinstance(checkpoint, torch.nn.Module):
            meant = "the model comes first: load_into(model, checkpoint)"
        elif isinstance(model, type):
            meant = f"give an instance of the class: load_into({model.__name__}(...), checkpoint)"
        elif isinstance(model, Mapping):
            meant = "load_checkpoint gives a dict of tensors"
        else:
            meant = "give a torch.nn.Module"
        raise ArgumentError(f"the model is {_kind(model)}, and no module: {meant}")
    if isinstance(checkpoint, torch.nn.Module):
        raise ArgumentError(
            f"the checkpoint is a model, {type(checkpoint).__name__}: give a path or a Checkpoint; "
            "of a model in memory, model.load_state_dict(other.state_dict())"
        )
    if isinstance(checkpoint, Mapping) and not isinstance(checkpoint, Checkpoint):
        raise ArgumentError(
            "the checkpoint is a dict, whose tensors are in memory already: "
            "model.load_state_dict(tensors) puts them into the model"
        )


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _lookup(names: Mapping[str, str | None]) -> Callable[[str], str | None]:
    return lambda name: names.get(name, name)
