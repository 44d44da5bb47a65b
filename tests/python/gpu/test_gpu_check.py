"""What `make gpu-check` relies on, on machines without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import support

HERE = Path(__file__).parent
HELPERS = Path(support.__file__).parent
SKIPPED = """
import pytest
if __name__ == "test_whole":
    pytest.skip("for a reason", allow_module_level=True)
def test_called():
    pytest.skip("for a reason")
@pytest.mark.skipif(True, reason="for a reason")
def test_marked():
    pass
@pytest.mark.xfail
def test_expected():
    raise ValueError
def test_plain():
    pass
"""


def run_pytest(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        command,
        env={**kept, "PYTHONPATH": str(HELPERS), **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize(
    ("name", "skipped", "passed"), [("test_parts", 2, "1 passed, "), ("test_whole", 1, "")]
)
def test_a_skip_fails_where_a_gpu_has_to_be(
    tmp_path: Path, name: str, skipped: int, passed: str, required: bool
) -> None:
    path = tmp_path / f"{name}.py"
    path.write_text(SKIPPED)
    told = {"WEIGHTLIFT_REQUIRE_GPU": "1"} if required else {}
    done = run_pytest("-p", "conftest", "--rootdir", tmp_path, path, **told)
    last = done.stdout.strip().splitlines()[-1]
    xfailed = ", 1 xfailed" if passed else ""
    if not required:
        assert f"{passed}{skipped} skipped{xfailed} in" in last, done.stdout
    elif passed:
        assert "1 failed, 1 passed, 1 xfailed, 1 error in" in last, done.stdout
        assert done.stdout.count("skipped, and WEIGHTLIFT_REQUIRE_GPU is set") >= skipped
    else:
        assert "1 error in" in last, done.stdout
    assert (done.returncode != 0) == (required or not passed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_missing_gpu_fails() -> None:
    done = run_pytest("-x", "-m", "gpu", HERE / "test_gpu_load_file.py", WEIGHTLIFT_REQUIRE_GPU="1")
    assert done.returncode == 1
    assert "no GPU, and WEIGHTLIFT_REQUIRE_GPU is set" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_the_script_says_that_there_is_no_gpu() -> None:
    script = HERE.parents[1] / "gpu_check.sh"
    done = subprocess.run(
        ["bash", script],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    assert "torch sees no GPU here: `make gpu-check` needs one" in done.stderr
