"""Random plans against torch: any files, dtypes, casts, parts and (simulated) devices in a load;
and more of the random slices of ``test_safe_open.py``."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import simulated
from simulated import Policy, Switch, machine
from support import DTYPES, bits, entry, file_bytes, open_files
from weightlift import Settings, _native
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core import dtypes
from weightlift.load.load_plan import LoadPlan
from weightlift.load.options import LoadOptions

__all__ = ["machine"]
pytestmark = simulated.pytestmark

# Dtypes that the engine casts; torch casts the others, which does not work on simulated devices.
CASTABLE = ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")
DEVICES = 3
CPU = -1

Range = tuple[int, int, int]  # start, step, count


@dataclasses.dataclass
class Chosen:
    """A tensor, and the part of it to load."""

    dtype: str
    shape: list[int]
    seed: int
    group: int | None  # of `Plan.groups`; None: it is left where it is
    ranges: list[Range]


@dataclasses.dataclass
class Group:
    device: int
    dtype: str | None
    parts: bool


@dataclasses.dataclass
class Plan:
    files: list[list[Chosen]]
    pads: list[int]
    groups: list[Group]
    mode: str
    settings: Settings
    seed: int
    policy: Any

    def tensors(self) -> list[tuple[str, Chosen]]:
        return [
            (f"{i}.{k}", chosen)
            for i, file in enumerate(self.files)
            for k, chosen in enumerate(file)
        ]


@st.composite
def ranges(draw: st.DrawFn, extent: int) -> Range:
    start = draw(st.integers(0, extent))
    step = draw(st.integers(1, 3))
    count = draw(st.integers(0, (extent - start + step - 1) // step))
    return start, step, count


@st.composite
def tensors(draw: st.DrawFn, groups: list[Group]) -> Chosen:
    group = draw(st.none() | st.integers(0, len(groups) - 1))
    into = None if group is None else groups[group]
    names = sorted(DTYPES)
    if into is not None and (into.dtype is not None or into.parts):
        # Neither are parts of halves of bytes, nor casts of rare dtypes, the engine's.
        rare = [name for name in names if DTYPES[name].is_floating_point and name not in CASTABLE]
        names = [name for name in names if name not in rare]
    dtype = draw(st.sampled_from(names))
    # Mostly small; some of several pieces, units and chunks.
    extents = st.integers(0, 9) | st.integers(0, 300)
    shape = draw(st.lists(extents, max_size=3).filter(lambda shape: math.prod(shape) <= 1 << 18))
    if dtype == "F4":
        shape = [*shape, draw(st.integers(0, 9)) * 2]
    cut = [draw(ranges(extent)) for extent in shape] if into is not None and into.parts else []
    return Chosen(dtype, shape, draw(st.integers(0, 99)), group, cut)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    groups = draw(
        st.lists(
            st.builds(
                Group,
                st.integers(CPU, DEVICES - 1),
                st.none() | st.sampled_from(CASTABLE),
                st.booleans(),
            ),
            min_size=1,
            max_size=5,
        )
    )
    files = draw(st.lists(st.lists(tensors(groups), max_size=8), min_size=1, max_size=3))
    sizes = st.none() | st.sampled_from([4096, 65536, 1 << 20])
    return Plan(
        files,
        [draw(st.integers(0, 70)) for _ in files],
        groups,
        draw(st.sampled_from(["auto", "read"])),
        Settings(
            threads=draw(st.integers(1, 4)),
            read_bytes=draw(sizes),
            chunk_bytes=draw(sizes),
            pinned_bytes=draw(sizes),
            io_path=draw(st.sampled_from(["auto", "buffered", "direct"])),
            cast_place=draw(st.sampled_from(["auto", "host", "device"])),
            kernels=draw(st.booleans()),
            batch_copies=draw(st.booleans()),
        ),
        draw(st.integers(0, 1000)),
        draw(st.sampled_from(list(Policy))),
    )


def content(chosen: Chosen) -> bytes:
    """Random bits, but numbers in tensors that may be cast: the rule for NaN differs from
    torch's."""
    if chosen.dtype not in CASTABLE:
        return entry(chosen.dtype, chosen.shape, chosen.seed)[2]
    random = torch.Generator().manual_seed(chosen.seed)
    numbers = torch.randn(math.prod(chosen.shape), generator=random, dtype=torch.float64)
    return bits(numbers.to(DTYPES[chosen.dtype]))


def written(plan: Plan, folder: Path) -> list[Path]:
    paths = []
    for i, (file, pad) in enumerate(zip(plan.files, plan.pads, strict=True)):
        entries = {f"{i}.{k}": (c.dtype, c.shape, content(c)) for k, c in enumerate(file)}
        path = folder / f"{i}.safetensors"
        path.write_bytes(file_bytes(entries, None, pad))
        paths.append(path)
    return paths


def expected(plan: Plan, paths: list[Path]) -> dict[str, torch.Tensor]:
    loaded = dict(
        itertools.chain.from_iterable(safetensors.torch.load_file(p).items() for p in paths)
    )
    found = {}
    for name, chosen in plan.tensors():
        if chosen.group is None:
            continue
        group = plan.groups[chosen.group]
        tensor = loaded[name]
        for dimension, (start, step, count) in enumerate(chosen.ranges):
            index = torch.arange(count) * step + start
            tensor = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
            tensor = torch.from_numpy(
                tensor.view(_BITS[tensor.itemsize]).numpy().take(index.numpy(), dimension)
            ).view(tensor.dtype)
        tensor = tensor.view(loaded[name].dtype)
        if group.dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtypes.to_torch(group.dtype))
        found[name] = tensor
    return found


def delivered_bytes(plan: Plan) -> int:
    """Bytes in the files: before casts, and without gaps between the parts."""
    total = 0
    for _, chosen in plan.tensors():
        if chosen.group is not None:
            cut = plan.groups[chosen.group].parts
            counts = [count for _, _, count in chosen.ranges] if cut else chosen.shape
            total += math.prod(counts) * dtypes.bits(chosen.dtype) // 8
    return total


# numpy takes parts of any bits; of some dtypes torch cannot.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check(machine: Switch, plan: Plan) -> None:
    before = open_files()
    with tempfile.TemporaryDirectory() as folder:
        paths = written(plan, Path(folder))
        theirs = expected(plan, paths)
        with machine(DEVICES, plan.seed, plan.policy) as driver:
            checkpoint = Checkpoint([_native.IndexedFile.open(str(path)) for path in paths])
            with plan.settings:
                allocator = simulated.SimulatedAllocator(driver)
                load = LoadPlan(checkpoint, LoadOptions(plan.mode), allocator=allocator)
            for number, group in enumerate(plan.groups):
                mine = [(name, c.ranges) for name, c in plan.tensors() if c.group == number]
                load.add(
                    torch.device("cpu") if group.device == CPU
                    else torch.device("cuda", group.device),
                    group.dtype,
                    [name for name, _ in mine],
                    parts=[cut for _, cut in mine] if group.parts else None,
                )  # fmt: skip
            running = load.start()
            loaded = running.result()
            assert loaded.keys() == theirs.keys()
            for name, tensor in loaded.items():
                other = theirs[name]
                if isinstance(tensor, torch.Tensor):
                    assert tensor.dtype == other.dtype, name
                    assert tensor.shape == other.shape, name
                    assert bits(tensor) == bits(other), name
                else:
                    assert DTYPES[tensor.dtype] == other.dtype, name
                    packed = 2 if tensor.dtype == "F4" else 1
                    assert math.prod(tensor.shape) == other.numel() * packed, name
                    assert tensor.bits() == bits(other), name
            assert running.report.bytes == delivered_bytes(plan)
            tensor = None
            del loaded, tensor, load, running, checkpoint
    assert open_files() == before


SUPPRESSED = [
    HealthCheck.function_scoped_fixture,  # it is a function
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
]


@settings(max_examples=100, suppress_health_check=SUPPRESSED)
@given(plan=plans())
def test_random_plans(machine: Switch, plan: Plan) -> None:
    check(machine, plan)


@pytest.mark.deep
@settings(max_examples=1500, suppress_health_check=SUPPRESSED)
@given(plan=plans())
def test_many_random_plans(machine: Switch, plan: Plan) -> None:
    check(machine, plan)
