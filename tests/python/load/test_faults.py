"""System calls that fail in turn: an error that names the file, or no effect."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import simulated
import support
import weightlift as wl
from support import bits, under_strace
from weightlift.models.saving import save_weights

HELPERS = Path(support.__file__).parent
COMPILER = next(
    (found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/native/fault_shim.cc, to be preloaded."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler for the library that makes calls fail")
    library = tmp_path_factory.mktemp("shim") / "fault_shim.so"
    source = HELPERS.parents[1] / "native" / "fault_shim.cc"
    command = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True)
    return library


def swept(which: str, folder: Path, shim: Path) -> dict[str, Any]:
    """The summary of fault_sweep.py."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", HELPERS / "fault_sweep.py", which, folder],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("which", ["host", pytest.param("device", marks=[*simulated.pytestmark])])
def test_every_call_of_a_load_fails_in_turn(tmp_path: Path, shim: Path, which: str) -> None:
    """In one process: it survives, holds no more resources than before, and the next load is
    right."""
    found = swept(which, tmp_path, shim)
    assert found["wrong"] == [], "\n".join(found["wrong"])
    assert found["faults"] > 300
    assert 0 < found["errors"] < found["faults"]
    assert found["grown"] < 16 << 20


def test_every_write_of_a_save_comes_up_short(tmp_path: Path, shim: Path) -> None:
    """A file, shards and their index, a .bin: the same bytes, whichever write takes a third."""
    found = swept("writes", tmp_path, shim)
    assert found["files"] == 5
    assert found["writes"] > 8


# --- By strace(1): also what Python, the C library and the reference's writer call ---------------

DONE, RAISED, OTHER, WRONG = 0, 1, 11, 13
LOAD_CALLS = (
    "openat|read|pread64|close|newfstatat|fstat|statx|lseek|mmap|munmap|madvise|fadvise64|readlink|"
    "getdents64|ioctl|sched_getaffinity"
)
SAVE_CALLS = (
    "openat|write|fsync|rename|chmod|fchmod|ftruncate|mmap|close|newfstatat|fstat|lseek|unlink|read|"
    "statx"
)


def noted(log: Path, names: str) -> list[str]:
    """The calls of these names, in their order."""
    return re.findall(rf"^(?:\d+ +)?({names})\(", log.read_text(), re.MULTILINE)


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("error", ["EIO", "EINTR", "ENOMEM", "EAGAIN"])
def test_every_call_of_a_load_fails_for_the_interpreter_too(tmp_path: Path, error: str) -> None:
    """Where files are found, indexes are read and memory is made; strace counts by the thread, so
    there is one."""
    tensors = {f"w.{i}": torch.arange(5000.0) + i for i in range(4)}
    save_weights(tensors, tmp_path / "model", max_shard_size=40_000)
    expected = {name: bits(tensor) for name, tensor in tensors.items()}
    log = tmp_path / "log"

    def load() -> None:
        try:
            loaded = wl.load_checkpoint(tmp_path / "model", mode="read")
        except (wl.WeightliftError, OSError, MemoryError):
            raise
        except Exception:
            os._exit(OTHER)
        if {name: bits(tensor) for name, tensor in loaded.items()} != expected:
            os._exit(WRONG)

    load()
    assert under_strace(load, log, "-f") == DONE
    counts: Counter[str] = Counter()
    raised = 0
    for call in noted(log, LOAD_CALLS):
        counts[call] += 1
        what = f"inject={call}:error={error}:when={counts[call]}"
        if call == "read" and error == "EAGAIN":
            continue  # never of a regular file (read(2)), and no error in Python but None
        code = under_strace(load, log, "-f", "-e", what)
        assert code in (DONE, RAISED), what
        if error == "EINTR" and call in ("read", "pread64"):
            assert code == DONE, what
        raised += code == RAISED
    assert counts.total() > 30
    assert 0 < raised < counts.total()


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("error", ["EIO", "EINTR", "ENOSPC", "ENOMEM", "EAGAIN"])
def test_every_call_of_a_save_fails_in_turn(tmp_path: Path, error: str) -> None:
    """The old file or the new one, and no other file; the new one if no error is raised."""
    path, log = tmp_path / "folder" / "f", tmp_path / "log"
    path.parent.mkdir()
    old, new = {"w": torch.zeros(9000)}, {"w": torch.ones(9000), "v": torch.ones(3)}
    wl.save_file(new, path)
    new_bytes = path.read_bytes()
    wl.save_file(old, path)
    old_bytes = path.read_bytes()

    def save() -> None:
        wl.save_file(new, path)

    assert under_strace(save, log, "-f") == DONE
    faults = 0
    counts: Counter[str] = Counter()
    for call in noted(log, SAVE_CALLS):
        counts[call] += 1
        path.write_bytes(old_bytes)
        what = f"inject={call}:error={error}:when={counts[call]}"
        code = under_strace(save, log, "-f", "-e", what)
        assert code in (DONE, RAISED), what
        found = path.read_bytes()
        assert found == new_bytes or (found == old_bytes and code == RAISED), what
        left = [name.name for name in path.parent.iterdir()]
        assert left == ["f"] or call == "unlink", (what, left)
        for name in left:
            if name != "f":
                (path.parent / name).unlink()
        # Calls that Python repeats (PEP 475); signals do not interrupt the others.
        if error == "EINTR" and call in ("openat", "write", "fsync", "read"):
            assert code == DONE, what
        faults += 1
    assert faults > 10
