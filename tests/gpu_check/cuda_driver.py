"""The CUDA driver calls that the first look needs, through ctypes. The same code measures a GPU and
the simulated driver."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p

_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_NAME_BYTES = 128


class CudaDriver:
    """One device, its primary context current in this thread.

    Raises:
        RuntimeError: a call that failed, with CUDA's name of the error.
    """

    def __init__(self, library: str = "libcuda.so.1", ordinal: int = 0) -> None:
        self._library = ctypes.CDLL(library)
        self.call("cuInit", c_uint(0))
        device = c_int()
        self.call("cuDeviceGet", byref(device), c_int(ordinal))
        self._device = device.value
        context = c_void_p()
        self.call("cuDevicePrimaryCtxRetain", byref(context), device)
        self.call("cuCtxPushCurrent_v2", context)

    def call(self, name: str, *arguments: object) -> None:
        result = getattr(self._library, name)(*arguments)
        if result != 0:
            text = c_char_p()
            self._library.cuGetErrorName(c_int(result), byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'?').decode()}")

    def close(self) -> None:
        self.call("cuCtxPopCurrent_v2", byref(c_void_p()))
        self.call("cuDevicePrimaryCtxRelease_v2", c_int(self._device))

    def describe(self) -> str:
        name = ctypes.create_string_buffer(_NAME_BYTES)
        self.call("cuDeviceGetName", name, c_int(_NAME_BYTES), c_int(self._device))
        version = c_int()
        self.call("cuDriverGetVersion", byref(version))
        return f"{name.value.decode()}, driver for CUDA {version.value}"

    # Memory and streams.

    def allocate(self, size: int) -> int:
        pointer = c_uint64()
        self.call("cuMemAlloc_v2", byref(pointer), c_size_t(size))
        return pointer.value

    def free(self, pointer: int) -> None:
        self.call("cuMemFree_v2", c_uint64(pointer))

    def create_stream(self) -> c_void_p:
        stream = c_void_p()
        self.call("cuStreamCreate", byref(stream), c_uint(_NON_BLOCKING))
        return stream

    def destroy_stream(self, stream: c_void_p) -> None:
        self.call("cuStreamDestroy_v2", stream)

    def copy(self, target: int, source: int, size: int, stream: c_void_p) -> None:
        self.call(
            "cuMemcpyHtoDAsync_v2", c_uint64(target), c_void_p(source), c_size_t(size), stream
        )

    def wait(self, streams: Sequence[c_void_p]) -> None:
        for stream in streams:
            self.call("cuStreamSynchronize", stream)


class Pinned:
    """Own pages, touched and registered with the driver; ``seconds`` is the time of the
    registration."""

    def __init__(self, driver: CudaDriver, size: int) -> None:
        self._driver = driver
        self.memory = mmap.mmap(-1, size)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self._view = (ctypes.c_char * size).from_buffer(self.memory)
        self.address = ctypes.addressof(self._view)
        ctypes.memset(self.address, 1, size)
        start = time.perf_counter()
        driver.call(
            "cuMemHostRegister_v2", c_void_p(self.address), c_size_t(size), c_uint(_PORTABLE)
        )
        self.seconds = time.perf_counter() - start

    def close(self) -> None:
        self._driver.call("cuMemHostUnregister", c_void_p(self.address))
        del self._view
        self.memory.close()
