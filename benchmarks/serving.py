"""What a rank of a serving engine reads, and how long it takes: `serving.py --output FOLDER`.

A rank of tensor parallelism as the engines build it (stacked q, k, v, merged gate and up, fused
experts, row- and column-parallel weights), without an engine: the slices are recorded and read as
for vLLM. Against it, what the engines do themselves: whole tensors of the reference's mapping, of
which each weight loader copies its part. The files are sparse: they are read from the page cache.
Bytes are those of the report and, independently, those that the system counts (/proc/self/io).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch

import weightlift as wl
from weightlift.module.recording.reader import CheckpointReader, sources_of
from weightlift.module.recording.recorder import Recorder
from weightlift.module.recording.replay import Taken

Weights = Iterable["tuple[str, torch.Tensor]"]
AHEAD = 128 << 20  # as the backend for vLLM
DENSE = {"layers": 2, "hidden": 4096, "inner": 16384, "experts": 0, "vocabulary": 32768}
MOE = {"layers": 2, "hidden": 2048, "inner": 4096, "experts": 16, "vocabulary": 32768}
MODELS = {"dense": DENSE, "moe": MOE}


def shapes_of(
    layers: int, hidden: int, inner: int, experts: int, vocabulary: int
) -> dict[str, Any]:
    """Of the tensors of a checkpoint, in the order of the modules."""
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
    """As the engines' own loaders: whole tensors that are mapped."""
    with safetensors.safe_open(path, "pt") as file:
        model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118


def seconds_of(load: Callable[[], object]) -> float:
    begun = time.perf_counter()
    load()
    return time.perf_counter() - begun


def counted_by_the_system() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def measure_bytes(name: str, path: Path, ranks: int, rank: int) -> dict[str, Any]:
    """In a process of its own: bytes, and the peak of its memory."""
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
    """A mixture of experts with so many tensors, small ones; the reading apart."""
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
    """Warm, interleaved: the median of the rounds' ratios."""
    model = Rank(ranks - 1, ranks, **MODELS[name])
    ways: dict[str, Callable[[Rank, Path], object]] = {
        "slices": by_slices,
        "mapping": by_mapping,
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for load in ways.values():
        load(model, path)
    for _ in range(rounds):
        for way, load in ways.items():
            times[way].append(seconds_of(lambda: load(model, path)))  # noqa: B023
    return {
        "model": name,
        "ranks": ranks,
        "seconds": {way: round(statistics.median(t), 3) for way, t in times.items()},
        "times_as_long_as_slices": {
            way: round(statistics.median(b / a for a, b in zip(times["slices"], t, strict=True)), 2)
            for way, t in times.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the files")
    parser.add_argument("--summary", type=Path, help="JSON that is written")
    parser.add_argument("--rounds", type=int, default=7)
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
    summary: dict[str, Any] = {"cpus": os.cpu_count(), "load_average": os.getloadavg()[0]}
    summary["recording"] = measure_recording(folder, arguments.names)
    print(summary["recording"], flush=True)
    summary["bytes"] = []
    for name in MODELS:
        for ranks in (2, 4, 8):
            for rank in (0, ranks - 1):
                command = [sys.executable, __file__, "--output", str(folder), "--one"]
                command += [name, str(ranks), str(rank)]
                text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                summary["bytes"].append(json.loads(text.splitlines()[-1]))
                print(summary["bytes"][-1], flush=True)
    summary["times"] = []
    for name in MODELS:
        for ranks in (2, 4, 8):
            path = folder / f"{name}.safetensors"
            summary["times"].append(measure_times(name, path, ranks, arguments.rounds))
            print(summary["times"][-1], flush=True)
            if arguments.summary:
                arguments.summary.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
