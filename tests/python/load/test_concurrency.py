from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import weightlift as wl
from support import bits, entry, file_bytes, run_python, sparse_file

MIB = 1 << 20


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict[str, bytes]]]:
    folder = tmp_path_factory.mktemp("files")
    made = []
    for number in range(4):
        entries = {
            f"f{number}.{i}": entry("F32", [100_000 + number], 10 * number + i) for i in range(4)
        }
        path = folder / f"f{number}"
        path.write_bytes(file_bytes(entries, None, number))
        made.append((path, {name: data for name, (_, _, data) in entries.items()}))
    return made


@pytest.mark.parametrize("mode", ["map", "read", "both"])
@pytest.mark.parametrize("same", [True, False])
def test_sixteen_threads(files: list[tuple[Path, dict[str, bytes]]], mode: str, same: bool) -> None:
    def load(turn: int) -> None:
        path, expected = files[0 if same else turn % len(files)]
        chosen = ("map", "read")[turn % 2] if mode == "both" else mode
        loaded = wl.load_file(path, mode=chosen)
        assert {name: bits(tensor) for name, tensor in loaded.items()} == expected
        report = wl.last_report()
        assert [file.path for file in report.files] == [str(path)]
        assert (report.mapped_bytes == 0) == (chosen == "read")
        cast = wl.load_file(path, dtype=torch.float64)
        for name, tensor in loaded.items():
            assert torch.equal(cast[name].nan_to_num(), tensor.to(torch.float64).nan_to_num())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(load, range(64)))


def test_each_thread_has_its_own_report(files: list[tuple[Path, dict[str, bytes]]]) -> None:
    wl.load_file(files[0][0])
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(wl.last_report).result() is None
        pool.submit(wl.load_file, files[1][0]).result()
        assert pool.submit(wl.last_report).result().files[0].path == str(files[1][0])
    assert wl.last_report().files[0].path == str(files[0][0])


def test_other_threads_run_meanwhile(tmp_path: Path) -> None:
    """The interpreter's lock is not held while bytes are read."""
    size = 512 * MIB
    header = {"w": {"dtype": "F64", "shape": [size // 8], "data_offsets": [0, size]}}
    sparse_file(tmp_path / "f", header, size)
    moments = []
    with ThreadPoolExecutor(1) as pool, wl.Settings(threads=1, io_depth=1):
        settings = wl.Settings.current()

        def load() -> tuple[float, float]:
            began = time.monotonic()
            with settings:
                wl.load_file(tmp_path / "f", dtype="float8_e5m2")
            return began, time.monotonic()

        loading = pool.submit(load)
        while not loading.done():
            moments.append(time.monotonic())
            time.sleep(0.001)
    began, ended = loading.result()
    inside = [moment for moment in moments if began < moment < ended]
    assert ended - began > 0.02
    assert max(b - a for a, b in zip([began, *inside], [*inside, ended], strict=True)) < 0.25


def test_fork_after_a_load(files: list[tuple[Path, dict[str, bytes]]]) -> None:
    """The child has the loaded tensors, and can load."""
    path, expected = files[0]
    kept = wl.load_file(path)
    kept_read = wl.load_file(path, mode="read")
    name = next(iter(expected))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks while threads live
        child = os.fork()
    if child == 0:
        code = 1
        try:
            for mode in ("map", "read"):
                loaded = wl.load_file(path, mode=mode)
                assert {key: bits(tensor) for key, tensor in loaded.items()} == expected
            kept[name][0] = 0  # a page of the child's own
            assert bits(kept_read[name]) == expected[name]
            del kept, kept_read
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bits(kept[name]) == bits(kept_read[name]) == expected[name]


INTERRUPTED = """
import signal, sys
import torch
import weightlift as wl

signal.signal(signal.SIGINT, signal.default_int_handler)
path, small = sys.argv[1:]
calls = []

def show(done, total):
    if not calls:
        print("loading", flush=True)
    calls.append(done)

try:
    with wl.Settings(threads=1, io_depth=1, read_bytes=65536):
        wl.load_file(path, dtype="float8_e5m2", progress=show)
except KeyboardInterrupt:
    print("interrupted", flush=True)
else:
    print("finished", flush=True)
assert wl.load_file(small, mode="read")["w"].tolist() == [1, 2, 3]
assert wl.load_file(small, mode="map")["w"].tolist() == [1, 2, 3]
print("again", flush=True)
"""


def test_control_c(tmp_path: Path) -> None:
    size = 4 << 30
    header = {"w": {"dtype": "F64", "shape": [size // 8], "data_offsets": [0, size]}}
    sparse_file(tmp_path / "f", header, size)
    (tmp_path / "small").write_bytes(file_bytes({"w": ("U8", [3], b"\1\2\3")}))
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "f"), str(tmp_path / "small")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "loading\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    took = time.monotonic() - began
    assert process.stdout.read() == "again\n", process.stderr.read()
    assert process.wait(timeout=30) == 0
    process.stdout.close()
    process.stderr.close()
    assert took < 1


def test_exit_while_a_thread_loads(tmp_path: Path) -> None:
    """The interpreter ends normally while a daemon thread is in a load."""
    code = """
import sys, threading, time
import torch
import weightlift as wl
going = threading.Event()
def load():
    with wl.Settings(threads=2, io_depth=2):
        wl.load_file(sys.argv[1], dtype="float8_e5m2", progress=lambda *_: going.set())
threading.Thread(target=load, daemon=True).start()
assert going.wait(20)
"""
    size = 2 << 30
    header = {"w": {"dtype": "F64", "shape": [size // 8], "data_offsets": [0, size]}}
    sparse_file(tmp_path / "f", header, size)
    done = run_python(code, tmp_path / "f", timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
