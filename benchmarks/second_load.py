"""Measures the gain of a second load from the memory of deleted tensors (`Settings.pool_bytes`):

    python benchmarks/second_load.py             # bf16 -> fp32, 1 GB of file

Each round is a new process. It loads the file six times into new memory and deletes the tensors
each time, does the same with the pool, and reports the medians of the last five loads of each kind.
The order of the two alternates between rounds. Memory is backed, because the process has just freed
it. Writes benchmarks/results/second-load/MACHINE.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import weightlift as wl
from rounds import in_new_process, write_record
from summary import ROOT

LOADS = 5
TENSOR = 16_000_000  # elements


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bytes", type=int, default=10**9, help="of the file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", nargs=2, metavar=("FILE", "FIRST"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        file, first = arguments.child
        print(json.dumps(measure(file, first)))
        return
    path = ROOT / "build" / "bench-data" / f"second-load-{arguments.bytes}.safetensors"
    write(path, arguments.bytes)
    rounds = []
    for number in range(arguments.rounds):
        first = ("fresh", "pool")[number % 2]
        rounds.append(in_new_process(__file__, "--child", str(path), first))
        print(rounds[-1], flush=True)
    ratios = [one["fresh"] / one["pool"] for one in rounds]
    print(
        f"{statistics.median(ratios):.2f}x faster ({min(ratios):.2f} to {max(ratios):.2f}): "
        f"{statistics.median(one['fresh'] for one in rounds):.3f} s into fresh memory, "
        f"{statistics.median(one['pool'] for one in rounds):.3f} s into memory used again"
    )
    found = {"bytes": arguments.bytes, "ratio": statistics.median(ratios), "rounds": rounds}
    write_record("second-load", __file__, found)


def measure(file: str, first: str) -> dict[str, float]:
    """Seconds by kind of memory; the first load of each kind does not count."""
    found = {}
    for kind in (first, "pool" if first == "fresh" else "fresh"):
        seconds = []
        with wl.Settings(pool_bytes=2**40 if kind == "pool" else 0):
            for _ in range(LOADS + 1):
                start = time.perf_counter()
                tensors = wl.load_file(file, dtype="float32")
                seconds.append(time.perf_counter() - start)
                del tensors
        found[kind] = statistics.median(seconds[1:])
        with wl.Settings(pool_bytes=0):  # this frees the pool's memory
            while wl.stats().pool_bytes:
                tensors = wl.load_file(file, dtype="float32")
                del tensors
    return found


def write(path: Path, size: int) -> None:
    """Makes a file of ordinary weights and reads it into the page cache."""
    if path.exists():
        path.read_bytes()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    count = max(1, size // (2 * TENSOR))
    save_file({f"w{i}": torch.randn(TENSOR).bfloat16() for i in range(count)}, path)


if __name__ == "__main__":
    main()
