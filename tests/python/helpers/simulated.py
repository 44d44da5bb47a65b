"""Simulated CUDA devices for whole loads: torch's allocator and tensors are replaced."""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import support
import weightlift
from weightlift import _native

_TESTS = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(_TESTS / "simulated_driver"))
simulated_driver = importlib.import_module("simulated_driver")
Policy, Time, CudaError = (
    simulated_driver.Policy,
    simulated_driver.Time,
    simulated_driver.CudaError,
)


def _find_library() -> str | None:
    given = os.environ.get("WEIGHTLIFT_SIMULATED_DRIVER")
    if given:
        return given
    built = (_TESTS.parent / "build" / "dev").glob("**/libsimulated_cuda.so")
    return next((str(path) for path in built), None)


LIBRARY = _find_library()
# For `pytestmark`.
pytestmark = [
    pytest.mark.skipif(
        not hasattr(_native, "use_driver_for_testing"),
        reason="this build has no test hooks (WEIGHTLIFT_TESTING=ON)",
    ),
    pytest.mark.skipif(
        LIBRARY is None, reason="no libsimulated_cuda.so; WEIGHTLIFT_SIMULATED_DRIVER may name one"
    ),
]


class SimulatedTensor:
    """The allocator's object in place of a CUDA tensor."""

    def __init__(
        self, driver: Any, device: int, stream: int, shape: Sequence[int], dtype: str
    ) -> None:
        self.driver, self.device, self.stream = driver, device, stream
        self.shape, self.dtype = tuple(shape), dtype
        count = 1
        for extent in shape:
            count *= extent
        self.size = count // 2 if dtype == "F4" else count * support.DTYPES[dtype].itemsize
        self.address = 0
        self.address = driver.alloc(device, max(self.size, 1))
        driver.tensors.add(self)

    def numel(self) -> int:
        return math.prod(self.shape)

    def data_ptr(self) -> int:
        return int(self.address)

    def bits(self) -> bytes:
        """The host reads it without waiting, because a load that has returned has arrived."""
        return bytes(self.driver.read(self.address, self.size)) if self.size else b""

    def free(self) -> None:
        """Frees in the stream's order, as torch's caching allocator does."""
        if self.address:
            self.driver.free(self.address, device=self.device, stream=self.stream)
        self.address = 0

    def __del__(self) -> None:
        self.free()


class SimulatedAllocator:
    """``allocation.Allocator``: each block comes with its previous owner's kernel still queued."""

    kind = SimulatedTensor

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.streams: dict[int, int] = {}
        self.reserved: dict[int, int] = {}

    def empty(self, device: int, shape: Sequence[int], dtype: str) -> tuple[int, SimulatedTensor]:
        try:
            tensor = self.kind(self.driver, device, self.stream(device), shape, dtype)
        except MemoryError as error:
            raise weightlift.OutOfMemoryError(str(error)) from error
        if tensor.size:
            self.driver.pending_write(device, tensor.address, tensor.size, stream=tensor.stream)
        return tensor.address, tensor

    def stream(self, device: int) -> int:
        if device not in self.streams:
            self.streams[device] = self.driver.create_stream(device)
        return self.streams[device]

    def reserve(self, device: int, sizes: Sequence[int]) -> None:
        self.reserved[device] = self.reserved.get(device, 0) + sum(sizes)


Switch = Callable[..., contextlib.AbstractContextManager[Any]]


@pytest.fixture
def machine() -> Switch:
    """``with machine(devices, seed, policy) as driver:``, and at its end nothing is left."""

    @contextlib.contextmanager
    def switch(
        devices: int = 1, seed: int = 0, policy: Any = Policy.RANDOM, *, lost: bool = False
    ) -> Iterator[Any]:
        assert LIBRARY is not None
        driver = simulated_driver.SimulatedDriver(LIBRARY)
        driver.tensors = weakref.WeakSet()
        driver.reset(devices, seed, policy)
        _native.use_driver_for_testing(LIBRARY)
        try:
            yield driver
        finally:
            gc.collect()
            for tensor in list(driver.tensors):  # addresses mean nothing to the next machine
                tensor.free()
            _native.use_driver_for_testing("")
        if not lost:
            driver.check()

    return switch


# Of four slots.
RING = weightlift.Settings(chunk_bytes="1MiB", pinned_bytes="4MiB")


def wait_for_calls(driver: Any, name: str, count: int) -> int:
    """The calls so far, as soon as there are so many, or after 5 s."""
    end = time.monotonic() + 5
    while driver.calls(name) < count and time.monotonic() < end:
        time.sleep(0.001)
    return int(driver.calls(name))


class FirstOpened:
    """What had been pinned when the first file of a checkpoint was opened and parsed.

    Attributes:
        driver: of the machine.
        wanted: how many slots are waited for, up to 5 s.
        seen: how many slots were pinned.
        calls: all calls of the driver so far.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.driver: Any = None
        self.wanted = 4
        self.seen: int | None = None
        self.calls = 0
        for name, room, owner in (
            ("_open", "checkpoint", None),  # of files that are safetensors by their names
            ("add", "open_checkpoint", "_OpenedFiles"),
        ):
            module = sys.modules[f"weightlift.checkpoint.{room}"]
            holder = getattr(module, owner) if owner else module
            monkeypatch.setattr(holder, name, self._wrapped(getattr(holder, name)))

    def _wrapped(self, opens: Callable[..., Any]) -> Callable[..., Any]:
        def opened(*arguments: Any) -> Any:
            if self.seen is None:
                self.calls = self.driver.ledger().calls
                self.seen = wait_for_calls(self.driver, "cuMemHostRegister", self.wanted)
            return opens(*arguments)

        return opened


@pytest.fixture
def first_opened(monkeypatch: pytest.MonkeyPatch) -> FirstOpened:
    return FirstOpened(monkeypatch)


@pytest.fixture
def six_mib(tmp_path: Path) -> Path:
    tensors = {f"{i}": torch.full((1 << 19,), i, dtype=torch.bfloat16) for i in range(6)}
    safetensors.torch.save_file(tensors, tmp_path / "six.safetensors")
    return tmp_path / "six.safetensors"
