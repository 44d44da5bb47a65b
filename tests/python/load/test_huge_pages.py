"""The pages of new memory, by the setting and by the report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weightlift as wl
from support import assert_same, run_python

SIZE = 24 << 20  # elements of the tensor: 96 MiB as float32


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("huge") / "model.safetensors"
    save_file({"w": torch.arange(SIZE, dtype=torch.int32).to(torch.bfloat16)}, path)
    return path


def huge_bytes(address: int) -> int:
    """Bytes on huge pages of the mapping at an address: proc(5), smaps."""
    found = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) * 1024
    return found


def has_huge_pages() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text()


@pytest.mark.parametrize("huge_pages", ["always", "never", "auto"])
def test_pages_are_as_they_are_set(
    path: Path, huge_pages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTLIFT_HUGE_PAGES", huge_pages)
    tensor = wl.load_file(path, dtype="float32")["w"]
    assert_same(tensor, torch.arange(SIZE, dtype=torch.int32).to(torch.bfloat16).float())
    report = wl.last_report()
    assert report is not None
    (reason,) = report.memory
    assert f"host memory: {reason}" in str(report)
    huge = huge_bytes(tensor.data_ptr() + tensor.nbytes // 2)
    if huge_pages == "never":
        assert (reason, huge) == ("small pages, as set", 0)
    elif not has_huge_pages():
        assert (reason, huge) == ("small pages: transparent huge pages are off", 0)
    elif huge_pages == "always":
        assert reason == "huge pages, as set"
        assert huge > 0
    else:
        assert re.fullmatch(
            r"huge pages|(small pages|huge pages, small ones after \d+ MiB): huge pages came at "
            r"\d+\.\d GB/s, small ones at \d+\.\d GB/s: .*",
            reason,
        )


@pytest.mark.parametrize("huge_pages", ["always", "auto"])
def test_pages_where_the_process_may_have_no_huge_ones(
    path: Path, huge_pages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PR_SET_THP_DISABLE of prctl(2), which children inherit."""
    code = """
import ctypes, sys
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0
import weightlift as wl
wl.load_file(sys.argv[1], dtype="float32")
print(*wl.last_report().memory)
"""
    monkeypatch.setenv("WEIGHTLIFT_HUGE_PAGES", huge_pages)
    done = run_python(code, path)
    assert (done.stdout, done.stderr) == ("small pages: transparent huge pages are off\n", "")


def test_what_is_mapped_or_small_takes_no_choice(path: Path, tmp_path: Path) -> None:
    wl.load_file(path)
    report = wl.last_report()
    assert report is not None
    assert report.memory == []
    save_file({"w": torch.ones(1000)}, tmp_path / "small.safetensors")
    wl.load_file(tmp_path / "small.safetensors", mode="read")
    report = wl.last_report()
    assert report is not None
    assert report.memory == []


def test_a_choice_that_is_none() -> None:
    with pytest.raises(wl.ArgumentError, match="huge_pages is 'sometimes'; it can be one of"):
        wl.Settings(huge_pages="sometimes")
