from __future__ import annotations

import ast
import copy
import errno
import gc
import os
import pickle
import random
import re
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors import safe_open as reference_safe_open
from safetensors.torch import load_file as reference_load_file

import weightlift as wl
from support import bits, entry, file_bytes, open_files, run_python, sparse_file, tasks
from weightlift.core import errors as errors_module

MIB = 1 << 20
BACKENDS = ["mmap", "pread"]


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """Errors in a file are reported at once; some tests start an interpreter, which takes long on a
    busy machine."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 60


def fails(path: Path | str, kind: type[BaseException]) -> Any:
    """Every public call raises ``kind`` quickly and names the file."""
    caught = None
    for load in (
        wl.load_file,
        lambda path: wl.load_file(path, mode="read"),
        lambda path: wl.load_file(path, dtype="float16"),
        wl.safe_open,
        lambda path: wl.safe_open(path, backend="pread"),
    ):
        began = time.monotonic()
        with pytest.raises(kind) as found:
            load(path)
        assert time.monotonic() - began < 1
        assert isinstance(found.value, wl.WeightliftError)
        assert str(path) in str(found.value)
        caught = found.value
    return caught


# --- Files that are none -----------------------------------------------------------------------


def test_missing(tmp_path: Path) -> None:
    path = tmp_path / "nothing.safetensors"
    error = fails(path, FileNotFoundError)
    assert isinstance(error, wl.ReadError)
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOENT
    assert error.filename == str(path)
    assert "No such file" in error.strerror
    fails(tmp_path / "no" / "folder", FileNotFoundError)
    (tmp_path / "dangling").symlink_to("nowhere")
    fails(tmp_path / "dangling", FileNotFoundError)
    (tmp_path / "file").touch()
    fails(tmp_path / "file" / "below", FileNotFoundError)
    for reading in (reference_load_file, lambda path: reference_safe_open(path, "pt")):
        with pytest.raises(FileNotFoundError):
            reading(path)


def test_directory(tmp_path: Path) -> None:
    error = fails(tmp_path, IsADirectoryError)
    assert isinstance(error, wl.ReadError)
    assert error.errno == errno.EISDIR
    assert error.filename == str(tmp_path)


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert fails(tmp_path / "a", wl.ReadError).errno == errno.ELOOP
    assert fails(tmp_path / ("n" * 300), wl.ReadError).errno == errno.ENAMETOOLONG


def test_pipes_sockets_and_devices(tmp_path: Path) -> None:
    """Refused before they are read: a read of a pipe waits, one of /dev/zero never ends."""
    os.mkfifo(tmp_path / "pipe")
    assert "regular file" in str(fails(tmp_path / "pipe", wl.ReadError))
    with (
        tempfile.TemporaryDirectory() as short,  # a socket's path has 108 bytes
        socket.socket(socket.AF_UNIX) as server,
    ):
        server.bind(f"{short}/s")
        fails(f"{short}/s", wl.ReadError)
    for device in ("/dev/zero", "/dev/null", "/dev/random"):
        assert stat.S_ISCHR(Path(device).stat().st_mode)
        fails(device, wl.ReadError)


def test_denied() -> None:
    code = """
import os, sys
import safetensors
import weightlift as wl
from weightlift.core import errors as errors_module
if os.geteuid() == 0:
    os.seteuid(65534)
for options in ({}, {"mode": "read"}):
    try:
        wl.load_file(sys.argv[1], **options)
    except PermissionError as error:
        assert isinstance(error, wl.ReadError)
        assert error.errno == 13
        assert error.filename == sys.argv[1]
    else:
        raise AssertionError("it was read")
"""
    # Not in tmp_path, whose closed parents would cause the error too.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "f"
        path.write_bytes(file_bytes({"w": entry("F32", [3])}))
        path.chmod(0o000)
        done = run_python(code, path)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_paths_that_name_nothing(path: str) -> None:
    with pytest.raises((FileNotFoundError, wl.ArgumentError)):
        wl.load_file(path)


LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 12345\n"
)


@pytest.mark.parametrize(
    ("content", "code", "text"),
    [
        (LFS_POINTER, "git_lfs_pointer", "git lfs"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not_weights", ""),
        (b"<html>\n<head><title>Sign in</title></head></html>", "not_weights", ""),
        (b"", "empty_file", "empty"),
        (b"abc", "header_too_small", ""),
    ],
)
def test_what_was_downloaded_instead(tmp_path: Path, content: bytes, code: str, text: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    error = fails(path, wl.FormatError)
    assert isinstance(error, safetensors.SafetensorError)
    assert error.code == code
    assert error.path == str(path)
    assert text in str(error).lower()
    with pytest.raises(safetensors.SafetensorError):
        reference_load_file(path)


def test_where_a_format_error_is(tmp_path: Path) -> None:
    content = file_bytes({"good": entry("U8", [4]), "bad": ("F32", [3], bytes(8))})
    path = tmp_path / "f"
    path.write_bytes(content)
    error = fails(path, wl.FormatError)
    assert error.code == "size_mismatch"
    assert error.tensor == "bad"
    assert "'bad'" in str(error)
    assert error.offset is None or 8 <= error.offset < len(content)


# --- Files that change -------------------------------------------------------------------------


def with_two(path: Path) -> bytes:
    content = file_bytes({"a": entry("U8", [3 * MIB], 1), "b": entry("U8", [3 * MIB], 2)})
    path.write_bytes(content)
    return content


USES: list[Callable[[Any], object]] = [
    lambda file: file.get_tensor("b"),
    lambda file: file.get_tensors(),
    lambda file: file.get_slice("b")[MIB:],
    lambda file: file.get_slice("b")[::-1],
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("left", [0, 10, 4 * MIB, 6 * MIB])
def test_file_that_shrinks(
    tmp_path: Path, backend: str, use: Callable[[Any], object], left: int
) -> None:
    """An error, while a touch of the mapping would kill the process."""
    path = tmp_path / "f"
    with_two(path)
    with wl.safe_open(path, backend=backend) as file:
        os.truncate(path, left)
        with pytest.raises(wl.ReadError, match="truncated") as caught:
            use(file)
    assert caught.value.filename == str(path)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use", USES)
def test_file_that_is_written_to(
    tmp_path: Path, backend: str, use: Callable[[Any], object]
) -> None:
    path = tmp_path / "f"
    content = with_two(path)
    with wl.safe_open(path, backend=backend) as file:
        use(file)
        time.sleep(0.02)  # more than the clock of the file system's times
        path.write_bytes(content[:-1] + b"x")
        with pytest.raises(wl.ReadError, match="written to") as caught:
            use(file)
    assert caught.value.filename == str(path)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["replaced", "deleted"])
def test_file_whose_name_goes_to_another(tmp_path: Path, backend: str, how: str) -> None:
    """The open file is the old one, whole."""
    path = tmp_path / "f"
    content = with_two(path)
    with wl.safe_open(path, backend=backend) as file:
        path.unlink()
        if how == "replaced":
            path.write_bytes(b"something else")
        assert bits(file.get_tensor("b")) == content[-3 * MIB :]


def test_truncated_at_any_time(tmp_path: Path) -> None:
    """Old bytes or an error, never other bytes."""
    rng = random.Random(1)
    outcomes = set()
    for turn in range(12):
        path = tmp_path / f"f{turn}"
        content = with_two(path)

        def truncate(path: Path = path, delay: float = rng.uniform(0, 0.006)) -> None:
            time.sleep(delay)
            os.truncate(path, 5 * MIB)

        thread = threading.Thread(target=truncate)
        thread.start()
        try:
            with wl.Settings(threads=1, read_bytes=65536):
                loaded = wl.load_file(path, mode="read")
        except (wl.ReadError, wl.FormatError):
            outcomes.add("error")
        else:
            outcomes.add("loaded")
            assert bits(loaded["b"]) == content[-3 * MIB :]
        thread.join()
    assert outcomes


def test_bytes_that_are_not_there(tmp_path: Path) -> None:
    """A file that is shorter than its header says was never complete: a format error."""
    content = with_two(tmp_path / "f")
    (tmp_path / "f").write_bytes(content[:-1])
    assert fails(tmp_path / "f", wl.FormatError).code == "data_incomplete"
    (tmp_path / "f").write_bytes(content + b"x")
    assert fails(tmp_path / "f", wl.FormatError).code == "trailing_bytes"


# --- The exceptions themselves -----------------------------------------------------------------


def test_what_catches_what() -> None:
    assert issubclass(wl.FormatError, safetensors.SafetensorError)
    assert issubclass(wl.ReadError, OSError)
    assert issubclass(wl.DeviceError, RuntimeError)
    assert issubclass(wl.ArgumentError, ValueError)
    assert issubclass(wl.CheckpointError, ValueError)
    assert issubclass(wl.OutOfMemoryError, MemoryError)
    for name in errors_module.__all__:
        assert issubclass(getattr(wl, name), wl.WeightliftError)


def test_the_codes_of_python_are_listed() -> None:
    """The codes that the package raises are in its list or in the engine's table."""
    root = Path(wl.__file__).parent
    raised_here = {
        call.args[0].value
        for file in root.rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and getattr(call.func, "id", "") in ("FormatError", "FileClosedError")
        and call.args
        and isinstance(call.args[0], ast.Constant)
    }
    table = (Path(__file__).parents[3] / "csrc" / "result.h").read_text(encoding="utf-8")
    native = set(re.findall(r'^  X\(k\w+, *"(\w+)"', table, re.MULTILINE))
    assert native
    assert raised_here - native == errors_module.PYTHON_CODES


def raised(path: Path) -> list[wl.WeightliftError]:
    """One of each kind, as they come out of the library."""
    errors: list[wl.WeightliftError] = []
    (path / "html").write_bytes(b"<html></html>")
    (path / "f").write_bytes(file_bytes({"w": entry("F32", [3])}))
    size = 1 << 43
    header = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    sparse_file(path / "huge", header, size)
    for call in (
        lambda: wl.load_file(path / "missing"),
        lambda: wl.load_file(path),
        lambda: wl.load_file("/dev/null"),
        lambda: wl.load_file(path / "html"),
        lambda: wl.safe_open(path / "f").get_tensor("nope"),
        lambda: wl.load_file(path / "f", mode="x"),
        lambda: wl.load_file(path / "f", device="foo"),
        lambda: wl.load_file(path / "f", verify=True),
        lambda: wl.load_file(path / "huge", mode="read"),
    ):
        with pytest.raises(wl.WeightliftError) as caught:
            call()
        errors.append(caught.value)
    return errors


def test_errors_travel(tmp_path: Path) -> None:
    """Between processes, as in a DataLoader or a pool, and through copy."""
    errors = raised(tmp_path)
    assert len({type(error).__mro__[:2] for error in errors}) >= 8
    for error in errors:
        for twin in (
            *(pickle.loads(pickle.dumps(error, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)),
            copy.copy(error),
            copy.deepcopy(error),
        ):
            assert type(twin) is type(error)
            assert str(twin) == str(error)
            for name in ("code", "path", "offset", "tensor", "errno", "strerror", "filename"):
                assert getattr(twin, name, None) == getattr(error, name, None)


# --- Nothing is left behind --------------------------------------------------------------------


def test_descriptors_and_threads_do_not_pile_up(tmp_path: Path) -> None:
    good, bad, short = tmp_path / "good", tmp_path / "bad", tmp_path / "short"
    good.write_bytes(file_bytes({"a": entry("F32", [500_000], 1), "b": entry("F16", [64])}))
    bad.write_bytes(b"\x10\0\0\0\0\0\0\0not json at all.")
    short.write_bytes(good.read_bytes()[:-1])
    options: list[dict[str, Any]] = [
        {},
        {"mode": "read"},
        {"dtype": torch.float16},
        {"dtype": torch.float64, "mode": "read"},
    ]

    def turn(number: int) -> None:
        wl.load_file(good, **options[number % 4])
        with pytest.raises(wl.FormatError):
            wl.load_file((bad, short)[number % 2], **options[number % 4])
        with wl.safe_open(good, backend=BACKENDS[number % 2]) as file:
            file.get_tensor("b")
            with pytest.raises(wl.FormatError):
                file.get_tensor("c")
        with wl.Settings(io_path="direct"), pytest.raises(ZeroDivisionError):
            wl.load_file(good, mode="read", progress=lambda done, total: 1 // 0)

    turn(0)
    gc.collect()
    # Other libraries that tests have used may keep threads of their own.
    files, threads, alive = open_files(), tasks(), threading.active_count()
    for number in range(200):
        turn(number)
    gc.collect()
    assert open_files() == files
    assert tasks(threads) <= threads
    assert threading.active_count() <= alive


def test_mapped_tensors_hold_no_descriptors(tmp_path: Path) -> None:
    """A model of many mapped shards does not use up the process's descriptors (often 1024)."""
    path = tmp_path / "f"
    path.write_bytes(file_bytes({"w": entry("F32", [500])}))
    before = open_files()
    kept = [wl.load_file(path) for _ in range(100)]
    assert open_files() == before
    assert all(torch.equal(kept[0]["w"].nan_to_num(), one["w"].nan_to_num()) for one in kept)


def test_no_more_descriptors(tmp_path: Path) -> None:
    code = """
import os, resource, sys
import weightlift as wl
from weightlift.core import errors as errors_module
wl.load_file(sys.argv[1], mode="read")
resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
try:
    wl.load_file(sys.argv[1])
except wl.ReadError as error:
    assert error.errno == 24, error
    assert error.filename == sys.argv[1]
else:
    raise AssertionError
os.close(held.pop())
# One is enough for the file; the second descriptor, for direct reads, is done without.
with wl.Settings(io_path="direct"):
    assert wl.load_file(sys.argv[1], mode="read")["w"].sum() == 100
assert wl.last_report().files[0].io != "direct"
assert wl.last_report().fallbacks
"""
    data = torch.ones(100).numpy().tobytes()
    (tmp_path / "f").write_bytes(file_bytes({"w": ("F32", [100], data)}))
    done = run_python(code, tmp_path / "f")
    assert done.returncode == 0, done.stderr


def test_no_more_threads(tmp_path: Path) -> None:
    """If no thread can be started, the caller does the work."""
    code = """
import os, resource, sys
import torch
import weightlift as wl
from weightlift.core import errors as errors_module
torch.set_num_threads(1)
if os.getuid() == 0:
    os.setuid(65534)  # root has no limit
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
import threading
try:
    threading.Thread(target=print).start()
except RuntimeError:
    pass
else:
    sys.exit(3)
loaded = wl.load_file(sys.argv[1], mode="read")
assert int(loaded["w"].sum(dtype=torch.int64)) == 3 << 20
assert wl.last_report().threads == 0
"""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "f"
        path.write_bytes(file_bytes({"w": ("U8", [3 * MIB], b"\1" * (3 * MIB))}))
        done = run_python(code, path)
    assert done.returncode == 0, done.stderr
