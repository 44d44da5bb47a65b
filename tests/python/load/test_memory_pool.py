"""Memory of deleted tensors, kept for the next load (``Settings.pool_bytes``)."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightlift as wl
from support import assert_same

MIB = 1 << 20
SHAPES = {"a": (3000, 1001), "b": (7,), "c": (2048, 2048), "d": (1500, 1000)}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pool") / "model.safetensors"
    torch.manual_seed(0)
    save_file({name: torch.randn(shape).bfloat16() for name, shape in SHAPES.items()}, path)
    return path


@pytest.fixture(autouse=True)
def empty_pool(path: Path) -> None:
    """A load that keeps nothing takes and frees the memory that other tests left."""
    while wl.stats().pool_bytes:
        held = wl.load_file(path, dtype="float32")
        del held


def test_the_next_load_uses_the_memory_of_dead_tensors(path: Path) -> None:
    reused = wl.stats().reused_bytes
    expected = {name: t.float() for name, t in load_file(path).items()}
    with wl.Settings(pool_bytes="1GiB"):
        first = wl.load_file(path, dtype="float32")
        address = first["a"].data_ptr()
        for tensor in first.values():
            tensor.fill_(123)
        assert wl.stats().pool_bytes == 0
        del first, tensor
        kept = wl.stats().pool_bytes
        assert sum(t.nbytes for t in expected.values()) <= kept <= 64 * MIB
        second = wl.load_file(path, dtype="float32")
        report = wl.last_report()
    assert second["a"].data_ptr() == address
    for name, tensor in expected.items():
        assert_same(second[name], tensor)
    assert wl.stats().pool_bytes == 0
    assert wl.stats().reused_bytes - reused == kept
    assert report is not None
    assert report.memory == ["used again, from tensors that are dead"]
    assert "host memory: used again" in str(report)


def test_nothing_is_kept_unless_asked_for(path: Path) -> None:
    held = wl.load_file(path, dtype="float32")
    del held
    with wl.Settings(pool_bytes=4 * MIB):  # below the block
        held = wl.load_file(path, dtype="float32")
        del held
    with wl.Settings(pool_bytes="1GiB", huge_pages="never"):
        held = wl.load_file(path, dtype="float32")
        del held
    with wl.Settings(pool_bytes="1GiB"):
        held = wl.load_file(path)  # mapped: there is no memory to keep
        del held
    assert wl.stats().pool_bytes == 0


def test_the_environment_says_it_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTLIFT_POOL_BYTES", "256MiB")
    held = wl.load_file(path, dtype="float32")
    del held
    assert wl.stats().pool_bytes > 0
    with wl.Settings(pool_bytes=0):
        held = wl.load_file(path, dtype="float32")
        del held
    assert wl.stats().pool_bytes == 0


def test_one_tensor_that_lives_keeps_its_bytes(path: Path) -> None:
    expected = load_file(path)["c"].float()
    with wl.Settings(pool_bytes="1GiB"):
        kept = wl.load_file(path, dtype="float32")["c"]  # the others die, their pages go lazily
        gc.collect()
        assert wl.stats().pool_bytes == 0
        others = [wl.load_file(path, dtype="float32") for _ in range(3)]
    assert len({kept.data_ptr(), *(t["c"].data_ptr() for t in others)}) == 4
    assert_same(kept, expected)


_CHILD = """
import sys, torch, weightlift as wl
path, = sys.argv[1:]
def lazily_free():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return 1024 * next(int(l.split()[1]) for l in lines if l.startswith("LazyFree"))
with wl.Settings(pool_bytes="1GiB"):
    held = wl.load_file(path, dtype="float32")
    assert lazily_free() == 0, lazily_free()
    del held
    print(wl.stats().pool_bytes, lazily_free())
    held = wl.load_file(path, dtype="float32")
    print(lazily_free())
"""


def test_the_kernel_may_take_what_is_kept(path: Path) -> None:
    """proc(5), smaps: LazyFree is what madvise(MADV_FREE) marked and nobody has written since."""
    out = subprocess.run(
        [sys.executable, "-c", _CHILD, str(path)], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    kept, free, after = map(int, out.stdout.split())
    assert free >= kept // (2 * MIB) * 2 * MIB - 2 * MIB
    assert after < 4 * MIB  # what the block has beyond the tensors


def test_memory_that_is_too_short_takes_the_pool_first(path: Path) -> None:
    """The pool has a block that the next load cannot use, and the limit is too small for both."""
    code = """
import resource, sys, weightlift as wl
path, = sys.argv[1:]
with wl.Settings(pool_bytes="1GiB"):
    held = wl.load_file(path, dtype="float32")
    del held
    assert wl.stats().pool_bytes > 0
# Address space: what is mapped now, and little more.
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (56 << 20),) * 2)
held = wl.load_file(path, dtype="float64")
print(held["c"].dtype, wl.stats().pool_bytes)
"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "WEIGHTLIFT_THREADS": "1"},
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ["torch.float64", "0"]


def test_a_size_that_is_none() -> None:
    with pytest.raises(wl.ArgumentError, match="pool_bytes is -1; it must be an integer from 0 to"):
        wl.Settings(pool_bytes=-1)
