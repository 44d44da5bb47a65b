"""Shared by the tests: files made by hand, comparisons of bits, and the process's resources."""

from __future__ import annotations

import gc
import inspect
import json
import os
import struct
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch

ROOT = next(
    folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file()
)
# Adapters for the libraries that the project's benchmark compares with.
PEERS = ROOT / "benchmarks" / "peers.py"
# The format's name of each dtype that torch has, as the format's documentation lists them.
DTYPES = {
    "BOOL": torch.bool,
    "F4": torch.float4_e2m1fn_x2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
# Since 0.8 safetensors has two ways to read, and the FNUZ dtypes.
REFERENCE_HAS_BACKENDS = "backend" in inspect.signature(safetensors.safe_open).parameters
REFERENCE_DTYPES = {
    name: dtype
    for name, dtype in DTYPES.items()
    if REFERENCE_HAS_BACKENDS or not name.endswith("FNUZ")
}
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

Entry = tuple[str, list[int], bytes]


def random_bytes(count: int, seed: int, dtype: str = "U8") -> bytes:
    data = torch.randint(
        0, 2 if dtype == "BOOL" else 256, (count,), generator=torch.Generator().manual_seed(seed)
    )
    return data.to(torch.uint8).numpy().tobytes()


def entry(dtype: str, shape: list[int], seed: int = 0) -> Entry:
    """A tensor of random bits."""
    bits = _BITS[dtype] if dtype in _BITS else 8 * DTYPES[dtype].itemsize
    count = 1
    for extent in shape:
        count *= extent
    assert count * bits % 8 == 0
    return dtype, shape, random_bytes(count * bits // 8, seed, dtype)


def file_bytes(
    entries: dict[str, Entry], metadata: dict[str, str] | None = None, pad: int = 0
) -> bytes:
    """A file of these tensors in this order; ``pad`` spaces after the header shift the data."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, tensor) in entries.items():
        offsets = [len(data), len(data) + len(tensor)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += tensor
    text = json.dumps(header).encode() + b" " * pad
    return struct.pack("<Q", len(text)) + text + data


def sparse_file(path: Path, header: dict[str, Any], size: int) -> int:
    """A file of ``size`` data bytes, all zero and none on the disk; returns where they begin."""
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    return 8 + len(text)


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's elements in order."""
    if tensor.numel() == 0:
        return b""  # whatever its strides: a view of another size may not be had
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bytes(ours: bytes, theirs: bytes, what: str) -> None:
    """Names the first byte that differs. Where CI is set, pytest writes a whole diff of two objects
    that an assertion compares, which takes half a minute for the bytes of a tensor."""
    if ours == theirs:
        return
    assert len(ours) == len(theirs), f"{what}: the number of bytes"
    first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    raise AssertionError(f"{what}: byte {first} is {ours[first]:#x}, not {theirs[first]:#x}")


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Same dtype, shape and bits."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert_same_bytes(bits(ours), bits(theirs), "a tensor")


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same, for all of a file's, in the same order."""
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert_same(tensor, theirs[name])


def anonymous_bytes() -> int:
    """The anonymous memory of this process, including modified private pages."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no RssAnon")


def open_files() -> int:
    gc.collect()  # what earlier tests left would close its files at any time
    return len(list(Path("/proc/self/fd").iterdir()))


def tasks(wanted: int | None = None) -> int:
    """The threads of this process; where that is not ``wanted``, it is asked again for a while.

    The kernel lets whoever joins a thread go on (set_tid_address(2)) before it takes the thread
    off this list.
    """
    deadline = time.monotonic() + 5
    while True:
        found = len(list(Path("/proc/self/task").iterdir()))
        if wanted is None or found <= wanted or time.monotonic() > deadline:
            return found
        time.sleep(0.001)


def run_python(
    code: str, *arguments: object, timeout: float = 240, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a new interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,
    )


def forked(work: Callable[[], object]) -> int:
    """The process id of a fork of this process that does ``work``, whose limits and mounts go with
    it. It computes nothing: the threads that torch computes with are not in the child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks while threads live
        child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def exit_code(child: int) -> int:
    """0 where its work is done, 1 where it raised an error."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(work: Callable[[], object]) -> int:
    """The exit code of a fork that runs ``work``."""
    return exit_code(forked(work))


def under_strace(work: Callable[[], object], log: Path, *options: str) -> int:
    """The same, with strace(1) attached to the fork while it works; ``-f`` for its threads too."""
    read_end, write_end = os.pipe()

    def wait_and_work() -> None:
        os.read(read_end, 1)
        work()

    child = forked(wait_and_work)
    command = ["strace", "-o", log, *options, "-p", str(child)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        assert "attached" in strace.stderr.readline()
        os.write(write_end, b".")
        os.close(read_end)
        os.close(write_end)
    return exit_code(child)
