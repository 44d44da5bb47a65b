"""Files that change while they are loaded: the file's content at one moment, or an error."""

from __future__ import annotations

import functools
import gc
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import fault_sweep
import simulated
import support
import weightlift as wl
from support import file_bytes, random_bytes, run_python

pytestmark = simulated.pytestmark

MIB = 1 << 20
SIZES = {"a": MIB, "b": 2 * MIB + 4098, "c": 5000, "d": MIB - 999}
LONG_AGO = 10**9

# A file's whole content at one moment; the first is that before the change.
States = list[bytes]
# Changes the file, with a pause wherever it has another state.
Change = Callable[[Path, States], Iterator[None]]


@functools.cache
def content(seed: int) -> bytes:
    """No zeros, so that bytes which were never read are seen."""
    entries = {
        name: ("BF16", [size // 2], random_bytes(size // 2 * 2, seed + i).replace(b"\0", b"\1"))
        for i, (name, size) in enumerate(SIZES.items())
    }
    return file_bytes(entries)


def tensors_of(state: bytes) -> dict[str, bytes] | None:
    """By the format's description; ``None`` if the file is not complete."""
    if len(state) < 8:
        return None
    begin = 8 + int.from_bytes(state[:8], "little")
    try:
        header = json.loads(state[8:begin])
    except ValueError:
        return None
    parts = {name: [begin + at for at in one["data_offsets"]] for name, one in header.items()}
    if max(end for _, end in parts.values()) != len(state):
        return None
    return {name: state[first:end] for name, (first, end) in parts.items()}


def truncate(path: Path, states: States) -> Iterator[None]:
    size = random.randrange(len(states[0]))
    states.append(states[0][:size])
    os.truncate(path, size)
    yield


def punch(path: Path, states: States) -> Iterator[None]:
    """Truncated and extended to its old size: the size does not show it, and zeros are read."""
    size = random.randrange(len(states[0]))
    os.truncate(path, size)
    os.truncate(path, len(states[0]))
    states += [states[0][:size], states[0][:size].ljust(len(states[0]), b"\0")]
    yield


def overwrite(path: Path, states: States) -> Iterator[None]:
    new = content(7)
    half = random.randrange(len(new))
    states += [new[:half] + states[0][half:], new]
    descriptor = os.open(path, os.O_WRONLY)
    os.pwrite(descriptor, new[:half], 0)
    yield
    os.pwrite(descriptor, new[half:], half)
    os.close(descriptor)


def append(path: Path, states: States) -> Iterator[None]:
    with path.open("ab") as file:
        file.write(b"more")
    states.append(states[0] + b"more")
    yield


def replace(path: Path, states: States) -> Iterator[None]:
    states.append(content(7))
    other = path.with_suffix(".new")
    other.write_bytes(states[-1])
    other.replace(path)
    yield


def delete(path: Path, states: States) -> Iterator[None]:
    path.unlink()
    yield


def deny(path: Path, states: States) -> Iterator[None]:
    path.chmod(0)
    yield


CHANGES: list[Change] = [truncate, punch, overwrite, append, replace, delete, deny]
# Those that leave a mapping whole.
KEEPING: list[Change] = [append, replace, delete, deny]


LOADS: dict[str, fault_sweep.Load] = {
    "read": fault_sweep.read,
    "direct": fault_sweep.read_direct,
    "cast": lambda path: fault_sweep.of(wl.load_file(path, dtype="float32")),
    "safe_open": lambda path: fault_sweep.of(wl.safe_open(path, backend="pread").get_tensors()),
    "pinned": fault_sweep.pinned,
    "cuda": fault_sweep.OnDevice(),
    "cuda, cast": fault_sweep.OnDevice("F32"),
}


def widened(data: bytes) -> bytes:
    """BF16 is the upper half of F32; a NaN keeps its sign."""
    wide = np.frombuffer(data, dtype=np.uint16).astype(np.uint32) << 16
    nan = (wide & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (wide & 0x80000000) | 0x7FC00000, wide).astype(np.uint32).tobytes()


def one_round(path: Path, mode: str, load: fault_sweep.Load, seed: int, took: float) -> str:
    """The outcome of a load during which the file changes: the state that it saw, or the error."""
    change = CHANGES[seed % len(CHANGES)]
    states = [content(seed % 5)]
    path.unlink(missing_ok=True)
    path.write_bytes(states[0])
    # Whatever the clock of the file system's times is: a change is one.
    os.utime(path, (LONG_AGO, LONG_AGO))
    delay = random.uniform(0, took)
    content(7)  # made before the clock runs

    def act() -> None:
        time.sleep(delay)
        for _ in change(path, states):
            time.sleep(0.012)

    thread = threading.Thread(target=act)
    thread.start()
    found, code, text = None, "", ""
    try:
        with fault_sweep.machine(seed):
            try:
                found = load(path)
            except (wl.ReadError, wl.FormatError) as error:
                # Not kept: its traceback would keep what lies on the machine.
                code, text = error.code, str(error)
    finally:
        thread.join()
    if found is None:
        assert str(path) in text
        return f"{change.__name__}: {code}"
    for number, state in enumerate(states):
        tensors = tensors_of(state)
        if tensors is None:
            continue
        if mode.endswith("cast"):
            tensors = {name: widened(data) for name, data in tensors.items()}
        if tensors == found:
            return f"{change.__name__}: state {number}"
    raise AssertionError(f"{mode}, seed {seed}: {change.__name__} gave bytes that never were")


def mapped_round(path: Path, seed: int, took: float) -> str:
    """Populating raises no signal; mapped tensors are complete while the file is."""
    change = CHANGES[seed % len(CHANGES)]
    states = [content(seed % 5)]
    path.unlink(missing_ok=True)
    path.write_bytes(states[0])
    with path.open() as file:
        os.fsync(file.fileno())
    os.utime(path, (LONG_AGO, LONG_AGO))
    delay = random.uniform(0, took)

    def act() -> None:
        time.sleep(delay)
        for _ in change(path, states):
            pass

    thread = threading.Thread(target=act)
    thread.start()
    try:
        fault_sweep.drop(path)
        loaded = wl.load_file(path, mode="map")
    except (wl.ReadError, wl.FormatError) as error:
        return f"{change.__name__}: {error.code}"
    except FileNotFoundError:
        return "deleted before"
    finally:
        thread.join()
    if change in KEEPING:
        found = fault_sweep.of(loaded)
        assert any(found == tensors_of(state) for state in states), change.__name__
    return f"{change.__name__}: loaded"


def rounds(folder: Path, first: int, last: int) -> Counter[str]:
    """Seeds ``first`` to ``last`` in turn over the modes."""
    path = folder / "changing.safetensors"
    wl.Settings.set_default(
        wl.Settings(threads=2, read_bytes=65536, chunk_bytes=1 << 19, pinned_bytes=MIB)
    )
    path.write_bytes(content(0))
    took = {}
    for mode, load in LOADS.items():
        with fault_sweep.machine(0):
            load(path)
            began = time.monotonic()
            load(path)
            took[mode] = time.monotonic() - began
    gc.collect()
    gc.freeze()
    outcomes: Counter[str] = Counter()
    for seed in range(first, last):
        random.seed(seed)
        number = seed // len(CHANGES) % (len(LOADS) + 1)
        if number == len(LOADS):
            outcomes[mapped_round(path, seed, 0.005)] += 1
        else:
            mode = list(LOADS)[number]
            outcomes[one_round(path, mode, LOADS[mode], seed, 1.2 * took[mode])] += 1
    return outcomes


HERE = f"{Path(__file__).parent}:{Path(support.__file__).parent}"
ROUNDS = """
import json, sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(":")
import test_changing_files
found = test_changing_files.rounds(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("first", "last"), [(0, 168), pytest.param(168, 1176, marks=pytest.mark.deep)]
)
def test_old_bytes_or_an_error(tmp_path: Path, first: int, last: int) -> None:
    """In a separate process, whose exit status shows a signal."""
    done = run_python(ROUNDS, HERE, tmp_path, first, last, timeout=60 + last - first)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert sum(outcomes.values()) == last - first
    # Changes did come in the middle of loads.
    assert any(name.endswith("file_shrank") for name in outcomes), outcomes
    assert any(name.endswith("file_changed") for name in outcomes), outcomes
    assert any(name.endswith("state 0") for name in outcomes), outcomes
