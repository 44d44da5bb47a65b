"""Copies of parts of tensors to parts of others: the native plan's errors and results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weightlift as wl
from weightlift import _native
from weightlift.checkpoint.checkpoint import indexed_files
from weightlift.core.settings import Settings
from weightlift.load.copies import Copy, copy_parts
from weightlift.load.plans import new_plan


@pytest.fixture
def checkpoint(tmp_path: Path) -> wl.Checkpoint:
    path = tmp_path / "m.safetensors"
    save_file({"t": torch.arange(24.0).reshape(4, 6), "none": torch.zeros(0, 3)}, path)
    return wl.open_checkpoint(path)


@pytest.mark.parametrize(
    ("offset", "dimensions"),
    [
        (24, []),
        (23, [(2, 1, 1)]),
        (0, [(5, 6, 6)]),
        (0, [(4, 6, 6), (7, 1, 1)]),
        (1, [(4, 6, 6), (6, 1, 1)]),
        (0, [(2, 24, 1)]),
        (0, [(2, 2**62, 1)]),
        (0, [(2**63, 1, 1)]),
        (2**63, [(1, 1, 1)]),
        (0, [(2**62, 2**2, 1), (2**62, 2**2, 1)]),
    ],
)
def test_what_reaches_outside_a_tensor_is_refused(
    offset: int, dimensions: list[tuple[int, int, int]], checkpoint: wl.Checkpoint
) -> None:
    plan = new_plan(Settings.current())
    target = torch.zeros(24)
    file = indexed_files(checkpoint)[0]
    which = file.find("t")
    assert which is not None
    with pytest.raises(IndexError, match="leaves its tensor"):
        plan.copy_strided(
            file, which, offset, dimensions, _native.Targets(-1, [target.data_ptr()], ["F32"])
        )


@pytest.mark.parametrize("stride", [0, -1, -(2**62)])
def test_a_tensor_is_walked_forwards(stride: int, checkpoint: wl.Checkpoint) -> None:
    plan = new_plan(Settings.current())
    file = indexed_files(checkpoint)[0]
    which = file.find("t")
    assert which is not None
    target = torch.zeros(24)
    with pytest.raises(ValueError, match="strides in the tensor must be positive"):
        plan.copy_strided(
            file, which, 5, [(2, stride, 1)], _native.Targets(-1, [target.data_ptr()], ["F32"])
        )


def test_positions_and_empty_parts(checkpoint: wl.Checkpoint) -> None:
    plan: _native.Plan = new_plan(Settings.current())
    file = indexed_files(checkpoint)[0]
    none = file.find("none")
    assert none is not None
    target = torch.zeros(1)
    plan.copy_strided(
        file, none, 0, [(0, 3, 3), (3, 1, 1)], _native.Targets(-1, [target.data_ptr()], ["F32"])
    )
    with pytest.raises(IndexError, match="no such tensor"):
        plan.copy_strided(file, 2, 0, [], _native.Targets(-1, [target.data_ptr()], ["F32"]))
    with pytest.raises(IndexError, match="leaves its tensor"):
        plan.copy_strided(file, none, 0, [], _native.Targets(-1, [target.data_ptr()], ["F32"]))


def test_a_target_that_runs_backwards(checkpoint: wl.Checkpoint) -> None:
    """A copy that torch cannot make, but a plan can."""
    plan = new_plan(Settings.current())
    file = indexed_files(checkpoint)[0]
    which = file.find("t")
    assert which is not None
    target = torch.zeros(6, dtype=torch.float64)
    last = target.data_ptr() + 5 * 8
    plan.copy_strided(file, which, 6, [(6, 1, -1)], _native.Targets(-1, [last], ["F64"]))
    plan.prepare()
    plan.start([])
    while not plan.wait(1):
        pass
    plan.finish()
    assert torch.equal(target, torch.arange(6.0, 12.0, dtype=torch.float64).flip(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_many_copies_into_one(dtype: torch.dtype, checkpoint: wl.Checkpoint) -> None:
    target = torch.zeros(6, 8, dtype=dtype)
    source = torch.arange(24.0).reshape(4, 6)
    copies = [
        Copy("t", 0, (6, 4), (1, 6), target[:, :4]),
        Copy("t", 12, (6, 2), (1, 6), target[:, 5:7]),
        Copy("t", 3, (), (), target[0, 7]),
    ]
    report = copy_parts(checkpoint, copies)
    wanted = torch.zeros(6, 8, dtype=dtype)
    wanted[:, :4] = source.t().to(dtype)
    wanted[:, 5:7] = source[2:].t().to(dtype)
    wanted[0, 7] = source[0, 3].to(dtype)
    assert torch.equal(target.float(), wanted.float())
    assert report.bytes == (24 + 12 + 1) * 4
