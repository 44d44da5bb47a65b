"""The first ninety seconds on a machine with a GPU: checks the loaded bytes, and measures the rates
of the link and the page cache, the costs of single steps, and the rate of a load.

Each figure is printed and written to RESULTS/first_look.jsonl at once. Steps for which there is no
time are named. ``--simulated LIBRARY`` runs everything on the simulated driver, as a test of this
script: its figures have no meaning.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cuda_driver import CudaDriver, Pinned

MIB = 1 << 20
GIB = 1 << 30
_READ = 512 << 10
_SLOT = 4 * MIB
_TENSOR = 64 * MIB


class Look:
    """Runs steps within the time limit, and keeps their figures."""

    def __init__(self, results: Path, seconds: float, scale: float) -> None:
        self._end = time.monotonic() + seconds
        self._log = (results / "first_look.jsonl").open("a", buffering=1)
        self._scale = scale
        self.failed: list[str] = []

    def scaled(self, size: int) -> int:
        """A size in whole MiB, at least one."""
        return max(int(size * self._scale) // MIB, 1) * MIB

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def note(self, name: str, value: object, unit: str = "") -> None:
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        print(f"  {name:58} {shown} {unit}".rstrip(), flush=True)
        self._log.write(json.dumps({"name": name, "value": value, "unit": unit}) + "\n")

    def step(self, title: str, work: Callable[[], None], *, needs: float = 2) -> None:
        """Runs one step. A failure is recorded, and the next step runs."""
        if self.left < needs:
            self.note(title, "left out: no time")
            return
        print(f"{title} ({self.left:.0f} s left)", flush=True)
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.failed.append(title)
            self.note(title, f"FAILED: {type(error).__name__}: {error}")


# --- Loads -------------------------------------------------------------------------------------


def write_file(path: Path, size: int, seed: int) -> None:
    """A safetensors file of bfloat16 tensors of 64 MiB, each with different bytes."""
    count = max(size // _TENSOR, 1)
    each = size // count
    header = {
        f"layer.{i}.weight": {
            "dtype": "BF16",
            "shape": [each // 2],
            "data_offsets": [i * each, (i + 1) * each],
        }
        for i in range(count)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = bytearray(os.urandom(min(each, 8 * MIB)))
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i in range(count):
            left = each
            while left:
                block[:16] = (seed << 64 | i << 32 | left // MIB).to_bytes(16, "little")
                left -= file.write(memoryview(block)[: min(left, len(block))]) or 0


class Real:
    """Loads with torch and a GPU."""

    def load(self, path: Path, **settings: Any) -> dict[str, Any]:
        import torch

        import weightlift as wl

        with wl.Settings(**settings) if settings else contextlib.nullcontext():
            tensors = wl.load_file(path, device="cuda")
        torch.cuda.synchronize()
        return dict(tensors)

    def same(self, found: dict[str, Any], path: Path) -> bool:
        import torch
        from safetensors.torch import load_file

        expected = load_file(path)
        return found.keys() == expected.keys() and all(
            torch.equal(found[name].view(torch.uint8).cpu(), tensor.view(torch.uint8))
            for name, tensor in expected.items()
        )

    def capture(self, path: Path) -> str:
        """The error of a load inside a graph capture."""
        import torch

        import weightlift as wl

        graph = torch.cuda.CUDAGraph()
        tensor = torch.zeros(8, device="cuda")
        said = "nothing: it was not refused"
        with torch.cuda.graph(graph):
            try:
                wl.load_file(path, device="cuda")
            except wl.DeviceError as error:
                said = str(error)
            tensor.add_(1)
        graph.replay()
        torch.cuda.synchronize()
        return f"{said}; the graph adds {tensor[0].item():.0f}"


class Simulated:
    """The same on the simulated driver."""

    def __init__(self, library: str) -> None:
        tests = Path(__file__).resolve().parents[1]
        sys.path[:0] = [str(tests / "python" / "helpers"), str(tests / "simulated_driver")]
        import simulated
        from weightlift import _native

        self._simulated = simulated
        self._driver = simulated.simulated_driver.SimulatedDriver(library)
        self._driver.tensors = set()
        self._driver.reset(1, 0, simulated.Policy.EAGER)
        _native.use_driver_for_testing(library)

    def load(self, path: Path, **settings: Any) -> dict[str, Any]:
        import torch

        import weightlift as wl
        from weightlift.checkpoint.checkpoint import Checkpoint
        from weightlift.load.load_plan import LoadPlan

        allocator = self._simulated.SimulatedAllocator(self._driver)
        with wl.Settings(**settings) if settings else contextlib.nullcontext():
            load = LoadPlan(Checkpoint.from_file(path), allocator=allocator)
        load.add(torch.device("cuda", 0), None)
        tensors = load.start().result()
        self._driver.tensors.clear()
        return dict(tensors)

    def same(self, found: dict[str, Any], path: Path) -> bool:
        data = path.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        return all(
            found[name].bits()
            == data[begin + entry["data_offsets"][0] : begin + entry["data_offsets"][1]]
            for name, entry in header.items()
        )

    def capture(self, path: Path) -> str:
        return "not here: torch.cuda.graph needs a GPU; the native tests capture"


# --- Steps -------------------------------------------------------------------------------------


@contextlib.contextmanager
def buffers(driver: CudaDriver, size: int, streams: int) -> Iterator[tuple[int, Pinned, list[Any]]]:
    target, pinned = driver.allocate(size), Pinned(driver, size)
    made = [driver.create_stream() for _ in range(streams)]
    try:
        yield target, pinned, made
    finally:
        driver.wait(made)
        for stream in made:
            driver.destroy_stream(stream)
        pinned.close()
        driver.free(target)


def link_rates(look: Look, driver: CudaDriver) -> float:
    """The best rate from host to device in bytes/s, over copy sizes and numbers of streams."""
    best = 0.0
    ring = max(look.scaled(64 * MIB), 4 * MIB)
    with buffers(driver, ring, 4) as (target, pinned, streams):
        for count in (1, 2, 4):
            for wanted in (256 << 10, MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB, 64 * MIB):
                size = min(wanted, ring // 4) if wanted < 64 * MIB else ring
                copies = max(look.scaled(GIB) // size, 1)
                places = ring // size
                driver.wait(streams)
                start = time.perf_counter()
                for i in range(copies):
                    at = i % places * size
                    if places < count:
                        driver.wait(streams)
                    driver.copy(target + at, pinned.address + at, size, streams[i % count])
                    if (i + 1) % places == 0:
                        driver.wait(streams[:count])
                driver.wait(streams)
                rate = copies * size / (time.perf_counter() - start)
                best = max(best, rate)
                look.note(f"link, {count} streams, copies of {size >> 10} KiB", rate / 1e9, "GB/s")
    return best


def cache_rates(look: Look, driver: CudaDriver, path: Path) -> float:
    """The best rate from the page cache into a pinned ring of 64 MiB in bytes/s, over numbers of
    threads."""
    best = 0.0
    size = path.stat().st_size
    pinned = Pinned(driver, 16 * _SLOT)
    fd = os.open(path, os.O_RDONLY)

    def read(part: int, parts: int) -> None:
        with memoryview(pinned.memory) as ring:
            begin = part % 16 * _SLOT
            for turn, at in enumerate(range(part * _READ, size, parts * _READ)):
                place = begin + turn * _READ % _SLOT
                with ring[place : place + _READ] as target:
                    os.preadv(fd, [target], at)

    try:
        for threads in (1, 2, 4, 8, 16):
            if threads > 2 * (os.cpu_count() or 1):
                break
            with ThreadPoolExecutor(threads) as pool:
                start = time.perf_counter()
                list(pool.map(lambda part, parts=threads: read(part, parts), range(threads)))
                rate = size / (time.perf_counter() - start)
            best = max(best, rate)
            look.note(f"page cache to a pinned ring, {threads} threads", rate / 1e9, "GB/s")
    finally:
        os.close(fd)
        pinned.close()
    return best


def costs(look: Look, driver: CudaDriver) -> None:
    """Measures the steps that a load takes once, in ms."""

    def timed(work: Callable[[], Any]) -> tuple[Any, float]:
        start = time.perf_counter()
        result = work()
        return result, 1e3 * (time.perf_counter() - start)

    slots = []
    for _ in range(4):
        slots.append(Pinned(driver, _SLOT))
        look.note("pinning a slot of 4 MiB", 1e3 * slots[-1].seconds, "ms")
    for slot in slots:
        look.note("unpinning it", timed(slot.close)[1], "ms")
    for _ in range(2):
        stream, ms = timed(driver.create_stream)
        look.note("a stream", ms, "ms")
        driver.destroy_stream(stream)
    for size in (2 * MIB, look.scaled(256 * MIB), look.scaled(4 * GIB)):
        pointer, ms = timed(lambda size=size: driver.allocate(size))
        look.note(f"cuMemAlloc of {size // MIB} MiB", ms, "ms")
        driver.free(pointer)
    from weightlift import _native

    look.note("kernels in this build", str(_native.machine()["kernels"]))
    report, ms = timed(_native.driver_report)
    look.note("contexts and modules of all devices", ms, "ms")
    look.note("what the driver has", str({k: report[k] for k in ("version", "batch_copies")}))
    for device in report["devices"]:
        look.note("a device", str(device))


def loads(look: Look, loader: Any, path: Path, ceiling: float) -> None:
    size = path.stat().st_size
    for turn in range(3):
        start = time.perf_counter()
        loader.load(path)
        rate = size / (time.perf_counter() - start)
        share = f"GB/s, {100 * rate / ceiling:.0f} % of the ceiling" if ceiling else "GB/s"
        look.note(f"load_file of {size / GIB:.2f} GiB, turn {turn}", rate / 1e9, share)


def sweeps(look: Look, loader: Any, path: Path, ceiling: float) -> None:
    size = path.stat().st_size
    settings: list[dict[str, Any]] = [{}]
    settings += [{"chunk_bytes": n * MIB} for n in (1, 2, 8, 16)]
    settings += [{"streams": n} for n in (1, 4)]
    settings += [{"pinned_bytes": n * MIB} for n in (16, 32, 64)]
    settings += [{"threads": n} for n in (2, 4, 8, 16, 32)]
    settings += [{"batch_copies": False}, {"io_path": "direct"}, {}]
    for chosen in settings:
        name = "load_file with " + (", ".join(f"{k}={v}" for k, v in chosen.items()) or "defaults")
        if look.left < 2:
            look.note(name, "left out: no time")
            continue
        rates = []
        for _ in range(2):
            start = time.perf_counter()
            try:
                loader.load(path, **chosen)
            except (TypeError, ValueError) as error:
                look.note(name, f"not with this build: {error}")
                break
            rates.append(size / (time.perf_counter() - start))
        if rates:
            share = f"GB/s, {100 * max(rates) / ceiling:.0f} % of the ceiling" if ceiling else ""
            look.note(name, max(rates) / 1e9, share)


def look_around(look: Look, loader: Any, library: str, folder: Path) -> None:
    ceiling: dict[str, float] = {}
    paths = {count: folder / f"{count}.safetensors" for count in (1, 4, 16)}

    def compare() -> None:
        write_file(paths[1], look.scaled(GIB), 1)
        right = loader.same(loader.load(paths[1]), paths[1])
        look.note(f"bytes of {paths[1].stat().st_size / GIB:.2f} GiB", "same" if right else "OTHER")
        if not right:
            raise ValueError("the bytes on the device are not those of the file")

    look.step("bytes compared", compare, needs=1)
    driver = CudaDriver(library)
    look.note("device", driver.describe())
    look.step("the link", lambda: ceiling.update(link=link_rates(look, driver)))
    look.step("the page cache", lambda: ceiling.update(cache=cache_rates(look, driver, paths[1])))
    look.step("single steps", lambda: costs(look, driver))
    best = min(ceiling.values()) if len(ceiling) == 2 else 0.0
    look.note("ceiling: the slower of link and page cache", best / 1e9, "GB/s")

    def load(count: int) -> None:
        if not paths[count].exists():
            write_file(paths[count], look.scaled(count * GIB), count)
        loads(look, loader, paths[count], best)

    look.step("load_file of 1 GiB", lambda: load(1))
    look.step("load_file of 4 GiB", lambda: load(4), needs=5)
    look.step("graph capture", lambda: look.note("said", loader.capture(paths[1])))
    look.step("load_file of 16 GiB", lambda: load(16), needs=25)
    paths[16].unlink(missing_ok=True)
    look.step("sweeps", lambda: sweeps(look, loader, paths[4], best))
    driver.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--scale", type=float, default=1.0, help="of all sizes")
    parser.add_argument("--simulated", metavar="LIBRARY", help="the simulated driver's path")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    look = Look(arguments.results, arguments.seconds, arguments.scale)
    if arguments.simulated:
        loader: Real | Simulated = Simulated(arguments.simulated)
    else:
        import torch

        torch.cuda.init()  # type: ignore[no-untyped-call]
        loader = Real()
    folder = Path(tempfile.mkdtemp(prefix="weightlift-first-look-"))
    try:
        look_around(look, loader, arguments.simulated or "libcuda.so.1", folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("failed: " + ", ".join(look.failed) if look.failed else "nothing failed", flush=True)
    return 1 if look.failed else 0


if __name__ == "__main__":
    sys.exit(main())
