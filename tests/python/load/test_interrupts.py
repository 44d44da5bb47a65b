"""Signals, forks and many threads in the middle of loads; see test_concurrency.py too."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fuse_server
import simulated
import support
import weightlift as wl
from support import bits, entry, file_bytes, open_files, run_python, sparse_file, tasks

MIB = 1 << 20
HELPERS = Path(support.__file__).parent
# The time of one answer of the slow file system, and the extra time in which a load must end.
ANSWER_SECONDS, END_SECONDS = 0.1, 0.2


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Path]:
    """A file whose every read takes a while: reading all of it would take minutes."""
    size = 256 * MIB
    header = {"w": {"dtype": "F64", "shape": [size // 8], "data_offsets": [0, size]}}
    sparse_file(tmp_path / "content", header, size)
    (tmp_path / "mount").mkdir()
    with contextlib.ExitStack() as stack:
        try:
            served = fuse_server.mounted(
                tmp_path / "mount", tmp_path / "content", direct=True, seconds=ANSWER_SECONDS
            )
            path = stack.enter_context(served)
        except (OSError, FileNotFoundError) as error:
            pytest.skip(f"no slow file without FUSE: {error}")
        yield path


LOADING = """
import contextlib, signal, sys, traceback
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import weightlift as wl
import support

mode, path, small = sys.argv[2:5]
signal.signal(signal.SIGINT, signal.default_int_handler)
if len(sys.argv) > 5:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
inside = contextlib.nullcontext()
wl.Settings.set_default(wl.Settings(threads=2, io_depth=2, read_bytes=65536))
if mode == "cuda":
    import fault_sweep
    inside = fault_sweep.machine(0)

def load(path):
    if mode == "cuda":
        return fault_sweep.OnDevice()(path)
    options = {"read": {"mode": "read"}, "cast": {"dtype": "float16"}}[mode]
    return {name: support.bits(tensor) for name, tensor in wl.load_file(path, **options).items()}

with inside:
    expected = load(Path(small))
    files, threads = support.open_files(), support.tasks()
    print("loading", flush=True)
    try:
        load(Path(path))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    except SystemExit as error:
        # A signal between the start of a load and the wait for it leaves the load to the traceback,
        # which the simulated driver does not outlive.
        traceback.clear_frames(error.__traceback__)
        raise
    assert load(Path(small)) == expected
    assert (support.open_files(), support.tasks(threads)) == (files, threads)
    print("again", flush=True)
"""


@contextlib.contextmanager
def loading(path: Path, mode: str, *more: str) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of a load of ``path``."""
    small = path.parent.parent / "small"
    small.write_bytes(file_bytes({"w": entry("F64", [1000])}))
    command = [sys.executable, "-c", LOADING, HELPERS, mode, path, small, *more]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert process.stdout.readline() == "loading\n", process.stderr.read()
            time.sleep(2 * ANSWER_SECONDS)  # past the header
            yield process
        finally:
            process.kill()


MODES = ["read", "cast", pytest.param("cuda", marks=simulated.pytestmark)]


@pytest.mark.parametrize("mode", MODES)
def test_control_c_waits_for_the_reads_in_flight_alone(slow: Path, mode: str) -> None:
    best = 60.0
    for _ in range(3):  # other processes may hold the processors for a moment
        with loading(slow, mode) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted\n", process.stderr.read()
            best = min(best, time.monotonic() - began)
            assert process.stdout.read() == "again\n", process.stderr.read()
            assert process.wait(20) == 0
        if best < ANSWER_SECONDS + END_SECONDS:
            return
    raise AssertionError(f"it took {best:.2f} s")


@pytest.mark.parametrize("mode", MODES)
def test_a_terminated_process_ends(slow: Path, mode: str) -> None:
    with loading(slow, mode) as process:
        process.terminate()
        assert process.wait(5) == -signal.SIGTERM


@pytest.mark.parametrize("mode", MODES)
def test_a_handler_of_sigterm_ends_the_load(slow: Path, mode: str) -> None:
    with loading(slow, mode, "handled") as process:
        process.terminate()
        assert process.wait(10) == 7


ENDING = """
import sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import weightlift as wl
import fault_sweep

sizes = {"read_bytes": 65536, "chunk_bytes": 256 << 10, "pinned_bytes": 1 << 20}
wl.Settings.set_default(wl.Settings(threads=2, io_depth=2, **sizes))
driver = fault_sweep.switch_on(int(sys.argv[3]))
thread = threading.Thread(
    target=lambda: fault_sweep.OnDevice(sys.argv[4] or None)(Path(sys.argv[2])), daemon=True
)
thread.start()
while driver.calls("cuEventRecord") < 3 and thread.is_alive():  # two chunks are on their way
    time.sleep(0.005)
assert thread.is_alive()
"""


@pytest.mark.parametrize(("seed", "dtype"), [(1, ""), (2, "BF16")])
@simulated.pytestmark[0]
@simulated.pytestmark[1]
def test_exit_while_a_thread_loads_to_a_device(slow: Path, seed: int, dtype: str) -> None:
    """The interpreter ends normally; test_concurrency.py has the same for the host."""
    done = run_python(ENDING, HELPERS, slow, seed, dtype, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


FORKING = """
import os, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forks while threads live
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
import weightlift as wl
import fault_sweep

path, small = Path(sys.argv[2]), Path(sys.argv[3])
on_device = sys.argv[4] == "cuda"
wl.Settings.set_default(wl.Settings(threads=2, io_depth=2, read_bytes=65536))
torch.set_num_threads(1)

def in_child(work):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    return child

def child_loads():
    assert fault_sweep.mapped(small) == expected
    assert fault_sweep.read(small) == expected
    assert fault_sweep.cast(small).keys() == expected.keys()
    if on_device:
        try:
            fault_sweep.OnDevice()(small)
        except wl.DeviceError as error:
            assert "forked" in str(error), error
            assert "spawn" in str(error), error
        else:
            raise AssertionError("a forked child used the driver")

def ended(child):
    for _ in range(200):
        if (done := os.waitpid(child, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(done[1])
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hung"

with fault_sweep.machine(0) if on_device else fault_sweep.no_machine():
    load = fault_sweep.OnDevice() if on_device else fault_sweep.read
    expected = fault_sweep.read(small)
    load(small)  # from now on the process has used the driver
    whole = []
    thread = threading.Thread(target=lambda: whole.append(load(path)))
    thread.start()
    children = []
    while thread.is_alive() and len(children) < 5:
        children.append(in_child(child_loads))
        time.sleep(0.005)
    while_it_loads = len(children)
    thread.join()
    children.append(in_child(child_loads))
    assert [ended(child) for child in children] == [0] * len(children)
    assert whole[0] == fault_sweep.read(path)
    assert load(small) == expected
    del whole
print(while_it_loads)
"""


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=simulated.pytestmark)])
def test_fork_during_a_load(tmp_path: Path, where: str) -> None:
    """The child's loads to the CPU work, those to a GPU fail with the reason; the parent's load
    goes on."""
    (tmp_path / "large").write_bytes(file_bytes({"w": entry("F32", [16 * MIB])}))
    (tmp_path / "small").write_bytes(file_bytes({"v": entry("F32", [50_000])}))
    done = run_python(FORKING, HELPERS, tmp_path / "large", tmp_path / "small", where)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1


def test_sixty_four_threads(tmp_path: Path) -> None:
    tensors = {f"w.{i}": torch.arange(70_001, dtype=torch.float32) + i for i in range(4)}
    path = tmp_path / "f"
    wl.save_file(tensors, path)
    expected = {name: bits(tensor) for name, tensor in tensors.items()}
    wide = {name: bits(tensor.to(torch.float64)) for name, tensor in tensors.items()}
    wl.load_file(path, mode="read")
    files, threads = open_files(), tasks()
    start = threading.Barrier(64)

    def load(number: int) -> None:
        start.wait(30)
        for turn in range(3):
            way = (number + turn) % 4
            direct = wl.Settings(io_path="direct") if way == 2 else contextlib.nullcontext()
            with direct:
                loaded = wl.load_file(
                    path,
                    mode="map" if way == 1 else "read",
                    dtype=torch.float64 if way == 3 else None,
                )
            found = {name: bits(tensor) for name, tensor in loaded.items()}
            assert found == (wide if way == 3 else expected)

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(load, range(64)))
    assert open_files() <= files  # those of other tests, idle until now, may be closed by now
    assert tasks(threads) <= threads
