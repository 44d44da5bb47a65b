"""Whole loads to simulated CUDA devices: real checkpoint, plan and engine, with torch's allocator
replaced. The native tests check more details; these check what Python passes to the engine."""

from __future__ import annotations

import functools
import gc
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.utils.dlpack import from_dlpack

import simulated
import support
import weightlift
from simulated import (
    RING,
    CudaError,
    FirstOpened,
    Policy,
    SimulatedAllocator,
    SimulatedTensor,
    Switch,
    Time,
    first_opened,
    machine,
    six_mib,
    wait_for_calls,
)
from weightlift import Settings, _native
from weightlift.checkpoint.checkpoint import Checkpoint, indexed_files
from weightlift.core import dtypes
from weightlift.load import load_tensors, plan_writer, plans
from weightlift.load.load_plan import LoadPlan
from weightlift.load.options import LoadOptions

__all__ = ["first_opened", "machine", "six_mib"]

pytestmark = simulated.pytestmark


def _tensors(seed: int = 0, scale: int = 1) -> dict[str, torch.Tensor]:
    """Tensors of many dtypes and sizes; floating-point ones contain numbers, so that casts are
    comparable."""
    random = torch.Generator().manual_seed(seed)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float32)

    return {
        "layer.0.weight": floats(300 * scale, 257).to(torch.bfloat16),
        "layer.0.bias": floats(257).to(torch.float16),
        "layer.1.weight": floats(70, 513 * scale),
        "layer.1.scale": floats(64, 3).to(torch.float8_e4m3fn),
        "layer.1.zero": floats(64, 3).to(torch.float8_e5m2),
        "layer.2.weight": floats(33, 100).to(torch.float64),
        "ids": torch.randint(-(2**60), 2**60, (101,), generator=random),
        "mask": torch.randint(0, 2, (7, 11), generator=random).to(torch.bool),
        "empty": torch.empty(0, 5),
        "scalar": floats(1)[0],
        **{f"small.{i}": floats(i % 7 + 1) for i in range(300)},
    }


@pytest.fixture
def checkpoint_path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(_tensors(), path, metadata={"odd": "x" * 13})
    return path


def _assert_loaded(ours: dict[str, SimulatedTensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert support.DTYPES[tensor.dtype] == theirs[name].dtype, name
        assert tensor.shape == tuple(theirs[name].shape), name
        assert tensor.bits() == support.bits(theirs[name]), name


def _load(path: Path, device: int, driver: Any, **options: Any) -> dict[str, SimulatedTensor]:
    options.setdefault("allocator", SimulatedAllocator(driver))
    how = LoadOptions(progress=options.pop("progress", False))
    return load_tensors.load_tensors(
        Checkpoint.from_file(path), torch.device("cuda", device), how, **options
    )


# --- One device --------------------------------------------------------------------------------


@pytest.mark.parametrize("device", range(8))
def test_a_file_arrives_on_each_of_eight_devices(
    machine: Switch, checkpoint_path: Path, device: int
) -> None:
    expected = safetensors.torch.load_file(checkpoint_path)
    policy = list(Policy)[device % len(Policy)]
    with machine(8, device, policy) as driver:
        used = SimulatedAllocator(driver)
        loaded = _load(checkpoint_path, device, driver, allocator=used)
        _assert_loaded(loaded, expected)
        assert used.reserved == {device: sum(t.nbytes for t in expected.values())}
        assert driver.ledger().peak_device_bytes[(device + 1) % 8] == 0
        report = weightlift.last_report()
        assert report is not None
        assert report.bytes == sum(t.nbytes for t in expected.values())
        assert report.fallbacks == []


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_casts_are_those_of_torch(
    machine: Switch, checkpoint_path: Path, dtype: str, kernels: bool
) -> None:
    wanted = dtypes.to_torch(dtype)
    expected = {
        name: tensor.to(wanted) if tensor.is_floating_point() else tensor
        for name, tensor in safetensors.torch.load_file(checkpoint_path).items()
    }
    for seed, place in enumerate(("auto", "host", "device")):
        settings = Settings(kernels=kernels, cast_place=place, chunk_bytes=256 * 1024, threads=2)
        with machine(1, seed, list(Policy)[seed]) as driver, settings:
            used = SimulatedAllocator(driver)
            loaded = _load(checkpoint_path, 0, driver, dtype=dtype, allocator=used)
            _assert_loaded(loaded, expected)
            assert used.reserved == {0: sum(t.nbytes for t in expected.values())}
            launched = driver.calls("cuLaunchKernel")
            assert (launched > 0) == kernels


@pytest.mark.parametrize("policy", list(Policy))
def test_every_schedule_gives_the_same(machine: Switch, tmp_path: Path, policy: Any) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(_tensors(1, scale=12), path)
    expected = safetensors.torch.load_file(path)
    for seed in range(4):
        settings = Settings(
            threads=seed + 1, chunk_bytes=256 * 1024, read_bytes=64 * 1024, pinned_bytes=512 * 1024
        )
        with machine(2, seed, policy) as driver, settings:
            _assert_loaded(_load(path, seed % 2, driver), expected)


def test_some_names(machine: Switch, checkpoint_path: Path) -> None:
    expected = safetensors.torch.load_file(checkpoint_path)
    names = ["layer.1.weight", "small.3", "ids", "empty"]
    with machine() as driver:
        loaded = _load(checkpoint_path, 0, driver, names=names)
        _assert_loaded(loaded, {name: expected[name] for name in names})


def test_an_older_driver_and_refused_kernels_are_no_obstacle(
    machine: Switch, checkpoint_path: Path
) -> None:
    expected = safetensors.torch.load_file(checkpoint_path)
    with machine() as driver:
        driver.hide_symbol("cuMemcpyBatchAsync")
        for n in (1, 2):  # machine code and PTX
            driver.fail_call("cuModuleLoadData", n, code=CudaError.NO_BINARY_FOR_GPU)
        _assert_loaded(_load(checkpoint_path, 0, driver), expected)
        report = weightlift.last_report()
        assert report is not None
        assert any("casts run on the host" in text for text in report.fallbacks)


def test_what_torch_has_is_asked_once_a_device(machine: Switch, tmp_path: Path) -> None:
    """Not once for each file: it takes up to a millisecond, and a checkpoint may have a hundred
    files."""
    tensors = {f"layer.{i}": torch.full((1000,), float(i)) for i in range(6)}
    places = {
        name: f"model-0000{i // 2 + 1}-of-00003.safetensors" for i, name in enumerate(tensors)
    }
    for file in set(places.values()):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        safetensors.torch.save_file(part, tmp_path / file)
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    asked = []

    class Counting(SimulatedAllocator):
        def reserve(self, device: int, sizes: Sequence[int]) -> None:
            asked.append(device)
            super().reserve(device, sizes)

    with machine(2) as driver:
        load = LoadPlan(weightlift.open_checkpoint(tmp_path), allocator=Counting(driver))
        load.add(torch.device("cuda", 1), None, ["layer.0", "layer.5"])
        load.add(torch.device("cuda", 0), None, ["layer.1", "layer.2", "layer.3", "layer.4"])
        loaded = load.start().result()
        assert sorted(asked) == [0, 1]
        for name, tensor in tensors.items():
            assert loaded[name].bits() == tensor.numpy().tobytes()
        del loaded, load


@pytest.mark.parametrize("in_use", [True, False], ids=["in use", "not in use"])
def test_slots_are_pinned_while_torch_allocates(
    machine: Switch, tmp_path: Path, in_use: bool
) -> None:
    """On a device that the process uses: a first use of CUDA is torch's."""
    tensors = {f"{i}": torch.full((1 << 20,), i, dtype=torch.uint8) for i in range(6)}
    safetensors.torch.save_file(tensors, tmp_path / "f")
    seen = []

    class Slow(SimulatedAllocator):
        def reserve(self, device: int, sizes: Sequence[int]) -> None:
            end = time.monotonic() + 5
            while in_use and driver.calls("cuMemHostRegister") < 4 and time.monotonic() < end:
                time.sleep(0.001)
            seen.append(driver.calls("cuMemHostRegister"))

    with machine(1) as driver:
        if in_use:
            driver.hold_context(0)
        calls = driver.ledger().calls
        weightlift.load_file(tmp_path / "f", mode="read")
        assert driver.ledger().calls == calls, "a load to the host uses no device"
        with Settings(chunk_bytes="1MiB", pinned_bytes="4MiB"):
            _assert_loaded(_load(tmp_path / "f", 0, driver, allocator=Slow(driver)), tensors)
        assert seen == [4 if in_use else 0]
        assert driver.calls("cuMemHostRegister") <= 4


# --- While files are opened --------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A checkpoint of three shards. An eighth of half of its bytes fills four slots of 1 MiB."""
    places = {}
    for number in range(3):
        file = f"model-0000{number + 1}-of-00003.safetensors"
        tensors = {
            f"{part}.{number}": torch.full((11 << 20,), number, dtype=torch.uint8)
            for part in ("first", "second")
        }
        safetensors.torch.save_file(tensors, tmp_path / file)
        places.update(dict.fromkeys(tensors, file))
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.mark.parametrize("in_use", [True, False], ids=["in use", "not in use"])
def test_slots_are_pinned_while_the_file_is_opened(
    machine: Switch,
    six_mib: Path,
    in_use: bool,
    monkeypatch: pytest.MonkeyPatch,
    first_opened: FirstOpened,
) -> None:
    module = sys.modules[weightlift.load_file.__module__]
    monkeypatch.setattr(module, "load_tensors", lambda *_, **__: {})  # torch sees no device here
    first_opened.wanted = 4 if in_use else 0
    with machine(1) as driver, RING:
        first_opened.driver = driver
        if in_use:
            driver.hold_context(0)
        weightlift.load_file(six_mib, "cuda:0")
        assert first_opened.seen == (4 if in_use else 0)
        with pytest.raises(FileNotFoundError):
            weightlift.load_file(six_mib.parent / "missing", "cuda:0")


@pytest.mark.parametrize(
    ("device_map", "slots"),
    [
        ("cuda:0", 4),
        ({"": 0}, 4),
        ({"first": "cuda:0", "second": "cuda:1"}, 4),  # which serve all devices of their node
        ({"first": "cuda:0", "second": "cpu"}, 0),  # nobody knows how much goes where
        ("cpu", 0),
    ],
    ids=str,
)
def test_slots_are_pinned_while_shards_are_opened(
    machine: Switch,
    shards: Path,
    device_map: Any,
    slots: int,
    monkeypatch: pytest.MonkeyPatch,
    first_opened: FirstOpened,
) -> None:
    expected = {}
    for file in shards.glob("*.safetensors"):
        expected.update(safetensors.torch.load_file(file))
    module = sys.modules[weightlift.load_checkpoint.__module__]
    first_opened.wanted = slots
    with machine(2) as driver, RING:
        first_opened.driver = driver
        for device in range(2):
            driver.hold_context(device)
        calls = driver.ledger().calls
        plan = functools.partial(LoadPlan, allocator=SimulatedAllocator(driver))
        monkeypatch.setattr(module, "LoadPlan", plan)
        loaded = weightlift.load_checkpoint(shards, device_map)
        assert first_opened.seen == slots
        assert (first_opened.calls > calls) == (slots > 0), "it is asked whether a device is in use"
        if device_map == "cpu":
            assert driver.ledger().calls == calls
        assert driver.calls("cuMemHostRegister") <= 8
        for name, tensor in loaded.items():
            bits = support.bits(tensor) if isinstance(tensor, torch.Tensor) else tensor.bits()
            assert bits == support.bits(expected.pop(name)), name
        assert expected == {}
        del loaded, tensor


@pytest.mark.parametrize(
    ("device_map", "slots"),
    [("cuda:0", 4), ({"first": 0, "second": 0}, 4), (None, 0), ("auto", 0), ({"": "disk"}, 0)],
    ids=str,
)
def test_slots_are_pinned_while_the_files_of_a_model_are_opened(
    machine: Switch,
    shards: Path,
    device_map: Any,
    slots: int,
    monkeypatch: pytest.MonkeyPatch,
    first_opened: FirstOpened,
) -> None:
    module = sys.modules[weightlift.load_into.__module__]
    monkeypatch.setattr(module, "fill", lambda *_, **__: None)  # torch sees no device here
    first_opened.wanted = slots
    with machine(1) as driver, RING:
        first_opened.driver = driver
        driver.hold_context(0)
        calls = driver.ledger().calls
        weightlift.load_into(torch.nn.Linear(2, 2, device="meta"), shards, device_map=device_map)
        assert first_opened.seen == slots
        assert (first_opened.calls > calls) == (slots > 0), "it is asked whether a device is in use"


def test_a_load_that_fails_while_its_files_are_opened_leaves_free_slots(
    machine: Switch, shards: Path, monkeypatch: pytest.MonkeyPatch, first_opened: FirstOpened
) -> None:
    """No thread goes on, and the next load takes the slots that are there."""
    path = shards / "model-00002-of-00003.safetensors"
    intact = path.read_bytes()
    module = sys.modules[weightlift.load_checkpoint.__module__]
    with machine(1) as driver, RING:
        first_opened.driver = driver
        driver.hold_context(0)
        plan = functools.partial(LoadPlan, allocator=SimulatedAllocator(driver))
        monkeypatch.setattr(module, "LoadPlan", plan)
        threads = set(Path("/proc/self/task").iterdir())
        path.write_bytes(intact[:100])
        with pytest.raises(weightlift.FormatError, match="00002-of-00003"):
            weightlift.load_checkpoint(shards, 0)
        assert first_opened.seen == 4
        assert set(Path("/proc/self/task").iterdir()) <= threads
        ledger = driver.ledger()
        assert (ledger.pinned_ranges, ledger.pinned_bytes) == (4, 4 << 20)
        path.write_bytes(intact)
        loaded = weightlift.load_checkpoint(shards, 0)
        assert driver.calls("cuMemHostRegister") == 4
        assert loaded["second.1"].bits() == bytes([1]) * (11 << 20)
        del loaded


# --- Before the plan starts --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "settings", "loads"),
    [
        (None, {}, False),
        ("F32", {}, True),
        ("F16", {}, True),
        ("F8_E4M3", {}, False),
        ("F8_E4M3", {"cast_place": "device"}, True),
        ("F32", {"cast_place": "host"}, False),
        ("F32", {"kernels": False}, False),
    ],
)
def test_the_kernel_is_loaded_while_torch_allocates(
    machine: Switch, six_mib: Path, dtype: str | None, settings: dict[str, Any], loads: bool
) -> None:
    """For a plan that will certainly use it: a module takes a millisecond or more."""
    loads = loads and bool(_native.machine()["kernels"])
    seen = []

    class Slow(SimulatedAllocator):
        def reserve(self, device: int, sizes: Sequence[int]) -> None:
            wait_for_calls(driver, "cuMemHostRegister", 4)  # the kernel comes before the slots
            seen.append(driver.calls("cuModuleLoadData"))

    with machine(1) as driver:
        driver.hold_context(0)
        with Settings(chunk_bytes="512KiB", pinned_bytes="2MiB", **settings):
            loaded = _load(six_mib, 0, driver, allocator=Slow(driver), dtype=dtype)
        assert seen == [int(loads)]
        assert driver.calls("cuModuleLoadData") == int(loads)
        del loaded


@pytest.mark.parametrize("size", [999, 1024], ids=["separate", "adjoining"])
def test_the_kernel_is_loaded_early_for_many_small_tensors(
    machine: Switch, tmp_path: Path, size: int
) -> None:
    tensors = {f"{i}": torch.full((size,), i % 7, dtype=torch.uint8) for i in range(3000)}
    safetensors.torch.save_file(tensors, tmp_path / "f")
    seen = []

    class Slow(SimulatedAllocator):
        def reserve(self, device: int, sizes: Sequence[int]) -> None:
            wait_for_calls(driver, "cuMemHostRegister", 2)
            seen.append(driver.calls("cuModuleLoadData"))

    with machine(1) as driver:
        driver.hold_context(0)
        with Settings(chunk_bytes="1MiB"):
            loaded = _load(tmp_path / "f", 0, driver, allocator=Slow(driver))
        assert seen == [int(size == 999 and bool(_native.machine()["kernels"]))]
        del loaded


@pytest.mark.parametrize("how", ["targets", "parts", "parts into targets"])
def test_slots_are_pinned_ahead_for_all_destinations(
    machine: Switch, six_mib: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where torch allocates nothing."""
    expected = safetensors.torch.load_file(six_mib)
    names = list(expected)
    started = plans.start_plan
    seen = []

    def slow(*arguments: Any) -> None:
        seen.append(wait_for_calls(driver, "cuMemHostRegister", 4))
        started(*arguments)

    monkeypatch.setattr(plan_writer, "start_plan", slow)
    with machine(1) as driver:
        driver.hold_context(0)
        allocator = SimulatedAllocator(driver)
        targets = None
        if "targets" in how:
            targets = [allocator.empty(0, expected[name].shape, "BF16")[1] for name in names]
            for target in targets:
                target.dtype = torch.bfloat16
                target.is_contiguous = lambda: True
        parts = [[(0, 1, 1 << 19)]] * len(names) if "parts" in how else None
        with Settings(chunk_bytes="1MiB", pinned_bytes="4MiB"):
            load = LoadPlan(Checkpoint.from_file(six_mib), allocator=allocator)
        load.add(torch.device("cuda", 0), None, names, targets, parts)
        loaded = load.start().result()
        assert seen == [4]
        for name in names:
            assert loaded[name].bits() == support.bits(expected[name])
        del loaded, load, targets
        target = None


def test_targets_that_their_stream_still_writes(machine: Switch, checkpoint_path: Path) -> None:
    """Existing parameters are filled after earlier work on them in the user's stream."""
    expected = safetensors.torch.load_file(checkpoint_path)
    names = [name for name, tensor in expected.items() if tensor.numel()]
    for seed, policy in enumerate(Policy):
        with machine(1, seed, policy) as driver:
            allocator = SimulatedAllocator(driver)
            targets = []
            for name in names:
                tensor = expected[name]
                _, target = allocator.empty(0, tensor.shape, dtypes.file_name(tensor.dtype) or "")
                target.dtype = tensor.dtype
                target.is_contiguous = lambda: True
                targets.append(target)
            load = LoadPlan(Checkpoint.from_file(checkpoint_path), allocator=allocator)
            load.add(torch.device("cuda", 0), None, names, targets)
            loaded = load.start().result()
            for name in names:
                assert loaded[name].bits() == support.bits(expected[name])
            del loaded, load, targets, target


# --- Several devices ---------------------------------------------------------------------------


def _to_devices(
    path: Path, allocator: SimulatedAllocator, place: Callable[[int], int], dtype: str | None = None
) -> dict[str, SimulatedTensor]:
    """All tensors in one plan, tensor ``i`` to device ``place(i)``."""
    checkpoint = Checkpoint.from_file(path)
    with Settings(threads=2, chunk_bytes=512 * 1024):
        load = LoadPlan(checkpoint, allocator=allocator)
    names: dict[int, list[str]] = {}
    for i, name in enumerate(checkpoint):
        names.setdefault(place(i), []).append(name)
    for device, chosen in names.items():
        load.add(torch.device("cuda", device), dtype, chosen)
    return load.start().result()


def test_one_plan_for_eight_devices(machine: Switch, checkpoint_path: Path) -> None:
    expected = safetensors.torch.load_file(checkpoint_path)
    for seed, policy in enumerate(Policy):
        with machine(8, seed, policy) as driver:
            used = SimulatedAllocator(driver)
            loaded = _to_devices(checkpoint_path, used, lambda i: i * 7 % 8)
            _assert_loaded(loaded, expected)


@pytest.mark.parametrize(
    ("link", "host"), [(40e6, 0.0), (100e6, 240e6)], ids=["links", "host memory"]
)
def test_eight_links_are_driven_at_once(
    machine: Switch, tmp_path: Path, link: float, host: float
) -> None:
    path = tmp_path / "model.safetensors"
    data = torch.arange(2_000_000, dtype=torch.float32)
    safetensors.torch.save_file({f"{i:02}": data[i:].clone() for i in range(8)}, path)
    best = min(8 * link, host) if host else 8 * link
    rates = []
    for _ in range(3):  # other processes may hold the processors for a moment
        with machine(8) as driver:
            driver.set_hashing(False)
            used = SimulatedAllocator(driver)
            driver.set_time(Time.REAL)
            for device in range(8):
                driver.set_link(device, link)
            driver.set_host_memory(host)
            loaded = _to_devices(path, used, lambda i: i)
            links = [driver.link(device) for device in range(8)]
            seconds = max(x.last_finish for x in links) - min(x.first_start for x in links)
            rates.append(sum(x.bytes_to_device for x in links) / seconds)
            del loaded
        if rates[-1] >= 0.9 * best:
            break
    assert max(rates) >= 0.9 * best


# --- From memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "BF16", "F32"])
def test_tensors_in_memory_go_through_the_ring(machine: Switch, dtype: str | None) -> None:
    tensors = {**_tensors(3, scale=4), "pairs": torch.zeros(3, 2, dtype=torch.float4_e2m1fn_x2)}
    expected = dict(tensors)
    if dtype is not None:
        wanted = dtypes.to_torch(dtype)
        expected = {
            name: t.to(wanted) if t.is_floating_point() and name != "pairs" else t
            for name, t in tensors.items()
        }
    for seed, policy in enumerate(Policy):
        settings = Settings(threads=2, chunk_bytes=256 * 1024, pinned_bytes=512 * 1024)
        with machine(2, seed, policy) as driver, settings:
            used = SimulatedAllocator(driver)
            target = torch.device("cuda", 1)
            loaded = load_tensors.copy_to_device(tensors, target, dtype, allocator=used)
            for name, tensor in loaded.items():
                assert tensor.bits() == support.bits(expected[name]), name
            assert used.reserved == {1: sum(t.nbytes for t in expected.values())}
            report = weightlift.last_report()
            assert report is not None
            assert report.devices == {"cuda:1": sum(t.nbytes for t in tensors.values())}
            assert report.read_bytes == 0
            assert 0 < report.peak_staging_bytes <= 512 * 1024
            del loaded


# --- What goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "code", "error"),
    [
        ("cuMemcpyHtoDAsync", CudaError.UNKNOWN, weightlift.DeviceError),
        ("cuLaunchKernel", CudaError.LAUNCH_FAILED, weightlift.DeviceError),
        ("cuEventSynchronize", CudaError.ILLEGAL_ADDRESS, weightlift.DeviceError),
        ("cuStreamCreate", CudaError.OUT_OF_MEMORY, weightlift.OutOfMemoryError),
        ("cuInit", CudaError.NO_DEVICE, weightlift.DeviceError),
    ],
)
def test_failures_name_the_call(
    machine: Switch, checkpoint_path: Path, call: str, code: int, error: type[Exception]
) -> None:
    expected = safetensors.torch.load_file(checkpoint_path)
    with machine() as driver:
        driver.fail_call(call, code=code)
        with pytest.raises(error, match=call):
            _load(checkpoint_path, 0, driver)
        _assert_loaded(_load(checkpoint_path, 0, driver), expected)


def test_a_full_device_is_an_error_and_leaves_it_empty(
    machine: Switch, checkpoint_path: Path
) -> None:
    with machine() as driver:
        driver.set_memory(0, 200_000)
        with pytest.raises(
            weightlift.OutOfMemoryError, match=r"model\.safetensors: tensor '[\w.]+': "
        ) as caught:
            _load(checkpoint_path, 0, driver)
        gc.collect()
        driver.drain()  # freed in their stream's order: once that has come so far
        assert driver.ledger().external_allocations == 0
        assert caught.tb is not None  # which keeps the frames that had the tensors


def test_a_missing_device_is_named(machine: Switch, checkpoint_path: Path) -> None:
    part = indexed_files(Checkpoint.from_file(checkpoint_path))[0]
    with machine(2):
        plan = _native.Plan(_native.Settings())
        plan.copy_to(part, [0], _native.Targets(5, [4096], part.dtypes([0])))
        with pytest.raises(weightlift.DeviceError, match=r"cuda:5.* sees 2"):
            plan.prepare()


@pytest.mark.parametrize("settings", [Settings(threads=1), Settings(threads=4, pinned_bytes=2**20)])
def test_ctrl_c_drains_and_the_next_load_is_right(
    machine: Switch, tmp_path: Path, settings: Settings
) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(_tensors(2, scale=40), path)
    expected = safetensors.torch.load_file(path)

    def interrupt(done: int, total: int) -> None:
        assert done < total
        raise KeyboardInterrupt

    with machine() as driver, settings:
        driver.set_time(Time.REAL)
        driver.set_link(0, 40e6)
        with pytest.raises(KeyboardInterrupt):
            _load(path, 0, driver, progress=interrupt)
        gc.collect()  # tensors go back in their stream's order: a copy in flight would be found
        driver.drain()
        assert driver.ledger().external_allocations == 0
        assert driver.violations() == []
        driver.set_time(Time.NONE)
        seen: list[tuple[int, int]] = []
        loaded = _load(path, 0, driver, progress=lambda *now: seen.append(now))
        _assert_loaded(loaded, expected)
        assert seen[-1][0] == seen[-1][1]


def test_a_wait_asks_until_the_end(machine: Switch, tmp_path: Path) -> None:
    """However long a load takes, it is asked for its progress, and so can be interrupted: nobody
    learns that a copy has ended before the wait has asked often."""
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(_tensors(2, scale=40), path)
    expected = safetensors.torch.load_file(path)
    often, asked = 4, 0
    asked_often = threading.Event()

    def show(done: int, total: int) -> None:
        nonlocal asked
        asked += done < total
        if asked == often:
            asked_often.set()

    with machine() as driver, Settings(threads=2, chunk_bytes="256KiB", pinned_bytes="512KiB"):
        with ThreadPoolExecutor(1) as pool:
            with driver.holding():
                loading = pool.submit(_load, path, 0, driver, progress=show)
                asked_often.wait(often * plans.POLL_SECONDS + 5)
            loaded = loading.result()
        assert asked >= often
        _assert_loaded(loaded, expected)
        del loaded, loading


@pytest.mark.parametrize("how", ["cancel", "interrupt"])
def test_a_load_that_is_stopped_has_nothing_in_flight(
    machine: Switch, tmp_path: Path, how: str
) -> None:
    """While what stands for it is still there: its end would wait for the copies, too."""
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(_tensors(2, scale=40), path)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with machine() as driver, Settings(threads=1):
        driver.set_time(Time.REAL)
        driver.set_link(0, 8e6)
        options = LoadOptions(progress=interrupt if how == "interrupt" else False)
        load = LoadPlan(Checkpoint.from_file(path), options, allocator=SimulatedAllocator(driver))
        load.add(torch.device("cuda", 0))
        running = load.start()
        end = time.monotonic() + 60
        while not driver.link(0).first_start and time.monotonic() < end:
            time.sleep(0.001)
        if how == "cancel":
            running.cancel()
        else:
            with pytest.raises(KeyboardInterrupt):
                running.result()
        assert driver.ledger().pending == 0
        del running, load
        gc.collect()


# --- Pinned host memory ------------------------------------------------------------------------


def test_pinned_tensors_are_registered_while_they_live(
    machine: Switch, checkpoint_path: Path
) -> None:
    expected = safetensors.torch.load_file(checkpoint_path)
    with machine(2) as driver:
        part = indexed_files(Checkpoint.from_file(checkpoint_path))[0]
        plan = _native.Plan(_native.Settings())
        plan.read(part, None, None, 0)
        assert plans.run_plan(plan, None)["bytes"] == sum(t.nbytes for t in expected.values())
        names = part.names()
        tensors = dict(zip(names, plan.tensors(from_dlpack), strict=True))
        del plan
        support.assert_same_tensors(tensors, {name: expected[name] for name in names})
        ledger = driver.ledger()
        assert ledger.pinned_ranges == 1
        assert ledger.pinned_bytes >= sum(t.nbytes for t in expected.values())
        last = tensors.popitem()[1]
        tensors.clear()
        gc.collect()
        assert driver.ledger().pinned_ranges == 1
        # torch records no event for memory that it did not allocate: a copy may still be reading
        # it.
        waited = driver.calls("cuCtxSynchronize")
        del last
        gc.collect()
        end = time.monotonic() + 5  # the thread that releases it waits for the devices
        while driver.ledger().pinned_ranges and time.monotonic() < end:
            time.sleep(0.001)
        assert driver.ledger().pinned_ranges == 0
        assert driver.calls("cuCtxSynchronize") > waited


def test_pinned_tensors_outlive_the_driver(machine: Switch, checkpoint_path: Path) -> None:
    with machine(lost=True) as driver:
        part = indexed_files(Checkpoint.from_file(checkpoint_path))[0]
        plan = _native.Plan(_native.Settings())
        plan.read(part, None, None, 0)
        plans.run_plan(plan, None)
        tensors = plan.tensors(from_dlpack)
        driver.exit()
        del plan, tensors
        gc.collect()
        assert driver.violations() == []


def test_other_threads_run_while_pages_are_pinned(machine: Switch, tmp_path: Path) -> None:
    size = 256 << 20
    header = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    support.sparse_file(tmp_path / "f", header, size)
    part = indexed_files(Checkpoint.from_file(tmp_path / "f"))[0]
    moments: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            moments.append(time.monotonic())

    ticking = threading.Thread(target=tick)
    with machine():
        settings = _native.Settings()
        settings.threads = 1
        plan = _native.Plan(settings)
        ticking.start()
        began = time.monotonic()
        plan.read(part, None, None, 0)
        ended = time.monotonic()
        done.set()
        ticking.join()
        del plan
    # With the lock held, the first moment after it could at the earliest lie just before `ended`.
    assert any(began < moment < (began + ended) / 2 for moment in moments)


def test_refused_pinning_is_named(machine: Switch, checkpoint_path: Path) -> None:
    with machine() as driver:
        part = indexed_files(Checkpoint.from_file(checkpoint_path))[0]
        driver.fail_call("cuMemHostRegister", code=CudaError.NOT_PERMITTED)
        driver.fail_call("cuMemHostAlloc", code=CudaError.NOT_PERMITTED)
        plan = _native.Plan(_native.Settings())
        with pytest.raises(weightlift.DeviceError, match="cuMemHost"):
            plan.read(part, None, None, 0)


# --- Slices ------------------------------------------------------------------------------------


def test_slices_arrive_on_a_device(machine: Switch, checkpoint_path: Path) -> None:
    whole = safetensors.torch.load_file(checkpoint_path)["layer.1.weight"]
    cases = [
        ([(0, 1, 70), (0, 1, 513)], whole),
        ([(3, 2, 20), (5, 1, 400)], whole[3:43:2, 5:405]),
        ([(69, 1, 1), (1, 7, 73)], whole[69:70, 1:512:7]),
    ]
    for seed, (parts, expected) in enumerate(cases):
        with machine(1, seed, list(Policy)[seed]) as driver:
            used = SimulatedAllocator(driver)
            part = indexed_files(Checkpoint.from_file(checkpoint_path))[0]
            address, owner = used.empty(0, tuple(expected.shape), "F32")
            plan = _native.Plan(_native.Settings())
            which = part.find("layer.1.weight")
            assert which is not None
            plan.slice_to(part, which, parts, _native.Targets(0, [address], ["F32"]))
            plan.use_stream(0, used.stream(0))
            plans.run_plan(plan, used)
            assert owner.bits() == support.bits(expected)


class _Readable(SimulatedTensor):
    """With torch's work on a device tensor done by the host."""

    def flip(self, dimensions: Sequence[int]) -> torch.Tensor:
        return self._on_host().flip(*dimensions)

    def reshape(self, shape: Sequence[int]) -> torch.Tensor:
        return self._on_host().reshape(tuple(shape))

    def _on_host(self) -> torch.Tensor:
        flat = torch.frombuffer(bytearray(self.bits()), dtype=support.DTYPES[self.dtype])
        return flat.reshape(self.shape)


class _ReadableAllocator(SimulatedAllocator):
    kind = _Readable


@pytest.mark.parametrize(
    "index",
    [
        (slice(3, 43, 2), slice(5, 405)),
        (slice(60, 10, -7), 12),
        (-1, slice(None, None, -3)),
        (slice(None, None, -1), slice(500, 3, -101)),
        7,
    ],
    ids=str,
)
def test_an_open_file_s_slices_on_a_device(
    machine: Switch, checkpoint_path: Path, monkeypatch: pytest.MonkeyPatch, index: Any
) -> None:
    whole = safetensors.torch.load_file(checkpoint_path)["layer.1.weight"].numpy()
    with machine(2) as driver:
        room = sys.modules["weightlift.safe_open"]
        monkeypatch.setattr(room, "TorchAllocator", lambda: _ReadableAllocator(driver))
        with weightlift.safe_open(checkpoint_path, device="cuda:1") as opened:
            found = opened.get_slice("layer.1.weight")[index]
        support.assert_same(found, torch.from_numpy(whole[index].copy()))
        report = weightlift.last_report()
        assert report is not None
        assert report.devices == {"cuda:1": found.nbytes}


def test_a_dtype_that_torch_lacks(machine: Switch, tmp_path: Path) -> None:
    path = tmp_path / "six.safetensors"
    path.write_bytes(
        support.file_bytes({"a": support.entry("F32", [4]), "b": support.entry("F6_E2M3", [8])})
    )
    with machine() as driver:
        with pytest.raises(weightlift.FormatError, match="torch has no dtype for F6_E2M3") as told:
            _load(path, 0, driver)
        assert (told.value.code, told.value.tensor) == ("unsupported_dtype", "b")
        assert list(_load(path, 0, driver, names=["a"])) == ["a"]


# --- What is said of a machine -----------------------------------------------------------------


def test_what_the_driver_tells(machine: Switch) -> None:
    with machine(3) as driver:
        report = _native.driver_report()
        assert [name for name, *_ in report["devices"]] == [f"Simulated {n}" for n in range(3)]
        assert report["library"] == simulated.LIBRARY
        assert report["version"] >= 12_000
        assert report["batch_copies"] == "13.0"
        assert all("sm_" in form and refusal is None for _, form, refusal in report["devices"])
        driver.hide_symbol("cuMemcpyBatchAsync")
        driver.fail_call("cuDeviceGetName", code=CudaError.UNKNOWN)
        _native.use_driver_for_testing(simulated.LIBRARY)  # as another process would find it
        report = _native.driver_report()
        assert report["batch_copies"] is None
        assert report["devices"][0][0] == "unknown"
