"""``torch.cuda`` on the simulated driver: streams and events are the driver's own, so that torch's
and the engine's work is judged together."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Sequence
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

import pytest
import torch

from simulated import SimulatedTensor
from simulated_torch import Allocator

_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING


class Cuda:
    """The functions of the driver, and which stream each thread of this process is on.

    Attributes:
        allocator: gives memory on the device to loads, in the order of the current stream.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self._find = driver._library.cuGetProcAddress_v2
        self._functions: dict[str, Any] = {}
        self._here = threading.local()
        self.context = c_void_p()
        driver.hold_context(0)
        self.call("cuDevicePrimaryCtxRetain", byref(self.context), 0)
        self.call("cuDevicePrimaryCtxRelease", 0)
        self._main = Stream(self)
        self.allocator = _OfTheCurrentStream(self)

    def call(self, name: str, *arguments: Any) -> None:
        function = self._functions.get(name)
        if function is None:
            found, status = c_void_p(), c_int()
            code = self._find(name.encode(), byref(found), 12000, c_uint64(0), byref(status))
            assert (code, status.value) == (0, 0), name
            function = self._functions[name] = ctypes.CFUNCTYPE(c_int)(found.value)
        if name != "cuCtxSetCurrent" and self.context.value:
            self.call("cuCtxSetCurrent", self.context)
        assert (code := function(*arguments)) == 0, f"{name} returns {code}"

    @property
    def current(self) -> Stream:
        found: Stream = getattr(self._here, "stream", self._main)
        return found

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before = self.current
        self._here.stream = stream
        try:
            yield
        finally:
            self._here.stream = before

    def use(self, source: int, target: int, size: int) -> None:
        """A kernel on the current stream that reads one range and writes another."""
        self.call(
            "cuMemcpyDtoDAsync", c_uint64(target), c_uint64(source), c_size_t(size),
            c_void_p(self.current.cuda_stream),
        )  # fmt: skip


class Stream:
    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.cuda_stream = cuda.driver.create_stream(0)

    def wait_event(self, event: Event) -> None:
        stream = c_void_p(self.cuda_stream)
        self._cuda.call("cuStreamWaitEvent", stream, event.handle, c_uint(0))

    def synchronize(self) -> None:
        self._cuda.call("cuStreamSynchronize", c_void_p(self.cuda_stream))


class Event:
    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.handle = c_void_p()
        cuda.call("cuEventCreate", byref(self.handle), c_uint(_DISABLE_TIMING))

    def record(self, stream: Stream) -> None:
        self._cuda.call("cuEventRecord", self.handle, c_void_p(stream.cuda_stream))

    def __del__(self) -> None:
        if self.handle.value:
            self._cuda.call("cuEventDestroy", self.handle)


class _OfTheCurrentStream(Allocator):
    def __init__(self, cuda: Cuda) -> None:
        super().__init__(cuda.driver)
        self._cuda = cuda

    def stream(self, device: int) -> int:
        return int(self._cuda.current.cuda_stream)

    def buffer(self, count: int) -> torch.Tensor:
        """Like ``torch.empty(count, device="cuda")``."""
        return self.empty(0, (count,), "U8")[1]  # type: ignore[no-any-return]

    def block(self, tensor: torch.Tensor) -> SimulatedTensor:
        return self.blocks[tensor.data_ptr()]


def install(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces ``torch.cuda`` by this."""

    def synchronize(device: object = None) -> None:
        cuda.driver.synchronize(0)

    replaced: dict[str, Any] = {
        "Stream": lambda device=None: Stream(cuda),
        "Event": lambda: Event(cuda),
        "current_stream": lambda device=None: cuda.current,
        "stream": cuda.on,
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": synchronize,
        "is_available": lambda: True,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)


def addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
