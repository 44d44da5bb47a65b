"""Weights that are streamed to a simulated CUDA device by the executor and the engine: the results,
and the order of operations by the simulated driver's clocks."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_streaming_device import file_of, loaded

import simulated
import support
import weightlift as wl
from simulated import Policy, Switch, machine
from simulated_cuda import Cuda, Stream, install
from streaming_mutants import CUDA_MUTANTS

__all__ = ["machine"]

pytestmark = simulated.pytestmark

BLOCKS = 5
SHAPES = {"weight": (96, 64), "bias": (96,)}
DEVICE = torch.device("cuda", 0)
MODULES = ("streaming.sources",)
# So small that a block needs several copies.
SMALL_CHUNKS = wl.Settings(chunk_bytes="16KiB")


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        f"{number}.{name}": torch.rand(shape, generator=generator)
        for number in range(BLOCKS)
        for name, shape in SHAPES.items()
    }


class Bench:
    """An executor on a simulated device, and kernels that use its weights."""

    def __init__(
        self, modules: Any, cuda: Cuda, source: Any, dtype: torch.dtype, threaded: bool, ahead: int
    ) -> None:
        self.cuda, self.dtype = cuda, dtype
        side = modules.device_side.CudaSide(DEVICE)
        side.allocate = cuda.allocator.buffer
        blocks = []
        for number in range(BLOCKS):
            block = modules.executor.BlockOfWeights(number, f"{number}")
            for name, shape in SHAPES.items():
                block.add(f"{number}.{name}", shape, dtype, source, f"{number}.{name}")
            blocks.append(block)
        self.executor = modules.executor.Executor(blocks, side, 3, ahead, threaded=threaded)
        self.stored = {w.name: w for block in blocks for w, _ in block.weights}
        self.results: list[tuple[str, Any]] = []

    def use(self, number: int) -> None:
        """One operation with all weights of a block; its result stays on the device."""
        leases = []
        for name in SHAPES:
            stored = self.stored[f"{number}.{name}"]
            leases.append((stored, self.executor.lease(stored, may_wait=not leases)))
        for stored, lease in leases:
            size = lease.tensor.nbytes
            result = self.cuda.allocator.buffer(size)
            self.cuda.use(lease.tensor.data_ptr(), result.data_ptr(), size)
            self.results.append((stored.name, result))
        for _, lease in leases:
            lease.end()

    def check(self, expected: dict[str, torch.Tensor]) -> None:
        self.cuda.driver.synchronize(0)
        assert self.results
        for name, result in self.results:
            bits = self.cuda.allocator.block(result).bits()
            support.assert_same_bytes(bits, support.bits(expected[name].to(self.dtype)), name)


@contextlib.contextmanager
def bench(
    modules: Any,
    cuda: Cuda,
    kind: str,
    path: Path,
    dtype: torch.dtype = torch.float32,
    threaded: bool = True,
    ahead: int = 2,
) -> Any:
    how = {"allocator": cuda.allocator, "device": DEVICE}
    if kind == "file":
        source = modules.sources.FileSource(wl.open_checkpoint(path), SMALL_CHUNKS, **how)
    else:
        source = modules.sources.HostSource(tensors(), **how)
    made = Bench(modules, cuda, source, dtype, threaded, ahead)
    try:
        yield made
    finally:
        made.executor.close()


def end(cuda: Cuda, *things: Any) -> None:
    """Frees all memory before the machine is checked."""
    for thing in things:
        thing.results.clear()
    gc.collect()
    cuda.allocator.blocks.clear()


# --- what is checked ------------------------------------------------------------------------------


def a_use_waits_for_copies_in_flight(modules: Any, cuda: Cuda, path: Path) -> None:
    """Whatever the host's speed: until the use is queued, nobody learns that a copy has ended."""
    for kind in ("file", "host"):
        with bench(modules, cuda, kind, path, ahead=0) as made:
            side = made.executor._side
            for number in range(BLOCKS):
                side._end_last()  # of the block before, which the next read waits for
                with cuda.driver.holding():
                    made.use(number)
            made.check(tensors())
        end(cuda, made)


def a_copy_waits_for_the_uses_of_all_threads(modules: Any, cuda: Cuda, path: Path) -> None:
    """Two threads use a block on streams of their own, and its buffer gets another one."""
    failed: list[BaseException] = []
    with bench(modules, cuda, "host", path, ahead=0) as made:

        def run() -> None:
            try:
                with cuda.on(Stream(cuda)):
                    made.use(0)
            except BaseException as error:
                failed.append(error)

        made.use(0)
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), "a thread waits for ever"
        assert not failed, failed[0]
        slot = made.executor.ring._slot_of[0]
        for number in (1, 2, 3):
            made.use(number)
        assert slot.block == 3, "the block is in another buffer"
        made.check(tensors())
    end(cuda, made)


def what_is_used_is_what_was_read(modules: Any, cuda: Cuda, path: Path) -> None:
    """With the host far ahead of the device, in a fixed and in random order."""
    for kind, dtype in (("file", torch.float32), ("host", torch.bfloat16)):
        with bench(modules, cuda, kind, path, dtype) as made:
            for number in [0, 1, 2, 3, 4] * 3 + [4, 2, 0, 3, 1, 1, 4]:
                made.use(number)
            made.check(tensors())
        end(cuda, made)


def other_streams_wait_too(modules: Any, cuda: Cuda, path: Path) -> None:
    """Threads that compute on streams of their own, with one ring."""
    failed: list[BaseException] = []
    with bench(modules, cuda, "file", path, torch.float32) as made:

        def run(order: list[int]) -> None:
            try:
                with cuda.on(Stream(cuda)):
                    for number in order:
                        made.use(number)
            except BaseException as error:
                failed.append(error)

        orders = [[0, 1, 2, 3, 4] * 2, [4, 3, 2, 1, 0] * 2]
        threads = [threading.Thread(target=run, args=(o,), daemon=True) for o in orders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
        assert not failed, failed[0]
        made.check(tensors())
    end(cuda, made)


def weights_that_are_read_alone(modules: Any, cuda: Cuda, path: Path) -> None:
    """After the end of the ring."""
    with bench(modules, cuda, "host", path, torch.float32) as made:
        made.use(0)
        made.executor.ring.stop()
        for number in (1, 0, 4):
            stored = made.stored[f"{number}.weight"]
            tensor = torch.empty(0)
            size = 96 * 64 * 4
            # As the executor does it, in memory of this device.
            tensor = cuda.allocator.buffer(size).view(torch.float32).view(96, 64)
            source = made.executor._sources[stored]
            transfer = modules.device_side.Transfer(
                stored.block, tensor, size,
                lambda s=source, w=stored, t=tensor: s.fill([w.key], [t]),
                lambda s=source, w=stored, t=tensor: s.begin([w.key], [t]),
            )  # fmt: skip
            side = made.executor._side
            side.wait(side.copy(transfer, [side.mark()]))
            result = cuda.allocator.buffer(size)
            cuda.use(tensor.data_ptr(), result.data_ptr(), size)
            made.results.append((stored.name, result))
        made.check(tensors())
    end(cuda, made)


def nothing_is_in_flight_after_the_end(modules: Any, cuda: Cuda, path: Path) -> None:
    """Closing a stream frees its buffers for others."""
    for threaded in (True, False):
        with bench(modules, cuda, "host", path, torch.float32, threaded) as made:
            for number in (0, 1, 2):
                made.use(number)
            buffers = [slot.buffer for slot in made.executor.ring._slots]
        for buffer in buffers:
            cuda.driver.write(buffer.data_ptr(), bytes(buffer.nbytes))  # a race, if one uses it
        del buffers, buffer
        end(cuda, made)


def a_failed_read_is_raised_and_forgotten(modules: Any, cuda: Cuda, path: Path) -> None:
    source = modules.sources.HostSource(tensors(), allocator=cuda.allocator, device=DEVICE)
    begin, failing = source.begin, {"2.weight"}

    def may_fail(names: Any, targets: Any) -> Any:
        if failing & {*names}:
            raise OSError("no such luck")
        return begin(names, targets)

    source.begin = may_fail
    made = Bench(modules, cuda, source, torch.float32, True, 2)
    try:
        for number in (0, 1):
            made.use(number)
        with pytest.raises(OSError, match="no such luck"):
            made.use(2)
        failing.clear()
        for number in (2, 3, 4, 0, 1, 2):
            made.use(number)
        made.check(tensors())
    finally:
        made.executor.close()
    end(cuda, made)


CHECKS = [
    a_use_waits_for_copies_in_flight,
    a_copy_waits_for_the_uses_of_all_threads,
    what_is_used_is_what_was_read,
    other_streams_wait_too,
    weights_that_are_read_alone,
    nothing_is_in_flight_after_the_end,
    a_failed_read_is_raised_and_forgotten,
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    safetensors.torch.save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def run_check(check: Any, modules: Any, switch: Switch, path: Path, seed: int, policy: Any) -> None:
    with switch(1, seed, policy) as driver, pytest.MonkeyPatch.context() as patches:
        cuda = Cuda(driver)
        install(cuda, patches)
        try:
            check(modules, cuda, path)
        finally:
            gc.collect()
            cuda.allocator.blocks.clear()


@pytest.mark.parametrize("policy", list(Policy), ids=lambda policy: policy.name.lower())
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check(machine: Switch, path: Path, check: Any, policy: Any) -> None:
    run_check(check, loaded(more=MODULES), machine, path, 1, policy)


def killed_by(changed: dict[str, str], switch: Switch, path: Path) -> str | None:
    """Threads run in any order: several rounds find more."""
    for seed, check, policy in itertools.product(range(1, 9), CHECKS, (Policy.LAZY, Policy.EAGER)):
        modules: types.SimpleNamespace = loaded(changed, more=MODULES)
        try:
            run_check(check, modules, switch, path, seed, policy)
        except BaseException as error:
            return f"{check.__name__}: {error!r}"
    return None


@pytest.mark.parametrize("name", CUDA_MUTANTS)
def test_a_mutant_is_killed(machine: Switch, path: Path, name: str) -> None:
    module, old, new = CUDA_MUTANTS[name]
    text = file_of(f"streaming.{module}").read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {module}.py"
    killed = killed_by({f"streaming.{module}": text.replace(old, new)}, machine, path)
    assert killed, "nothing noticed"
    print(killed)
