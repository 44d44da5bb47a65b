"""Loads of files that are larger than the allowed memory."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

import simulated
import support

MIB = 1 << 20
FILE_BYTES = 512 * MIB
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


def _new_group() -> tuple[Path, str] | None:
    """A new memory cgroup and the name of its limit, if one can be made."""
    for root, limit in ((V2, "memory.max"), (V1, "memory.limit_in_bytes")):
        group = root / f"weightlift-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / limit).exists() and os.access(group / limit, os.W_OK):
            return group, limit
        group.rmdir()
    return None


@pytest.fixture
def limited() -> Iterator[Callable[[int], Path]]:
    """Makes a cgroup with a memory limit, and no swap beyond it; returns its folder."""
    made = _new_group()
    if made is None:
        pytest.skip("no memory cgroup may be made here (neither v1 nor v2 is writable)")
    group, name = made

    def limit(size: int) -> Path:
        (group / name).write_text(str(size))
        for swap in ("memory.swap.max", "memory.swappiness"):
            with contextlib.suppress(OSError):
                (group / swap).write_text("0")
        return group

    yield limit
    group.rmdir()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of FILE_BYTES, written to the disk, not only to the page cache."""
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    block = torch.arange(4 * MIB, dtype=torch.int32).view(torch.float32)
    safetensors.torch.save_file({f"w.{i:02}": block + i for i in range(32)}, path)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return path


# Drops the file from the page cache and joins the group: what torch takes is outside of it.
PRELUDE = """
import os, sys
from pathlib import Path
group, path = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, sys.argv[3])
import torch
import weightlift as wl
import fault_sweep, support
fault_sweep.drop(path)
(group / "cgroup.procs").write_text(str(os.getpid()))
def check(name, tensor):
    # As torch would fill it; a part at a time, for there is no room for another.
    number = int(name[2:])
    first = torch.arange(4096, dtype=torch.int32).view(torch.float32) + number
    last = torch.arange((4 << 20) - 4096, 4 << 20, dtype=torch.int32).view(torch.float32) + number
    assert torch.equal(tensor[:4096], first.to(tensor.dtype)), name
    assert torch.equal(tensor[-4096:], last.to(tensor.dtype)), name
"""


def run(
    code: str, group: Path, path: Path, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, group, path, Path(support.__file__).parent],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


MAPPED = """
loaded = wl.load_file(path)
assert len(loaded) == 32
for name, tensor in loaded.items():
    tensor.view(torch.uint8)[:: 4096].sum()  # touches every page
    check(name, tensor)
print(wl.last_report())
"""

CUDA = """
with fault_sweep.machine(0):
    driver = fault_sweep.OnDevice.driver
    driver.set_hashing(False)
    from weightlift import Checkpoint
    from weightlift.load.load_tensors import load_tensors
    allocator = fault_sweep.simulated.SimulatedAllocator(driver)
    checkpoint = Checkpoint.from_file(path)
    before = support.anonymous_bytes()
    # The device's memory is this process's: a tensor at a time.
    for name in checkpoint:
        loaded = load_tensors(
            checkpoint, torch.device("cuda", 0), names=[name], allocator=allocator
        )
        (tensor,) = loaded.values()
        check(name, torch.frombuffer(bytearray(tensor.bits()), dtype=torch.float32))
        del loaded, tensor
        driver.drain()
    report = wl.last_report()
    assert 0 < report.pinned_bytes <= 64 << 20
    del allocator
print(report)
"""

CAST = """
try:
    loaded = wl.load_file(path, dtype="bfloat16")
except MemoryError as error:
    assert isinstance(error, wl.OutOfMemoryError)
    assert "can be had" in str(error), error
    assert str(path) in str(error), error
else:
    raise AssertionError("it fitted")
# And what fits is loaded after it.
with wl.safe_open(path, backend="pread") as file:
    check("w.03", file.get_tensor("w.03"))
print("refused")
"""


DEEP = pytest.mark.deep


@pytest.mark.parametrize("share", [0.25, pytest.param(0.5, marks=DEEP)])
def test_a_mapped_load(limited: Callable[[int], Path], path: Path, share: float) -> None:
    done = run(MAPPED, limited(int(share * FILE_BYTES)), path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("share", [0.5, pytest.param(0.25, marks=DEEP)])
def test_a_cast_that_does_not_fit(limited: Callable[[int], Path], path: Path, share: float) -> None:
    done = run(CAST, limited(int(share * FILE_BYTES)), path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "refused\n"


@pytest.mark.parametrize(
    "share",
    [
        pytest.param(0.5, marks=simulated.pytestmark),
        pytest.param(0.25, marks=[*simulated.pytestmark, DEEP]),
    ],
)
def test_a_load_to_a_device(limited: Callable[[int], Path], path: Path, share: float) -> None:
    done = run(CUDA, limited(int(share * FILE_BYTES)), path)
    assert done.returncode == 0, done.stderr
