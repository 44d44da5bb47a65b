"""``load_into``: fills a module from a checkpoint, in one process or several."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from weightlift.checkpoint.checkpoint import Checkpoint, describe_location, nearest
from weightlift.checkpoint.open_checkpoint import open_without_arguments
from weightlift.core.errors import ArgumentError
from weightlift.core.given import check_flag
from weightlift.core.paths import path_text
from weightlift.core.report import LoadReport
from weightlift.core.requirements import require
from weightlift.load.load_plan import LoadPlan
from weightlift.load.options import LoadOptions, Mode, Progress
from weightlift.load.slots_ahead import slots_ahead
from weightlift.module.device_map import known_devices, unused_max_memory
from weightlift.module.fill import NewLoad, fill
from weightlift.module.matching import MatchPolicy
from weightlift.module.parameters import ParameterRef, dtensor_types, gather_resharded
from weightlift.module.placement import PlacementPolicy, check_memory_format

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from weightlift.distributed.rank_group import Scope
    from weightlift.module.device_map import DeviceMap


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
    ``data_ptr``, same ``requires_grad``), unless ``device_map``, ``dtype`` or ``pin_memory`` needs
    other memory; then their ``.data`` is replaced. Tied parameters stay tied; the checkpoint needs
    only one of their names.

    For a DTensor (``fully_shard``, ``parallelize_module``) the rank reads only its own part, into
    the local tensor. All ranks of its mesh, or of ``group``, must call this at the same time. If
    one fails, the call fails on all.

    Args:
        model: a module on ``meta`` (``accelerate.init_empty_weights``, ``torch.device("meta")``) or
            with real parameters.
        checkpoint: a ``Checkpoint``, or what ``open_checkpoint`` takes.
        device_map: ``None`` keeps each tensor on its device (``meta`` becomes the CPU); a device;
            ``"auto"``, ``"balanced"``, ``"balanced_low_0"``, ``"sequential"``; or a dict of module
            prefix -> device, where ``"disk"`` leaves tensors in their file, to be read at each use.
            With more than one device the model gets accelerate's hooks.
        max_memory: device -> bytes (``8_000_000_000``, ``"8GB"``, ``"500MiB"``) for automatic maps;
            with any other ``device_map`` it is an error.
        offload_folder: allows automatic maps to use ``"disk"``; nothing is written to it.
        dtype: the dtype of floating-point tensors; ``None``: each parameter's own; ``"auto"``: the
            checkpoint's. ``_keep_in_fp32_modules`` of the model stay in float32.
        strict: missing or unexpected keys are an error, raised before anything is read.
        ignore_mismatched_sizes: skip tensors whose shape differs from the parameter's.
        key_map: a function from a tensor's name in the checkpoint to its name in the model, or a
            dict, which leaves the names that it lacks as they are; ``None`` skips the tensor. A
            name of the dict that the checkpoint lacks is warned of.
        mode: as in ``load_file``; tensors that are filled in place are read in every mode.
        pin_memory: use page-locked host memory.
        memory_format: the memory format of 4-D weights, such as ``torch.channels_last``.
        verify: as in ``load_file``.
        progress: as in ``load_file``.
        group: the ranks that hold the same model. Together they read each tensor that is not
            sharded once, and exchange the parts. ``None`` loads without other ranks; so does
            ``dist.group.WORLD`` before ``init_process_group``.
        scope: ``"node"``: each node reads each byte once, and its ranks share mappings where no
            copy is needed; ``"group"``: the group reads each byte once, for slow shared storage.
        background: return as soon as the load runs. Before its ``forward`` each module waits only
            for its own tensors; every other access to a tensor waits for it. Tensors are read in
            the order of the modules, or in the order in which an earlier model of the class used
            them. Needs parameters on ``meta`` and one device. The report's ``wait()`` waits for the
            end, ``progress`` gives the bytes done, ``cancel()`` ends the load, and so does deleting
            the model. The first module that needs a tensor that failed raises the error.

    Returns:
        The report, with ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys``.

    Raises:
        CheckpointError: keys or shapes do not match, the model does not fit the devices, or a
            rank failed or ended.
        ArgumentError: arguments contradict each other, ``model`` is not a module, ``checkpoint`` is
            not a checkpoint; a flag is neither ``True`` nor ``False``; a tensor of the model is
            expanded, so that its elements share memory; ``background=True`` with real parameters,
            DTensors, a ``group``, several devices or ``verify=True``.
        FormatError, ReadError, DeviceError, OutOfMemoryError: as ``load_file``.
    """
    require("torch", "load_into")
    _check_arguments(model, checkpoint)
    check_flag("strict", strict)
    check_flag("ignore_mismatched_sizes", ignore_mismatched_sizes)
    _check_ranks(group, scope, background=background)
    if offload_folder is not None:
        path_text(offload_folder)
    if (unused := unused_max_memory(device_map, max_memory)) is not None:
        raise ArgumentError(unused)
    check_memory_format(memory_format)
    gathered = gather_resharded(model)
    options = LoadOptions(mode, pin_memory, verify, progress, background=background)
    matching = MatchPolicy(strict, ignore_mismatched_sizes, compare_ties=True)
    placement = PlacementPolicy(
        device_map,
        max_memory,
        offload=offload_folder is not None,
        dtype=dtype,
        memory_format=memory_format,
    )
    # Each parameter has a dtype of its own.
    ahead = slots_ahead(
        known_devices(device_map, (ref.tensor for ref in gathered.refs)), casts=True
    )
    with ahead, _for_group(model, gathered.refs, group, scope) as new_load:
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = open_without_arguments(checkpoint)
        if key_map is not None:
            _warn_of_unknown_names(key_map, checkpoint)
            checkpoint = checkpoint.renamed(key_map)
        return fill(
            model,
            checkpoint,
            placement,
            matching,
            options,
            new_load=new_load,
            gathered=gathered,
        )


def _warn_of_unknown_names(key_map: object, checkpoint: Checkpoint) -> None:
    """A dict of names may have been made for another checkpoint, or have a typo."""
    if not isinstance(key_map, Mapping):
        return
    unknown = [name for name in key_map if name not in checkpoint]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        warnings.warn(
            f"key_map has {unknown[0]!r}{more}, which {describe_location(checkpoint)} does not "
            f"have{nearest(str(unknown[0]), checkpoint)}",
            stacklevel=3,
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
        ArgumentError: ``model`` is not a module, or ``checkpoint`` is not a checkpoint.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        if isinstance(checkpoint, torch.nn.Module):
            meant = "the model comes first: load_into(model, checkpoint)"
        elif isinstance(model, type):
            meant = f"give an instance of the class: load_into({model.__name__}(...), checkpoint)"
        elif isinstance(model, Mapping):
            meant = "load_checkpoint returns a dict of tensors"
        else:
            meant = "give a torch.nn.Module"
        raise ArgumentError(f"the model is {_kind(model)}, not a module: {meant}")
    if isinstance(checkpoint, torch.nn.Module):
        raise ArgumentError(
            f"the checkpoint is a model, {type(checkpoint).__name__}: give a path or a Checkpoint; "
            "to copy a model in memory, use model.load_state_dict(other.state_dict())"
        )
    if isinstance(checkpoint, Mapping) and not isinstance(checkpoint, Checkpoint):
        raise ArgumentError(
            "the checkpoint is a dict, whose tensors are already in memory: use "
            "model.load_state_dict(tensors)"
        )


def _check_ranks(
    group: ProcessGroup | DeviceMesh | None, scope: object, *, background: bool
) -> None:
    """
    Raises:
        ArgumentError: there is no such scope, or ranks cannot load in the background.
    """
    if scope not in ("node", "group"):
        raise ArgumentError(f"scope is {scope!r}; it can be 'node' or 'group'")
    if background and group is not None:
        raise ArgumentError(
            "background=True cannot be combined with group=, because the ranks wait for each "
            "other: leave out one of them"
        )


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
