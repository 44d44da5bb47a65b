"""The simulated CUDA driver's controls for Python tests: simulated_driver.h through ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
from collections.abc import Iterator
from ctypes import c_char_p, c_double, c_int, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

MAX_DEVICES = 16


class Policy(enum.IntEnum):
    """When queued operations run; see simulated_driver.h."""

    EAGER = 0
    LAZY = 1
    RANDOM = 2
    SPLIT = 3
    STALL = 4
    PCT = 5


class Time(enum.IntEnum):
    NONE = 0
    REAL = 1
    VIRTUAL = 2


class Capture(enum.IntEnum):
    """CUDA's modes of stream capture."""

    GLOBAL = 0
    THREAD_LOCAL = 1
    RELAXED = 2


class Hide(enum.IntEnum):
    NOT_FOUND = 0
    NULL = 1


class CudaError(enum.IntEnum):
    """The results that tests use most; any other number works too."""

    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    NOT_INITIALIZED = 3
    DEINITIALIZED = 4
    NO_DEVICE = 100
    INVALID_IMAGE = 200
    INVALID_CONTEXT = 201
    NO_BINARY_FOR_GPU = 209
    INVALID_SOURCE = 300
    INVALID_HANDLE = 400
    ILLEGAL_ADDRESS = 700
    HOST_MEMORY_ALREADY_REGISTERED = 712
    LAUNCH_FAILED = 719
    NOT_PERMITTED = 800
    NOT_SUPPORTED = 801
    UNKNOWN = 999


class _Ledger(ctypes.Structure):
    _fields_ = [
        *[
            (name, c_uint64)
            for name in (
                "streams",
                "events",
                "allocations",
                "allocated_bytes",
                "external_allocations",
                "external_bytes",
                "pinned_ranges",
                "pinned_bytes",
                "contexts",
                "pushed",
                "modules",
                "pending",
                "operations",
                "calls",
                "peak_pinned_bytes",
            )
        ],
        ("peak_device_bytes", c_uint64 * MAX_DEVICES),
        ("peak_client_bytes", c_uint64 * MAX_DEVICES),
    ]


class _Link(ctypes.Structure):
    _fields_ = [
        ("bytes_to_device", c_uint64),
        ("bytes_to_host", c_uint64),
        ("bytes_of_pages", c_uint64),
        ("first_start", c_double),
        ("last_finish", c_double),
    ]


@dataclass(frozen=True)
class Ledger:
    """The objects that are alive, and their maxima."""

    streams: int
    events: int
    allocations: int
    allocated_bytes: int
    external_allocations: int
    external_bytes: int
    pinned_ranges: int
    pinned_bytes: int
    contexts: int
    pushed: int
    modules: int
    pending: int
    operations: int
    calls: int
    peak_pinned_bytes: int
    peak_device_bytes: tuple[int, ...]
    peak_client_bytes: tuple[int, ...]

    def leaks(self) -> dict[str, int]:
        """The client's live objects; external ones belong to the test."""
        names = ("streams", "events", "allocations", "pinned_ranges", "contexts", "pushed")
        return {name: count for name in (*names, "modules") if (count := getattr(self, name))}


@dataclass(frozen=True)
class Link:
    bytes_to_device: int
    bytes_to_host: int
    bytes_of_pages: int
    first_start: float
    last_finish: float

    @property
    def rate(self) -> float:
        """Bytes per second from the first start to the last finish."""
        seconds = self.last_finish - self.first_start
        return (self.bytes_to_device + self.bytes_to_host) / seconds if seconds > 0 else 0.0


_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "sim_reset": (None, [c_int, c_uint64, c_int]),
    "sim_set_policy": (None, [c_uint64, c_int]),
    "sim_alloc": (c_uint64, [c_int, c_uint64]),
    "sim_free": (c_int, [c_uint64]),
    "sim_free_on": (c_int, [c_int, c_uint64, c_uint64]),
    "sim_hold_context": (None, [c_int]),
    "sim_stream_create": (c_uint64, [c_int]),
    "sim_stream_destroy": (c_int, [c_uint64]),
    "sim_synchronize": (None, [c_int]),
    "sim_pending_write": (c_int, [c_int, c_uint64, c_uint64, c_uint64]),
    "sim_begin_capture": (c_int, [c_int, c_uint64, c_int]),
    "sim_end_capture": (c_int, [c_int, c_uint64]),
    "sim_allow": (None, [c_int, c_int]),
    "sim_read_device": (c_int, [c_uint64, c_void_p, c_uint64]),
    "sim_write_device": (c_int, [c_uint64, c_void_p, c_uint64]),
    "sim_read_on": (c_int, [c_int, c_uint64, c_uint64, c_void_p, c_uint64]),
    "sim_set_memory": (None, [c_int, c_uint64]),
    "sim_set_attribute": (None, [c_int, c_int, c_int]),
    "sim_set_version": (None, [c_int]),
    "sim_hide_symbol": (None, [c_char_p, c_int]),
    "sim_fail_call": (None, [c_char_p, c_uint64, c_int, c_int]),
    "sim_faults_left": (c_uint64, []),
    "sim_exit": (None, []),
    "sim_set_time": (None, [c_int]),
    "sim_now": (c_double, []),
    "sim_set_link": (None, [c_int, c_double]),
    "sim_set_host_memory": (None, [c_double]),
    "sim_hold": (c_int, [c_double]),
    "sim_link": (None, [c_int, c_void_p]),
    "sim_set_hashing": (None, [c_int]),
    "sim_ledger": (None, [c_void_p]),
    "sim_calls": (c_uint64, [c_char_p]),
    "sim_drain": (None, []),
    "sim_violations": (c_uint64, []),
    "sim_violation_text": (c_char_p, [c_uint64]),
    "sim_image": (c_void_p, []),
}


class SimulatedDriver:
    """A process has one simulator: all instances with the same path control it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._library = ctypes.CDLL(self.path, mode=os.RTLD_NOW | os.RTLD_LOCAL)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.restype = result
            function.argtypes = arguments

    # A run.

    def reset(self, devices: int = 1, seed: int = 0, policy: Policy = Policy.RANDOM) -> None:
        self._library.sim_reset(devices, seed, policy)

    def set_policy(self, seed: int, policy: Policy) -> None:
        self._library.sim_set_policy(seed, policy)

    def drain(self) -> None:
        self._library.sim_drain()

    def exit(self) -> None:
        self._library.sim_exit()

    # In torch's place. Stream 0 is the device's default stream.

    def hold_context(self, device: int) -> None:
        self._library.sim_hold_context(device)

    def alloc(self, device: int, size: int) -> int:
        address: int = self._library.sim_alloc(device, size)
        if address == 0:
            raise MemoryError(f"simulated device {device} has no {size} bytes left")
        return address

    def free(self, address: int, *, device: int = 0, stream: int | None = None) -> None:
        """Frees now, or with a stream in its order, as torch's caching allocator does."""
        if stream is None:
            freed = self._library.sim_free(address)
        else:
            freed = self._library.sim_free_on(device, stream, address)
        if not freed:
            raise ValueError(f"{address:#x} is not an allocation of this run")

    def create_stream(self, device: int) -> int:
        handle: int = self._library.sim_stream_create(device)
        if handle == 0:
            raise ValueError(f"no simulated device {device}")
        return handle

    def destroy_stream(self, stream: int) -> None:
        if not self._library.sim_stream_destroy(stream):
            raise ValueError(f"{stream:#x} is not a stream of create_stream")

    def synchronize(self, device: int) -> None:
        self._library.sim_synchronize(device)

    def pending_write(self, device: int, address: int, size: int, *, stream: int = 0) -> None:
        if not self._library.sim_pending_write(device, stream, address, size):
            raise ValueError(f"{size} bytes at {address:#x} are not inside an allocation")

    @contextlib.contextmanager
    def capturing(self, device: int, stream: int, mode: Capture) -> Iterator[None]:
        """Captures as ``torch.cuda.graph`` does. Raises AssertionError if a call broke the
        capture."""
        if not self._library.sim_begin_capture(device, stream, mode):
            raise ValueError(f"cannot capture {stream:#x}")
        try:
            yield
        finally:
            whole = self._library.sim_end_capture(device, stream)
        if not whole:
            raise AssertionError("the capture was broken")

    # Bytes.

    def read(self, address: int, size: int, *, device: int = 0, stream: int | None = None) -> bytes:
        """Reads on the host now, or with a stream in its order and with a wait, as `tensor.cpu()`
        does."""
        buffer = ctypes.create_string_buffer(size)
        if stream is None:
            done = self._library.sim_read_device(address, buffer, size)
        else:
            done = self._library.sim_read_on(device, stream, address, buffer, size)
        if not done:
            raise ValueError(f"cannot read {size} bytes at {address:#x}")
        return buffer.raw

    def write(self, address: int, data: bytes) -> None:
        if not self._library.sim_write_device(address, data, len(data)):
            raise ValueError(f"cannot write {len(data)} bytes at {address:#x}")

    # The machine.

    def set_memory(self, device: int, size: int) -> None:
        self._library.sim_set_memory(device, size)

    def set_attribute(self, device: int, attribute: int, value: int) -> None:
        self._library.sim_set_attribute(device, attribute, value)

    def set_version(self, version: int) -> None:
        self._library.sim_set_version(version)

    def hide_symbol(self, name: str, how: Hide = Hide.NOT_FOUND) -> None:
        self._library.sim_hide_symbol(name.encode(), how)

    def fail_call(
        self, name: str | None, n: int = 1, code: int = CudaError.UNKNOWN, *, sticky: bool = False
    ) -> None:
        encoded = None if name is None else name.encode()
        self._library.sim_fail_call(encoded, n, code, sticky)

    @property
    def faults_left(self) -> int:
        left: int = self._library.sim_faults_left()
        return left

    # Time.

    def set_time(self, mode: Time) -> None:
        self._library.sim_set_time(mode)

    def now(self) -> float:
        seconds: float = self._library.sim_now()
        return seconds

    def set_link(self, device: int, bytes_per_second: float) -> None:
        self._library.sim_set_link(device, bytes_per_second)

    def set_host_memory(self, bytes_per_second: float) -> None:
        self._library.sim_set_host_memory(bytes_per_second)

    @contextlib.contextmanager
    def holding(self, seconds: float = 20) -> Iterator[None]:
        """Nobody learns that a copy has ended, so that all are in flight when others are queued;
        raises AssertionError where that took longer than some seconds: a thread waits for one."""
        self._library.sim_hold(seconds)
        held = False
        try:
            yield
        finally:
            held = bool(self._library.sim_hold(0))
        if not held:
            raise AssertionError(f"a thread waited {seconds} s for the device")

    def set_hashing(self, on: bool) -> None:
        self._library.sim_set_hashing(on)

    def link(self, device: int) -> Link:
        link = _Link()
        self._library.sim_link(device, ctypes.byref(link))
        return Link(*(getattr(link, field[0]) for field in _Link._fields_))

    # What was found.

    def ledger(self) -> Ledger:
        ledger = _Ledger()
        self._library.sim_ledger(ctypes.byref(ledger))
        values: dict[str, Any] = {}
        for name, *_ in _Ledger._fields_:
            value = getattr(ledger, name)
            values[name] = value if isinstance(value, int) else tuple(value)
        return Ledger(**values)

    def calls(self, name: str) -> int:
        count: int = self._library.sim_calls(name.encode())
        return count

    def violations(self) -> list[str]:
        """The first 1,000 reports; `violation_count` counts them all."""
        kept = min(self.violation_count, 1000)
        return [self._library.sim_violation_text(i).decode() for i in range(kept)]

    @property
    def violation_count(self) -> int:
        count: int = self._library.sim_violations()
        return count

    def check(self) -> None:
        """Raises AssertionError with every report, and with what the client left behind."""
        problems = self.violations()
        if leaks := self.ledger().leaks():
            problems.append(f"leak: {leaks}")
        if problems:
            raise AssertionError("\n".join(problems))

    @contextlib.contextmanager
    def run(
        self, devices: int = 1, seed: int = 0, policy: Policy = Policy.RANDOM
    ) -> Iterator[SimulatedDriver]:
        """A run that must cause no violation; `check` also finds leaks."""
        self.reset(devices, seed, policy)
        yield self
        self.drain()
        if problems := self.violations():
            header = f"seed {seed}, policy {policy.name.lower()}:"
            raise AssertionError("\n".join([header, *problems]))
