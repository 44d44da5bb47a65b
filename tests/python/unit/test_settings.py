from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file as reference_load_file
from safetensors.torch import save_file as reference_save_file

import weightlift as wl
from support import assert_same_tensors, bits, entry, file_bytes
from weightlift import Settings, _native

MIB = 1 << 20


def test_nothing_is_set() -> None:
    assert Settings.current() == Settings()
    assert all(value is None for value in dataclasses.astuple(Settings()))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("threads", "3", 3),
        ("io_depth", " 12 ", 12),
        ("read_bytes", "262144", 262144),
        ("chunk_bytes", "2MiB", 2 * MIB),
        ("chunk_bytes", "2 mb", 2_000_000),
        ("pinned_bytes", "1GiB", 1 << 30),
        ("pinned_bytes", "64kib", 65536),
        ("pool_bytes", "1 GiB", 1 << 30),
        ("pool_bytes", "0", 0),
        ("streams", "4", 4),
        ("io_path", "direct", "direct"),
        ("io_path", "BUFFERED", "buffered"),
        ("cast_place", "host", "host"),
        ("populate", "0", False),
        ("populate", "yes", True),
        ("kernels", "off", False),
        ("batch_copies", "True", True),
        ("threads", "", None),
    ],
)
def test_environment(monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object) -> None:
    monkeypatch.setenv("WEIGHTLIFT_" + name.upper(), text)
    assert Settings.current() == Settings(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("threads", "many"),
        ("threads", "0"),
        ("threads", "-1"),
        ("threads", "99999999999999"),
        ("read_bytes", "1.5MiB"),
        ("read_bytes", "4 parsecs"),
        ("io_path", "uring"),
        ("cast_place", "nowhere"),
        ("populate", "maybe"),
    ],
)
def test_environment_that_makes_no_sense(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / "f").write_bytes(file_bytes({"w": entry("U8", [3])}))
    monkeypatch.setenv("WEIGHTLIFT_" + name.upper(), text)
    with pytest.raises(wl.ArgumentError, match=f"(?i){name}"):
        wl.load_file(tmp_path / "f", mode="read")


@pytest.mark.parametrize(
    "values",
    [
        {"threads": 0},
        {"threads": -1},
        {"threads": 1.5},
        {"threads": "4"},
        {"threads": True},
        {"threads": 1 << 40},
        {"io_depth": 0},
        {"read_bytes": 1 << 70},
        {"chunk_bytes": -4096},
        {"pinned_bytes": 0},
        {"io_path": "uring"},
        {"io_path": 5},
        {"cast_place": "gpu"},
        {"populate": "yes"},
        {"populate": 1},
        {"kernels": 3},
        {"batch_copies": "no"},
    ],
)
def test_values_that_make_no_sense(values: dict[str, object]) -> None:
    (name,) = values
    with pytest.raises(wl.ArgumentError, match=name):
        Settings(**values)  # type: ignore[arg-type]


def test_the_innermost_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTLIFT_THREADS", "1")
    monkeypatch.setenv("WEIGHTLIFT_IO_DEPTH", "11")
    Settings.set_default(Settings(threads=2, io_path="buffered"))
    assert Settings.current() == Settings(threads=2, io_depth=11, io_path="buffered")
    outer = Settings(threads=3)
    with outer as merged:
        assert merged.threads == 3
        assert Settings.current() == Settings(threads=3, io_depth=11, io_path="buffered")
        with Settings(io_path="direct"):
            assert Settings.current() == Settings(threads=3, io_depth=11, io_path="direct")
            with outer, outer:
                assert Settings.current().threads == 3
            with Settings(threads=4):
                assert Settings.current().threads == 4
            assert Settings.current().threads == 3
        assert Settings.current().io_path == "buffered"
    assert Settings.current().threads == 2
    Settings.set_default(None)
    assert Settings.current() == Settings(threads=1, io_depth=11)


def test_left_by_an_error() -> None:
    with pytest.raises(KeyError), Settings(threads=3):
        raise KeyError
    assert Settings.current().threads is None


def test_each_thread_has_its_own() -> None:
    """All are inside their blocks at once, and leave in another order than they entered."""
    barrier = threading.Barrier(8)

    def use(number: int) -> None:
        for turn in range(20):
            with Settings(threads=number + 1):
                barrier.wait(timeout=30)
                assert Settings.current().threads == number + 1
                with Settings(io_depth=turn + 1):
                    assert Settings.current() == Settings(threads=number + 1, io_depth=turn + 1)
            assert Settings.current() == Settings()

    with ThreadPoolExecutor(8) as pool, Settings(threads=99):
        list(pool.map(use, range(8)))


def test_each_task_has_its_own() -> None:
    async def use(number: int) -> None:
        for _ in range(5):
            with Settings(threads=number):
                await asyncio.sleep(0.001 * (number % 3))
                assert Settings.current().threads == number
            assert Settings.current().threads is None

    async def main() -> None:
        await asyncio.gather(*(use(number) for number in range(1, 9)))

    asyncio.run(main())


def test_a_process_wide_default_reaches_threads(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(file_bytes({"w": entry("U8", [2 * MIB])}))
    Settings.set_default(Settings(io_path="direct"))
    with ThreadPoolExecutor(1) as pool:
        reason = pool.submit(
            lambda: (wl.load_file(tmp_path / "f", mode="read"), wl.last_report())[1].files[0].reason
        ).result()
    assert "forced" in reason


# --- What they do ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors that begin anywhere in a page, cross pages, and end the file within one."""
    entries = {
        f"t{i}": entry("U8", [size], i)
        for i, size in enumerate([1, 4095, 4096, 4097, 13, 300_001, 65536, 3, 1_048_577, 70_000, 5])
    }
    path = tmp_path_factory.mktemp("ragged") / "f"
    path.write_bytes(file_bytes(entries, None, 5))
    assert path.stat().st_size % 512 != 0
    return path


@pytest.mark.parametrize("io_path", ["auto", "buffered", "direct"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"read_bytes": 1, "chunk_bytes": 1},
        {"read_bytes": 65536, "threads": 1},
        {"read_bytes": 4097, "chunk_bytes": 12345, "threads": 7, "io_depth": 1},
        {"read_bytes": 1 << 40, "chunk_bytes": 1 << 40},
        {"threads": 300, "io_depth": 300, "read_bytes": 65536},
    ],
    ids=str,
)
def test_bytes_are_the_same_however_they_are_read(
    ragged: Path, io_path: str, sizes: dict[str, int]
) -> None:
    expected = reference_load_file(ragged)
    with Settings(io_path=io_path, **sizes):  # type: ignore[arg-type]
        assert_same_tensors(wl.load_file(ragged, mode="read"), expected)
    (file,) = wl.last_report().files
    if io_path == "direct":
        assert file.io == "direct" or any("direct" in t for t in wl.last_report().fallbacks)
        assert "forced" in file.reason
    else:
        assert file.io in ("page cache", "buffered")
        assert "resident" in file.reason


@pytest.mark.parametrize("io_path", ["buffered", "direct"])
def test_single_tensors_and_slices_past_the_page_cache(ragged: Path, io_path: str) -> None:
    expected = reference_load_file(ragged)
    with Settings(io_path=io_path), wl.safe_open(ragged, backend="pread") as file:
        for name, tensor in expected.items():
            assert bits(file.get_tensor(name)) == bits(tensor)
            assert bits(file.get_slice(name)[1::3]) == bits(tensor[1::3])


def test_direct_reads_in_memory_file_systems(ragged: Path) -> None:
    """tmpfs refuses O_DIRECT on some kernels: then the page cache is used, and the report says
    so."""
    shared = Path("/dev/shm") / f"weightlift-test-{threading.get_ident()}"
    try:
        shared.write_bytes(ragged.read_bytes())
        with Settings(io_path="direct"):
            loaded = wl.load_file(shared, mode="read")
        report = wl.last_report()
        assert_same_tensors(loaded, reference_load_file(ragged))
        if report.files[0].io != "direct":
            assert report.files[0].io == "buffered"
            assert any(str(shared) in text for text in report.fallbacks)
    finally:
        shared.unlink(missing_ok=True)


def test_threads_are_as_many_as_asked(tmp_path: Path) -> None:
    reference_save_file(
        {f"t{i}": torch.zeros(MIB, dtype=torch.uint8) for i in range(8)}, tmp_path / "f"
    )
    for threads in (1, 3):
        with Settings(threads=threads, io_path="buffered", io_depth=1):
            wl.load_file(tmp_path / "f", mode="read")
        assert 1 <= wl.last_report().threads <= threads
    (tmp_path / "g").write_bytes(file_bytes({"w": entry("U8", [3])}))
    wl.load_file(tmp_path / "g", mode="read")
    assert wl.last_report().threads == 0


def test_populate_is_a_choice(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(file_bytes({"w": entry("U8", [8 * MIB])}))
    with path.open("r+b") as file:
        os.fsync(file.fileno())
    indexed = _native.IndexedFile.open(str(path))

    def resident(populate: bool | None) -> int:
        indexed.drop_from_page_cache()
        with Settings(populate=populate):
            kept = wl.load_file(path)
        found = indexed.resident_bytes()
        del kept
        assert found is not None
        return found

    indexed.drop_from_page_cache()
    if indexed.resident_bytes() != 0:
        pytest.skip("this file system keeps its files in memory, or the kernel cannot tell")
    assert resident(False) < 4 * MIB
    assert "first touch" in wl.last_report().files[0].reason
    assert resident(True) >= 8 * MIB
    assert "populated" in wl.last_report().files[0].reason
    assert resident(None) >= 8 * MIB


@pytest.mark.parametrize("name", ["read_bytes", "chunk_bytes", "pinned_bytes", "pool_bytes"])
def test_sizes_are_text_here_too(name: str) -> None:
    assert getattr(Settings(**{name: "32MB"}), name) == 32_000_000
    assert Settings(**{name: "1 MiB"}) == Settings(**{name: MIB})
    with pytest.raises(wl.ArgumentError, match=rf"Settings\.{name} is '1 parsec'; write whole "):
        Settings(**{name: "1 parsec"})


def test_a_variable_that_nobody_reads_is_warned_of() -> None:
    code = (
        "import warnings, weightlift as wl; warnings.simplefilter('always')\n"
        "for _ in range(2): wl.Settings.current()\n"
    )
    environment = {**os.environ, "WEIGHTLIFT_THREAD": "3", "WEIGHTLIFT_ZZZ": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    said = [line for line in done.stderr.splitlines() if "is unknown" in line]
    assert len(said) == 2
    assert "WEIGHTLIFT_THREAD is unknown; did you mean WEIGHTLIFT_THREADS?" in said[0]
    assert "WEIGHTLIFT_ZZZ is unknown; known are " in said[1]


@pytest.mark.parametrize(
    ("written", "dtype"),
    [
        ("bf16", torch.bfloat16), ("BF16", torch.bfloat16), ("torch.bfloat16", torch.bfloat16),
        ("fp16", torch.float16), ("half", torch.float16), ("F16", torch.float16),
        ("fp32", torch.float32), ("float", torch.float32), ("F32", torch.float32),
        ("double", torch.float64), ("fp8_e4m3", torch.float8_e4m3fn),
    ],
)  # fmt: skip
def test_dtypes_as_people_write_them(tmp_path: Path, written: str, dtype: torch.dtype) -> None:
    reference_save_file({"w": torch.tensor([1.5, -2.0])}, tmp_path / "f.safetensors")
    found = wl.load_file(tmp_path / "f.safetensors", dtype=written)["w"]
    assert found.dtype == dtype
    assert found.float().tolist() == [1.5, -2.0]


def test_a_dtype_with_a_mistake_gets_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(file_bytes({"w": entry("F32", [3])}))
    with pytest.raises(wl.ArgumentError, match=r"'bflot16' .did you mean 'bfloat16'"):
        wl.load_file(tmp_path / "f", dtype="bflot16")
    for wrong in ("int8", "fp8", "cuda", ""):
        with pytest.raises(wl.ArgumentError, match="it can be one of"):
            wl.load_file(tmp_path / "f", dtype=wrong)
