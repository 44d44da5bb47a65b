"""The findings of ``weightlift doctor`` on other machines."""

from __future__ import annotations

import errno
import importlib.metadata
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

import weightlift as wl
from support import in_child
from weightlift.bench import conditions, measure_child
from weightlift.cli import disk_findings, gpu_findings, host_findings
from weightlift.cli.disk_findings import probe_disk
from weightlift.cli.doctor import _folder
from weightlift.cli.findings import Finding
from weightlift.cli.host_findings import _state_of_memory

MB = 10**6
NO_SUCH_ADVICE = 9999


def named(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for found in (probe_disk(tmp_path, MB), gpu_findings.probe_gpu()):
        (finding,) = (one for one in found if one.found == "torch is not installed")
        assert finding.state == "missing"
        assert finding.remedy == "pip install torch"


def test_a_disk_without_space(tmp_path: Path) -> None:
    found = named(probe_disk(tmp_path, 10**18))["read rates"]
    assert found.state == "missing"
    assert "less than 2000000.0 TB free" in found.found
    assert "--disk-mb" in found.remedy


def test_a_folder_that_is_not_the_users() -> None:
    def look() -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            found = named(probe_disk(Path("/usr"), 1000))["read rates"]
        finally:
            os.seteuid(os.getuid())
        assert found.state == "missing"
        assert os.strerror(errno.EACCES) in found.found
        assert "--disk" in found.remedy

    assert in_child(look) == 0


def test_files_that_are_in_memory_always() -> None:
    folder = Path("/dev/shm")
    if disk_findings._file_system(folder)[0] != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    before = set(folder.iterdir())
    found = named(probe_disk(folder, 4 * MB))
    assert "always in memory" in found["cold"].found
    assert "cold, buffered" not in found
    assert found["page cache"].value is not None
    assert not [path for path in set(folder.iterdir()) - before if "doctor" in path.name]


def test_where_neither_direct_io_nor_the_page_cache_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = disk_findings._direct_refusal("/proc/version")  # of no disk
    assert refusal == f"EINVAL, {os.strerror(errno.EINVAL)}"
    monkeypatch.setattr(disk_findings, "_direct_refusal", lambda _: refusal)
    monkeypatch.setattr(conditions, "page_cache", lambda _: None)
    found = named(probe_disk(tmp_path, 4 * MB))
    assert (found["cold, direct"].state, found["residency"].state) == ("missing", "missing")
    assert refusal in found["cold, direct"].found
    assert "does not tell whether it was cold" in found["cold, buffered"].found
    assert "cachestat" in found["residency"].remedy
    assert list(tmp_path.iterdir()) == []


def test_no_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_findings, "_COPY_BYTES", 8 * MB)
    for state, text in (("never", "never;"), (None, "not in this kernel;")):
        monkeypatch.setattr(conditions, "huge_pages", lambda state=state: state)
        found = named(host_findings.probe_memory())["huge pages"]
        assert found.state == "missing"
        assert found.found.startswith(text)
        assert "madvise" in found.remedy


def small_page_faults(work: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_kernels_that_cannot_populate(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 32 << 20
    monkeypatch.setattr(host_findings, "_FAULT_BYTES", count)
    monkeypatch.setattr(host_findings, "_MADV_POPULATE_WRITE", NO_SUCH_ADVICE)
    faults = small_page_faults(lambda: host_findings._fault_rate(mmap.MADV_NOHUGEPAGE))
    assert faults >= count // mmap.PAGESIZE
    monkeypatch.setattr(measure_child, "_MADV_POPULATE_WRITE", NO_SUCH_ADVICE)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", mmap.MADV_NOHUGEPAGE)
    faults = small_page_faults(measure_child.backed_memory(count).__enter__)
    assert faults >= count // mmap.PAGESIZE


def child_memory() -> int:
    """The anonymous memory of this process's children, in bytes."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")
    return sum(measure_child.anonymous_bytes(int(pid)) for pid in found.split())


def test_memory_is_held_until_a_load_begins() -> None:
    count, before = 256 << 20, child_memory()
    with conditions.BackedMemory(count) as memory:
        assert child_memory() == before
        assert memory.hold() == count
        assert before + count <= child_memory() < before + 2 * count
        assert memory.hold() == count  # the same
        assert child_memory() < before + 2 * count
        memory.release()
        assert child_memory() == before
        memory.release()
        assert memory.hold() == count
    assert child_memory() == before


def test_memory_that_cannot_be_backed(monkeypatch: pytest.MonkeyPatch) -> None:
    with conditions.BackedMemory(0) as memory:
        assert memory.hold() == 0
    monkeypatch.setattr(conditions, "RUN_CHILD", ["-c", "raise SystemExit(1)"])
    with conditions.BackedMemory(1 << 20) as memory:
        assert memory.hold() == 0


def test_a_process_that_has_ended_has_no_memory() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert measure_child.anonymous_bytes(process.pid) == 0
    assert measure_child.anonymous_bytes() > 0


def test_which_folder_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    assert _folder(file) == _folder(tmp_path) == tmp_path
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert _folder(None) == tmp_path
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    assert _folder(None) == Path.cwd()


@pytest.mark.parametrize(
    ("built_for", "hidden", "there", "found", "remedy"),
    [
        (None, None, [], "no NVIDIA driver", "nothing"),
        (None, None, ["/proc/driver/nvidia/version"], "without CUDA", "pytorch.org"),
        ("13.0", "", [], "hides all GPUs", "unset CUDA_VISIBLE_DEVICES"),
        ("13.0", "-1", [], "hides all GPUs", "unset CUDA_VISIBLE_DEVICES"),
        ("13.0", "0", [], "no NVIDIA driver", "install the driver"),
        ("13.0", None, ["/proc/driver/nvidia/version"], "/dev/nvidiactl", "--gpus all"),
        (
            "13.0",
            None,
            ["/proc/driver/nvidia/version", "/dev/nvidiactl"],
            "built for CUDA 13.0",
            "nvidia-smi",
        ),
    ],
)
def test_why_torch_sees_no_gpu(
    built_for: str | None,
    hidden: str | None,
    there: list[str],
    found: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        gpu_findings, "Path", lambda path: SimpleNamespace(exists=lambda: path in there)
    )
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    driver = named(gpu_findings.probe_gpu())["driver"]
    assert driver.state == "missing"
    assert found in driver.found
    assert remedy in driver.remedy


_CODE = (90, False, "ptxas 12.9.86", 60_000)
_PTX = (75, True, "PTX 8.0", 130_000)


@pytest.mark.parametrize(
    ("toolkit", "kernels", "state", "found"),
    [
        ("", [], "missing", "has none"),
        ("", [(75, True, "the simulated driver", 10)], "missing", "a test build"),
        ("nvcc 13.0.88", [_CODE, _PTX], "ok", "sm_90 and PTX 8.0"),
        (
            "nvcc 13.0.88",
            [(90, False, "ptxas 13.0.88", 60_000), _PTX],
            "info",
            "drivers of the CUDA 12 series",
        ),
    ],
)
def test_kernels_of_this_build(
    toolkit: str,
    kernels: list[tuple[int, bool, str, int]],
    state: str,
    found: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine = {"kernels": kernels, "kernel_toolkit": toolkit}
    monkeypatch.setattr("weightlift._native.machine", lambda: machine)
    told = named(gpu_findings.probe_gpu())["kernels"]
    assert told.state == state
    assert found in told.found


def test_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose /proc/cpuinfo has no names, as on ARM; a machine without transparent huge
    pages."""
    own = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    assert conditions.cpu_model() in own or not own
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "CPU implementer : 0x41\n")
    assert conditions.cpu_model() == os.uname().machine
    assert conditions.huge_pages() is None


def test_a_source_tree_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    found = conditions.machine()
    assert found["torch"] == importlib.metadata.version("torch")

    def not_there(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_there)
    found = conditions.machine()
    assert found["weightlift"] == wl.__version__
    assert found["torch"] is None


@pytest.mark.parametrize(
    ("huge", "small", "state"), [(0.2e9, 0.8e9, "missing"), (4e9, 1e9, "ok"), (1e9, 3e9, "ok")]
)
def test_the_state_of_memory(huge: float, small: float, state: str) -> None:
    found = _state_of_memory(huge, small, 5e9)
    assert (found.topic, found.name, found.state) == ("memory", "state", state)
    if state == "missing":
        assert "200 MB/s on huge pages and 800 MB/s on small ones, at 5.0 GB/s" in found.found
        assert found.costs
        assert found.remedy
