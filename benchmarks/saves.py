"""Measures saves against the reference and its flush: `python benchmarks/saves.py`.

Writes benchmarks/results/saves/MACHINE.json; then `python benchmarks/report.py`.

    save-file         1 GB of bf16 by weightlift.save_file and by safetensors.torch.save_file
    save-shards       the same as 4 shards, by weightlift.save_checkpoint and by
                      huggingface_hub.save_torch_state_dict
    save-pretrained   a model of layers, fp32, by weightlift.ModelMixin and by diffusers.ModelMixin
    convert           an fp32 file of 2 GB to bf16, by `weightlift convert`'s function, and by
                      load_file, a cast of each tensor, and save_file

weightlift flushes its files and their folder before it renames. The reference does not, so the
script calls fsync(2) on its files and their folder, and counts this time. Each save is in a new
process, after a small one, so that its imports do not count. The rounds are interleaved, begin with
an empty write-back queue (sync(2)), and alternate the order.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from rounds import in_new_process, write_record
from summary import ROOT
from weightlift.bench.measure_child import backed_memory

TENSOR = 16_000_000  # elements
OURS, REFERENCE = "weightlift", "reference"
Save = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--bytes", type=int, default=10**9, help="of what is written")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.workloads if name not in WORKLOADS]:
        parser.error(f"{unknown[0]}: the workloads are {', '.join(WORKLOADS)}")
    folder = ROOT / "build" / "bench-data" / "saves"
    if arguments.child:
        name, contender = arguments.child
        print(json.dumps(measure(WORKLOADS[name], contender, folder, arguments.bytes)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    records = [
        compare(name, arguments.bytes, arguments.rounds)
        for name in arguments.workloads or WORKLOADS
    ]
    shutil.rmtree(folder)
    found = {"load_average": round(load, 2), "bytes": arguments.bytes, "saves": records}
    write_record("saves", __file__, found)


def compare(name: str, count: int, rounds: int) -> dict[str, Any]:
    """The rounds of a workload, and the median of their ratios."""
    seconds: dict[str, list[float]] = {OURS: [], REFERENCE: []}
    for number in range(rounds):
        for contender in (OURS, REFERENCE) if number % 2 else (REFERENCE, OURS):
            took = in_new_process(__file__, "--bytes", str(count), "--child", name, contender)
            seconds[contender].append(took)
    ratios = [ours / other for ours, other in zip(*seconds.values(), strict=True)]
    record = {
        "name": name,
        "seconds": seconds,
        "ours_over_reference": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
    }
    print(
        f"{name}: {record['ours_over_reference']:.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) of "
        f"the reference's time; medians {statistics.median(seconds[OURS]):.3f} s and "
        f"{statistics.median(seconds[REFERENCE]):.3f} s",
        flush=True,
    )
    return record


def measure(
    prepare: Callable[[str, Path, int], Save], contender: str, folder: Path, count: int
) -> float:
    """Seconds of one save into a folder that is empty before and after."""
    small = empty(folder / "small" / "target")
    prepare(contender, small, TENSOR)()
    shutil.rmtree(small.parent)
    target = empty(folder / "target")
    save = prepare(contender, target, count)
    os.sync()
    with backed_memory(count + count // 4):  # for the pages of the file
        pass
    start = time.perf_counter()
    save()
    if contender == REFERENCE:
        for path in [*target.rglob("*"), target]:
            flush(path)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def weights(count: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    size = TENSOR * dtype.itemsize
    return {f"w{i}": torch.randn(TENSOR).to(dtype) for i in range(max(1, count // size))}


def save_one(contender: str, target: Path, count: int) -> Save:
    library: Any = import_module("weightlift" if contender == OURS else "safetensors.torch")
    tensors = weights(count)
    return lambda: library.save_file(tensors, target / "model.safetensors")


def save_shards(contender: str, target: Path, count: int) -> Save:
    if contender == OURS:
        save: Any = import_module("weightlift").save_checkpoint
    else:
        save = import_module("huggingface_hub").save_torch_state_dict
    tensors = weights(count)
    return lambda: save(tensors, target, max_shard_size=count // 4)


def save_pretrained(contender: str, target: Path, count: int) -> Save:
    library: Any = import_module("weightlift" if contender == OURS else "diffusers")
    configured: Any = import_module(
        "weightlift" if contender == OURS else "diffusers.configuration_utils"
    )

    class Stack(library.ModelMixin, configured.ConfigMixin):  # type: ignore[misc]
        @configured.register_to_config  # type: ignore[untyped-decorator]
        def __init__(self, layers: int = 1) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(
                torch.nn.Linear(4000, 4000, bias=False) for _ in range(layers)
            )

    model = Stack(max(1, count // (4 * 4000 * 4000)))
    return lambda: model.save_pretrained(target)


def convert(contender: str, target: Path, count: int) -> Save:
    from safetensors.torch import load_file, save_file

    source = target.parent / "source.safetensors"
    if not source.exists():
        save_file(weights(2 * count, torch.float32), source)
    source.read_bytes()
    out = target / "model.safetensors"
    if contender == OURS:
        from weightlift import open_checkpoint
        from weightlift.convert import convert_checkpoint

        return lambda: convert_checkpoint(open_checkpoint(source), out, dtype="bfloat16")
    return lambda: save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in load_file(source).items()}, out
    )


WORKLOADS: dict[str, Callable[[str, Path, int], Save]] = {
    "save-file": save_one,
    "save-shards": save_shards,
    "save-pretrained": save_pretrained,
    "convert": convert,
}


if __name__ == "__main__":
    main()
