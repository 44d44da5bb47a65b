"""Measures what a rank of a serving engine reads, and the time: `python benchmarks/serving.py`.

Writes benchmarks/results/serving/MACHINE.json; then `python benchmarks/report.py`.

The script builds a rank of tensor parallelism as the engines do (stacked q, k, v, merged gate and
up, fused experts, row- and column-parallel weights), but without an engine. The slices are recorded
and read as for vLLM. They are compared with the engines' own way: whole tensors of the reference's
mapping, from which each weight loader copies its part. The files are sparse and are read from the
page cache. Bytes are counted by the report and, independently, by the system (/proc/self/io). If
tests/serving has its environment (`make test-serving`), serving_vllm.py also measures vLLM's own
loader on one and two ranks.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch

import weightlift as wl
from summary import RESULTS, ROOT, machine_name, to_text
from weightlift.bench.conditions import machine
from weightlift.module.recording.reader import CheckpointReader, sources_of
from weightlift.module.recording.recorder import Recorder
from weightlift.module.recording.replay import Taken

Weights = Iterable["tuple[str, torch.Tensor]"]
AHEAD = 128 << 20  # like the backend for vLLM
DENSE = {"layers": 2, "hidden": 4096, "inner": 16384, "experts": 0, "vocabulary": 32768}
MOE = {"layers": 2, "hidden": 2048, "inner": 4096, "experts": 16, "vocabulary": 32768}
MODELS = {"dense": DENSE, "moe": MOE}
# Gaps up to this size are read too; 1 for none.
HOLES = {"slices": 4096, "without holes": 1, "holes of 64 KiB": 65536}
PARTS = ("recording", "bytes", "times", "vllm")
VLLM = ROOT / "build" / "serving" / "venv" / "bin" / "python"


def shapes_of(
    layers: int, hidden: int, inner: int, experts: int, vocabulary: int
) -> dict[str, Any]:
    """The tensors of a checkpoint, in the order of the modules."""
    found: dict[str, tuple[int, ...]] = {"embed": (vocabulary, hidden)}
    for layer in range(layers):
        for name in ("q", "k", "v", "o"):
            found[f"{layer}.{name}"] = (hidden, hidden)
        found[f"{layer}.norm"] = (hidden,)
        if experts:
            found[f"{layer}.router"] = (experts, hidden)
        for expert in range(experts):
            prefix = f"{layer}.experts.{expert}"
            found[f"{prefix}.gate"] = found[f"{prefix}.up"] = (inner, hidden)
            found[f"{prefix}.down"] = (hidden, inner)
        if not experts:
            found[f"{layer}.gate"] = found[f"{layer}.up"] = (inner, hidden)
            found[f"{layer}.down"] = (hidden, inner)
    return {**found, "head": (vocabulary, hidden)}


def write(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 without any data blocks."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


class Rank(torch.nn.Module):
    """The parameters of one rank and how its weight loaders fill them."""

    def __init__(
        self,
        rank: int,
        ranks: int,
        layers: int,
        hidden: int,
        inner: int,
        experts: int,
        vocabulary: int,
    ) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks
        own, part = hidden // ranks, inner // ranks
        self.made: dict[str, torch.Tensor] = {
            "embed": torch.empty(vocabulary // ranks, hidden, dtype=torch.bfloat16),
            "head": torch.empty(vocabulary // ranks, hidden, dtype=torch.bfloat16),
        }
        of_experts = (experts,) if experts else ()
        for layer in range(layers):
            shapes = {
                "qkv": (3, own, hidden),
                "o": (hidden, own),
                "norm": (hidden,),
                "gate_up": (*of_experts, 2, part, hidden),
                "down": (*of_experts, hidden, part),
            }
            if experts:
                shapes["router"] = (experts, hidden)
            for name, shape in shapes.items():
                self.made[f"{layer}.{name}"] = torch.empty(shape, dtype=torch.bfloat16)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.made.values())

    def load_weights(self, weights: Weights) -> None:
        for name, tensor in weights:
            layer, _, rest = name.rpartition(".")
            layer, _, experts = layer.partition(".experts.")
            if rest in ("norm", "router"):
                self.made[name].copy_(tensor)
                continue
            dimension = 1 if rest in ("o", "down") else 0
            size = tensor.shape[dimension] // self.ranks
            part = tensor.narrow(dimension, self.rank * size, size)
            if rest in ("q", "k", "v"):
                target = self.made[f"{layer}.qkv"][("q", "k", "v").index(rest)]
            elif rest in ("gate", "up", "down"):
                target = self.made[f"{layer}.{'down' if rest == 'down' else 'gate_up'}"]
                target = target[int(experts)] if experts else target
                target = target if rest == "down" else target[int(rest == "up")]
            else:
                target = self.made[name]
            target.copy_(part)


def by_slices(model: Rank, path: Path) -> tuple[CheckpointReader, Taken]:
    reader = CheckpointReader(wl.open_checkpoint(path))
    recorder = Recorder(reader, ahead=AHEAD)
    with recorder.watching():
        model.load_weights(_placeholders(recorder, reader))
    recorder.finish()
    return reader, Taken.of(recorder)


def _placeholders(
    recorder: Recorder, reader: CheckpointReader
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, source in sources_of(reader.checkpoint).items():
        if source is not None:
            yield name, recorder.placeholder(name, source)


def by_mapping(model: Rank, path: Path) -> None:
    """The way of the engines' own loaders: whole mapped tensors."""
    with safetensors.safe_open(path, "pt") as file:
        model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118


def seconds_of(load: Callable[[], object]) -> float:
    begun = time.perf_counter()
    load()
    return time.perf_counter() - begun


def counted_by_the_system(what: str = "rchar") -> int:
    """Bytes that were read, or with syscr the calls that read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(what)))


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def measure_bytes(name: str, path: Path, ranks: int, rank: int) -> dict[str, Any]:
    """In a separate process: the bytes and the peak of its memory."""
    model = Rank(rank, ranks, **MODELS[name])
    by_slices(Rank(0, 1, 1, 64, 64, 0, 64), _small(path))  # threads, imports
    before, peak, ended = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    counted = counted_by_the_system()
    reader, taken = by_slices(model, path)
    counted = counted_by_the_system() - counted
    ended.set()
    watcher.join()
    return {
        "model": name,
        "ranks": ranks,
        "rank": rank,
        "parameters_bytes": model.nbytes,
        "needed_bytes": taken.sliced_bytes,
        "read_bytes": reader.report.read_bytes,
        "counted_bytes": counted,
        "came_whole": len(taken.whole),
        "peak_over_parameters_mib": round((peak - before - model.nbytes) / 2**20, 1),
    }


def _small(path: Path) -> Path:
    small = path.parent / "small.safetensors"
    if not small.exists():
        write(small, shapes_of(1, 64, 64, 0, 64))
    return small


def measure_recording(folder: Path, names: int) -> dict[str, Any]:
    """A mixture of experts with this many small tensors; the reading is timed separately."""
    config = {"layers": names // 768, "hidden": 32, "inner": 32, "experts": 256, "vocabulary": 64}
    path = folder / "many.safetensors"
    write(path, shapes_of(**config))
    model = Rank(1, 2, **config)
    runs, processor = [], []
    for _ in range(3):
        checkpoint = wl.open_checkpoint(path)
        recorder = Recorder(CheckpointReader(checkpoint))
        weights = _placeholders(recorder, CheckpointReader(checkpoint))
        begun = time.thread_time()
        with recorder.watching():
            runs.append(seconds_of(lambda: model.load_weights(weights)))  # noqa: B023
        processor.append(time.thread_time() - begun)
        whole = seconds_of(recorder.finish)
    best = min(runs)
    return {
        "names": len(checkpoint),
        "recording_seconds": round(best, 2),
        "recording_processor_seconds": round(min(processor), 2),
        "microseconds_a_tensor": round(1e6 * min(processor) / len(checkpoint), 1),
        "reading_seconds": round(whole, 2),
    }


def measure_times(name: str, path: Path, ranks: int, rounds: int) -> dict[str, Any]:
    """Warm and interleaved: the median of the rounds' ratios; for slices also the processor time of
    all threads and the number of calls that read."""
    model = Rank(ranks - 1, ranks, **MODELS[name])
    read: dict[str, int] = {}
    calls: dict[str, int] = {}
    processor: dict[str, list[float]] = {way: [] for way in HOLES}

    def with_holes(way: str) -> None:
        before, begun = counted_by_the_system("syscr"), time.process_time()
        with wl.Settings(hole_bytes=HOLES[way]):
            reader, _ = by_slices(model, path)
        processor[way].append(time.process_time() - begun)
        calls[way] = counted_by_the_system("syscr") - before
        read[way] = reader.report.read_bytes

    ways: dict[str, Callable[[], object]] = {
        way: functools.partial(with_holes, way) for way in HOLES
    }
    ways["mapping"] = functools.partial(by_mapping, model, path)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for load in ways.values():
        load()
    for _ in range(rounds):
        for way, load in ways.items():
            times[way].append(seconds_of(load))
    return {
        "model": name,
        "ranks": ranks,
        "parameters_bytes": model.nbytes,
        "read_bytes": read,
        "read_calls": calls,
        "processor_seconds": {
            way: round(statistics.median(t[1:]), 3) for way, t in processor.items()
        },
        "seconds": {way: round(statistics.median(t), 3) for way, t in times.items()},
        "times_as_long_as_slices": {
            way: round(statistics.median(b / a for a, b in zip(times["slices"], t, strict=True)), 2)
            for way, t in times.items()
        },
    }


def measure_vllm(folder: Path, ranks: int, rounds: int) -> list[dict[str, Any]]:
    """Runs each rank in its own process."""
    rendezvous = tempfile.mktemp(dir=folder)
    script = str(Path(__file__).with_name("serving_vllm.py"))
    command = [str(VLLM), script]
    environment = {**os.environ, "VLLM_DIST_IDENT": "weightlift"}
    running = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), rendezvous, str(folder / "vllm"), str(rounds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for rank in range(ranks)
    ]
    texts = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit(f"serving_vllm.py on {ranks} ranks has failed: run it by hand")
    lines = [line for text in texts for line in text.splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines]


def measure_all(arguments: argparse.Namespace, summary: dict[str, Any]) -> Iterator[Any]:
    """Fills the summary, and yields each measurement."""
    folder: Path = arguments.output
    if "recording" in arguments.parts:
        summary["recording"] = measure_recording(folder, arguments.names)
        yield summary["recording"]
    for part in PARTS[1:]:
        if part in arguments.parts:
            summary[part] = []
    models = [(name, ranks) for name in MODELS for ranks in (2, 4, 8)]
    for name, ranks in models if "bytes" in arguments.parts else ():
        for rank in (0, ranks - 1):
            command = [sys.executable, __file__, "--output", str(folder), "--one"]
            command += [name, str(ranks), str(rank)]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            summary["bytes"].append(json.loads(text.splitlines()[-1]))
            yield summary["bytes"][-1]
    for name, ranks in models if "times" in arguments.parts else ():
        path = folder / f"{name}.safetensors"
        summary["times"].append(measure_times(name, path, ranks, arguments.rounds))
        yield summary["times"][-1]
    if "vllm" not in arguments.parts:
        return
    if not VLLM.exists():
        yield "vLLM is left out: `make test-serving` makes its environment"
        return
    for ranks in (1, 2):
        summary["vllm"] += measure_vllm(folder, ranks, arguments.rounds)
        yield from summary["vllm"][-ranks * 3 :]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench-data" / "serving")
    parser.add_argument("--summary", type=Path, help="instead of results/serving/MACHINE.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="the record keeps its other parts"
    )
    parser.add_argument("--names", type=int, default=36_000)
    parser.add_argument("--one", nargs=3, help="MODEL RANKS RANK: bytes of one rank, to stdout")
    arguments = parser.parse_args()
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in MODELS.items():
        if not (folder / f"{name}.safetensors").exists():
            write(folder / f"{name}.safetensors", shapes_of(**config))
    if arguments.one:
        name, ranks, rank = arguments.one
        found = measure_bytes(name, folder / f"{name}.safetensors", int(ranks), int(rank))
        print(json.dumps(found))
        return
    run = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/serving.py", *sys.argv[1:]]),
        "load_average": round(os.getloadavg()[0], 1),
    }
    summary: dict[str, Any] = {"machine": machine(), "runs": [run]}
    out = arguments.summary or RESULTS / "serving" / f"{machine_name(summary['machine'])}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    if set(arguments.parts) != set(PARTS) and out.exists():
        before = json.loads(out.read_text(encoding="utf-8"))
        summary |= {part: before[part] for part in PARTS if part in before}
        summary["runs"] = [*before["runs"], run]
    for measured in measure_all(arguments, summary):
        print(measured, flush=True)
    out.write_text(to_text(summary), encoding="utf-8")


if __name__ == "__main__":
    main()
