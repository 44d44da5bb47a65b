"""System calls that fail in turn: an error that names the file, or nothing that is noticed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import test_simulated_engine as simulated

HERE = Path(__file__).parent
COMPILER = next(
    (found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/native/fault_shim.cc, to be preloaded."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler for the library that makes calls fail")
    library = tmp_path_factory.mktemp("shim") / "fault_shim.so"
    source = HERE.parent / "native" / "fault_shim.cc"
    command = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True)
    return library


@pytest.mark.parametrize("which", ["host", pytest.param("device", marks=[*simulated.pytestmark])])
def test_every_call_of_a_load_fails_in_turn(tmp_path: Path, shim: Path, which: str) -> None:
    """In one process: it survives, holds nothing more than before, and loads right after it."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", HERE / "fault_sweep.py", which, tmp_path],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == [], "\n".join(found["wrong"])
    assert found["faults"] > 300
    assert 0 < found["errors"] < found["faults"]
    assert found["grown"] < 16 << 20
