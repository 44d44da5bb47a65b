"""Loads by several processes under torch.distributed: each rank's shards of DTensors, and
replicated weights that a group reads once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from weightlift.core.errors import ArgumentError
from weightlift.distributed.group_load import GroupLoadPlan
from weightlift.distributed.rank_group import RankGroup, Scope, describe, digest, require_same
from weightlift.load.load_plan import LoadPlan

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

    from weightlift.checkpoint.checkpoint import Checkpoint
    from weightlift.module.fill import NewLoad

__all__ = ["TensorParallel", "collective_load", "group_load", "tensor_parallel"]


class TensorParallel:
    """A tensor-parallel load by all ranks of a mesh.

    Attributes:
        new_load: makes the plan of a load of this rank's parts.
    """

    def __init__(
        self,
        device_mesh: DeviceMesh,
        tp_plan: Mapping[str, ParallelStyle] | None,
        new_load: NewLoad,
    ) -> None:
        self.new_load = new_load
        self._device_mesh = device_mesh
        self._tp_plan = tp_plan

    def cut(self, model: torch.nn.Module) -> None:
        """Turns the parameters of a model on ``meta`` into DTensors.

        Raises:
            ArgumentError: neither the caller nor the model has a plan.
        """
        plan = self._tp_plan if self._tp_plan is not None else getattr(model, "_tp_plan", None)
        if not plan:
            raise ArgumentError(
                f"device_mesh= needs tp_plan=, because {type(model).__name__} has no _tp_plan"
            )
        parallelize_module(model, self._device_mesh, dict(plan))


@contextlib.contextmanager
def tensor_parallel(
    device_mesh: DeviceMesh | None, tp_plan: Mapping[str, ParallelStyle] | None
) -> Iterator[TensorParallel]:
    """For ``from_pretrained``: all ranks of the mesh run the block together.

    Args:
        device_mesh: a 1-D mesh; all ranks by default.
        tp_plan: module path, with ``*`` as in ``fnmatch`` -> parallel style; the model's
            ``_tp_plan`` by default.

    Raises:
        ArgumentError: there is no process group, or the mesh is unsuitable.
    """
    _require_initialized("a device_mesh or a tp_plan")
    if device_mesh is None:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        device_mesh = init_device_mesh(kind, (dist.get_world_size(),))
    if device_mesh.ndim != 1:
        raise ArgumentError(
            f"device_mesh is {device_mesh}: tensor parallelism needs one dimension, such as "
            'device_mesh["tp"]'
        )
    if device_mesh.get_coordinate() is None:
        raise ArgumentError(
            f"device_mesh is {device_mesh}, without rank {dist.get_rank()}: give a mesh with all "
            "ranks that call this"
        )
    with _rank_group([device_mesh.get_group()], None) as new_load:
        yield TensorParallel(device_mesh, tp_plan, new_load)


def _require_initialized(what: str) -> None:
    if not dist.is_initialized():
        raise ArgumentError(
            f"{what} needs a process group: call torch.distributed.init_process_group() first, "
            "under torchrun"
        )


@contextlib.contextmanager
def group_load(
    model: torch.nn.Module, group: dist.ProcessGroup | DeviceMesh | None, scope: Scope = "node"
) -> Iterator[NewLoad]:
    """Yields the function that makes the load for ``fill``: a group load, if there is a group or
    the model has DTensors. If the load fails on one rank inside the block, it fails on all.
    """
    if scope not in ("node", "group"):
        raise ArgumentError(f"scope is {scope!r}; it can be 'node' or 'group'")
    if group is not None:
        groups = [_parse_group(group)]
        _require_within(groups[0], model)
    else:
        groups = _groups_of(model)
    with _rank_group(groups, scope if group is not None else None) as new_load:
        yield new_load


def _groups_of(model: torch.nn.Module) -> list[dist.ProcessGroup]:
    """The process groups of the meshes of the model's tensors."""
    meshes = {t.device_mesh: None for _, t in _all_tensors(model) if isinstance(t, DTensor)}
    found = [g for mesh in meshes if mesh.get_coordinate() for g in mesh.get_all_groups()]
    return list({group.group_name: group for group in found}.values())


def _require_within(group: dist.ProcessGroup, model: torch.nn.Module) -> None:
    ranks = set(dist.get_process_group_ranks(group))
    for name, tensor in _all_tensors(model):
        if isinstance(tensor, DTensor) and tensor.device_mesh.get_coordinate():
            outside = set(tensor.device_mesh.mesh.flatten().tolist()) - ranks
            if outside:
                raise ArgumentError(
                    f"{name!r} is a DTensor on {tensor.device_mesh}, whose ranks "
                    f"{sorted(outside)} are not in group=, which has the ranks {sorted(ranks)}; "
                    "give a group of all of them"
                )


class CollectiveLoad:
    """A load by the ranks of a model's meshes, at the same time but without an exchange."""

    def __init__(self, rank_group: RankGroup) -> None:
        self._rank_group = rank_group
        self.ended = False

    def begin(
        self,
        checkpoint: Checkpoint | None,
        error: BaseException | None,
        outcomes: Mapping[str, str],
    ) -> bool:
        """Waits for all ranks; ``False`` if no rank could open the checkpoint.

        Args:
            checkpoint: the checkpoint, the same on all ranks.
            error: the error, if this rank has no checkpoint.
            outcomes: name of a tensor -> its treatment, the same on all ranks.
        """
        self.ended = True  # unless all ranks agree
        failure = None if error is None else f"{type(error).__name__}: {error}"
        described = None if checkpoint is None else describe(checkpoint)
        payload = (failure, described, digest(sorted(outcomes.items())))
        answers = self._rank_group.agree(None, payload)
        if all(reason is not None for reason, _, _ in answers.values()):
            self.ended = False
            return False
        self._rank_group.refuse({rank: reason for rank, (reason, _, _) in answers.items()}, error)
        same = {rank: rest for rank, (_, *rest) in answers.items()}
        require_same(self._rank_group, same, outcomes)
        self.ended = False
        return True


@contextlib.contextmanager
def collective_load(model: torch.nn.Module) -> Iterator[CollectiveLoad]:
    """An error on one rank inside the block becomes an error on all ranks of the model's DTensors.

    Raises:
        CheckpointError: on every rank, at the latest at the end of the block.
    """
    rank_group = RankGroup([group for group in _groups_of(model) if group.size() > 1], None)
    load = CollectiveLoad(rank_group)
    try:
        yield load
    except Exception as error:
        if not load.ended:
            rank_group.agree(error)
        raise
    rank_group.agree(None)


@contextlib.contextmanager
def _rank_group(groups: Sequence[dist.ProcessGroup], scope: Scope | None) -> Iterator[NewLoad]:
    if all(group.size() == 1 for group in groups):
        yield LoadPlan
        return
    rank_group = RankGroup(groups, scope)
    try:
        yield functools.partial(GroupLoadPlan, rank_group)
    except Exception as error:
        if not rank_group.load_started:  # the other ranks wait at the start
            rank_group.agree(error)
        raise
    finally:
        rank_group.close()


def _all_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _parse_group(group: dist.ProcessGroup | DeviceMesh) -> dist.ProcessGroup:
    _require_initialized("a group")
    if isinstance(group, DeviceMesh):
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise ArgumentError(
            f"group is {group!r}, not a torch.distributed.ProcessGroup that this rank is in; "
            "torch.distributed.group.WORLD is all ranks"
        )
    return group
