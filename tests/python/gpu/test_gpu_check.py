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
        env={**kept, "PYTHONPATH": f"{HERE.parent}:{HELPERS}", **environment},
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


CHECK = HERE.parents[1] / "gpu_check" / "run.py"


def run_check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHECK), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_every_file_of_gpu_tests_has_its_part(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(CHECK.parent)!r}); import pathlib, run\n"
        f"for part in run.gpu_parts(pathlib.Path({str(tmp_path)!r}), None):\n"
        "    print(part.command[-1] if part.name.startswith('tests') else '')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    files = {Path(line).name for line in done.stdout.split()}
    assert files == {path.name for path in HERE.glob("test_*.py")} - {Path(__file__).name}
    assert len(files) > 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_nothing_runs_without_a_gpu(tmp_path: Path) -> None:
    done = run_check("--results", tmp_path)
    assert done.returncode == 1
    assert "torch sees no GPU here: `make gpu-check` needs one" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00-machine.log", "summary.txt"]


def test_what_goes_wrong_costs_its_own_part_alone(tmp_path: Path) -> None:
    parts = ("hangs on purpose", "breaks on purpose", "dies on purpose", "machine")
    done = run_check("--rehearsal", "--results", tmp_path, "--only", *parts)
    assert done.returncode == 0, done.stdout
    told = (tmp_path / "summary.txt").read_text()
    for part, outcome in zip(
        ("machine", "hangs on purpose", "breaks on purpose", "dies on purpose"),
        (" ok ", "stopped, 3 s", "status 2", "status -6"),
        strict=True,
    ):
        line = next(line for line in told.splitlines() if part in line)
        assert outcome in line
    assert "hangs" in (tmp_path / "04-hangs-on-purpose.log").read_text()


def test_a_bound_that_is_past_begins_nothing(tmp_path: Path) -> None:
    done = run_check("--rehearsal", "--results", tmp_path, "--minutes", -1)
    assert done.returncode == 0
    assert (
        done.stdout.count("not begun: no time left")
        == len((tmp_path / "summary.txt").read_text().splitlines()) - 1
    )
