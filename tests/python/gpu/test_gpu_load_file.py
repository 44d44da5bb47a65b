"""On a real GPU: the loaded bytes, compared with the reference library and torch.

Run by `make gpu-check`, which sets WEIGHTLIFT_REQUIRE_GPU so that a missing GPU fails.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import struct
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file as reference_load_file
from safetensors.torch import save_file as reference_save_file

import weightlift as wl
from support import DTYPES

pytestmark = pytest.mark.gpu

MIB = 1 << 20
FLOATS = ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]


def random_bits(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


def assert_same_bytes(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if expected.numel() == 0:
        return
    left = found.cpu().contiguous().reshape(-1).view(torch.uint8)
    assert torch.equal(left, expected.cpu().contiguous().reshape(-1).view(torch.uint8))


def assert_same_numbers(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit-identical, except NaNs, which are NaNs on both sides."""
    assert found.dtype == expected.dtype
    found, expected = found.cpu(), expected.cpu()
    nan = expected.to(torch.float32).isnan()
    assert torch.equal(found.to(torch.float32).isnan(), nan)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = kinds[expected.element_size()]
    assert torch.equal(found.view(bits)[~nan], expected.view(bits)[~nan])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large, small, empty and scalar tensors, of every dtype of the format that torch has."""
    path = tmp_path_factory.mktemp("gpu") / "mixed.safetensors"
    tensors = {"large": random_bits(37 * MIB + 24, 1).view(torch.bfloat16)}
    for i in range(3000):
        tensors[f"small.{i}"] = random_bits(2 * (i % 700 + 1), i).view(torch.float16)
    for name, kind in DTYPES.items():
        bits = random_bits(4096, len(name))
        tensors[f"dtype.{name}"] = (bits > 127) if kind is torch.bool else bits.view(kind)
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(0, 7)
    reference_save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def unaligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An odd header: every tensor is misaligned in the file."""
    path = tmp_path_factory.mktemp("gpu") / "odd.safetensors"
    names = [f"t{i}" for i in range(40)]
    sizes = [4 * (i * i * 997 % 90_000 + 1) for i in range(40)]
    header, at = {}, 0
    for name, size in zip(names, sizes, strict=True):
        header[name] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * ((9 - len(text) % 8) % 8)
    assert len(text) % 8 == 1
    path.write_bytes(struct.pack("<Q", len(text)) + text + random_bits(at, 5).numpy().tobytes())
    return path


SETTINGS = {
    "default": wl.Settings(),
    "no kernels": wl.Settings(kernels=False),
    "no kernels, no batch": wl.Settings(kernels=False, batch_copies=False),
    "one thread, small slots": wl.Settings(
        threads=1, chunk_bytes=256 << 10, read_bytes=64 << 10, pinned_bytes=512 << 10
    ),
    "direct": wl.Settings(io_path="direct"),
    "casts on the host": wl.Settings(cast_place="host"),
    "casts on the device": wl.Settings(cast_place="device"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("file", ["mixed", "unaligned"])
def test_bytes_arrive(settings: wl.Settings, file: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(file)
    with settings:
        loaded = wl.load_file(path, device="cuda")
    expected = reference_load_file(path)
    assert list(loaded) == list(expected)
    for name, tensor in expected.items():
        assert loaded[name].device == torch.device("cuda", torch.cuda.current_device())
        assert_same_bytes(loaded[name], tensor)
    report = wl.last_report()
    assert report is not None
    size = sum(tensor.untyped_storage().nbytes() for tensor in expected.values())
    assert report.bytes == size
    assert report.devices == {f"cuda:{torch.cuda.current_device()}": size}
    assert 0 < report.peak_staging_bytes <= 64 * MIB


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("target", FLOATS)
def test_casts(settings: wl.Settings, target: str, tmp_path: Path) -> None:
    halfway = [65504.0, 65519.9, 65520.0, 448.0, 464.0, 465.0, 57344.0, 61440.0]
    edges = [1e-8, 5.96e-8, 1e-40, 3.4e38, 1e300, -1e-300]
    plain = [0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan")]
    special = torch.tensor([*plain, *halfway, *edges], dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    wide = torch.randn(300_001, generator=generator, dtype=torch.float64)
    values = torch.cat([special, wide * torch.exp(wide * 9), wide])
    # All 8- and 16-bit patterns, and random 32-bit ones.
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    tensors = {
        "float64": values,
        "float32": torch.cat([values.float(), random_bits(1 << 20, 3).view(torch.float32)]),
        "float16": halves.view(torch.float16).clone(),
        "bfloat16": halves.view(torch.bfloat16).clone(),
        "float8_e4m3fn": torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn),
        "float8_e5m2": torch.arange(256).to(torch.uint8).view(torch.float8_e5m2),
        "integers": torch.arange(1000),
    }
    path = tmp_path / "casts.safetensors"
    reference_save_file(tensors, path)
    with settings:
        loaded = wl.load_file(path, device="cuda", dtype=target)
    wanted = getattr(torch, target)
    for name, tensor in tensors.items():
        if name == "integers":
            assert_same_bytes(loaded[name], tensor)
        else:
            assert_same_numbers(loaded[name], tensor.to(wanted))


def test_the_copies_wait_for_the_allocating_stream(tmp_path: Path) -> None:
    """The caching allocator hands out memory that a kernel on this stream still writes to."""
    path = tmp_path / "x.safetensors"
    expected = random_bits(64 * MIB, 9)
    reference_save_file({"x": expected}, path)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            busy = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
            torch.cuda._sleep(200_000_000)
            busy.fill_(255)
            del busy
            found = wl.load_file(path, device="cuda")["x"]
            stream.synchronize()
            assert_same_bytes(found, expected)
            del found


def test_peak_memory_is_the_model_and_one_ring(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {f"t{i}": random_bits(16 * MIB, i).view(torch.bfloat16) for i in range(16)}
    tensors |= {f"s{i}": random_bits(1024, i) for i in range(5000)}
    reference_save_file(tensors, path)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = wl.load_file(path, device="cuda")
    now = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= now + 64 * MIB
    assert len(loaded) == len(tensors)


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_slices(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensor = torch.arange(24_000.0).reshape(20, 30, 40)
    reference_save_file({"x": tensor}, path)
    with wl.safe_open(path, device="cuda", backend=backend) as opened:
        view = opened.get_slice("x")
        for index in (
            (slice(None), slice(3, 9)),
            (slice(2, 18, 5), 4, slice(None, None, 3)),
            (Ellipsis, -1),
            (slice(None, None, 2), slice(0, 0)),
            7,
        ):
            assert_same_bytes(view[index], tensor[index].contiguous())
        backwards = view[::-1, :, ::-2]
        expected = torch.from_numpy(tensor.numpy()[::-1, :, ::-2].copy())
        assert_same_bytes(backwards, expected)


def test_pinned(mixed: Path) -> None:
    expected = reference_load_file(mixed)
    loaded = wl.load_file(mixed, pin_memory=True)
    assert all(tensor.is_pinned() for tensor in loaded.values() if tensor.numel())
    for name, tensor in expected.items():
        assert_same_bytes(loaded[name], tensor)
    moved = {name: tensor.to("cuda", non_blocking=True) for name, tensor in loaded.items()}
    del loaded
    gc.collect()
    torch.cuda.synchronize()
    for name, tensor in expected.items():
        assert_same_bytes(moved[name], tensor)


def test_many_threads_at_once(mixed: Path) -> None:
    expected = reference_load_file(mixed)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            loaded = wl.load_file(mixed, device="cuda")
            for name in ("large", "small.7", "scalar"):
                assert_same_bytes(loaded[name], expected[name])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_device_that_is_not_there(mixed: Path) -> None:
    with pytest.raises((wl.DeviceError, RuntimeError)):
        wl.load_file(mixed, device=torch.cuda.device_count())


def test_interrupt_drains_and_the_next_load_is_right(mixed: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wl.load_file(mixed, device="cuda", progress=interrupt)
    expected = reference_load_file(mixed)
    for name, tensor in wl.load_file(mixed, device="cuda").items():
        assert_same_bytes(tensor, expected[name])


def _load_in_child(path: str, results: multiprocessing.Queue[str]) -> None:
    try:
        wl.load_file(path, device="cuda")
        results.put("loaded")
    except BaseException as error:
        results.put(f"{type(error).__name__}: {error}")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_an_error(mixed: Path) -> None:
    wl.load_file(mixed, device="cuda")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_load_in_child, args=(str(mixed), results))
    child.start()
    text = results.get(timeout=30)
    child.join(timeout=30)
    assert "fork" in text, text


def test_out_of_memory_is_an_error(tmp_path: Path) -> None:
    free, _ = torch.cuda.mem_get_info()
    header = {"x": {"dtype": "U8", "shape": [2 * free], "data_offsets": [0, 2 * free]}}
    text = json.dumps(header).encode()
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 2 * free)
    with pytest.raises(MemoryError):
        wl.load_file(path, device="cuda")
