"""Runs the checks of a world of gloo ranks in one set of processes, because starting a rank takes
seconds. A check that fails on a rank ends the rank, because its collectives would no longer match
those of the others.
"""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import weightlift as wl
from support import assert_same

TIMEOUT = 40.0
Check = Callable[[Path], None]


def init(rank: int, world: int, store: Path) -> None:
    torch.set_num_threads(1)
    # As torchrun has them.
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)})
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", f"file://{store}", timeout, world, rank)


def run_rank(rank: int, world: int, folder: Path, checks: Mapping[str, Check]) -> None:
    init(rank, world, folder / f"store-{world}")
    for name, check in checks.items():
        outcome = "passed"
        try:
            check(folder)
        except BaseException:
            outcome = traceback.format_exc()
        (folder / f"{name}-{world}-{rank}").write_text(outcome)
        if outcome != "passed":
            break
    # Not with destroy_process_group: gloo may abort a rank whose peers close their connections
    # first.
    os._exit(0)


def run_checks(world: int, folder: Path, checks: Mapping[str, Check]) -> Callable[[str], list[str]]:
    """Runs all checks. Returns a function that gives the outcome of a check on every rank."""
    context = mp.get_context("spawn")
    ranks = [
        context.Process(target=run_rank, args=(rank, world, folder, checks))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()

    def of(check: str) -> list[str]:
        files = [folder / f"{check}-{world}-{rank}" for rank in range(world)]
        return [file.read_text() if file.exists() else "not reached" for file in files]

    return of


def total(value: int) -> int:
    """Over all ranks."""
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, value)
    return sum(counts)


def failure_of(load: Callable[[], object]) -> str:
    """The error that every rank gets; no tensor may have arrived."""
    with pytest.raises(wl.CheckpointError) as caught:
        load()
    dist.barrier()  # nothing of the load is left in the group
    return str(caught.value)


def assert_same_model(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """The same DTensors, with the same local bits, and the same of all else."""
    from torch.distributed.tensor import DTensor

    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        own = state[name]
        assert type(own) is type(tensor), name
        if isinstance(tensor, DTensor):
            assert own.placements == tensor.placements, name
            assert own.device_mesh == tensor.device_mesh
            assert own.shape == tensor.shape
            assert own.stride() == tensor.stride()
            own, tensor = own.to_local(), tensor.to_local()
        assert_same(own, tensor)
